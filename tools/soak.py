"""Soak: a run of two processes on CPU with a random SIGKILL every 20 seconds or so must end as the run left alone, bit for bit.

    python tools/soak.py --minutes 10

A worker is killed, or one time in five the launcher: then the same command is typed again. One kill in five comes while the processes
still start, the others once they train. Prints the kills, both goodputs, and whether every loss and every bit of the state are the
same; exits with 1 where they are not.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from teratron.checkpoint import newest_checkpoint
from teratron.train.history import Follower, History, read_history

MODEL = {"model.layers": 2, "model.hidden": 64, "model.heads": 4, "model.seq_length": 64, "model.dropout": 0.1, "data.tokenizer": "bytes"}
TRAIN = {"train.global_batch": 8, "train.micro_batch": 2, "train.eval_every": 0, "train.eval_batches": 2, "parallel.shard": "optimizer"}
SAVES = {"checkpoint.every": 25, "log.every": 1000, "log.tensorboard": "false"}
STEPS = 600
"""Steps a minute by default: half of what an idle core makes, since the other half goes into starting again and steps made twice."""
LAUNCHER, STARTING = 0.2, 0.2
"""How often the launcher is the victim, and how often a kill does not wait until the run has got on."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10, help="how long processes are killed; the run then goes on to its end")
    parser.add_argument("--every", type=float, default=20, help="seconds of training between kills on average")
    parser.add_argument("--steps", type=int, help=f"how long the run is (default: {STEPS} a minute)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        text = folder / "text.txt"
        words = random.Random(0)
        text.write_text("\n".join(" ".join(words.choices(["the", "cat", "sat", "on", "a", "mat"], k=12)) for _ in range(2000)))
        steps = args.steps or round(STEPS * args.minutes)
        print(f"{steps:,} steps of two processes; left alone first", flush=True)
        if start(folder / "alone", text, steps).wait():
            sys.exit((folder / "alone.log").read_text())
        kills, seconds = struck(folder / "struck", text, steps, args)
        return verdict(folder / "alone", folder / "struck", kills, seconds)


def start(run: Path, text: Path, steps: int) -> subprocess.Popen[bytes]:
    keys = {**MODEL, **TRAIN, **SAVES, "train.steps": steps, "data.text": text}
    options = [f"--{key}={value}" for key, value in keys.items()]
    command = [sys.executable, "-m", "teratron", "train", *options, "--run", str(run), "--nproc=2", "--restarts=1000000", "--device=cpu"]
    with run.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})


def struck(run: Path, text: Path, steps: int, args: argparse.Namespace) -> tuple[list[str], float]:
    """Kill until the minutes are over or the run has ended; returns the victims and the seconds that it took."""
    draw, follower, victims, begun = random.Random(args.seed), Follower(run / "metrics.jsonl"), list[str](), time.monotonic()
    job = start(run, text, steps)
    while wait_to_kill(job, follower, draw, args.every) and time.monotonic() < begun + args.minutes * 60:
        victims.append(kill(job, draw))
        print(f"{time.monotonic() - begun:5.0f} s: killed a {victims[-1]} after step {follower.update().last('step'):,.0f}", flush=True)
        if victims[-1] == "launcher":
            job.wait()
            job = start(run, text, steps)
    if job.wait():
        sys.exit(run.with_suffix(".log").read_text())
    return victims, time.monotonic() - begun


def wait_to_kill(job: subprocess.Popen[bytes], follower: Follower, draw: random.Random, every: float) -> bool:
    """Until the run has got on for a while, or now and then only for a while; returns whether it still runs."""
    since, pause = time.time(), draw.uniform(0.5, 1.5) * every
    end = time.monotonic() + pause if draw.random() < STARTING else math.inf
    while job.poll() is None and time.monotonic() < end:
        if end == math.inf and follower.update().clock > since:
            end = time.monotonic() + pause
        time.sleep(0.2)
    return job.poll() is None


def kill(job: subprocess.Popen[bytes], draw: random.Random) -> str:
    """SIGKILL to a worker, or to the launcher, also where no worker has begun."""
    workers = [int(word) for word in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()]
    workers = [process for process in workers if b"teratron" in Path(f"/proc/{process}/cmdline").read_bytes()]
    if not workers or draw.random() < LAUNCHER:
        job.kill()
        return "launcher"
    os.kill(draw.choice(workers), signal.SIGKILL)
    return "worker"


def verdict(run: Path, other: Path, kills: list[str], seconds: float) -> int:
    histories = [read_history(folder / "metrics.jsonl") for folder in (run, other)]
    losses = [list(zip(history.columns["step"], history.columns["loss"], strict=True)) for history in histories]
    same = losses[0] == losses[1] and not differing(run, other)
    workers, launchers = kills.count("worker"), kills.count("launcher")
    print(f"killed {workers} workers and {launchers} launchers in {seconds / 60:.1f} minutes")
    for name, history in zip(("left alone", "killed"), histories, strict=True):
        print(f"{name:<11} step {history.last('step'):,.0f}, loss {history.last('loss')!r}, {account(history)}")
    print("every loss and every bit of the state are the same" if same else "THE RUNS DIFFER")
    return 0 if same and kills else 1


def differing(run: Path, other: Path) -> list[str]:
    """Tensors of the last checkpoints that are not the same."""
    states = []
    for folder in (run, other):
        checkpoint = newest_checkpoint(folder, print)
        if checkpoint is None:
            sys.exit(f"{folder} holds no checkpoint")
        states.append(checkpoint.load())
    return [name for name in states[0].keys() | states[1].keys() if not torch.equal(*(state[name] for state in states))]


def account(history: History) -> str:
    goodput = "unknown" if math.isnan(history.goodput) else f"{100 * history.goodput:.0f} %"
    return f"{history.elapsed:,.0f} s, {history.useful:,.0f} s of steps that count (goodput {goodput}), {history.lost:,.0f} s made twice"


if __name__ == "__main__":
    sys.exit(main())
