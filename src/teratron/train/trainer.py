"""The trainer: opens everything, checks everything, then the loop with its events (evaluate, save, log)."""

from __future__ import annotations

import math
import platform
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

import teratron
from teratron.checkpoint import TrainingState, checkpoint_folders, load_training, newest_checkpoint, save_training
from teratron.config import Config, UserError
from teratron.data.batch import make_batch
from teratron.data.open import TrainingData, open_data
from teratron.models import build_model, flops_per_token, initialise, parameter_count
from teratron.objectives import Batch, build_objective
from teratron.optim import AdamW, learning_rate
from teratron.train.device import DTYPES, choose_device, describe, measure_peak
from teratron.train.evaluate import evaluate
from teratron.train.metrics import Console, Metrics, duration
from teratron.train.report import write_report
from teratron.train.run import absolute_paths, continue_config, fork, lock, write_config
from teratron.train.step import micro_batches, train_step


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

    The same call continues a run (contract C13). Raises `UserError` for everything that can be known before the first step.
    """

    def __init__(
        self, config: Config | None, run: str | Path, *, device: str = "auto", fork_to: str | Path | None = None, echo: bool = True
    ) -> None:
        self.run = Path(run)
        config = Config.load(self.run) if config is None else absolute_paths(config)
        if fork_to is not None:
            fork(self.run, Path(fork_to), config)
            self.run = Path(fork_to)
        self._lock = lock(self.run)
        config = continue_config(self.run, config)
        self.device = choose_device(device, config.train.deterministic)
        self.console = Console(config.train.steps, config.log.every) if echo else Console(0, 1, open("/dev/null", "w"))
        checkpoint = newest_checkpoint(self.run, self.console.say)
        past = checkpoint.manifest["state"]["phases"] if checkpoint else []
        phases = _phases(past, config.train.steps)
        self.data = open_data(config, self.run, phases, self.console.say)
        self.config = config.override({"model.vocab_size": self.data.vocab_size})
        _check_memory(self.config, self.device)
        self.objective = build_objective(self.config.objective)
        self.model = build_model(self.config.model, device=self.device, dtype=DTYPES[self.config.train.precision])
        if checkpoint is None:
            initialise(self.model, self.config.train.seed)
        self.optimizer = AdamW(self.model, self.config.optim)
        self.state = TrainingState(phases=phases)
        if checkpoint is not None:
            self.state = replace(load_training(checkpoint, self.optimizer), phases=phases)
        if self.config.train.compile:
            _compile(self.model, self.device)
        self._interrupted = False
        write_config(self.run, self.config)

    def train(self) -> Result:
        """Train to `train.steps`, evaluating, saving and logging; Ctrl-C saves and returns with `interrupted`."""
        metrics = Metrics(self.run, self.config.log.tensorboard)
        handlers = self._catch_signals()
        try:
            self._announce(metrics)
            return self._loop(metrics)
        finally:
            self.console.finish()
            metrics.close()
            write_report(self.run)
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def evaluate(self) -> float:
        """The held-out loss over `train.eval_batches` global batches, or over everything."""
        self.model.eval()
        loss = evaluate(self.model, self.objective, self._valid_batches())
        self.model.train()
        return loss

    def batch(self, step: int) -> Batch:
        """The global batch of a step (from 1): computed from the step alone."""
        size = self.config.train.global_batch
        return self._batch(self.data.train, np.arange((step - 1) * size, step * size))

    def _loop(self, metrics: Metrics) -> Result:
        config, loss, valid_loss = self.config.train, math.nan, math.nan
        started = self.state.step
        for step in range(started + 1, config.steps + 1):
            loss = self._step(step, metrics, started)
            last = step == config.steps
            if self.data.valid is not None and (last or (config.eval_every and step % config.eval_every == 0)):
                valid_loss = self._report_evaluation(step, metrics)
            if last or self._interrupted or (self.config.checkpoint.every and step % self.config.checkpoint.every == 0):
                self._save(metrics)
            if self._interrupted:
                break
        reason = "interrupted" if self._interrupted else "done"
        metrics.write("end", step=self.state.step, seconds=self.state.seconds, reason=reason, time=time.time())
        return Result(self.state.step, loss, valid_loss, self._interrupted)

    def _step(self, step: int, metrics: Metrics, started: int) -> float:
        config, begun = self.config.train, time.perf_counter()
        lr = learning_rate(self.config.optim, step, config.steps)
        loss, norm = train_step(
            self.model, self.objective, self.optimizer, self.batch(step), step=step, seed=config.seed, micro_batch=config.micro_batch, lr=lr
        )
        if not math.isfinite(norm):
            self.console.say(f"step {step}: the gradient norm is {norm}: the update was skipped; lower optim.lr if this repeats")
        seconds = time.perf_counter() - begun
        tokens = config.global_batch * self.config.model.seq_length
        self.state = replace(self.state, step=step, tokens=self.state.tokens + tokens, seconds=self.state.seconds + seconds)
        rate = tokens / seconds
        event = {"step": step, "loss": loss, "grad_norm": norm, "lr": lr, "tokens": self.state.tokens, "seconds": seconds}
        event |= {"tokens_per_second": rate, "mfu": rate * self.flops_per_token / self.peak_flops}
        metrics.write("step", **event, time=time.time())
        if step > started + 1 or step == config.steps:  # the first step also warms up: no forecast from it
            self._mean_seconds = seconds if step == started + 2 else 0.95 * self._mean_seconds + 0.05 * seconds
        else:
            self._mean_seconds = seconds
        self.console.step(event, self._mean_seconds * (config.steps - step))
        return loss

    def _report_evaluation(self, step: int, metrics: Metrics) -> float:
        begun = time.perf_counter()
        loss = self.evaluate()
        perplexity = math.exp(min(loss, 700.0))
        metrics.write("eval", step=step, loss=loss, perplexity=perplexity, time=time.time())
        self.console.say(f"step {step}: held-out loss {loss:.4f}, perplexity {perplexity:,.2f} ({duration(time.perf_counter() - begun)})")
        return loss

    def _save(self, metrics: Metrics) -> None:
        begun = time.perf_counter()
        folder = self.run / "checkpoints" / f"step-{self.state.step:08d}"
        if folder not in checkpoint_folders(self.run):
            tokenizer = self.run / "tokenizer"
            save_training(self.run, self.config, self.optimizer, self.state, [tokenizer] if tokenizer.is_dir() else [])
            metrics.write("save", step=self.state.step, seconds=time.perf_counter() - begun, time=time.time())
        self.console.say(f"step {self.state.step}: saved {folder}")

    def _announce(self, metrics: Metrics) -> None:
        self.peak_flops = measure_peak(self.device, DTYPES[self.config.train.precision])
        self.flops_per_token = flops_per_token(self.model, self.config.model.seq_length)
        count = parameter_count(self.model)
        versions = {"teratron": teratron.__version__, "torch": torch.__version__, "python": platform.python_version()}
        facts: dict[str, Any] = {"parameters": count, "vocab_size": self.data.vocab_size, "device": describe(self.device)}
        facts |= {"precision": self.config.train.precision, "peak_flops": self.peak_flops, "flops_per_token": self.flops_per_token}
        facts |= {"versions": versions, "train_tokens": self.data.train_tokens, "valid_tokens": self.data.valid_tokens}
        metrics.write("resume" if self.state.step else "start", step=self.state.step, time=time.time(), **facts)
        self.console.say(
            f"{count:,} parameters in {self.config.train.precision} on {describe(self.device)}, matrix products up to {self.peak_flops / 1e9:,.0f} GFLOP/s; "
            f"{self.data.train_tokens:,} training and {self.data.valid_tokens:,} held-out tokens"
        )
        if self.state.step:
            self.console.say(f"continuing {self.run} from step {self.state.step}")

    def _batch(self, samples: Any, index: np.ndarray) -> Batch:
        rows = samples.rows(index)
        if rows.max() >= self.data.vocab_size:
            raise UserError(
                f"the data holds token {rows.max()}, model.vocab_size is {self.data.vocab_size}: they belong to different tokenizers"
            )
        data = self.config.data
        batch = make_batch(
            rows, index, eod=self.data.eod, isolate_documents=data.isolate_documents, mask_end_of_document=data.mask_end_of_document
        )
        if not data.isolate_documents:
            del batch["segments"]  # without segments attention takes the plain causal path
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _valid_batches(self) -> Iterator[Batch]:
        if self.data.valid is None:
            raise UserError("there is no held-out data: set data.valid, or data.split with a second part")
        size, limit = self.config.train.global_batch, self.data.valid.count or 0
        if self.config.train.eval_batches:
            limit = min(limit, self.config.train.eval_batches * size)
        for start in range(0, limit, size):
            whole = self._batch(self.data.valid, np.arange(start, min(start + size, limit)))
            yield from micro_batches(whole, self.config.train.micro_batch)

    def _catch_signals(self) -> dict[int, Any]:
        """First SIGINT or SIGTERM: finish the step, save, leave. A second one stops at once."""

        def interrupt(number: int, frame: FrameType | None) -> None:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
            self.console.say(f"{signal.Signals(number).name}: finishing this step, then saving (again = stop at once)")

        try:
            return {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: whoever runs there handles signals
            return {}


def _phases(past: list[int], steps: int) -> tuple[int, ...]:
    """Steps of each phase of the sample order: more steps than before append one (contract C14)."""
    done = sum(past)
    return (*past, steps - done) if steps > done else tuple(past)


def _compile(model: torch.nn.Module, device: torch.device) -> None:
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "c++", "clang++"))):
        raise UserError("train.compile on CPU needs a C++ compiler: install one (`apt-get install g++`), or drop --train.compile")
    for block in model.blocks.values():  # type: ignore[union-attr, operator]
        block.compile()


def _check_memory(config: Config, device: torch.device) -> None:
    """Refuse a model whose state alone exceeds the memory here: weights, gradients, masters, two moments."""
    count = parameter_count(build_model(config.model, device="meta"))
    needed = count * {"fp32": 16, "bf16": 2 + 2 + 4 + 4 + 8, "fp64": 32}[config.train.precision]
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _available_memory()
    if needed > free:
        raise UserError(
            f"{count:,} parameters in {config.train.precision} need {needed / 2**30:,.1f} GiB for weights, gradients and optimizer; "
            f"{free / 2**30:,.1f} GiB are free on {device.type}: choose a smaller model"
        )


def _available_memory() -> float:
    """Bytes that can be taken without swapping; infinite where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return float(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))) * 1024


__all__ = ["Result", "Trainer", "TrainingData"]
