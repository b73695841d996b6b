"""The engine of a run: model, objective and optimizer on a mesh, and one exact optimizer step over a global batch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teratron.config import Config, UserError
from teratron.models import Model, State, with_dropout
from teratron.models.encoder_decoder import both_segments
from teratron.models.float8 import use_float8
from teratron.models.moe import balance
from teratron.models.relative import RELATIVE, relative_shape
from teratron.objectives import Batch, Objective, Tally, Term, build_objective, layer_counts, layer_loads, layer_terms, total_loss
from teratron.objectives.layers import LAYER_TERMS
from teratron.optim import build_optimizer
from teratron.optim.groups import freeze
from teratron.parallel.context import cut_tokens
from teratron.parallel.deferral import Deferral, defer
from teratron.parallel.device import DTYPES
from teratron.parallel.flat import FlatModel
from teratron.parallel.mesh import DATA, SPLIT, Mesh, check_layout, mesh_sizes
from teratron.parallel.offload import Home, home_of
from teratron.parallel.pipeline import Channels, Runtime
from teratron.parallel.schedule_check import check
from teratron.parallel.schedules import build_schedule
from teratron.parallel.spans import UPDATE, span
from teratron.parallel.stages import chunk_count, cut_stages
from teratron.train.device import compile_blocks
from teratron.train.recompute import recompute
from teratron.train.stash import stash


class Engine:
    """Weights are undefined until `optimizer.initialise` or a checkpoint has filled them."""

    runtime: Callable[..., Runtime] = Runtime
    """What executes the schedules; a dry run has its own."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        device: str | torch.device = "cpu",
        objective: Objective | None = None,
        folder: Path | None = None,
        home: Home | None = None,
    ) -> None:
        """objective: None = the config's own. folder: for files of what is kept on disk; None = that of temporary files.

        home: where all lies that may lie elsewhere; None = as `parallel.offload` and `parallel.offload_activations` say.
        """
        check_batch(config, mesh.data.size)
        self.config, self.mesh, self.device = config, mesh, torch.device(device)
        self.objective = objective or build_objective(config)
        plain = {"objective.label_smoothing": 0.0, "objective.contrastive": 0.0, "model.predict_tokens": 1, "objective.ahead_weight": 1.0}
        self.scorer = objective or build_objective(config.override(plain))
        self.stages = cut_stages(config.model, mesh, config.parallel, DTYPES[config.train.precision])
        self.later = Deferral()
        if config.parallel.schedule in SPLIT and mesh.group("pipeline").size > 1:
            defer(self.stages, self.later)
        if config.train.precision == "fp8":
            models = list(self.stages.stages().values())
            use_float8(models, config.train.fp8_scaling, config.train.fp8_except, self.device)
        freeze(self.stages, config.optim)
        folder = folder or Path(tempfile.gettempdir())
        self.flat = FlatModel(self.stages, mesh, config.parallel, home or home_of(config.parallel, self.device, folder))
        away = home or home_of(config.parallel, self.device, folder, "offload_activations")
        self.optimizer = build_optimizer(self.flat, config.optim, config.train.seed)
        self.channels = Channels.of(mesh)
        self._runtimes: dict[int, Runtime] = {}
        """By the number of micro-batches, which evaluations may have other than steps."""
        for model in self.stages.stages().values():
            if config.train.compile:
                compile_blocks(model, self.device)
            recompute(model, config.train.recompute, config.train.recompute_every)
            if away.apart:
                stash(model, away)
            if mesh.world > 1:
                self._tell_units(model)

    def _tell_units(self, model: Model) -> None:
        """Let this rank say which unit it is in."""
        paths = {unit: path for path, unit in model.named_modules()}
        for unit in model.units():
            unit.register_forward_pre_hook(lambda unit, inputs: self.mesh.doing.within(paths[unit]))

    @property
    def model(self) -> Model:
        """The one stage of a run without a pipeline, or the first that is here."""
        return next(iter(self.stages.stages().values()))

    def rows(self, count: int) -> slice:
        """This data rank's share of `count` rows of a global batch."""
        share = count // self.mesh.data.size
        return slice(self.mesh.data.rank * share, (self.mesh.data.rank + 1) * share)

    def step(
        self,
        batch: Batch,
        *,
        step: int,
        number: int,
        lr: float,
        loss_scale: float = 1.0,
        around: AbstractContextManager[Any] | None = None,
    ) -> tuple[Tally, Tensor]:
        """Learn from this rank's rows of a global batch; returns the whole batch's terms and the gradient norm before clipping.

        The loss is exact over the global batch: its counts are known before the first forward pass (contract C2). The host reads no
        number from the device: the norm is a scalar there, and with one that is not finite nothing is learnt.
        Args: step (from 1) decides dropout, number counts the updates (from 1); around is entered once the gradients are there, and left
        after the update.
        """
        work = self.passes(batch, step=step, loss_scale=loss_scale)
        with span(UPDATE), around or nullcontext():
            norm = self.optimizer.step(number, lr, loss_scale)
        if work.loads and self.config.model.router_balance == "bias" and not self.config.model.adapter_rank:
            rate = norm.isfinite() * torch.full_like(norm, self.config.model.bias_rate)
            loads = self._summed(work.loads, *self._token_axes)
            for model in self.stages.stages().values():
                balance(model, {name: load for name, load in loads.items() if has_module(model, name)}, rate)
        return self._reduced(work.tally), norm

    def passes(self, batch: Batch, *, step: int, loss_scale: float = 1.0) -> MicroBatches:
        """The forward and backward passes of a step, which leave its gradients in the buckets; the tally is of this rank alone."""
        batch = self._padded(batch)
        tally = Tally(counts=self._summed(self.objective.counts(batch) | layer_counts(self.model, batch)))
        work = MicroBatches(self, self.objective, batch, tally, step, loss_scale)
        self._runtime(len(work.parts)).run(work)
        self.flat.finish()
        return work

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], scorer: Objective | None = None) -> Tally:
        """The terms over all batches of all data ranks together, nothing dropped out; every rank must bring as many batches.

        scorer: what makes the terms, which may be vectors; None = the run's objective without what is for training alone.

        The layers' own terms are told, but the loss is the objective's alone.
        """
        tally, scorer = Tally(), scorer or self.scorer
        with self.optimizer.judged():
            for batch in batches:
                work = MicroBatches(self, scorer, self._padded(batch), tally)
                tally.count(scorer.counts(work.batch) | layer_counts(self.model, work.batch))
                self._runtime(len(work.parts)).run(work, forward_only=True)
            self.flat.release()
        tally.counts = self._summed(tally.counts)
        return self._reduced(tally)

    def _runtime(self, micro_batches: int) -> Runtime:
        if micro_batches not in self._runtimes:
            self._runtimes[micro_batches] = self._build_runtime(micro_batches)
        return self._runtimes[micro_batches]

    def _build_runtime(self, micro_batches: int) -> Runtime:
        """Raises ScheduleError for a schedule that would wait for ever."""
        parallel, ranks = self.config.parallel, self.mesh.group("pipeline").size
        name, chunks = (parallel.schedule, chunk_count(parallel)) if ranks > 1 else ("1f1b", 1)
        schedule = build_schedule(name, ranks, micro_batches, chunks)
        check(schedule)
        return self.runtime(schedule, self.channels, DTYPES[self.config.train.precision], self.device)

    def _padded(self, batch: Batch) -> Batch:
        return pad_sequences(batch, self._multiple, self.model.streams)

    def _share(self, tensors: State) -> State:
        """This context rank's tokens."""
        return cut_tokens(tensors, self.mesh.context, self._balanced, self.model.streams)

    @property
    def _balanced(self) -> bool:
        return self.config.parallel.context_method == "ring"

    @property
    def _multiple(self) -> int:
        """What sequence lengths must divide into."""
        context = self.mesh.context.size
        chunks = context * (2 if self._balanced and context > 1 else 1)
        return chunks * (self.mesh.tensor.size if self.config.parallel.sequence else 1)

    def _reduced(self, tally: Tally) -> Tally:
        """Sums over the data and context ranks and the stages, any of which may have a term; the counts are so already."""
        found = {name: tally.sums.get(name, Term("", torch.zeros_like(count), 0.0)) for name, count in tally.counts.items()}
        sums = self._summed({name: term.sum for name, term in found.items()}, "context", "pipeline")
        if self.config.parallel.sequence:  # layers' terms are of the tokens at hand, which tensor ranks share
            for name in sorted(sums.keys() & LAYER_TERMS):  # a set's own order differs from process to process
                self.mesh.tensor.sum(sums[name]).wait()
        weights = torch.tensor([found[name].weight for name in sorted(found)], dtype=torch.float64, device=self.device)
        self.mesh.group("pipeline").max(weights).wait()
        return Tally({name: Term(name, sums[name], w) for name, w in zip(sorted(found), weights, strict=True)}, tally.counts)

    @property
    def _token_axes(self) -> tuple[str, ...]:
        """The axes beside the data axes whose ranks have different tokens."""
        return ("context", "tensor") if self.config.parallel.sequence else ("context",)

    def _summed(self, values: dict[str, Tensor], *axes: str) -> dict[str, Tensor]:
        """Values summed over the data ranks, and those along more axes, in one message."""
        names = sorted(values)
        together = torch.cat([values[name].double().flatten() for name in names])
        self.mesh.group(*DATA, *axes).sum(together).wait()
        pieces = together.split([values[name].numel() for name in names])
        return {name: piece.view(values[name].shape) for name, piece in zip(names, pieces, strict=True)}


class MicroBatches:
    """What the stages of this rank do with the micro-batches of one global batch; a `pipeline.Work`."""

    def __init__(
        self, engine: Engine, objective: Objective, batch: Batch, tally: Tally, step: int | None = None, loss_scale: float = 1.0
    ) -> None:
        """step: None = nothing is dropped out, and nothing learnt."""
        self.engine, self.objective, self.batch, self.tally = engine, objective, batch, tally
        self.step, self.loss_scale = step, loss_scale
        self.parts = list(micro_batches(batch, engine.config.train.micro_batch))
        self.models, self.units = engine.stages.stages(), engine.stages.units
        self.left = dict.fromkeys(self.models, len(self.parts))
        """Backward passes that each stage has before it."""
        self.loads: dict[str, Tensor] = {}
        """How many tokens chose each expert, by router."""
        self._kept: dict[tuple[int, int], tuple[State, State, Tensor | None]] = {}
        self._put_off: dict[tuple[int, int], list[Callable[[], None]]] = {}

    def received(self, stage: int, micro_batch: int) -> dict[str, tuple[int, ...]]:
        engine, model = self.engine, self.engine.model
        ranks = engine.mesh.context.size * (engine.mesh.tensor.size if engine.config.parallel.sequence else 1)
        shapes: dict[str, tuple[int, ...]] = {}
        for name, stream in model.carried(engine.config.model, self.units[stage].start).items():
            if f"{stream}positions" not in self.parts[micro_batch]:
                continue
            rows, length = self.parts[micro_batch][f"{stream}positions"].shape
            shapes[name] = (rows, length // ranks, engine.config.model.hidden)
        if RELATIVE in shapes:
            shapes[RELATIVE] = relative_shape(engine.config.model, engine.mesh.tensor.size)
        return shapes

    def forward(self, stage: int, micro_batch: int, received: State) -> State:
        part, model = self.parts[micro_batch], self.models[stage]
        state = self.objective.inputs(part)
        if self.step is not None:
            state = with_dropout(state, model.streams, self.engine.config.train.seed, self.step, part["sample"])
        received = {name: tensor.detach().requires_grad_(torch.is_grad_enabled()) for name, tensor in received.items()}
        state = model({**self.engine._share(state), **received})
        learning = self.step is not None
        terms = [*self.objective.terms(model, state, self.engine._share(part)), *layer_terms(model, state, learning)]
        self.tally.add(terms)
        self.loads |= {name: load + self.loads.get(name, 0) for name, load in layer_loads(state).items()}
        following = self.units[stage].stop
        carried = model.carried(model.config, following) if following < model.count_units(model.config) else {}
        sent = {name: state[name] for name in carried if name in state}
        if learning:
            loss = total_loss(terms, self.tally.counts) * self.loss_scale if terms else None
            self._kept[stage, micro_batch] = received, sent, loss
        return sent

    def backward(self, stage: int, micro_batch: int, gradients: State, split: bool) -> State:
        received, sent, loss = self._kept.pop((stage, micro_batch))
        pairs: list[tuple[Tensor, Tensor | None]] = [(tensor, gradients[name]) for name, tensor in sent.items() if tensor.requires_grad]
        pairs += [(loss, None)] if loss is not None else []
        if split:
            self.engine.later.begin()
        self.left[stage] -= not split
        tensors, slopes = [tensor for tensor, _ in pairs], [slope for _, slope in pairs]
        self.engine.flat.backward(stage, tensors, slopes, not self.left[stage], split)
        if split:
            self._put_off[stage, micro_batch] = self.engine.later.take()
        return {name: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for name, tensor in received.items()}

    def backward_weights(self, stage: int, micro_batch: int) -> None:
        for make in self._put_off.pop((stage, micro_batch)):
            make()
        self.left[stage] -= 1
        self.engine.flat.weights_made(stage, last=not self.left[stage])


def has_module(model: Model, path: str) -> bool:
    """Whether a stage holds a module."""
    return any(name == path for name, _ in model.named_modules())


def check_degrees(config: Config, world: int) -> None:
    """Raise `UserError` for a layout that `world` processes, the model or the batch cannot have."""
    sizes = mesh_sizes(config.parallel, world, config.model)
    check_layout(config.model, config.parallel, world)
    check_batch(config, sizes["replicate"] * sizes["shard"])


def check_batch(config: Config, ranks: int) -> None:
    """Raise `UserError` unless each of so many data ranks gets as many whole micro-batches of every step."""
    for batch in config.batches.sizes:
        if batch % (ranks * (config.train.micro_batch or 1)):
            raise _cannot_share(config, batch, ranks)


def _cannot_share(config: Config, batch: int, ranks: int) -> UserError:
    """What is wrong with a global batch of so many sequences, and what would do."""
    train, micro, parallel = config.train, config.train.micro_batch, config.parallel
    unit = ranks * (micro or 1)
    least = batch // unit * unit
    near = f"{least} or {least + unit}" if least else str(unit)
    plain = not train.batch_tokens and not train.batch_schedule
    choices = [f"--train.global_batch {near}" if plain else f"batches of {near}"]
    if batch % ranks == 0:
        smaller = max(n for n in range(1, micro) if batch // ranks % n == 0)
        choices.insert(0, f"--train.micro_batch {smaller}")
    inner = parallel.pipeline * parallel.context * parallel.tensor
    processes = [str(n * inner) for n in range(1, batch + 1) if batch % (n * (micro or 1)) == 0]
    per_rank = f" in micro-batches of {micro}" if micro else ""
    name = f"train.global_batch = {batch}" if plain else f"a global batch of {batch} sequences"
    return UserError(
        f"{name} cannot be shared by {ranks} data ranks{per_rank}: choose {', or '.join(choices)}, or --nproc among {', '.join(processes)}"
    )


def micro_batches(batch: Batch, size: int) -> Iterator[Batch]:
    """Cut a batch along its first dimension; size 0 = whole."""
    count = batch["sample"].shape[0]
    for start in range(0, count, size or count):
        yield {name: tensor[start : start + (size or count)] for name, tensor in batch.items()}


def pad_sequences(batch: Batch, multiple: int, streams: Mapping[str, bool]) -> Batch:
    """Lengthen every stream to a multiple, with tokens that weigh nothing and that no other token attends to.

    A causal stream needs no mask for that, as what is later is never seen.
    """
    padded = dict(both_segments(batch, streams))
    for stream, causal in streams.items() if multiple > 1 else ():
        names = [name for name, tensor in padded.items() if tensor.dim() == 2 and _stream_of(name, streams) == stream]
        if not names:
            continue
        missing = -batch[names[0]].shape[1] % multiple
        if missing and not causal and f"{stream}segments" not in padded:
            padded[f"{stream}segments"] = torch.zeros_like(batch[f"{stream}positions"])
            names.append(f"{stream}segments")
        if missing and f"{stream}real" not in padded:
            padded[f"{stream}real"] = torch.ones_like(batch[names[0]], dtype=torch.bool)
            names.append(f"{stream}real")
        for name in names:
            padded[name] = torch.nn.functional.pad(padded[name], (0, missing), value=-1 if name.endswith("segments") else 0)
    return both_segments(padded, streams)  # another stream must not see a memory's padding


def _stream_of(name: str, streams: Iterable[str]) -> str:
    return max((stream for stream in streams if name.startswith(stream)), key=len)
