"""The trainer: opens everything, checks everything, then the loop with its events (evaluate, save, log)."""

from __future__ import annotations

import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np
import torch

import teratron
from teratron.checkpoint import TrainingState, load_training, open_checkpoint, saved_state, weights_for
from teratron.checkpoint.agree import agree
from teratron.checkpoint.format import checkpoint_bytes
from teratron.checkpoint.machines import find_machines
from teratron.checkpoint.memory import memory_checkpoints
from teratron.checkpoint.reader import Checkpoint
from teratron.checkpoint.training import check_data
from teratron.config import Config, UserError
from teratron.data.open import open_data
from teratron.data.samples import Samples
from teratron.data.tokenizer import Tokenizer
from teratron.models import build_model, flops_per_token, initial_values, parameter_count
from teratron.objectives import Batch, Tally, build_objective
from teratron.optim import LossScale, learning_rate, optim_at
from teratron.parallel.device import DTYPES, choose_device
from teratron.parallel.mesh import Mesh, check_layout, describe_layout, mesh_sizes
from teratron.parallel.spans import DATA, span
from teratron.parallel.worker import PREEMPTED, connect, disconnect, take_restarts, telling, this_worker
from teratron.train.budget import within_budget
from teratron.train.device import check_memory, describe, keep_freed_memory, measure_peak, set_deterministic
from teratron.train.engine import Engine, check_batch, micro_batches
from teratron.train.float32 import choose_float32_products
from teratron.train.guard import Guard
from teratron.train.interrupt import Interrupt
from teratron.train.live import Live, live_lr, live_optim, not_overridden
from teratron.train.metrics import Console, Metrics, Silence, duration
from teratron.train.noise import Noise, check_noise, part_of, probe, separate
from teratron.train.norms import Norms
from teratron.train.profiling import Tracer
from teratron.train.report import write_report
from teratron.train.run import absolute_paths, check_held, continue_config, fork, has_config, lock, run_config, write_config
from teratron.train.saving import Place, Saver, check_places, find_start
from teratron.train.sinks import check_sinks, open_sinks
from teratron.train.spikes import checkpoint_before, is_spike, leave_out, remember, remove_given_up, zscore
from teratron.train.timing import Watch

T = TypeVar("T")
Examine = Callable[[], Iterator[dict[str, Any]]]
"""Measures the model on `train.eval_tasks`, all ranks together; gives an event's fields for each."""
Examiner = Callable[[Engine, Tokenizer | None], Examine]
"""Reads their files, and raises `UserError` for what cannot be measured."""


@dataclass(frozen=True)
class Result:
    """How a call of `Trainer.train` ended."""

    step: int
    loss: float
    """Training loss of the last step; NaN when no step was made."""
    valid_loss: float
    """Held-out loss of the last evaluation; NaN without one."""
    stopped: int = 0
    """The exit code that says why it stopped before the last step; 0 = it did not."""

    @property
    def interrupted(self) -> bool:
        return self.stopped != 0


class Trainer:
    """One run in one folder. Making it opens the data, the model and the newest checkpoint; `train` goes to the last step.

    The same call continues a run (contract C13); a Trainer holds its folder until `train` returns or raises. Raises
    `UserError` for everything that can be known before the first step; the folder then is no run yet, and any config may follow.
    Under torchrun, srun or `teratron train --nproc N` every process makes one, and they share the work as `parallel.*` says.
    """

    def __init__(
        self,
        config: Config | None,
        run: str | Path,
        *,
        device: str = "auto",
        fork_to: str | Path | None = None,
        echo: bool = True,
        examiner: Examiner | None = None,
    ) -> None:
        """config: None = the run's own. fork_to: branch off, train there from the newest checkpoint of `run`. echo: print.

        examiner: what `train.eval_tasks` needs, such as `teratron.tasks.evaluate.training.examiner`.
        """
        self.run = Path(run if fork_to is None else fork_to)
        config = run_config(Path(run)) if config is None else absolute_paths(config)
        worker = this_worker()
        sizes = mesh_sizes(config.parallel, worker.world if worker else 1, config.model)
        self.device = choose_device(device, worker)
        if worker is not None:
            connect(worker, self.device)
        self.mesh = Mesh(sizes, worker.rank if worker else 0, telling())
        self.machines = find_machines(self.mesh.control, worker)
        self.leads = self.mesh.rank == 0
        """Whether this is the one process that writes and speaks."""
        self._lock: TextIO | None = self._lead(lambda: lock(self.run))
        try:
            if fork_to is not None:
                self._lead(lambda: fork(Path(run), self.run))
            self.console = Console(config.train.steps, config.log.every, sys.stdout if echo and self.leads else None)
            config = continue_config(self.run, config, self.console.say)
            set_deterministic(config.train.deterministic)
            keep_freed_memory()
            choose_float32_products()
            self._open(config)
            self._check()
            self.examine = self._together(lambda: self._examined_by(examiner))
            self._lead(lambda: write_config(self.run, self.config))
        except BaseException:
            self._close()
            raise

    def _together(self, action: Callable[[], T]) -> T:
        """Run something on every rank; an error on any of them is raised on all."""
        results: list[T] = []
        agree(self.mesh.control, lambda: results.append(action()))
        return results[0]

    def _first(self, action: Callable[[], T]) -> T:
        """The same on rank 0 before the others, which see what it left."""
        results: list[T] = []
        for turn in (self.leads, not self.leads):
            self._together((lambda: results.append(action())) if turn else _nothing)
        return results[0]

    def _lead(self, action: Callable[[], T]) -> T | None:
        """Something that only rank 0 does."""
        return self._together(lambda: action() if self.leads else None)

    def _close(self) -> None:
        if self._lock is not None:
            self._lock.close()
        if self.mesh.world > 1:
            disconnect()

    def _open(self, config: Config) -> None:
        """Data, model, optimizer, and the state of the newest checkpoint."""
        checkpoint = self._newest(config)
        if checkpoint is not None and not has_config(self.run):  # it may have come from checkpoint.copy_to
            config = continue_config(self.run, config, lambda text: None)
        if checkpoint is not None and config.model.vocab_size == 0:
            config = config.override({"model.vocab_size": checkpoint.config().model.vocab_size})
        past = saved_state(checkpoint) if checkpoint is not None else TrainingState()
        changes = not_overridden(past.live, checkpoint.config().optim, config.optim) if checkpoint is not None else ()
        self.live = Live(self.run, self.mesh, self.console.say)
        self.state = replace(past, phases=_phases(past.phases, config.train.steps), live=self.live.replayed(changes))
        check_batch(config, self.mesh.data.size)
        check_layout(config.model, config.parallel, self.mesh.world)  # once more when the data has told the vocabulary
        self.data = self._first(lambda: open_data(config, self.run, self.state.phases, self.console.say, build_objective(config).needs))
        self.config = config.override({"model.vocab_size": self.data.special.vocab_size})
        if checkpoint is not None:
            check_data(checkpoint, self.config, self.data.identity)
        if self.state.step > config.train.steps:
            raise UserError(f"train.steps = {config.train.steps} is below step {self.state.step}, where the checkpoint stands: raise it")
        check_layout(self.config.model, self.config.parallel, self.mesh.world)
        self._together(lambda: check_memory(self.config, self.mesh, self.device))
        fitting, said = within_budget(self.config, self.mesh.world)
        if said:
            self.console.say(said)
        self.engine = Engine(fitting, self.mesh, self.device, folder=self.run)
        self.optimizer = self.engine.optimizer
        self._restore(checkpoint)
        self.guard = Guard(self.run, self.engine, self.console.say)

    def _restore(self, checkpoint: Checkpoint | None) -> None:
        """Weights, moments and loss scale where `state` says that the run stands; without a checkpoint as it begins."""
        if checkpoint is None:
            self._begin()
        else:
            load_training(checkpoint, self.optimizer.pieces(), self.mesh.control)
            self.optimizer.publish()
        self.loss_scale = self.state.loss_scale or LossScale.start(self.config.optim, self.config.train.precision)

    def _begin(self) -> None:
        """Weights of a new run: drawn, or those of `train.init`."""
        init, model = self.config.train.init, self.config.model
        given, new = self._together(lambda: weights_for(Path(init), model)) if init else ({}, ())
        if new:
            self.console.say(f"new: {', '.join(new[:3])}{f' and {len(new) - 3} more' if len(new) > 3 else ''}")
        values = {name: entry.values for name, entry in given.items()}
        self.optimizer.initialise(self.config.train.seed, partial(initial_values, given=values))

    def _newest(self, config: Config) -> Checkpoint | None:
        """The newest good checkpoint."""
        memory = memory_checkpoints(self.run, self.machines, self.mesh.control, self.console.say)
        return self._found(lambda: find_start(self.run, config.checkpoint, memory, self.console.say))

    def _found(self, find: Callable[[], Checkpoint | None]) -> Checkpoint | None:
        """A checkpoint that one rank finds and verifies; the others open it."""
        found = self._lead(find)
        name = self.mesh.control.gather_bytes(str(found.folder).encode() if found is not None else b"")[0].decode()
        return found if self.leads or not name else open_checkpoint(Path(name))

    def _check(self) -> None:
        """What the first step, the first evaluation and the first checkpoint would stumble over."""
        train = self.config.train
        if train.verify_every and self.device.type == "cuda" and not train.deterministic:
            raise UserError(
                f"train.verify_every = {train.verify_every} computes steps twice and compares, which differ on CUDA by its own atomics: "
                "add --train.deterministic, or leave train.verify_every out"
            )
        check_noise(self.config, self.mesh.data.size)
        self.batch(min(self.state.step + 1, train.steps))
        if self.data.valid is not None:
            next(self._valid_batches())
        pieces = self.optimizer.pieces()
        needed = checkpoint_bytes(pieces, self.mesh.control)
        self._lead(lambda: check_sinks(self.config.log))
        self._first(lambda: check_places(self.run, self.config.checkpoint, pieces, needed, self.machines))

    def train(self) -> Result:
        """Train to `train.steps`, evaluating, saving and logging; Ctrl-C saves and returns with `interrupted`."""
        self.live.look()
        total = self.live.last_step(self.config.train.steps)
        if self._lock is not None and self._lock.closed:
            self._lock = lock(self.run)
        try:
            if self._complete():
                more = "--train.steps N" if total == self.config.train.steps else f"take stop_step out of {self.live.path}"
                more = more if self.state.step >= total else "raise train.patience"
                self.console.say(f"{self.run} is complete: step {self.state.step} of {total}; to train on: {more}")
                result = Result(self.state.step, math.nan, math.nan)
            else:
                with self._metrics() as metrics, Interrupt(self.config.train.stop_after) as interrupt:
                    self._announce(metrics)
                    self._take_changes(metrics)
                    with Saver(self.run, self.config, self.mesh, self.machines, metrics, self.console.say, self._check_held) as saver:
                        result = self._loop(metrics, interrupt, saver)
                    self._end(metrics, result)
            self.mesh.doing.at(0)
            self._lead(lambda: write_report(self.run))  # together: a scheduler may end all tasks when the first one leaves
            return result
        finally:
            self.console.finish()
            self._close()

    def _examined_by(self, examiner: Examiner | None) -> Examine | None:
        if not self.config.train.eval_tasks:
            return None
        if examiner is None:
            raise UserError(
                "train.eval_tasks is set and nobody is there to measure: give Trainer(..., "
                "examiner=teratron.tasks.evaluate.training.examiner), or leave it out"
            )
        return examiner(self.engine, self.data.special.tokenizer)

    def _metrics(self) -> Metrics | Silence:
        """Where events go; and on every rank what is to be measured."""
        log, say = self.config.log, self.console.say
        self.watch = Watch(self.mesh, self.optimizer, self.device, say)
        metrics = Metrics(self.run, log.tensorboard, say, open_sinks(log, self.run, say)) if self.leads else Silence()
        self.tracer = Tracer(self.run, log.profile_step, self.mesh.rank, metrics, say)
        return metrics

    def evaluate(self) -> float:
        """The held-out loss over `train.eval_batches` global batches, or over everything."""
        return self._evaluate().loss()

    def _evaluate(self) -> Tally:
        return self.engine.evaluate(self._valid_batches())

    def batch(self, step: int) -> Batch:
        """This process's rows of the global batch of a step (from 1): computed from the step alone."""
        start, end = (self.config.batches.until(steps) for steps in (step - 1, step))
        return self._batch(self.data.train, np.arange(start, end)[self.engine.rows(end - start)])

    def _loop(self, metrics: Metrics | Silence, interrupt: Interrupt, saver: Saver) -> Result:
        config, loss, valid_loss, stop = self.config.train, math.nan, math.nan, 0
        while not self._complete():
            step, losses = self.state.step + 1, self.state.losses
            self.mesh.doing.at(step)
            if step in self.state.left_out:
                self.state = replace(self.state, step=step, skipped=self.state.skipped + 1)
            else:
                loss = self._step(step, metrics)
                if is_spike(loss, losses, config):
                    saver.finish()
                    self._go_back(step, zscore(loss, losses), metrics)
                    continue
            last = step == self.live.last_step(config.steps)
            if self.data.valid is not None and (last or (config.eval_every and step % config.eval_every == 0)):
                valid_loss = self._report_evaluation(step, metrics)
                last = self._complete()
            if self.examine is not None and (last or _due(step, config.eval_tasks_every)):
                self._report_tasks(step, self.examine(), metrics)
            if last or step % self.config.log.every == 0:
                metrics.write("ranks", step=step, **self.watch.report(), time=time.time())
            due = Place.DISK if step in self.state.best[1:] else saver.due(step)
            wishes = interrupt.asked, saver.failed, due, self.tracer.asked(), self.live.asked()
            stop, failed, place, trace, changed = self._most(*wishes)
            if trace:
                self.tracer.step = step + 1
            if changed:
                self.live.look()
                self._take_changes(metrics)
                last = self._complete()
            if failed:
                saver.finish()
            if last or stop or place:
                saver.save(Place.DISK if last or stop else Place(place), self.optimizer.pieces(), self.state, self.data.identity)
            saver.poll()
            if stop:
                break
        self.guard.tell_overflows(self.state.step, self.loss_scale.scale)
        return Result(self.state.step, loss, valid_loss, stop if self.state.step < config.steps else 0)

    def _complete(self) -> bool:
        """Whether the run has come to its last step, or to the end of `train.patience`."""
        train, state = self.config.train, self.state
        weary = bool(train.patience and state.best) and state.step - state.best[1] >= train.patience * train.eval_every
        return weary or state.step >= self.live.last_step(train.steps)

    def _remember_best(self, score: float) -> None:
        """Note an evaluation's score, the greater the better, where one is to be the best."""
        if self.config.train.patience and (not self.state.best or score > self.state.best[0]):
            self.state = replace(self.state, best=(score, self.state.step))

    def _end(self, metrics: Metrics | Silence, result: Result) -> None:
        done = "done" if self.state.step == self.config.train.steps else "stopped"
        reason = {0: done, PREEMPTED: "preempted"}.get(result.stopped, "interrupted")
        metrics.write("end", step=self.state.step, seconds=self.state.seconds, reason=reason, time=time.time())

    def _most(self, *values: int) -> list[int]:
        """The greatest of all ranks: all stop or save after the same step, and none when another has died."""
        most = torch.tensor(values)
        self.mesh.all.max(most).wait()
        return most.tolist()

    def _take_changes(self, metrics: Metrics | Silence) -> None:
        """What live.toml says anew holds from the next step on."""
        step = self.state.step + 1
        changes, news = self.live.take(self.state.live, step)
        if news:
            metrics.write("live", step=step, **news, time=time.time())
        self.state = replace(self.state, live=changes)
        self.live.tell(changes, step)

    def _check_held(self) -> None:
        check_held(self._lock, self.run)

    def _step(self, step: int, metrics: Metrics | Silence) -> float:
        config = self.config.train
        lr, scale = live_lr(learning_rate(self.config, step), self.state.live, step), self.loss_scale
        optim = live_optim(optim_at(self.config, step), self.state.live, step)
        if optim != self.optimizer.config:
            self.optimizer.adopt(optim)
        number = step - self.state.skipped
        with self.tracer.tracing(step), self.watch.step() as lap:
            with span(DATA):
                batch = self.batch(step)
            lap.got_data()
            part = self._probe(step) if _due(step, self.config.log.noise_scale) else None
            norms = Norms(self.optimizer, scale.scale) if _due(step, self.config.log.norms) else None
            tally, total_norm = self.engine.step(batch, step=step, number=number, lr=lr, loss_scale=scale.scale, around=norms)
            loss, norm = tally.loss(), float(total_norm)
        finite, seconds = math.isfinite(norm), lap.seconds
        self.loss_scale = scale.after(finite, self.config.optim, config.precision)
        tokens = round(self.config.batches.size(step) * self.data.sample_tokens)
        self.state = replace(
            self.state,
            step=step,
            tokens=self.state.tokens + tokens,
            seconds=self.state.seconds + seconds,
            skipped=self.state.skipped + (not finite),
            loss_scale=self.loss_scale,
            losses=remember(self.state.losses, loss, config) if finite else self.state.losses,
        )
        event = {"step": step, "loss": loss, "terms": tally.means(), "grad_norm": norm, "lr": lr}
        event |= {"tokens": self.state.tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}
        event |= {"data": lap.data, "communication": lap.communication}
        event |= {"mfu": tokens / seconds * self.flops_per_token / (self.peak_flops * self.mesh.world)}
        if self.config.optim.weight_decay_ramp != "none":
            event |= {"weight_decay": optim.weight_decay}
        if config.precision == "fp16":
            event |= {"loss_scale": scale.scale}
        if not finite:
            event |= {"skipped": True}
        metrics.write("step", **event, time=time.time())
        self.console.step(event)
        if norms is not None:
            metrics.write("norms", step=step, parts=norms.parts, time=time.time())
        if part is not None and finite and math.isfinite(part):
            self._tell_noise(step, part, norm, metrics)
        self.guard.check(step, batch, loss, norm, scale, metrics)
        return loss

    def _probe(self, step: int) -> float:
        """The gradient norm over the first part of a step's batch."""
        batches = self.config.batches
        batch = self._evenly(self.data.train, batches.until(step - 1), part_of(batches.size(step)))
        return float(probe(self.engine, batch, step, self.loss_scale.scale))

    def _tell_noise(self, step: int, part: float, whole: float, metrics: Metrics | Silence) -> None:
        """Note the gradient noise scale; part, whole: the gradient norms over part of the step's batch and over all of it."""
        size = self.config.batches.size(step)
        found = separate(part**2, whole**2, part_of(size), size)
        noise = found.smoothed(Noise(*self.state.noise) if self.state.noise else None)
        self.state = replace(self.state, noise=(noise.signal, noise.variance))
        event = {"signal": found.signal, "variance": found.variance, "critical_batch": noise.critical_batch}
        event |= {"critical_tokens": noise.critical_batch * self.config.model.seq_length}
        metrics.write("noise", step=step, batch=size, **event, time=time.time())
        self.console.say(f"step {step}: gradient noise scale {noise.told(self.config.model.seq_length)}, the batch is {size:,}")

    def _go_back(self, step: int, deviations: float, metrics: Metrics | Silence) -> None:
        """After a loss spike: the state of a checkpoint before the batches that are left out from now on."""
        self.mesh.doing.at(0)  # verifying and reading may take longer than any step
        before = self.state
        left_out = leave_out(before.left_out, step, self.config.train)
        first = min({*left_out} - {*before.left_out})
        checkpoint = self._found(lambda: checkpoint_before(self.run, first, left_out, self.console.say))
        past = saved_state(checkpoint) if checkpoint is not None else TrainingState()
        self.state = replace(past, phases=before.phases, seconds=before.seconds, left_out=left_out, live=before.live)
        self._restore(checkpoint)
        self._lead(lambda: remove_given_up(self.run, first))
        metrics.write("spike", step=step, deviations=deviations, back_to=past.step, left_out=list(left_out), time=time.time())
        self.console.say(
            f"step {step}: the loss lies {deviations:.1f} deviations above the last ones: back to step {past.step}, "
            f"and steps {first} to {step} are left out"
        )

    def _report_evaluation(self, step: int, metrics: Metrics | Silence) -> float:
        begun = time.perf_counter()
        tally = self._evaluate()
        loss = tally.loss()
        terms, more = tally.means(), {}
        self._remember_best(terms.get("accuracy", -loss))
        told = "".join(f", {name} {mean:.4f}" for name, mean in terms.items()) if len(terms) > 1 else ""
        if self.config.objective.name == "next_token":  # others predict tokens from both sides: no probability of a text follows from it
            more = {"perplexity": math.exp(min(loss, 700.0))}
            told = f", perplexity {more['perplexity']:,.2f}"
        seconds = time.perf_counter() - begun
        metrics.write("eval", step=step, loss=loss, **more, terms=terms, seconds=seconds, time=time.time())
        self.console.say(f"step {step}: held-out loss {loss:.4f}{told} ({duration(seconds)})")
        return loss

    def _report_tasks(self, step: int, events: Iterator[dict[str, Any]], metrics: Metrics | Silence) -> None:
        for event in events:
            metrics.write("task", step=step, **event, time=time.time())
            told = ", ".join(f"{name} {value:.4g}" for name, value in event["metrics"].items())
            self.console.say(f"step {step}: {event['task']} {Path(event['file']).name}: {told} ({duration(event['seconds'])})")

    def _announce(self, metrics: Metrics | Silence) -> None:
        """Measure the machine, and say and note what will be trained on it."""
        precision, dtype = self.config.train.precision, DTYPES[self.config.train.precision]
        place, self.peak_flops = describe(self.device, dtype), measure_peak(self.device, dtype)
        whole = build_model(self.config.model, device="meta")
        predicted = self.engine.objective.needs.predicted
        self.flops_per_token = flops_per_token(whole, self.config.model.seq_length, predicted)
        count = parameter_count(whole)
        versions = {"teratron": teratron.__version__, "torch": torch.__version__, "python": platform.python_version()}
        facts: dict[str, Any] = {"parameters": count, "vocab_size": self.data.special.vocab_size, "device": place, "precision": precision}
        facts |= {"peak_flops": self.peak_flops, "flops_per_token": self.flops_per_token, "versions": versions}
        facts |= {"ranks": self.mesh.world, "layout": self.mesh.sizes}
        facts |= {"train_tokens": self.data.train_tokens, "valid_tokens": self.data.valid_tokens}
        for restart in take_restarts() if self.leads else ():
            metrics.write("restart", step=self.state.step, **restart)
        metrics.write("resume" if self.state.step else "start", step=self.state.step, time=time.time(), **facts)
        if self.mesh.world > 1:
            self.console.say(describe_layout(self.mesh.sizes, self.config.parallel))
        self.console.say(
            f"{count:,} parameters in {precision} on {place}, matrix products up to {self.peak_flops / 1e9:,.0f} GFLOP/s; "
            f"{self.data.train_tokens:,} training and {self.data.valid_tokens:,} held-out tokens"
        )
        unreached = self.config.batches.unreached(self.config.train.steps)
        if unreached:
            self.console.say(unreached)
        if self.state.step:
            self.console.say(f"continuing {self.run} from step {self.state.step}")

    def _batch(self, samples: Samples, index: np.ndarray) -> Batch:
        special = self.data.special
        batch = self.engine.objective.prepare(samples, index, special)
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _valid_batches(self) -> Iterator[Batch]:
        """This rank's share of the held-out windows, as many batches as every rank gets."""
        if self.data.valid is None or self.data.valid.count is None:
            raise UserError("there is no held-out data: set data.valid, or data.split with a second part")
        size, limit = self.config.largest_batch, self.data.valid.count
        if self.config.train.eval_batches:
            limit = min(limit, self.config.train.eval_batches * size)
        for start in range(0, limit, size):
            batch = self._evenly(self.data.valid, start, min(size, limit - start))
            yield from micro_batches(batch, self.config.train.micro_batch)

    def _evenly(self, samples: Samples, start: int, count: int) -> Batch:
        """This rank's share of so many samples in a row. Every rank gets as many: what is missing is filled with rows of no weight."""
        ranks = self.mesh.data
        share = -(-count // ranks.size)
        wanted = np.arange(start + ranks.rank * share, start + (ranks.rank + 1) * share)
        batch = self._batch(samples, np.minimum(wanted, start + count - 1))
        kept = torch.from_numpy(wanted < start + count)[:, None].to(self.device)
        return batch | {name: batch[name] * kept for name in batch if name.endswith("weights")}


def _nothing() -> None:
    pass


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _phases(past: tuple[int, ...], steps: int) -> tuple[int, ...]:
    """Steps of each phase of the sample order: more steps than before append one (contract C14)."""
    done = sum(past)
    return (*past, steps - done) if steps > done else past


__all__ = ["Result", "Trainer"]
