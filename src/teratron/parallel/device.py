"""The device of a process and the number types of a run."""

from __future__ import annotations

import os
import shutil

import torch

from teratron.config import UserError
from teratron.parallel.worker import Worker

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16, "fp64": torch.float64}
"""`train.precision` -> type of weights and activations."""


def choose_device(name: str, worker: Worker | None = None) -> torch.device:
    """`auto` = CUDA if there is any, else the CPU. Each worker of a machine gets a CUDA device of its own; None = a single process.

    Raises `UserError` for a CUDA device that is not there.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {name}: expected auto, cpu or cuda")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cuda" and not count:
        raise UserError("--device cuda: no CUDA device is visible to PyTorch; use --device cpu, or check nvidia-smi and the PyTorch build")
    if name == "cpu" or not count:
        return torch.device("cpu")
    return torch.device("cuda", _cuda_index(worker, count) if worker is not None else 0)


def has_compiler(device: torch.device) -> bool:
    """Whether torch.compile works here: on CPU it needs a C++ compiler."""
    return device.type != "cpu" or any(map(shutil.which, ("g++", "c++", "clang++")))


def _cuda_index(worker: Worker, devices: int) -> int:
    if devices >= worker.local_world:
        return worker.local_rank
    if devices == 1 and "LOCAL_RANK" not in os.environ:
        return 0  # srun --gpus-per-task 1 shows each task its own only
    raise UserError(
        f"{worker.local_world} processes on a machine with {devices} CUDA device{'s' * (devices != 1)}: expected a device for each; "
        f"start {devices} at most, such as --nproc {devices}, or choose --device cpu"
    )
