"""What a contender is told, and how it answers: the shape, the batches, the gate after each step.

It is read by the Python of every peer's own environment, where this project is not: PyTorch and numpy alone.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

CHECKS = 2
"""Steps on given batches before the rounds: losses of the same weights, then of the same weights after one update. They also warm up."""


@dataclass(frozen=True)
class Shape:
    """A GPT-2 (learned positions, GELU, LayerNorm) or, `llama`, a Llama (rotary, SwiGLU, RMSNorm)."""

    llama: bool
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    seq_length: int
    vocab_size: int
    bias: bool
    tied: bool
    norm_eps: float
    rope_theta: float


@dataclass(frozen=True)
class Job:
    """One contender's part of a race. Its folder holds `tokens.npy`, `checks.npy` [CHECKS, B, S + 1] and `weights.pt`."""

    folder: str
    contender: str
    """The module of `contenders` that runs it."""
    variant: str
    """What the module makes of it, such as `fused`."""
    shape: Shape
    batch: int
    precision: str
    """`fp32` or `bf16`."""
    device: str
    threads: int
    switches: bool
    """Whether a peer gets this project's settings of the process too."""
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip: float

    def text(self) -> str:
        """As JSON, for `parse`."""
        return json.dumps(asdict(self))

    @staticmethod
    def parse(text: str) -> Job:
        values = json.loads(text)
        return Job(**values | {"shape": Shape(**values["shape"]), "betas": tuple(values["betas"])})

    def weights(self) -> dict[str, Tensor]:
        """By the names of `GPT2LMHeadModel` or `LlamaForCausalLM`, each matrix [out, in], a tied one once; float32."""
        return torch.load(Path(self.folder) / "weights.pt", mmap=True, weights_only=True)

    def rows(self) -> Iterator[Tensor]:
        """Token ids int64 [S + 1], for ever: those of the checks, then random windows of the text as nanoGPT draws them."""
        for batch in np.load(Path(self.folder) / "checks.npy"):
            yield from torch.from_numpy(batch)
        tokens = np.load(Path(self.folder) / "tokens.npy", mmap_mode="r")
        while True:
            for start in torch.randint(len(tokens) - self.shape.seq_length, (self.batch,)).tolist():
                yield torch.from_numpy(tokens[start : start + self.shape.seq_length + 1].astype(np.int64))

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets [B, S] of step after step, on the device."""
        rows = self.rows()
        while True:
            batch = torch.stack([next(rows) for _ in range(self.batch)])
            if self.device == "cuda":
                batch = batch.pin_memory().to(self.device, non_blocking=True)
            yield batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    def autocast(self) -> torch.autocast:
        """bf16 as the users of plain PyTorch run it."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16")


class Gate:
    """What every contender's loop passes after each step: it times the rounds, and holds the loop between them."""

    def __init__(self, job: Job, answers: TextIO) -> None:
        self.job, self.answers = job, answers
        self.imports = process_memory("VmRSS") if job.device == "cpu" else 0
        self.steps, self.goal, self.begun, self.losses = 0, CHECKS, 0.0, list[float]()

    def ready(self, parameters: int) -> None:
        """The loop begins; `parameters` counts shared ones once, without padding."""
        self.parameters = parameters

    def passed(self, loss: Tensor | float) -> None:
        """One step is done; `loss` is the mean of its batch before the update."""
        self.steps += 1
        if self.steps <= CHECKS:
            self.losses.append(float(loss))
        if self.steps == self.goal:
            self._synchronize()
            if self.steps == CHECKS:
                self._say({"parameters": self.parameters, "losses": self.losses, "imports": self.imports})
            else:
                self._say((time.perf_counter() - self.begun) / self.round)
            self._wait()

    def _wait(self) -> None:
        """Answer with the memory for 0, go on for as many steps as asked, end with whoever asks."""
        while (line := sys.stdin.readline()) == "0\n":
            self._say(process_memory("VmHWM") if self.job.device == "cpu" else torch.cuda.max_memory_allocated())
        if not line:
            os._exit(0)  # past the threads and the farewells of frameworks
        self.round = int(line)
        self.goal = self.steps + self.round
        self._synchronize()
        self.begun = time.perf_counter()

    def _say(self, answer: Any) -> None:
        self.answers.write(json.dumps(answer) + "\n")
        self.answers.flush()

    def _synchronize(self) -> None:
        if self.job.device == "cuda":
            torch.cuda.synchronize()


def keep_freed_memory() -> None:
    """glibc keeps what a step has freed for the next one; this project's own setting, for peers that get its switches."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**30)


def process_memory(field: str) -> int:
    """Bytes that this process holds (`VmRSS`) or held at most (`VmHWM`); without /proc both are the latter."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    # not getrusage: its peak starts at that of the process which started this one
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024
