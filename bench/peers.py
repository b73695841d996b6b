"""Who runs beside this project: each peer's module, variant, and the environment that it is installed into."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from workloads import Workload

from teratron.config import UserError

BENCH = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Peer:
    """How one contender is run."""

    contender: str
    """The module of `contenders`."""
    variant: str = ""
    environment: str = ""
    """The file of `requirements` that it needs; without one the Python that runs the benchmark serves."""
    llama_only: bool = False
    """Whether it has no GPT-2 style model."""
    biased: bool = False
    """Whether its GPT-2 always has biases."""
    alike: bool = True
    """Whether its GPT-2 can be given the same weights; without, only the shapes are equal, and its losses are not compared."""

    @property
    def python(self) -> Path:
        """The interpreter that runs it."""
        return environments() / self.environment / "bin" / "python" if self.environment else Path(sys.executable)

    def can_run(self, workload: Workload) -> bool:
        """Whether it has a model for the workload."""
        gpt2 = not workload.shape.llama
        return not (gpt2 and (self.llama_only or (self.biased and not workload.shape.bias)))

    def compared(self, workload: Workload) -> bool:
        """Whether its losses must be this project's."""
        return self.alike or workload.shape.llama


OURS = Peer("teratron")
PEERS = {
    "nanogpt": Peer("nanogpt"),
    "nanogpt-fused": Peer("nanogpt", "fused"),
    "nanogpt-compiled": Peer("nanogpt", "compiled"),
    "ddp": Peer("ddp", "fused"),
    "fsdp2": Peer("fsdp2", "fused"),
    "transformers": Peer("hf", environment="transformers", biased=True),
    "transformers-fused": Peer("hf", "fused", "transformers", biased=True),
    "trainer": Peer("hf_trainer", environment="transformers", biased=True),
    "lightning": Peer("lightning_loop", "fused", "lightning"),
    "litgpt": Peer("litgpt_loop", "fused", "litgpt", alike=False),
    "megatron-core": Peer("megatron", "fused", "megatron-core"),
    "deepspeed": Peer("deepspeed_zero", "fused", "deepspeed"),
    "torchtitan": Peer("torchtitan_loop", "fused", "torchtitan", llama_only=True),
}
"""nanogpt alone takes PyTorch's own choice of AdamW, a loop over parameters on CPU; `fused` is the faster one."""


def environments() -> Path:
    """The folder of the peers' environments."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "teratron-bench"


def find(names: str | None, workload: Workload) -> list[str]:
    """The peers asked for, or all that are installed and have a model for the workload.

    Raises `UserError` for a name that is no peer, one that cannot run the workload and one that is not installed.
    """
    if names is None:
        return [name for name, peer in PEERS.items() if peer.can_run(workload) and peer.python.exists()]
    chosen = [name for name in names.split(",") if name]
    for name in chosen:
        check(name, workload)
        if not PEERS[name].python.exists():
            raise UserError(f"--peers {name}: not installed; python bench/train.py --install {name}")
    return chosen


def check(name: str, workload: Workload) -> None:
    """Raises `UserError` for a name that is no peer, and for a workload that the peer has no model for."""
    if name not in PEERS:
        raise UserError(f"--peers {name}: expected some of {', '.join(PEERS)}")
    if not PEERS[name].can_run(workload):
        able = ", ".join(other for other, peer in PEERS.items() if peer.can_run(workload))
        raise UserError(f"--peers {name}: it has no model like workload {workload.name}; choose from {able}")


def install(name: str) -> None:
    """Make the peer's environment anew from its file of `requirements`. Raises `UserError` when that fails."""
    if name not in PEERS:
        raise UserError(f"--install {name}: expected one of {', '.join(PEERS)}")
    environment = PEERS[name].environment
    if not environment:
        print(f"{name} needs nothing but this environment")
        return
    folder, needs = environments() / environment, BENCH / "requirements" / f"{environment}.txt"
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "-r", str(needs)]
    for command in ([sys.executable, "-m", "venv", "--clear", str(folder)], pip):
        if subprocess.run(command, check=False).returncode:
            (folder / "bin" / "python").unlink(missing_ok=True)
            raise UserError(f"--install {name}: {needs} cannot be installed here; pip's own message is above")
