"""`python bench/parallel.py`: a training step cut over two processes of one thread each, all layouts in the same run."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from machine import add_line, facts
from rich.console import Console
from rich.table import Table
from workloads import OPTIM, SEED, WORKLOADS, Workload, random_rows

from teratron.config import Config, UserError
from teratron.data.batch import make_batch
from teratron.parallel.mesh import Mesh, mesh_sizes
from teratron.train.device import keep_freed_memory
from teratron.train.engine import Engine

CHECKS = 2
"""Steps before the rounds, whose losses all layouts of a batch must agree on."""
TOLERANCE = {"fp32": 1e-4, "bf16": 0.02}
"""Largest relative difference of those losses."""
PATIENCE = timedelta(minutes=5)
"""How long a rank waits for the other."""


@dataclass(frozen=True)
class Case:
    """Processes that train together, or apart."""

    name: str
    ranks: int
    """Processes, of one thread each."""
    keys: dict[str, Any]
    """Of the config, beyond the workload."""
    batches: int
    """Batches of the workload that they take in one step, all together."""
    base: str = ""
    """Whose tokens a second it is compared with; empty = nobody's."""

    @property
    def together(self) -> bool:
        return bool(self.keys)


def _shard(what: str) -> Case:
    return Case(f"shard {what}", 2, {"parallel.shard": what}, 2, "replicate")


CASES = (
    Case("alone", 1, {}, 1),
    Case("apart", 2, {}, 2),
    Case("replicate", 2, {"parallel.shard": "none"}, 2, "apart"),
    *map(_shard, ("optimizer", "gradients", "parameters")),
    Case("tensor", 2, {"parallel.tensor": 2}, 1, "alone"),
    Case("tensor + sequence", 2, {"parallel.tensor": 2, "parallel.sequence": True}, 1, "alone"),
)


@dataclass
class Lane:
    """What one case has shown."""

    case: Case
    losses: list[float]
    seconds: list[float] = field(default_factory=list)
    """Of one step, each round's mean."""


def main() -> int:
    args = _parse()
    workload = WORKLOADS[args.workload]
    try:
        lanes = measure(workload, chosen(args.cases), args.precision, args.steps or workload.steps, args.rounds)
    except UserError as error:
        print(f"bench/parallel.py: error: {error}", file=sys.stderr)
        return 2
    context = facts("cpu")
    Console().print(table(workload, args.precision, context["device"], lanes))
    if args.json:
        add_line(args.json, {**context, "precision": args.precision, "workload": workload.name, "cases": record(workload, lanes)})
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", choices=list(WORKLOADS), default="B", help="as in bench/train.py (default: B)")
    parser.add_argument("--precision", choices=list(TOLERANCE), default="fp32", help="default: fp32")
    parser.add_argument("--cases", help=f"comma-separated, of {', '.join(case.name for case in CASES)} (default: all)")
    parser.add_argument("--steps", type=int, default=0, help="timed steps of a round (default: about a second's worth)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; medians are over them (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the result to this file as one JSON line")
    args = parser.parse_args()
    for name, least in (("steps", 0), ("rounds", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)}: expected at least {least}")
    return args


def chosen(names: str | None) -> list[Case]:
    """The cases asked for, and those that they are compared with."""
    if names is None:
        return list(CASES)
    known = {case.name: case for case in CASES}
    wanted = [name.strip() for name in names.split(",")]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise UserError(f"--cases {unknown[0]}: expected some of {', '.join(known)}")
    return [case for case in CASES if case.name in wanted or case.name in {known[name].base for name in wanted}]


def measure(workload: Workload, cases: Sequence[Case], precision: str, steps: int, rounds: int) -> list[Lane]:
    """Start the processes of all cases, check that they compute the same, then let them take turns: `rounds` times `steps` steps each.

    Raises `UserError` when a process dies or the losses differ.
    """
    with tempfile.TemporaryDirectory() as folder:
        teams = []
        try:
            for case in cases:
                teams.append(Team(case, workload, precision, Path(folder)))
            lanes = [team.ready() for team in teams]
            check_same(lanes, precision)
            for _ in range(rounds):
                for team, lane in zip(teams, lanes, strict=True):
                    lane.seconds.append(team.ask(steps))
        finally:
            for team in teams:
                team.stop()
    return lanes


def check_same(lanes: Sequence[Lane], precision: str) -> None:
    """Raises `UserError` unless cases with batches of the same size have the same losses."""
    for lane in lanes:
        right = next(other for other in lanes if _batches(other) == _batches(lane))
        for step, (loss, expected) in enumerate(zip(lane.losses, right.losses, strict=True), 1):
            if not abs(loss - expected) <= TOLERANCE[precision] * abs(expected):
                raise UserError(f"{lane.case.name} has loss {loss:.7f} at step {step}, {right.case.name} {expected:.7f}: not the same step")


def _batches(lane: Lane) -> int:
    """Of the workload in one step of one engine."""
    return lane.case.batches if lane.case.together else 1


class Team:
    """The processes of a case."""

    def __init__(self, case: Case, workload: Workload, precision: str, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.case = case
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(case.ranks):
            mine, theirs = context.Pipe()
            store = folder / case.name.replace(" ", "-")
            process = context.Process(target=serve, args=(theirs, case, rank, workload, precision, store), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)

    def ready(self) -> Lane:
        """Wait until all have passed their first steps."""
        return Lane(self.case, self._receive()[0])

    def ask(self, steps: int) -> float:
        """Seconds a step over `steps` steps: the mean over the processes, which take as long as each other unless they are apart."""
        for pipe in self.pipes:
            pipe.send(steps)
        seconds = self._receive()
        return len(seconds) / sum(1 / each for each in seconds)

    def stop(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.close()
            process.terminate()
            process.join()

    def _receive(self) -> list[Any]:
        try:
            return [pipe.recv() for pipe in self.pipes]
        except EOFError:
            raise UserError("a process ended before its time; its own message is above") from None


def serve(pipe: Connection, case: Case, rank: int, workload: Workload, precision: str, store: Path) -> None:
    """One process of a `Team`: build, take the first steps, then answer until the pipe closes."""
    torch.set_num_threads(1)
    ranks = case.ranks if case.together else 1
    if ranks > 1:
        dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=ranks, timeout=PATIENCE)
    trainee = Trainee(case, rank if ranks > 1 else 0, ranks, workload, precision)
    pipe.send([trainee.step() for _ in range(CHECKS)])
    while (steps := _next(pipe)) is not None:
        begun = time.perf_counter()
        for _ in range(steps):
            trainee.step()
        pipe.send((time.perf_counter() - begun) / steps)


def _next(pipe: Connection) -> int | None:
    try:
        return pipe.recv()
    except EOFError:
        return None


class Trainee:
    """One rank's engine and what it learns from."""

    def __init__(self, case: Case, rank: int, ranks: int, workload: Workload, precision: str) -> None:
        keep_freed_memory()
        self.workload, self.steps = workload, 0
        self.batches = case.batches if ranks > 1 else 1
        keys = {"train.global_batch": self.batches * workload.batch, "train.precision": precision, "train.seed": SEED, **case.keys}
        config = Config(model=workload.model, optim=OPTIM).override(keys)
        self.engine = Engine(config, Mesh(mesh_sizes(config.parallel, ranks), rank))
        self.engine.optimizer.initialise(SEED)

    def step(self) -> float:
        """Make the next batch and learn from it; returns the loss before."""
        batches = self.batches * self.steps
        rows = torch.cat([torch.from_numpy(random_rows(self.workload, batches + n)) for n in range(self.batches)]).numpy()
        self.steps += 1
        mine = self.engine.rows(len(rows))
        index = torch.arange(batches * self.workload.batch, batches * self.workload.batch + len(rows)).numpy()
        batch = make_batch(rows[mine], index[mine], eod=None, isolate_documents=False, mask_end_of_document=False)
        return self.engine.step(batch, step=self.steps, number=self.steps, lr=OPTIM.lr)[0].loss()


def table(workload: Workload, precision: str, device: str, lanes: Sequence[Lane]) -> Table:
    """Cases by row; the last column is tokens a second over those of the case that each is compared with."""
    model = workload.model
    shape = f"{model.layers} layers, {model.hidden} wide, vocabulary {model.vocab_size:,}, {workload.batch} x {model.seq_length} tokens"
    grid = Table(title=f"{workload.name}: {shape}", caption=f"{precision} on {device}, 1 thread a process; {len(lanes[0].seconds)} rounds")
    grid.add_column("case")
    for heading in ("processes", "tokens/s", "ms/step"):
        grid.add_column(heading, justify="right")
    grid.add_column("over")
    grid.add_column("ratio", justify="right")
    for lane in lanes:
        speed, milliseconds = tokens_per_second(workload, lane), median(lane.seconds) * 1e3
        row = [lane.case.name, str(lane.case.ranks), f"{speed:,.0f}", f"{milliseconds:,.1f}"]
        grid.add_row(*row, *([lane.case.base, f"{ratio(lane, lanes):.3f} x"] if comparable(lane, lanes) else []))
    return grid


def tokens_per_second(workload: Workload, lane: Lane) -> float:
    return lane.case.batches * workload.tokens / median(lane.seconds)


def comparable(lane: Lane, lanes: Sequence[Lane]) -> bool:
    """Whether what a case is compared with has been measured too."""
    return any(other.case.name == lane.case.base for other in lanes)


def ratio(lane: Lane, lanes: Sequence[Lane]) -> float:
    """Tokens a second over those of the case compared with: the median over rounds of the ratio within the round."""
    base = next(other for other in lanes if other.case.name == lane.case.base)
    share = lane.case.batches / base.case.batches
    return median(share * theirs / own for own, theirs in zip(lane.seconds, base.seconds, strict=True))


def record(workload: Workload, lanes: Sequence[Lane]) -> dict[str, Any]:
    """The result as plain numbers."""
    return {
        lane.case.name: {
            "tokens_per_second": tokens_per_second(workload, lane),
            "seconds": lane.seconds,
            "losses": lane.losses,
            **({"over": lane.case.base, "ratio": ratio(lane, lanes)} if comparable(lane, lanes) else {}),
        }
        for lane in lanes
    }


if __name__ == "__main__":
    sys.exit(main())
