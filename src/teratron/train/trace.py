"""Where numbers first stop being finite: the passes of a step once more, with an eye on every module (see `docs/faults.md`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from teratron.checkpoint.agree import gather_json
from teratron.objectives import Batch
from teratron.parallel.buckets import Bucket
from teratron.train.engine import Engine

FORWARD, LOSS, BACKWARD, GRADIENT = range(4)
"""Kinds of findings, each a possible cause of those behind it."""
WORDS = (
    "the output of {name} in the forward pass of micro-batch {micro_batch}",
    "the sum of {name} over the tokens",
    "the gradient of the input of {name} in the backward pass of micro-batch {micro_batch}",
    "the gradient of {name}",
)


class Finding(NamedTuple):
    """The first number of a rank that is not finite; findings of all ranks compare by what came first."""

    kind: int
    micro_batch: int
    """From 0."""
    stage: int
    """In the order in which a pass reaches them: from the last one, below 0, in a backward pass."""
    order: int
    """Tensors looked at before it, of which the ranks of a stage have the same."""
    name: str


def locate(engine: Engine, batch: Batch, step: int, loss_scale: float) -> str:
    """Where the step's numbers first are not finite, over all ranks, such as `the output of blocks.1.ffn.up ... on rank 2`.

    Empty when they all are. A collective, which leaves the state as it is.
    """
    found = _Watch(engine).run(batch, step, loss_scale)
    every = [(Finding(*finding), rank) for rank, finding in enumerate(gather_json(engine.mesh.control, found)) if finding]
    if not every:
        return ""
    first, _ = min(every)
    ranks = [rank for finding, rank in every if finding == first]
    where = WORDS[first.kind].format(name=first.name, micro_batch=first.micro_batch + 1)
    return f"{where} on rank{'s' if ranks[1:] else ''} {', '.join(map(str, ranks))}"


class _Watch:
    """What one rank sees of a step."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.found: list[Finding] = []
        self._looks = 0
        self._begun: dict[int, int] = {}
        """Forward passes of each stage so far."""

    def run(self, batch: Batch, step: int, loss_scale: float) -> Finding | None:
        hooks = [hook for stage, model in self.engine.stages.stages().items() for hook in self._hooks(stage, model)]
        self.engine.flat.watch = self._gradient
        try:
            with torch.compiler.set_stance("force_eager"):  # hooks on what is compiled would not be called
                work = self.engine.passes(batch, step=step, loss_scale=loss_scale)
        finally:
            self.engine.flat.watch = None
            self.engine.flat.clear()
            for hook in hooks:
                hook.remove()
        for term in work.tally.sums.values():
            self._look(LOSS, 0, 0, term.name, term.sum)
        return min(self.found, default=None)

    def _hooks(self, stage: int, model: nn.Module) -> Iterator[Any]:
        """Modules' outputs on the way forward; on the way back the inputs of those that hold no others, where gradients are made."""
        yield model.register_forward_pre_hook(lambda module, inputs: self._begin(stage))
        for name, module in model.named_modules():
            if name:
                yield module.register_forward_hook(self._after(stage, name))
            if not any(module.children()):
                yield module.register_forward_pre_hook(self._before(stage, name))

    def _begin(self, stage: int) -> None:
        self._begun[stage] = self._begun.get(stage, -1) + 1

    def _after(self, stage: int, name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in _tensors(output):
                self._look(FORWARD, self._begun[stage], stage, name, tensor)

        return look

    def _before(self, stage: int, name: str) -> Callable[..., None]:
        def watch(module: nn.Module, inputs: Any) -> None:
            micro_batch = self._begun[stage]
            for tensor in _tensors(inputs):
                if tensor.requires_grad and torch.is_grad_enabled():
                    tensor.register_hook(lambda slope: self._look(BACKWARD, micro_batch, -1 - stage, name, slope))

        return watch

    def _gradient(self, bucket: Bucket, gradient: Tensor) -> None:
        if _finite(gradient):
            return
        for span in bucket.spans:
            self._look(GRADIENT, 0, 0, span.part.name, gradient[span.start : span.stop])

    def _look(self, kind: int, micro_batch: int, stage: int, name: str, tensor: Tensor) -> None:
        self._looks += 1
        if not _finite(tensor):
            self.found.append(Finding(kind, micro_batch, stage, self._looks, name))


def _finite(tensor: Tensor) -> bool:
    return math.isfinite(tensor.detach().abs().amax()) if tensor.numel() else True


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those of floating point in what modules take and give: alone, in a state, in a tuple, or in a dataclass."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict) or hasattr(value, "__dataclass_fields__"):
        yield from _tensors(list((value if isinstance(value, dict) else vars(value)).values()))
