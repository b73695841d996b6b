"""Maximal update parametrisation: what was found at one width holds at others; at the base width nothing changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from teratron.config import ModelConfig, OptimConfig, ParallelConfig
from teratron.models import Model, build_model, initialise, parts_of
from teratron.optim import build_optimizer
from teratron.optim.groups import treatment_of
from teratron.parallel.flat import FlatModel
from teratron.parallel.mesh import Mesh
from teratron.parallel.stages import Stages

VOCAB, LENGTH = 32, 8


def config(width: int, base: int = 0, **keys: object) -> ModelConfig:
    """A model whose heads grow with it."""
    own = {"mup_base": base, "mup_base_head": base // 4, "init_std": 0.1}
    return ModelConfig(layers=2, hidden=width, heads=4, seq_length=LENGTH, vocab_size=VOCAB, vocab_multiple=1, **{**own, **keys})  # type: ignore[arg-type]


def made(shape: ModelConfig) -> Model:
    model = build_model(shape)
    initialise(model, 1)
    return model


def batch(seed: int) -> tuple[Tensor, Tensor]:
    return tuple(torch.randint(VOCAB, (2, 4, LENGTH), generator=torch.Generator().manual_seed(seed)))  # type: ignore[return-value]


def outputs(model: Model, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What the last block adds to the residual stream, and the logits."""
    seen: list[Tensor] = []
    hooks = [leaf.register_forward_hook(lambda leaf, x, y: seen.append(y)) for leaf in (model.blocks["1"].ffn, model.blocks["1"].attention)]  # type: ignore[attr-defined]
    hidden = model({"tokens": tokens, "positions": torch.arange(LENGTH).expand(tokens.shape)})["hidden"]
    for hook in hooks:
        hook.remove()
    return torch.cat(seen), model.head.output(hidden)


def change(width: int, base: int) -> tuple[float, float]:
    """How far four steps move what the last block adds and the logits of a batch, root mean squares."""
    model = made(config(width, base))
    optimizer = build_optimizer(FlatModel(Stages({0: model}), Mesh(), ParallelConfig()), OptimConfig(lr=1e-2, weight_decay=0.0))
    tokens = batch(0)[0]
    with torch.no_grad():
        before = outputs(model, tokens)
    for step in range(1, 5):
        inputs, targets = batch(step)
        hidden = model({"tokens": inputs, "positions": torch.arange(LENGTH).expand(inputs.shape)})["hidden"]
        loss = model.head.output.loss_sum(hidden, targets, torch.ones(targets.shape)) / targets.numel()
        optimizer.flat.backward(0, [loss], [None], last=True)
        optimizer.flat.finish()
        optimizer.step(step, 1e-2)
    with torch.no_grad():
        after = outputs(model, tokens)
    inner, logits = (float((a - b).square().mean().sqrt()) for a, b in zip(after, before, strict=True))
    return inner, logits


def test_what_steps_change_is_as_large_at_any_width() -> None:
    """The coordinate check (Yang et al. 2022, appendix D.1)."""
    narrow, wide = change(64, 64), change(512, 64)
    ordinary = change(512, 0)
    for ours, base, theirs in zip(wide, narrow, ordinary, strict=True):
        assert 0.4 < ours / base < 2.5
        assert theirs / base > 4


@pytest.mark.parametrize("tied", [True, False])
def test_at_the_base_width_nothing_changes(tied: bool) -> None:
    tokens = batch(0)[0]
    with torch.no_grad():
        found = [outputs(made(config(64, base, tie_embeddings=tied)), tokens) for base in (0, 64)]
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_rates_and_decay_of_matrices_between_features_alone_are_scaled() -> None:
    shape, optim = config(256, 64, experts=2), OptimConfig(weight_decay=0.1)
    found = {part.name: treatment_of(part, optim, shape) for part in parts_of(build_model(shape, device="meta"))}
    scaled = {name for name, treatment in found.items() if (treatment.lr, treatment.decay) == (0.25, 0.4)}
    assert {name for name in found if name.endswith(("q.weight", "output.weight", "up.weight", "router.weight"))} <= scaled
    assert all(name.startswith("blocks.") and name.endswith(".weight") and "norm" not in name for name in scaled)
    assert found["embedding.tokens.weight"].lr == found["blocks.0.attention.q.bias"].lr == 1
