"""`train.memory_budget`: as few activations as possible are made again in the backward pass, so that a step fits."""

from __future__ import annotations

from functools import partial
from typing import Any

from teratron.config import Config, UserError
from teratron.parallel.offload import Home
from teratron.plan.dryrun import dry_run
from teratron.train.engine import Engine

LADDER = (("none", 1), ("selective", 1), *(("full", every) for every in (8, 4, 3, 2, 1)))
"""What is made again, and in every so many-th block; the cheapest in time first."""
GIB = 2**30


def within_budget(config: Config, world: int) -> tuple[Config, str]:
    """The config with the recomputation that its budget asks for, and a line that says so; without a budget itself, and nothing.

    A dry run of the first and the last rank tells what a step takes: tensors, not what Python, libraries and allocators add. It is
    a function of the config and the number of ranks, so all ranks choose alike. Raises `UserError` where nothing is little enough.
    """
    budget = config.train.memory_budget
    if not budget:
        return config, ""
    for mode, every in LADDER:
        keys: dict[str, Any] = {"train.memory_budget": 0.0, "train.recompute": mode, "train.recompute_every": every}
        chosen = config.override(keys)
        needed = needs(chosen, world)
        if needed <= budget * GIB:
            again = {"none": "nothing is made again", "selective": "attention is made again"}
            what = again.get(mode, f"every {every}. block is made again" if every > 1 else "all blocks are made again")
            return chosen, f"memory budget {budget:g} GiB: {what}, a step takes {needed / GIB:.2f} GiB"
    raise UserError(
        f"train.memory_budget = {budget:g}: a step takes {needed / GIB:.2f} GiB even if all blocks are made again in its backward pass: "
        "raise it, lower train.micro_batch, keep activations elsewhere (parallel.offload_activations), or cut the model over more processes"
    )


def needs(config: Config, world: int) -> int:
    """Bytes of tensors at the peak of a step, on whichever of the first and the last rank takes more."""
    config = config.override({"train.compile": False, "parallel.offload_activations": "none"})
    build = partial(Engine, home=Home())
    return max(dry_run(config, world, rank, build).total for rank in {0, world - 1})
