"""The engine's parts: padding changes no number, recomputation neither and keeps less, batches that cannot be shared are refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from teratron.config import Config, ModelConfig, UserError
from teratron.models import FAMILIES, Model, build_model, initialise, with_dropout
from teratron.objectives import Batch
from teratron.parallel.mesh import Mesh
from teratron.train.engine import Engine, check_batch, micro_batches, pad_sequences
from teratron.train.recompute import recompute

VOCAB = 20
MODEL: dict[str, Any] = {"layers": 4, "hidden": 16, "heads": 2, "seq_length": 12, "vocab_size": VOCAB, "init_std": 0.3, "dropout": 0.2}
FAMILY = pytest.mark.parametrize("family", [name for name in FAMILIES if name != "xlnet"])  # whose own tests are beside it


def made(family: str, **keys: Any) -> Model:
    model = build_model(ModelConfig(**{**MODEL, "family": family, **keys}), dtype=torch.float64)
    initialise(model, 1)
    return model


def batch_of(family: str, length: int = 7, packed: bool = False, count: int = 3) -> Batch:
    """A batch with uneven weights; packed: two documents a sample."""
    draw = torch.Generator().manual_seed(0)
    positions = torch.arange(length).expand(count, length)
    batch = {"tokens": torch.randint(VOCAB, (count, length), generator=draw), "positions": positions}
    batch |= {"targets": batch["tokens"].roll(-1, 1), "weights": torch.rand(count, length, generator=draw), "sample": torch.arange(count)}
    if packed:
        batch |= {"segments": (positions >= 3).long(), "positions": positions - 3 * (positions >= 3)}
    if family == "encoder_decoder":
        read = torch.arange(length - 2).expand(count, length - 2)
        batch |= {"encoder_tokens": torch.randint(VOCAB, (count, length - 2), generator=draw), "encoder_positions": read}
        if packed:
            batch["encoder_segments"] = (read >= 2).long()
    return batch


def loss_of(model: Model, batch: Batch) -> Tensor:
    """The loss of a training step."""
    state = {name: tensor for name, tensor in batch.items() if name not in ("targets", "weights", "sample")}
    state = with_dropout(state, model.streams, 1, 1, batch["sample"])
    return model.head.output.loss_sum(model(state)["hidden"], batch["targets"], batch["weights"])


def learnt(model: Model, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients."""
    loss = loss_of(model, batch)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return loss.detach(), dict(zip(dict(model.named_parameters()), gradients, strict=True))


# Padding


@FAMILY
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("multiple", [2, 4, 5])
def test_padding_changes_neither_loss_nor_gradient(family: str, packed: bool, multiple: int) -> None:
    model, batch = made(family, attention_dropout=0.1), batch_of(family, packed=packed)
    padded = pad_sequences(batch, multiple, model.streams)
    lengths = {tensor.shape[1] for name, tensor in padded.items() if name != "sample"}
    assert all(length % multiple == 0 for length in lengths)
    assert padded["tokens"].shape[1] == math.ceil(7 / multiple) * multiple
    (loss, gradients), (expected, right) = learnt(model, padded), learnt(model, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, right[name], rtol=0, atol=1e-12 * float(right[name].abs().max()) + 1e-15, msg=name)


@FAMILY
def test_padding_weighs_nothing_is_of_no_document_and_leaves_the_batch(family: str) -> None:
    batch = batch_of(family)
    before = {name: tensor.clone() for name, tensor in batch.items()}
    padded = pad_sequences(batch, 4, FAMILIES[family].streams)
    assert batch.keys() == before.keys()
    assert all(torch.equal(tensor, batch[name]) for name, tensor in before.items())
    assert not padded["weights"][:, 7:].any()
    for name, tensor in batch.items():
        assert torch.equal(padded[name][:, : tensor.shape[1]] if tensor.dim() > 1 else padded[name], tensor)
    new = {name: tensor for name, tensor in padded.items() if name not in batch and name.endswith("segments")}
    streams = FAMILIES[family].streams
    masked = {f"{stream}segments" for stream, causal in streams.items() if not causal}
    # A decoder beside an encoder is told that it is of the same document as the memory's real tokens.
    assert set(new) == (masked | {"segments"} if len(streams) > 1 else masked)
    for name, segments in new.items():
        real = batch[name.replace("segments", "tokens")].shape[1]
        assert (segments[:, :real] == 0).all()
        assert (segments[:, real:] == (-1 if name in masked else 0)).all()


@FAMILY
def test_what_divides_is_left_as_it_is(family: str) -> None:
    batch = batch_of(family, length=7 if family != "encoder_decoder" else 14)
    for multiple in (1, 7) if family != "encoder_decoder" else (1, 2):
        padded = pad_sequences(batch, multiple, FAMILIES[family].streams)
        assert padded.keys() == batch.keys()
        assert all(padded[name] is batch[name] or torch.equal(padded[name], batch[name]) for name in batch)


# Recomputation


def kept_bytes(model: Model, forward: Callable[[], Tensor]) -> int:
    """Memory that autograd keeps for the backward pass, the parameters aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    del loss
    return sum(kept.values())


MODES = [("none", 1), ("selective", 2), ("selective", 1), ("full", 2), ("full", 1)]
"""From the most memory to the least."""


@FAMILY
def test_recomputation_gives_the_same_bits_and_keeps_less(family: str) -> None:
    batch = batch_of(family, length=12, packed=True)
    results, kept = [], []
    for mode, every in MODES:
        model = made(family, attention_dropout=0.1)
        recompute(model, mode, every)
        results.append(learnt(model, batch))
        kept.append(kept_bytes(model, lambda model=model: loss_of(model, batch)))  # type: ignore[misc]
    (expected, right), *others = results
    for loss, gradients in others:
        assert torch.equal(loss, expected)
        assert all(torch.equal(gradients[name], right[name]) for name in right)
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == len(MODES)
    assert kept[-1] < 0.25 * kept[0], "whole blocks keep their input only"


def test_evaluation_recomputes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = made("gpt"), batch_of("gpt")
    expected = loss_of(model, batch)
    recompute(model, "full", 1)
    monkeypatch.setattr("teratron.train.recompute.checkpoint", None)
    with torch.no_grad():
        assert torch.equal(loss_of(model, batch), expected)
    with pytest.raises(TypeError):
        loss_of(model, batch)


# Batches


def test_micro_batches_are_the_batch_in_order() -> None:
    batch = batch_of("gpt", count=5)
    for size, lengths in ((0, [5]), (1, [1] * 5), (2, [2, 2, 1]), (9, [5])):
        parts = list(micro_batches(batch, size))
        assert [len(part["sample"]) for part in parts] == lengths
        assert all(torch.equal(torch.cat([part[name] for part in parts]), batch[name]) for name in batch)


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "possible"),
    [(8, 0, 3, "1, 2, 4, 8"), (6, 0, 4, "1, 2, 3, 6"), (8, 2, 8, "1, 2, 4"), (8, 4, 4, "1, 2"), (12, 2, 4, "1, 2, 3, 6")],
)
def test_a_batch_that_data_ranks_cannot_share_is_refused_with_the_ranks_that_can(batch: int, micro: int, ranks: int, possible: str) -> None:
    config = Config().override({"train.global_batch": batch, "train.micro_batch": micro})
    with pytest.raises(UserError, match=rf"^train\.global_batch = {batch} cannot be shared by {ranks} data ranks.*among {possible}$"):
        check_batch(config, ranks)
    for choice in map(int, possible.split(", ")):
        check_batch(config, choice)


# A step


def engine(**keys: Any) -> Engine:
    model = {f"model.{name}": value for name, value in MODEL.items()}
    changes = {name.replace("__", "."): value for name, value in keys.items()}
    made = Engine(Config().override(model | {"train.precision": "fp64", "train.global_batch": 3} | changes), Mesh())
    made.optimizer.initialise(1)
    return made


def test_the_loss_of_a_step_is_the_smoothed_one_and_evaluations_is_plain() -> None:
    batch, found = batch_of("gpt"), {}
    for smoothing in (0.0, 0.3):
        made = engine(objective__label_smoothing=smoothing, model__dropout=0.0)
        plain = made.evaluate([batch]).loss()
        found[smoothing] = plain, made.step(batch, step=1, number=1, lr=0.0)[0].loss()
    assert found[0.3][0] == found[0.0][0] == pytest.approx(found[0.0][1], rel=1e-14)
    assert abs(found[0.3][1] - found[0.0][1]) > 1e-2


def test_the_step_decides_dropout_and_the_number_the_bias_correction() -> None:
    batch = batch_of("gpt")
    losses, weights = {}, {}
    for step, number in ((1, 1), (2, 1), (1, 2)):
        made = engine()
        losses[step, number] = made.step(batch, step=step, number=number, lr=1e-2)[0].loss()
        weights[step, number] = torch.cat([bucket.master for bucket in made.flat.buckets])
    assert losses[1, 1] == losses[1, 2] != losses[2, 1]
    assert not torch.allclose(weights[1, 1], weights[1, 2])
