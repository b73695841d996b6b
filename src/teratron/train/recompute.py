"""Activation recomputation: backward makes again what forward did not keep (Chen et al. 2016; Korthikanti et al. 2022)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from teratron.models import Model
from teratron.models.attention import AttentionCore
from teratron.models.blocks import Block


def recompute(model: Model, mode: str, every: int) -> None:
    """Recompute every `every`-th block (`full`), only the attention inside it (`selective`), or nothing (`none`)."""
    blocks = [unit for unit in model.units() if isinstance(unit, Block)][::every]
    for block in blocks if mode != "none" else ():
        targets = [block] if mode == "full" else [module for module in block.modules() if isinstance(module, AttentionCore)]
        for module in targets:
            module.forward = _recomputed(module.forward)  # type: ignore[method-assign]


def _of_state(forward: Callable[..., Any], names: tuple[str, ...], others: tuple[Any, ...], *values: Any) -> Any:
    return forward(dict(zip(names, values, strict=True)), *others)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    # torch.compile gives up on checkpoints of modules with state: it compiles what is inside, and what is around.
    # Masks are functions of coordinates: there is no generator whose state would have to be brought back.
    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def run(*inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs)
        if not isinstance(inputs[0], dict):
            return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)
        names, values = zip(*inputs[0].items(), strict=True)  # one by one, so that what is kept of them may lie elsewhere
        again = functools.partial(_of_state, forward, names, inputs[1:])
        return checkpoint(again, *values, use_reentrant=False, preserve_rng_state=False)

    return run
