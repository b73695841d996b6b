"""Big models on a small machine: text from one that is mapped from its file, training of one whose optimizer lies on disk.

    python bench/big.py generate --file 8b.safetensors     # writes random weights there first, part by part
    python bench/big.py train --folder /fast/disk --offload disk

Each is measured in a process of its own: seconds, and the most memory it had, of its own and of files that were mapped into it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import add_line, facts
from torch import Tensor

from teratron.checkpoint import Weights, open_model, write_weights
from teratron.checkpoint.stream import Entry
from teratron.config import Config, ModelConfig
from teratron.generate import Decoder, Sampling, TokenStream
from teratron.models import build_model, parameter_count, parts_of
from teratron.parallel.mesh import Mesh
from teratron.train.device import keep_freed_memory, optimizer_bytes, state_bytes
from teratron.train.engine import Engine

SIZES = {"generate": {"layers": 72, "hidden": 3072, "heads": 24}, "train": {"layers": 24, "hidden": 2048, "heads": 16}}
"""GPT-2 of 8.3 billion parameters (Megatron-LM's largest), and of 1.3 billion."""
VOCAB = 51_200
POOL = 2**22
"""Random numbers that are drawn; weights are taken from them again and again."""


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    if args.child:
        print(json.dumps(measure(args)))
        return 0
    config = model_of(args)
    if args.what == "generate" and not args.file.exists():
        begun = time.perf_counter()
        write_weights(random_weights(config), args.file)
        print(f"{args.file}: {args.file.stat().st_size / 1e9:.2f} GB written and compared in {time.perf_counter() - begun:.0f} s")
    for name in ("cold", "warm") if args.what == "generate" else ("",):
        if name == "cold":
            forget_file(args.file)
        command = [sys.executable, __file__, *(sys.argv[1:] if arguments is None else arguments), "--child"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        record = {"what": args.what, "name": name, "parameters": count(config), **json.loads(done.stdout.splitlines()[-1])}
        print(told(record))
        if args.json:
            add_line(args.json, record | facts("cpu"))
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=SIZES)
    parser.add_argument("--file", type=Path, default=Path("big.safetensors"), help="generate: the model's weights, in bfloat16")
    parser.add_argument("--folder", type=Path, default=Path("."), help="train: where the optimizer's files lie")
    parser.add_argument("--offload", choices=("none", "disk"), default="disk")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="train: numbers of weights and activations")
    parser.add_argument("--tokens", type=int, default=16, help="generate: new tokens")
    parser.add_argument("--steps", type=int, default=3, help="train: optimizer steps")
    for name in ("layers", "hidden", "heads"):
        parser.add_argument(f"--{name}", type=int, default=0, help="0 = those of 8.3 billion parameters, in training of 1.3 billion")
    parser.add_argument("--seq-length", type=int, default=256, help="train: tokens of the one sequence of a step")
    parser.add_argument("--json", type=Path, help="add all numbers to this file, a line each")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser


def model_of(args: argparse.Namespace) -> ModelConfig:
    sizes: dict[str, Any] = {name: getattr(args, name) or size for name, size in SIZES[args.what].items()}
    length = args.seq_length if args.what == "train" else 1024
    return ModelConfig(**sizes, vocab_size=VOCAB, seq_length=length, activation="gelu_tanh")


def count(config: ModelConfig) -> int:
    return parameter_count(build_model(config, device="meta"))


def random_weights(config: ModelConfig) -> Weights:
    """Small random numbers in bfloat16 for every part, made when they are asked for."""
    pool = (torch.randn(POOL, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)

    def values(shape: tuple[int, ...]) -> Tensor:
        size = torch.Size(shape).numel()
        return pool.repeat(-(-size // POOL))[:size].view(shape)

    parts = parts_of(build_model(config, device="meta"))
    return Weights(config, [Entry(part.name, torch.bfloat16, part.shape, partial(values, part.shape)) for part in parts], None, "random")


def forget_file(path: Path) -> None:
    """Let the system read a file from the disk again."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(args: argparse.Namespace) -> dict[str, float]:
    """What is measured in a process of its own."""
    with watched() as memory:
        found = generated(args) if args.what == "generate" else trained(args)
    return found | memory


def generated(args: argparse.Namespace) -> dict[str, float]:
    """Open a model and continue a prompt of 8 tokens."""
    begun = time.perf_counter()
    loaded = open_model(args.file, dtype=torch.bfloat16)
    opened = time.perf_counter()
    stream = TokenStream(Decoder(loaded.model, [list(range(1, 9))], args.tokens), Sampling(temperature=0.0))
    moments = [time.perf_counter() for _ in stream]
    speed = (len(moments) - 1) / (moments[-1] - moments[0])
    return {"load_seconds": opened - begun, "first_token_seconds": moments[0] - opened, "tokens_per_second": speed}


def trained(args: argparse.Namespace) -> dict[str, float]:
    """Steps of one sequence of random tokens: medians of all but the first one, and of their updates."""
    model = model_of(args)
    config = Config(model=model).override(
        {
            "parallel.offload": args.offload,
            "parallel.offload_folder": str(args.folder),
            "train.global_batch": 1,
            "train.precision": args.precision,
            "train.recompute": "full",
        }
    )
    keep_freed_memory()
    begun = time.perf_counter()
    engine = Engine(config, Mesh(), folder=args.folder)
    engine.optimizer.initialise(config.train.seed)
    seconds, updates = [time.perf_counter() - begun], list[float]()
    for step in range(1, args.steps + 1):
        begun = time.perf_counter()
        tally, norm = engine.step(batch_of(model, step), step=step, number=step, lr=1e-4, around=timed(updates))
        seconds.append(time.perf_counter() - begun)
        print(f"step {step}: loss {tally.loss():.3f}, norm {float(norm):.3f}, {seconds[-1]:.1f} s", file=sys.stderr)
    parameters, later = count(model), max(1, args.steps - 1)  # the first update reads files that hold nothing yet
    return {
        "start_seconds": seconds[0],
        "step_seconds": median(seconds[-later:]),
        "update_seconds": median(updates[-later:]),
        "state_gb": parameters * state_bytes(config, 1) / 1e9,
        "offloaded_gb": parameters * optimizer_bytes(config, 1) / 1e9 * (args.offload != "none"),
        "loss": tally.loss(),
    }


def batch_of(model: ModelConfig, step: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(step)
    tokens = torch.randint(model.vocab_size, (1, model.seq_length + 1), generator=draw)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": torch.ones(1, model.seq_length),
        "positions": torch.arange(model.seq_length)[None],
        "sample": torch.tensor([step]),
    }


@contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - begun)


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """The most memory of this process, in GB: in all (what the system has noted), and of its own and of files, looked at every 20 ms."""
    found, over = {"own_gb": 0.0, "files_gb": 0.0}, threading.Event()

    def look() -> None:
        while not over.wait(0.02):
            status = memory()
            found["own_gb"] = max(found["own_gb"], status["RssAnon"])
            found["files_gb"] = max(found["files_gb"], status["RssFile"])

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
        found["peak_gb"] = memory()["VmHWM"]


def memory() -> dict[str, float]:
    """GB of this process by the system's names."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0][:-1]: int(words[1]) * 1024 / 1e9 for words in lines if words[0] in ("VmHWM:", "RssAnon:", "RssFile:")}


def told(record: dict[str, Any]) -> str:
    numbers = ", ".join(f"{name} {value:,.3f}" for name, value in record.items() if isinstance(value, float))
    return f"{record['what']} {record['name']}: {record['parameters']:,} parameters: {numbers}"


if __name__ == "__main__":
    sys.exit(main())
