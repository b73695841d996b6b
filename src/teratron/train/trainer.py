"""The trainer: opens everything, checks everything, then the loop with its events (evaluate, save, log)."""

from __future__ import annotations

import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np
import torch

import teratron
from teratron.checkpoint import TrainingState, load_training, newest_checkpoint, open_checkpoint, save_training, saved_state
from teratron.checkpoint.agree import agree
from teratron.checkpoint.format import check_space, checkpoint_bytes
from teratron.checkpoint.reader import Checkpoint
from teratron.config import Config, UserError
from teratron.data.batch import make_batch
from teratron.data.open import open_data
from teratron.data.samples import Samples
from teratron.models import build_model, flops_per_token, parameter_count
from teratron.objectives import Batch, Tally
from teratron.optim import LossScale, learning_rate
from teratron.parallel.device import DTYPES, choose_device
from teratron.parallel.mesh import Mesh, check_layout, mesh_sizes
from teratron.parallel.worker import connect, disconnect, this_worker
from teratron.train.device import check_memory, compile_blocks, describe, keep_freed_memory, measure_peak, set_deterministic
from teratron.train.engine import Engine, check_batch, micro_batches
from teratron.train.interrupt import Interrupt
from teratron.train.metrics import Console, Metrics, Silence, duration
from teratron.train.report import write_report
from teratron.train.run import absolute_paths, check_held, continue_config, fork, lock, write_config

T = TypeVar("T")
SKIPS_ALLOWED = 10
"""Updates in a row that may be skipped for a gradient that is not finite."""


@dataclass(frozen=True)
class Result:
    """How a call of `Trainer.train` ended."""

    step: int
    loss: float
    """Training loss of the last step; NaN when no step was made."""
    valid_loss: float
    """Held-out loss of the last evaluation; NaN without one."""
    interrupted: bool = False


class Trainer:
    """One run in one folder. Making it opens the data, the model and the newest checkpoint; `train` goes to the last step.

    The same call continues a run (contract C13); a Trainer holds its folder until `train` returns or raises. Raises
    `UserError` for everything that can be known before the first step; the folder then is no run yet, and any config may follow.
    Under torchrun, srun or `teratron train --nproc N` every process makes one, and they share the work as `parallel.*` says.
    """

    def __init__(
        self, config: Config | None, run: str | Path, *, device: str = "auto", fork_to: str | Path | None = None, echo: bool = True
    ) -> None:
        """config: None = the run's own. fork_to: branch off, train there from the newest checkpoint of `run`. echo: print."""
        self.run = Path(run if fork_to is None else fork_to)
        config = Config.load(run) if config is None else absolute_paths(config)
        worker = this_worker()
        self.device = choose_device(device, worker.local_rank if worker else 0)
        if worker is not None:
            connect(worker, self.device)
        self.mesh = Mesh(mesh_sizes(config.parallel, worker.world), worker.rank) if worker is not None else Mesh()
        self.leads = self.mesh.rank == 0
        """Whether this is the one process that writes and speaks."""
        self._lock: TextIO | None = self._lead(lambda: lock(self.run))
        try:
            if fork_to is not None:
                self._lead(lambda: fork(Path(run), self.run))
            config = continue_config(self.run, config)
            self.console = Console(config.train.steps, config.log.every, sys.stdout if echo and self.leads else None)
            set_deterministic(config.train.deterministic)
            keep_freed_memory()
            self._open(config)
            self._check()
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
        checkpoint = self._newest()
        if checkpoint is not None and config.model.vocab_size == 0:
            config = config.override({"model.vocab_size": checkpoint.config().model.vocab_size})
        past = saved_state(checkpoint) if checkpoint is not None else TrainingState()
        self.state = replace(past, phases=_phases(past.phases, config.train.steps))
        check_batch(config, self.mesh.data.size)
        check_layout(config.model, config.parallel)  # once more when the data has told the vocabulary
        self.data = self._first(lambda: open_data(config, self.run, self.state.phases, self.console.say))
        self.config = config.override({"model.vocab_size": self.data.vocab_size})
        if self.state.step > config.train.steps:
            raise UserError(f"train.steps = {config.train.steps} is below step {self.state.step}, where the checkpoint stands: raise it")
        check_layout(self.config.model, self.config.parallel)
        self._together(lambda: check_memory(self.config, self.mesh, self.device))
        self.engine = Engine(self.config, self.mesh, self.device)
        self.optimizer = self.engine.optimizer
        if checkpoint is None:
            self.optimizer.initialise(self.config.train.seed)
        else:
            load_training(checkpoint, self.optimizer.pieces(), self.mesh.control)
            self.engine.flat.publish()
        self.loss_scale = self.state.loss_scale or LossScale.start(self.config.optim, self.config.train.precision)
        self._skipped = 0
        if self.config.train.compile:
            for model in self.engine.stages.stages().values():
                compile_blocks(model, self.device)

    def _newest(self) -> Checkpoint | None:
        """The newest good checkpoint; one rank verifies, the others open what it found."""
        found = self._lead(lambda: newest_checkpoint(self.run, self.console.say))
        name = self.mesh.control.gather_bytes(str(found.folder).encode() if found is not None else b"")[0].decode()
        return found if self.leads or not name else open_checkpoint(Path(name))

    def _check(self) -> None:
        """What the first step, the first evaluation and the first checkpoint would stumble over."""
        self.batch(min(self.state.step + 1, self.config.train.steps))
        if self.data.valid is not None:
            next(self._valid_batches())
        needed = checkpoint_bytes(self.optimizer.pieces(), self.mesh.control)
        self._lead(lambda: check_space(self.run, needed))

    def train(self) -> Result:
        """Train to `train.steps`, evaluating, saving and logging; Ctrl-C saves and returns with `interrupted`."""
        total = self.config.train.steps
        if self._lock is not None and self._lock.closed:
            self._lock = lock(self.run)
        try:
            if self.state.step >= total:
                self.console.say(f"{self.run} is complete: step {self.state.step} of {total}; to train on: --train.steps N")
                result = Result(self.state.step, math.nan, math.nan)
            else:
                with self._metrics() as metrics, Interrupt() as interrupt:
                    self._announce(metrics)
                    result = self._loop(metrics, interrupt)
            if self.leads:
                write_report(self.run)
            return result
        finally:
            self.console.finish()
            self._close()

    def _metrics(self) -> Metrics | Silence:
        return Metrics(self.run, self.config.log.tensorboard, self.console.say) if self.leads else Silence()

    def evaluate(self) -> float:
        """The held-out loss over `train.eval_batches` global batches, or over everything."""
        return self._evaluate().loss()

    def _evaluate(self) -> Tally:
        return self.engine.evaluate(self._valid_batches())

    def batch(self, step: int) -> Batch:
        """This process's rows of the global batch of a step (from 1): computed from the step alone."""
        size = self.config.train.global_batch
        return self._batch(self.data.train, np.arange((step - 1) * size, step * size)[self.engine.rows(size)])

    def _loop(self, metrics: Metrics | Silence, interrupt: Interrupt) -> Result:
        config, loss, valid_loss = self.config.train, math.nan, math.nan
        for step in range(self.state.step + 1, config.steps + 1):
            loss = self._step(step, metrics)
            last = step == config.steps
            if self.data.valid is not None and (last or (config.eval_every and step % config.eval_every == 0)):
                valid_loss = self._report_evaluation(step, metrics)
            self._refuse_numbers(loss)
            stop = self._any(interrupt.asked)
            if last or stop or (self.config.checkpoint.every and step % self.config.checkpoint.every == 0):
                self._save(metrics)
            if stop:
                break
        interrupted = self.state.step < config.steps
        reason = "interrupted" if interrupted else "done"
        metrics.write("end", step=self.state.step, seconds=self.state.seconds, reason=reason, time=time.time())
        return Result(self.state.step, loss, valid_loss, interrupted)

    def _any(self, asked: bool) -> bool:
        """Whether any rank says so: all ranks stop after the same step, and none when another has died."""
        flag = torch.tensor([int(asked)])
        self.mesh.all.max(flag).wait()
        return bool(flag)

    def _refuse_numbers(self, loss: float) -> None:
        """Stop before good checkpoints are pushed out by useless ones."""
        if not math.isfinite(loss) or self._skipped >= SKIPS_ALLOWED:
            found = f"the loss is {loss}" if self._skipped < SKIPS_ALLOWED else f"{self._skipped} updates in a row were skipped"
            raise UserError(
                f"{self.run}: step {self.state.step}: {found}: stopped without saving, earlier checkpoints are intact; "
                "lower optim.lr or model.init_std, and start again or --fork from the newest checkpoint"
            )

    def _step(self, step: int, metrics: Metrics | Silence) -> float:
        config, begun = self.config.train, time.perf_counter()
        lr, scale = learning_rate(self.config.optim, step, config.steps), self.loss_scale
        number = step - self.state.skipped
        tally, norm = self.engine.step(self.batch(step), step=step, number=number, lr=lr, loss_scale=scale.scale)
        loss, finite = tally.loss(), math.isfinite(norm)
        self.loss_scale = scale.after(finite, self.config.optim, config.precision)
        seconds = time.perf_counter() - begun
        tokens = config.global_batch * self.config.model.seq_length
        self.state = replace(
            self.state,
            step=step,
            tokens=self.state.tokens + tokens,
            seconds=self.state.seconds + seconds,
            skipped=self.state.skipped + (not finite),
            loss_scale=self.loss_scale,
        )
        event = {"step": step, "loss": loss, "terms": tally.means(), "grad_norm": norm, "lr": lr}
        event |= {"tokens": self.state.tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}
        event |= {"mfu": tokens / seconds * self.flops_per_token / (self.peak_flops * self.mesh.world)}
        if config.precision == "fp16":
            event |= {"loss_scale": scale.scale}
        if finite:
            self._skipped = 0
        else:
            event |= {"skipped": True}
            self._say_skipped(step, norm)
        metrics.write("step", **event, time=time.time())
        self.console.step(event)
        return loss

    def _say_skipped(self, step: int, norm: float) -> None:
        """Tell an overflow that a smaller loss scale cures from one that nothing here does."""
        if self.loss_scale.scale > self.config.optim.min_loss_scale and not self.config.optim.loss_scale and self.loss_scale.overflows:
            self.console.say(f"step {step}: overflow in fp16: the update was skipped; loss scale now {self.loss_scale.scale:g}")
            return
        self._skipped += 1
        self.console.say(f"step {step}: the gradient norm is {norm}: the update was skipped; lower optim.lr if this repeats")

    def _report_evaluation(self, step: int, metrics: Metrics | Silence) -> float:
        begun = time.perf_counter()
        tally = self._evaluate()
        loss = tally.loss()
        perplexity = math.exp(min(loss, 700.0))
        metrics.write("eval", step=step, loss=loss, perplexity=perplexity, terms=tally.means(), time=time.time())
        self.console.say(f"step {step}: held-out loss {loss:.4f}, perplexity {perplexity:,.2f} ({duration(time.perf_counter() - begun)})")
        return loss

    def _save(self, metrics: Metrics | Silence) -> None:
        begun = time.perf_counter()
        self._lead(lambda: check_held(self._lock, self.run))
        tokenizer = self.run / "tokenizer"
        extra = [tokenizer] if tokenizer.is_dir() else []
        layout = {"ranks": self.mesh.world, **self.mesh.sizes, "sharded": self.config.parallel.shard}
        folder = save_training(self.run, self.config, self.optimizer.pieces(), self.state, extra, self.mesh.control, layout)
        metrics.write("save", step=self.state.step, seconds=time.perf_counter() - begun, time=time.time())
        self.console.say(f"step {self.state.step}: saved {folder}")

    def _announce(self, metrics: Metrics | Silence) -> None:
        """Measure the machine, and say and note what will be trained on it."""
        precision, place = self.config.train.precision, describe(self.device)
        self.peak_flops = measure_peak(self.device, DTYPES[precision])
        whole = build_model(self.config.model, device="meta")
        self.flops_per_token = flops_per_token(whole, self.config.model.seq_length)
        count = parameter_count(whole)
        versions = {"teratron": teratron.__version__, "torch": torch.__version__, "python": platform.python_version()}
        facts: dict[str, Any] = {"parameters": count, "vocab_size": self.data.vocab_size, "device": place, "precision": precision}
        facts |= {"peak_flops": self.peak_flops, "flops_per_token": self.flops_per_token, "versions": versions}
        facts |= {"ranks": self.mesh.world, "layout": self.mesh.sizes}
        facts |= {"train_tokens": self.data.train_tokens, "valid_tokens": self.data.valid_tokens}
        metrics.write("resume" if self.state.step else "start", step=self.state.step, time=time.time(), **facts)
        self.console.say(
            f"{count:,} parameters in {precision} on {place}, matrix products up to {self.peak_flops / 1e9:,.0f} GFLOP/s; "
            f"{self.data.train_tokens:,} training and {self.data.valid_tokens:,} held-out tokens"
        )
        if self.state.step:
            self.console.say(f"continuing {self.run} from step {self.state.step}")

    def _batch(self, samples: Samples, index: np.ndarray) -> Batch:
        rows = samples.rows(index)
        if rows.max() >= self.data.vocab_size:
            raise UserError(
                f"the data holds token {rows.max()}, model.vocab_size is {self.data.vocab_size}: "
                "set it to the size of the tokenizer that prepared the data, or prepare the data again"
            )
        data = self.config.data
        batch = make_batch(
            rows, index, eod=self.data.eod, isolate_documents=data.isolate_documents, mask_end_of_document=data.mask_end_of_document
        )
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _valid_batches(self) -> Iterator[Batch]:
        """This rank's share of the held-out windows. Every rank gets as many batches: what is missing is filled with rows of no weight."""
        if self.data.valid is None:
            raise UserError("there is no held-out data: set data.valid, or data.split with a second part")
        size, limit, ranks = self.config.train.global_batch, self.data.valid.count, self.mesh.data
        if self.config.train.eval_batches:
            limit = min(limit, self.config.train.eval_batches * size)
        for start in range(0, limit, size):
            count = min(size, limit - start)
            share = -(-count // ranks.size)
            wanted = np.arange(start + ranks.rank * share, start + (ranks.rank + 1) * share)
            batch = self._batch(self.data.valid, np.minimum(wanted, start + count - 1))
            batch["weights"] *= torch.from_numpy(wanted < start + count)[:, None].to(self.device)
            yield from micro_batches(batch, self.config.train.micro_batch)


def _nothing() -> None:
    pass


def _phases(past: tuple[int, ...], steps: int) -> tuple[int, ...]:
    """Steps of each phase of the sample order: more steps than before append one (contract C14)."""
    done = sum(past)
    return (*past, steps - done) if steps > done else past


__all__ = ["Result", "Trainer"]
