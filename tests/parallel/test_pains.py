"""Bugs that users of Megatron-LM live with where parallelisms are composed, each stated as what must hold here.

Named after what goes wrong there (NVIDIA/Megatron-LM issue numbers in the docstrings).
"""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from cases import Learnt, assemble, assert_copies, assert_layout_invisible, batch_of, config_of, engine_of, outcome, share, single, train
from pool import pool
from torch import Tensor

from teratron.models import build_model, initialise, parameter_count, parts_of
from teratron.models.leaves import Dropout
from teratron.objectives import Batch
from teratron.optim.optimizer import global_norm
from teratron.optim.scale import LossScale
from teratron.parallel.boxes import Piece
from teratron.train.engine import Engine

pytestmark = pytest.mark.xdist_group("ranks")

UNEVEN = {"model.vocab_multiple": 1, "model.tie_embeddings": False}
"""13 tokens are 6 + 7, and 3 + 3 + 3 + 4: nothing is hidden by padding."""
T2, T4 = {"parallel.tensor": 2}, {"parallel.tensor": 4}
T2S, T4S = T2 | {"parallel.sequence": True}, T4 | {"parallel.sequence": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "replicate": (2, {}),
    "optimizer": (4, {"parallel.shard": "optimizer"}),
    "parameters": (2, {"parallel.shard": "parameters"}),
    "tensor": (2, T2),
    "sequence": (4, T4S),
    "tensor x gradients x replicate": (8, T2 | {"parallel.shard": "gradients", "parallel.replicate": 2}),
    "sequence x parameters": (8, T2S | {"parallel.shard": "parameters"}),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)


# The loss


def head_probe(rank: int, ranks: int, keys: dict[str, Any], smoothing: float) -> tuple[Tensor, Tensor]:
    """The head's sum of losses, and its logits, from hidden features that were gathered before."""
    engine = engine_of(rank, ranks, keys)
    batch, hidden, output = batch_of(engine.config, 1), hidden_of(keys), engine.model.head.output
    if engine.config.parallel.sequence:
        hidden = hidden.chunk(ranks, dim=1)[rank]
    return output.loss_sum(hidden, batch["targets"], batch["weights"], smoothing).detach(), output(hidden)


def hidden_of(keys: dict[str, Any]) -> Tensor:
    config = config_of(keys)
    shape = config.train.global_batch, config.model.seq_length, config.model.hidden
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("keys", [T2, T4, T4S], ids=["2", "4", "4 with sequence"])
def test_label_smoothing_over_the_local_vocabulary(keys: dict[str, Any], smoothing: float) -> None:
    """#7452 findings 1 and 2, #737: the smoothed loss is over all words, and that of gathered logits is the same loss."""
    keys = keys | UNEVEN
    model = build_model(config_of(keys).model, dtype=torch.float64)
    initialise(model, config_of(keys).train.seed)
    logits, batch = hidden_of(keys) @ model.head.output.weight.T, batch_of(config_of(keys), 1)
    assert logits.shape[-1] == 13
    losses = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="none", label_smoothing=smoothing)
    expected = (losses * batch["weights"].flatten()).sum()
    for loss, gathered in pool().run(head_probe, keys["parallel.tensor"], keys, smoothing):
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(gathered, logits.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("silent", [4, 7], ids=["none on half of the ranks", "all on the first"])
@pytest.mark.parametrize("shard", ["none", "parameters"])
def test_loss_normalised_by_the_local_count_of_valid_tokens(shard: str, silent: int) -> None:
    """#7513 and finding 3: half or a quarter of the gradient where the valid tokens lie on few ranks."""
    assert_layout_invisible(4, {"parallel.shard": shard, "train.micro_batch": 1}, False, 0, silent)


# Gradients of what is not cut


@pytest.mark.parametrize("keys", [T2, T4, T4S], ids=["2", "4", "4 with sequence"])
def test_gradient_of_norms_behind_a_cut_is_not_summed(keys: dict[str, Any]) -> None:
    """Finding 11 (`out_norm`), #1446: weights of norms over each head, of which every rank sees its own heads only."""
    ranks = keys["parallel.tensor"]
    found = assert_layout_invisible(ranks, keys | {"model.qk_norm": True, "model.kv_heads": 2})
    assert all(found.state[f"moment1/blocks.0.attention.{name}_norm.weight"].abs().min() > 0 for name in "qk")


def uncut_probe(rank: int, ranks: int, keys: dict[str, Any]) -> tuple[list[Piece], dict[str, Tensor]]:
    """After two steps: the pieces, and the whole weights that the next forward pass would use."""
    engine = engine_of(rank, ranks, keys)
    for step in (1, 2):
        engine.step(share(engine, batch_of(engine.config, step)), step=step, number=step, lr=0.01)
    for unit in engine.model.units():
        engine.flat._await(unit)
    weights = {name: parameter.detach().clone() for name, parameter in engine.model.named_parameters()}
    uncut = [part for part in parts_of(engine.model) if part.copies == engine.mesh.tensor.size]
    return engine.optimizer.pieces(), {part.name: part.of(weights[part.parameter]) for part in uncut}


@pytest.mark.parametrize("kind", ["none", "optimizer", "parameters"])
@pytest.mark.parametrize("sequence", [False, True])
def test_copies_of_uncut_parameters_drift_apart(sequence: bool, kind: str) -> None:
    """#6099, finding 11: norms, biases after a row-cut product and positions stay the same bit for bit on all ranks.

    With four data ranks the order of summation depends on where in a buffer an element lies.
    """
    keys: dict[str, Any] = T2 | UNEVEN | {"parallel.sequence": sequence, "parallel.shard": kind, "train.precision": "fp32"}
    results = pool().run(train, 8, keys | {"model.hidden": 64, "model.seq_length": 40})
    copies = {piece.name for _, _, pieces in results for piece in pieces if not piece.first}
    assert {f"moment1/{name}" for name in ("embedding.positions.weight", "head.norm.weight", "blocks.0.ffn.down.bias")} <= copies
    outcome(results)


@pytest.mark.parametrize("keys", [T2S, {}], ids=["tensor", "data"])
def test_weights_in_use_are_those_that_are_saved(keys: dict[str, Any]) -> None:
    """What the next forward pass reads, on every rank: not only what each owns."""
    shard = {"parallel.shard": "none" if keys else "optimizer"}
    results = pool().run(uncut_probe, 2, keys | shard | UNEVEN)
    state = assemble(piece for pieces, _ in results for piece in pieces if piece.first)
    for _, weights in results:
        assert "blocks.1.ffn_norm.weight" in weights
        assert [name for name, weight in weights.items() if not torch.equal(weight, state[f"weight/{name}"])] == []


# The norm


def ones_probe(rank: int, ranks: int, keys: dict[str, Any]) -> float:
    """The norm of gradients that are one everywhere, in padding too."""
    engine = engine_of(rank, ranks, keys)
    for bucket in engine.flat.trained:
        bucket.gradient.fill_(1.0)
    return float(global_norm(engine.flat))


@layouts
@pytest.mark.parametrize("shape", [{}, {"model.kv_heads": 1, "model.qk_norm": True}, UNEVEN], ids=["tied", "shared heads", "uneven"])
def test_clip_norm_leaves_out_or_repeats_parameters(layout: str, shape: dict[str, Any]) -> None:
    """#5916, #7530: cut, copied, shared and padded parameters count exactly once."""
    ranks, keys = LAYOUTS[layout]
    count = parameter_count(build_model(config_of(shape).model, device="meta"))
    for norm in pool().run(ones_probe, ranks, keys | shape):
        assert math.isclose(norm, math.sqrt(count), rel_tol=1e-12)


# Random numbers


def initial_probe(rank: int, ranks: int, keys: dict[str, Any]) -> Learnt:
    return [], [], engine_of(rank, ranks, keys).optimizer.pieces()


@layouts
def test_initial_weights_depend_on_the_layout(layout: str) -> None:
    """#1736, #445, #673: bit for bit the same model on every layout, the copies too."""
    ranks, keys = LAYOUTS[layout]
    shape = UNEVEN | {"model.kv_heads": 2}
    found, expected = outcome(pool().run(initial_probe, ranks, keys | shape)), outcome([initial_probe(0, 1, shape)])
    assert found.state.keys() == expected.state.keys()
    assert [name for name, value in expected.state.items() if not torch.equal(found.state[name], value)] == []


def mask_probe(rank: int, ranks: int, keys: dict[str, Any]) -> dict[str, Tensor]:
    """What every dropout of the first step keeps: this rank's share."""
    engine, kept = engine_of(rank, ranks, keys), {}
    for name, module in engine.model.named_modules():
        if isinstance(module, Dropout):
            module.register_forward_hook(lambda module, inputs, output, name=name: kept.__setitem__(name, output.detach() != 0))
    engine.step(share(engine, batch_of(engine.config, 1)), step=1, number=1, lr=0.0)
    return kept


@pytest.mark.parametrize("layout", ["replicate", "tensor", "sequence", "sequence x parameters"])
def test_dropout_masks_depend_on_the_layout(layout: str) -> None:
    """#1764: each rank drops what the single process drops there, not the same everywhere, nor what its own generator says."""
    ranks, keys = LAYOUTS[layout]
    tensor, (expected,) = keys.get("parallel.tensor", 1), [mask_probe(0, 1, {})]
    shares = pool().run(mask_probe, ranks, keys)
    for name, mask in expected.items():
        rows = [
            torch.cat([s[name] for s in shares[first : first + tensor]], dim=1) if "parallel.sequence" in keys else shares[first][name]
            for first in range(0, ranks, tensor)
        ]
        assert 0.7 < mask.double().mean() < 0.9
        assert torch.equal(torch.cat(rows), mask), name
    if "parallel.sequence" not in keys and tensor > 1:
        assert all(torch.equal(shares[0][name], shares[1][name]) for name in expected)


# State


@layouts
def test_moments_are_dropped(layout: str) -> None:
    """AReaL#1468: every weight has its moments among what is saved, on every layout, and they have moved."""
    ranks, keys = LAYOUTS[layout]
    state = outcome(pool().run(train, ranks, keys | UNEVEN)).state
    weights = {name.partition("/")[2] for name in state if name.startswith("weight/")}
    model = build_model(config_of(UNEVEN).model, device="meta")
    assert weights == {part.name for part in parts_of(model)}
    assert state.keys() == {f"{kind}/{name}" for kind in ("weight", "moment1", "moment2") for name in weights}
    assert [name for name, value in state.items() if not value.any()] == []


# Evaluation


def held_out(engine: Engine) -> list[Batch]:
    """A rank's share of two global batches, the second with five rows: what is missing is filled with rows of no weight."""
    whole, ranks, rank = [batch_of(engine.config, step) for step in (101, 102)], engine.mesh.data.size, engine.mesh.data.rank
    per_rank = -(-5 // ranks)
    wanted = torch.arange(rank * per_rank, (rank + 1) * per_rank)
    last = {name: tensor[wanted.clamp(max=4)] for name, tensor in whole[1].items()}
    last["weights"] = last["weights"] * (wanted < 5)[:, None]
    return [share(engine, whole[0]), last]


def evaluation_probe(rank: int, ranks: int, keys: dict[str, Any]) -> tuple[list[float], Learnt]:
    """Held-out losses before, between and after two steps of training."""
    engine = engine_of(rank, ranks, keys)
    found, norms = [engine.evaluate(held_out(engine)).loss()], []
    for step in (1, 2):
        norms.append(float(engine.step(share(engine, batch_of(engine.config, step)), step=step, number=step, lr=0.01)[1]))
        found.append(engine.evaluate(held_out(engine)).loss())
    return found, (found, norms, engine.optimizer.pieces())


@layouts
def test_evaluation_differs_from_one_process(layout: str) -> None:
    """#6237: the held-out loss of all rows together, also where the last batch has fewer; and training goes on unchanged."""
    ranks, keys = LAYOUTS[layout]
    keys = keys | {"objective.label_smoothing": 0.1}
    expected, alone = evaluation_probe(0, 1, {"objective.label_smoothing": 0.1})
    results = pool().run(evaluation_probe, ranks, keys)
    assert len({tuple(found) for found, _ in results}) == 1
    assert results[0][0] == pytest.approx(expected, rel=1e-9)
    assert outcome(learnt for _, learnt in results).norms == pytest.approx(alone[1], rel=1e-9)


# Precision


@pytest.mark.parametrize("layout", ["replicate", "sequence", "sequence x parameters", "tensor x gradients x replicate"])
def test_float32_drifts_from_one_process(layout: str) -> None:
    """#1754, #2263: a stated tolerance, 1e-4 after ten steps, of everything but the biases of keys."""
    ranks, keys = LAYOUTS[layout]
    assert_layout_invisible(ranks, keys | {"train.precision": "fp32"}, False, 0, 0, 10, tol=1e-4)


HALF_BAND = 0.02
"""Relative distance of the losses of half types from float32's, over three steps of the tiny model."""


@pytest.mark.parametrize("reduce", ["fp32", "bf16"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("layout", ["replicate", "sequence x parameters", "tensor x gradients x replicate"])
def test_half_types_leave_their_band(layout: str, precision: str, reduce: str) -> None:
    """The same losses and norms on all ranks, the same weights in all copies, near float32's."""
    ranks, keys = LAYOUTS[layout]
    found = outcome(pool().run(train, ranks, keys | {"train.precision": precision, "parallel.reduce": reduce, "train.micro_batch": 1}))
    assert found.losses == pytest.approx(single({"train.precision": "fp32"}).losses, rel=HALF_BAND)
    assert all(value.dtype == torch.float32 for value in found.state.values())


def overflow_probe(rank: int, ranks: int, keys: dict[str, Any], culprit: int) -> tuple[Learnt, list[Piece], list[float]]:
    """Four steps, in the second of which one element of one rank's gradient is infinite; the state around it, and the loss scales."""
    engine = engine_of(rank, ranks, keys)
    config, step, scales = engine.config, 0, []
    scale = LossScale(2.0**10)

    def spoil(gradient: Tensor) -> Tensor:
        if step == 2:
            gradient = gradient.clone()
            gradient.flatten()[3] = math.inf
        return gradient

    if rank == culprit:
        engine.model.get_parameter("blocks.1.ffn_norm.weight").register_hook(spoil)
    losses, norms, around = [], [], []
    for step in (1, 2, 3, 4):
        scales.append(scale.scale)
        batch = share(engine, batch_of(config, step))
        tally, total = engine.step(batch, step=step, number=step - (step > 2), lr=0.01, loss_scale=scale.scale)
        norm = float(total)
        scale = scale.after(math.isfinite(norm), config.optim, config.train.precision)
        losses.append(tally.loss())
        norms.append(norm if math.isfinite(norm) else math.inf)
        if step in (1, 2):
            around.append([Piece(p.name, p.shape, p.boxes, p.values.clone(), p.first) for p in engine.optimizer.pieces()])
    before, after = (sorted(pieces, key=lambda piece: piece.name) for pieces in around)
    assert all(torch.equal(a.values, b.values) for a, b in zip(before, after, strict=True)), "the skipped step changed something"
    return (losses, norms, engine.optimizer.pieces()), before, scales


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_overflow_on_one_rank_is_skipped_by_some(layout: str, precision: str) -> None:
    """Every rank skips the same step, halves the same scale and goes on from the same weights."""
    ranks, keys = LAYOUTS[layout]
    keys = keys | {"train.precision": precision, "optim.loss_scale_hysteresis": 1}
    results = pool().run(overflow_probe, ranks, keys, ranks - 1)
    found = outcome(learnt for learnt, _, _ in results)
    assert [math.isfinite(norm) for norm in found.norms] == [True, False, True, True]
    halved = 2.0**9 if precision == "fp16" else 2.0**10
    assert {tuple(scales) for _, _, scales in results} == {(2.0**10, 2.0**10, halved, halved)}
    before = assemble(piece for _, pieces, _ in results for piece in pieces if piece.first)
    assert_copies(before, (piece for _, pieces, _ in results for piece in pieces))
    assert [name for name, value in before.items() if name.startswith("moment1") and torch.equal(value, found.state[name])] == []


def test_the_pains_are_felt() -> None:
    """The tests above can fail: a cut norm whose share is not summed is seen."""
    keys = T2 | {"model.qk_norm": True}
    with pytest.raises(AssertionError), mock.patch("cases.train", _train_without_sums):
        assert_layout_invisible(2, keys)


def _train_without_sums(rank: int, ranks: int, *args: Any) -> Learnt:
    if ranks == 1:
        return train(rank, ranks, *args)
    with mock.patch("teratron.parallel.flat.FlatModel._sum_shares", return_value=None):
        return train(rank, ranks, *args)
