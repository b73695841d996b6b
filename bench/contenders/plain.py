"""A plain PyTorch loop as its users write it: autocast for bf16, `cross_entropy` on full logits, `torch.optim.AdamW`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from job import Gate, Job
from torch import Tensor, nn


def loop(
    job: Job, gate: Gate, model: nn.Module, logits: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer | None = None
) -> None:
    """`logits` maps token ids [B, S] to [B, S, V]; the optimizer defaults to AdamW as the job's variant names it."""
    optimizer = optimizer or adamw(job, model)
    gate.ready(count(model))
    for x, y in job.batches():
        with job.autocast():
            loss = cross_entropy(logits(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), job.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        gate.passed(loss.detach())


def adamw(job: Job, model: nn.Module) -> torch.optim.AdamW:
    """Matrices decay, vectors do not. Fused for a variant that has a name; else PyTorch's own choice, on CPU a loop."""
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) is matrix] for matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": job.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=job.lr, betas=job.betas, eps=job.eps, fused=bool(job.variant) or None)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def load(model: nn.Module, state: Mapping[str, Tensor]) -> Any:
    """Copy weights in; whatever is not in `state` must be tied to something that is. Raises `ValueError`."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = {"lm_head.weight"} if "lm_head.weight" not in state else set()
    if unexpected or set(missing) - tied:
        raise ValueError(f"{type(model).__name__}: weights missing {missing}, unexpected {unexpected}: another version of the class?")
    return model


def alone(job: Job) -> None:
    """A process group of this process only, for what will not run without one."""
    backend = "nccl" if job.device == "cuda" else "gloo"
    dist.init_process_group(backend, f"file://{job.folder}/{job.contender}-meeting", world_size=1, rank=0)
