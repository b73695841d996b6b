"""What adapters spare: frozen weights cost their own bytes and nothing else, and no product is made for their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from teratron.config import Config
from teratron.models.leaves import Linear
from teratron.parallel.mesh import Mesh
from teratron.train.engine import Engine

ROWS, LENGTH = 2, 8
KEYS: dict[str, Any] = {
    "model.layers": 2,
    "model.hidden": 64,
    "model.heads": 4,
    "model.seq_length": LENGTH,
    "model.vocab_size": 64,
    "train.global_batch": ROWS,
}
ADAPTERS: dict[str, Any] = {"model.adapter_rank": 1}


def engine(**keys: Any) -> Engine:
    made = Engine(Config().override(KEYS | keys), Mesh())
    made.optimizer.initialise(1)
    return made


def batch() -> dict[str, Tensor]:
    tokens = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH)
    places = {"positions": torch.arange(LENGTH).expand(ROWS, LENGTH), "sample": torch.arange(ROWS)}
    return {"tokens": tokens, "targets": tokens.roll(-1, 1), "weights": torch.ones(ROWS, LENGTH), **places}


def held(made: Engine) -> dict[str, int]:
    """Bytes of the weights and of all that is kept beside them between steps, each memory counted once."""
    buckets, trained = made.flat.buckets, made.flat.trained
    weights = _storages([bucket.weights for bucket in buckets])
    others = [bucket.master for bucket in buckets] + [flat for flats in made.optimizer.state.values() for flat in flats]
    others += [flat for bucket in trained for flat in (bucket.backward, bucket.total, bucket.gradient)]
    others += [parameter.grad for parameter in made.model.parameters() if parameter.grad is not None]
    beside = {place: size for place, size in _storages(others).items() if place not in weights}
    return {"weights": sum(weights.values()), "beside": sum(beside.values())}


def _storages(flats: list[Tensor]) -> dict[int, int]:
    """Their sizes by where they lie."""
    return {flat.untyped_storage().data_ptr(): flat.untyped_storage().nbytes() for flat in flats}


def learning(made: Engine) -> int:
    """Numbers that learn."""
    return sum(parameter.numel() for parameter in made.model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_kept_beside_the_weights_is_for_the_adapters_alone(precision: str) -> None:
    whole, adapted = (engine(**{"train.precision": precision}, **keys) for keys in ({}, ADAPTERS))
    for made in (whole, adapted):
        made.step(batch(), step=1, number=1, lr=1e-3)
    full, few = held(whole), held(adapted)
    assert few["beside"] * learning(whole) == full["beside"] * learning(adapted), "as many bytes a number that learns"
    assert few["weights"] + few["beside"] < (full["weights"] + full["beside"]) / 3
    assert [name for name, one in adapted.model.named_parameters() if one.grad is not None and not one.requires_grad] == []


def flops(made: Engine) -> int:
    """Of the passes of one step."""
    with FlopCounterMode(display=False) as counter:
        made.passes(batch(), step=1)
    return counter.get_total_flops()


def test_no_product_is_made_for_the_gradient_of_a_frozen_weight() -> None:
    # The embedding learns too, so that gradients go down as far as without adapters.
    whole, adapted = engine(), engine(**ADAPTERS, **{"optim.groups": ("embedding.*: lr=1",)})
    leaves = [leaf for leaf in adapted.model.modules() if isinstance(leaf, Linear) and leaf.adapter is not None]
    frozen = sum(leaf.weight.numel() for leaf in leaves)
    narrow = sum(leaf.adapter.a.numel() + leaf.adapter.b.numel() for leaf in leaves if leaf.adapter is not None)
    product = 2 * ROWS * LENGTH  # operations of one product for each number of its matrix
    assert flops(adapted) == flops(whole) - product * frozen + 3 * product * narrow
    assert flops(engine(**ADAPTERS)) < flops(adapted)
