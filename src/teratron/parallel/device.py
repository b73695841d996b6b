"""The device of a process and the number types of a run."""

from __future__ import annotations

import torch

from teratron.config import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
"""`train.precision` -> type of weights and activations."""


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` = CUDA if there is any, else the CPU. Of several CUDA devices this process takes the local_rank-th.

    Raises `UserError` for a CUDA device that is not there.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {name}: expected auto, cpu or cuda")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cuda" and not count:
        raise UserError("--device cuda: no CUDA device is visible to PyTorch; use --device cpu, or check nvidia-smi and the PyTorch build")
    if name == "cpu" or not count:
        return torch.device("cpu")
    if local_rank >= count:
        raise UserError(
            f"--device {name}: {local_rank + 1} processes here, {count} CUDA devices: start {count} at most, or choose --device cpu"
        )
    return torch.device("cuda", local_rank)
