"""The trainer: opens everything, checks everything, then the loop with its events (evaluate, save, log)."""

from __future__ import annotations

import math
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import teratron
from teratron.checkpoint import TrainingState, load_training, newest_checkpoint, save_training, saved_state
from teratron.checkpoint.format import check_space, checkpoint_bytes
from teratron.checkpoint.training import state_tensors
from teratron.config import Config, UserError
from teratron.data.batch import make_batch
from teratron.data.open import open_data
from teratron.data.samples import Samples
from teratron.models import build_model, flops_per_token, initialise, parameter_count
from teratron.objectives import Batch, Tally, build_objective
from teratron.optim import AdamW, learning_rate
from teratron.train.device import (
    DTYPES,
    check_memory,
    choose_device,
    compile_blocks,
    describe,
    keep_freed_memory,
    measure_peak,
    set_deterministic,
)
from teratron.train.evaluate import evaluate
from teratron.train.interrupt import Interrupt
from teratron.train.metrics import Console, Metrics, duration
from teratron.train.report import write_report
from teratron.train.run import absolute_paths, continue_config, fork, lock, write_config
from teratron.train.step import micro_batches, train_step

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
    """

    def __init__(
        self, config: Config | None, run: str | Path, *, device: str = "auto", fork_to: str | Path | None = None, echo: bool = True
    ) -> None:
        """config: None = the run's own. fork_to: branch off, train there from the newest checkpoint of `run`. echo: print."""
        self.run = Path(run if fork_to is None else fork_to)
        config = Config.load(run) if config is None else absolute_paths(config)
        self._lock = lock(self.run)
        try:
            if fork_to is not None:
                fork(Path(run), self.run)
            config = continue_config(self.run, config)
            self.console = Console(config.train.steps, config.log.every, sys.stdout if echo else None)
            self.device = choose_device(device)
            set_deterministic(config.train.deterministic)
            keep_freed_memory()
            self._open(config)
            self._check()
            write_config(self.run, self.config)
        except BaseException:
            self._lock.close()
            raise

    def _open(self, config: Config) -> None:
        """Data, model, optimizer, and the state of the newest checkpoint."""
        checkpoint = newest_checkpoint(self.run, self.console.say)
        if checkpoint is not None and config.model.vocab_size == 0:
            config = config.override({"model.vocab_size": checkpoint.config().model.vocab_size})
        past = saved_state(checkpoint) if checkpoint is not None else TrainingState()
        self.state = replace(past, phases=_phases(past.phases, config.train.steps))
        self.data = open_data(config, self.run, self.state.phases, self.console.say)
        self.config = config.override({"model.vocab_size": self.data.vocab_size})
        if self.state.step > config.train.steps:
            raise UserError(f"train.steps = {config.train.steps} is below step {self.state.step}, where the checkpoint stands: raise it")
        check_memory(self.config, self.device)
        self.objective = build_objective(self.config.objective)
        self.model = build_model(self.config.model, device=self.device, dtype=DTYPES[self.config.train.precision])
        if checkpoint is None:
            initialise(self.model, self.config.train.seed)
        self.optimizer = AdamW(self.model, self.config.optim)
        if checkpoint is not None:
            load_training(checkpoint, self.optimizer)
        self._skipped = 0
        if self.config.train.compile:
            compile_blocks(self.model, self.device)

    def _check(self) -> None:
        """What the first step, the first evaluation and the first checkpoint would stumble over."""
        self.batch(min(self.state.step + 1, self.config.train.steps))
        if self.data.valid is not None:
            next(self._valid_batches())
        check_space(self.run, checkpoint_bytes(state_tensors(self.optimizer)))

    def train(self) -> Result:
        """Train to `train.steps`, evaluating, saving and logging; Ctrl-C saves and returns with `interrupted`."""
        total = self.config.train.steps
        if self._lock.closed:
            self._lock = lock(self.run)
        try:
            if self.state.step >= total:
                self.console.say(f"{self.run} is complete: step {self.state.step} of {total}; to train on: --train.steps N")
                result = Result(self.state.step, math.nan, math.nan)
            else:
                with Metrics(self.run, self.config.log.tensorboard, self.console.say) as metrics, Interrupt() as interrupt:
                    self._announce(metrics)
                    result = self._loop(metrics, interrupt)
            write_report(self.run)
            return result
        finally:
            self.console.finish()
            self._lock.close()

    def evaluate(self) -> float:
        """The held-out loss over `train.eval_batches` global batches, or over everything."""
        return self._evaluate().loss()

    def _evaluate(self) -> Tally:
        return evaluate(self.model, self.objective, self._valid_batches())

    def batch(self, step: int) -> Batch:
        """The global batch of a step (from 1): computed from the step alone."""
        size = self.config.train.global_batch
        return self._batch(self.data.train, np.arange((step - 1) * size, step * size))

    def _loop(self, metrics: Metrics, interrupt: Interrupt) -> Result:
        config, loss, valid_loss = self.config.train, math.nan, math.nan
        for step in range(self.state.step + 1, config.steps + 1):
            loss = self._step(step, metrics)
            last = step == config.steps
            if self.data.valid is not None and (last or (config.eval_every and step % config.eval_every == 0)):
                valid_loss = self._report_evaluation(step, metrics)
            self._refuse_numbers(loss)
            stop = interrupt.asked
            if last or stop or (self.config.checkpoint.every and step % self.config.checkpoint.every == 0):
                self._save(metrics)
            if stop:
                break
        interrupted = self.state.step < config.steps
        reason = "interrupted" if interrupted else "done"
        metrics.write("end", step=self.state.step, seconds=self.state.seconds, reason=reason, time=time.time())
        return Result(self.state.step, loss, valid_loss, interrupted)

    def _refuse_numbers(self, loss: float) -> None:
        """Stop before good checkpoints are pushed out by useless ones."""
        if not math.isfinite(loss) or self._skipped >= SKIPS_ALLOWED:
            found = f"the loss is {loss}" if self._skipped < SKIPS_ALLOWED else f"{self._skipped} updates in a row were skipped"
            raise UserError(
                f"{self.run}: step {self.state.step}: {found}: stopped without saving, earlier checkpoints are intact; "
                "lower optim.lr or model.init_std, and start again or --fork from the newest checkpoint"
            )

    def _step(self, step: int, metrics: Metrics) -> float:
        config, begun = self.config.train, time.perf_counter()
        lr = learning_rate(self.config.optim, step, config.steps)
        batch = self.batch(step)
        tally, norm = train_step(
            self.model, self.objective, self.optimizer, batch, step=step, seed=config.seed, micro_batch=config.micro_batch, lr=lr
        )
        loss = tally.loss()
        seconds = time.perf_counter() - begun
        tokens = config.global_batch * self.config.model.seq_length
        self.state = replace(self.state, step=step, tokens=self.state.tokens + tokens, seconds=self.state.seconds + seconds)
        event = {
            "step": step,
            "loss": loss,
            "terms": tally.means(),
            "grad_norm": norm,
            "lr": lr,
            "tokens": self.state.tokens,
            "seconds": seconds,
        }
        event |= {"tokens_per_second": tokens / seconds, "mfu": tokens / seconds * self.flops_per_token / self.peak_flops}
        metrics.write("step", **event, time=time.time())
        self._skipped = 0 if math.isfinite(norm) else self._skipped + 1
        if self._skipped:
            self.console.say(f"step {step}: the gradient norm is {norm}: the update was skipped; lower optim.lr if this repeats")
        self.console.step(event)
        return loss

    def _report_evaluation(self, step: int, metrics: Metrics) -> float:
        begun = time.perf_counter()
        tally = self._evaluate()
        loss = tally.loss()
        perplexity = math.exp(min(loss, 700.0))
        metrics.write("eval", step=step, loss=loss, perplexity=perplexity, terms=tally.means(), time=time.time())
        self.console.say(f"step {step}: held-out loss {loss:.4f}, perplexity {perplexity:,.2f} ({duration(time.perf_counter() - begun)})")
        return loss

    def _save(self, metrics: Metrics) -> None:
        begun = time.perf_counter()
        tokenizer = self.run / "tokenizer"
        folder = save_training(self.run, self.config, self.optimizer, self.state, [tokenizer] if tokenizer.is_dir() else [])
        metrics.write("save", step=self.state.step, seconds=time.perf_counter() - begun, time=time.time())
        self.console.say(f"step {self.state.step}: saved {folder}")

    def _announce(self, metrics: Metrics) -> None:
        """Measure the machine, and say and note what will be trained on it."""
        precision, place = self.config.train.precision, describe(self.device)
        self.peak_flops = measure_peak(self.device, DTYPES[precision])
        self.flops_per_token = flops_per_token(self.model, self.config.model.seq_length)
        count = parameter_count(self.model)
        versions = {"teratron": teratron.__version__, "torch": torch.__version__, "python": platform.python_version()}
        facts: dict[str, Any] = {"parameters": count, "vocab_size": self.data.vocab_size, "device": place, "precision": precision}
        facts |= {"peak_flops": self.peak_flops, "flops_per_token": self.flops_per_token, "versions": versions}
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
        if self.data.valid is None:
            raise UserError("there is no held-out data: set data.valid, or data.split with a second part")
        size, limit = self.config.train.global_batch, self.data.valid.count
        if self.config.train.eval_batches:
            limit = min(limit, self.config.train.eval_batches * size)
        for start in range(0, limit, size):
            whole = self._batch(self.data.valid, np.arange(start, min(start + size, limit)))
            yield from micro_batches(whole, self.config.train.micro_batch)


def _phases(past: tuple[int, ...], steps: int) -> tuple[int, ...]:
    """Steps of each phase of the sample order: more steps than before append one (contract C14)."""
    done = sum(past)
    return (*past, steps - done) if steps > done else past


__all__ = ["Result", "Trainer"]
