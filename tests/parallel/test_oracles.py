"""Other people's data parallelism on the same model code: torch's DDP and FSDP2 learn the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import STEPS, AnyFamily, batch_of, config_of, outcome, train
from parity import assert_parity
from pool import pool
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from teratron.config import Config
from teratron.models import Model, build_model, initialise, parts_of, with_dropout
from teratron.objectives import Batch

pytestmark = pytest.mark.xdist_group("ranks")

MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "modern": {
        "model.tie_embeddings": False,
        "model.position": "rope",
        "model.norm": "rmsnorm",
        "model.activation": "swiglu",
        "model.bias": False,
        "model.kv_heads": 2,
        "model.attention_dropout": 0.1,
    },
}


class LossSum(nn.Module):
    """A model with its objective inside, so that wrappers see one forward pass."""

    def __init__(self, model: Model, objective: AnyFamily, seed: int) -> None:
        super().__init__()
        self.model, self.objective, self.seed = model, objective, seed

    def forward(self, batch: Batch, step: int) -> Tensor:
        state = with_dropout(self.objective.inputs(batch), self.model.streams, self.seed, step, batch["sample"])
        return self.objective.terms(self.model, self.model(state), batch)[0].sum


def with_ddp(loss_sum: LossSum, ranks: int) -> nn.Module:
    return DistributedDataParallel(loss_sum)


def with_fsdp(loss_sum: LossSum, ranks: int) -> nn.Module:
    mesh = init_device_mesh("cpu", (ranks,))
    for block in loss_sum.model.blocks.values():
        fully_shard(block, mesh=mesh)
    return fully_shard(loss_sum, mesh=mesh)


def train_with(rank: int, ranks: int, wrap: Callable[[LossSum, int], nn.Module], keys: dict[str, Any]) -> dict[str, Tensor]:
    """Three steps of the plain model under a wrapper, with torch's own AdamW and clipping; the whole weights by part."""
    config = config_of(keys)
    model = build_model(config.model, dtype=torch.float64)
    initialise(model, config.train.seed)
    names = {part.name: part for part in parts_of(model)}
    wrapped = wrap(LossSum(model, AnyFamily(config), config.train.seed), ranks)
    optimizer = torch.optim.AdamW(_groups(wrapped, config), lr=config.optim.lr, betas=_betas(config), eps=config.optim.eps)
    for step in range(1, STEPS + 1):
        whole = batch_of(config, step)
        batch = {name: tensor.chunk(ranks)[rank] for name, tensor in whole.items()}
        loss = wrapped(batch, step) / whole["weights"].sum()
        (loss * ranks).backward()  # both average over the ranks
        torch.nn.utils.clip_grad_norm_(wrapped.parameters(), config.optim.clip)
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: _whole(parameter) for name, parameter in model.named_parameters()}
    return {f"weight/{name}": part.of(weights[part.parameter]).clone() for name, part in names.items()}


def _groups(module: nn.Module, config: Config) -> list[dict[str, Any]]:
    """Matrices decay, the rest does not."""
    parameters = list(module.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.optim.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


def _betas(config: Config) -> tuple[float, float]:
    return config.optim.beta1, config.optim.beta2


def _whole(parameter: Tensor) -> Tensor:
    with torch.no_grad():
        return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()


def oracle(rank: int, ranks: int, name: str, keys: dict[str, Any]) -> dict[str, Tensor]:
    assert dist.get_world_size() == ranks
    return train_with(rank, ranks, {"ddp": with_ddp, "fsdp": with_fsdp}[name], keys)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("name", "shard"), [("ddp", "none"), ("fsdp", "parameters"), ("fsdp", "none")])
def test_torch_learns_the_same_weights(name: str, shard: str, model: str) -> None:
    keys = MODELS[model]
    ours = outcome(pool().run(train, 2, keys | {"parallel.shard": shard}))
    assert min(ours.norms) > config_of(keys).optim.clip, "clipping was not active"
    weights = {part: value for part, value in ours.state.items() if part.startswith("weight/")}
    for theirs in pool().run(oracle, 2, name, keys):
        assert_parity(weights, theirs, 1e-9, config_of(keys).optim.lr, STEPS)
