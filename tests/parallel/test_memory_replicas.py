"""Checkpoints in the memory of several machines, which here are folders: one may be lost, and what is gone on from is what was saved."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import Learnt, batch_of, engine_of, outcome, share
from pool import pool

from teratron.checkpoint import TrainingState, load_training, memory, open_checkpoint
from teratron.checkpoint.agree import gather_json
from teratron.checkpoint.machines import Machines, find_machines
from teratron.checkpoint.memory import memory_checkpoints
from teratron.parallel.mesh import Group
from teratron.parallel.worker import this_worker
from teratron.train.engine import Engine
from teratron.train.metrics import Silence
from teratron.train.saving import Place, Saver, check_places, find_start

pytestmark = pytest.mark.xdist_group("ranks")

RANKS = 4
KEYS = {"parallel.shard": "optimizer", "checkpoint.memory_every": 1}
DISK, MEMORY = 1, 2
"""Steps after which it is saved there."""


def begin(rank: int, ranks: int, folder: str, each: int) -> tuple[Engine, Machines, Path]:
    """One rank of a run whose machines have so many ranks each."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    os.environ.update(zip(names, map(str, (rank, ranks, rank % each, each)), strict=True))
    memory.PLACE = Path(folder) / "machines" / str(rank // each)
    engine = engine_of(rank, ranks, KEYS)
    return engine, find_machines(engine.mesh.control, this_worker()), Path(folder) / "run"


def saver_of(engine: Engine, machines: Machines, run: Path) -> Saver:
    for turn in (True, False):
        if turn == (machines.rank == 0):
            check_places(run, engine.config.checkpoint, engine.optimizer.pieces(), 1, machines)
        gather_json(engine.mesh.control, None)
    return Saver(run, engine.config, engine.mesh, machines, Silence(), lambda text: None, lambda: None)


def save(rank: int, ranks: int, folder: str, each: int) -> Learnt:
    """Save a step on disk and the next one in memory, and come to no orderly end."""
    engine, machines, run = begin(rank, ranks, folder, each)
    saver = saver_of(engine, machines, run)
    for step, place in ((DISK, Place.DISK), (MEMORY, Place.MEMORY)):
        engine.step(share(engine, batch_of(engine.config, step)), step=step, number=step, lr=engine.config.optim.lr)
        saver.save(place, engine.optimizer.pieces(), TrainingState(step), {})
    saver.finish()
    return [], [], engine.optimizer.pieces()


def go_on(rank: int, ranks: int, folder: str, each: int) -> tuple[int, list[str], Learnt]:
    """The step gone on from, what was said, and the state."""
    engine, machines, run = begin(rank, ranks, folder, each)
    control, said = engine.mesh.control, list[str]()
    found = memory_checkpoints(run, machines, control, said.append)
    first = find_start(run, engine.config.checkpoint, found, said.append) if rank == 0 else None
    step = gather_json(control, first.step if first is not None else 0)[0]
    where = next((one.fetch() for one in found if one.step == step), run / "checkpoints" / f"step-{step:08d}")
    checkpoint = open_checkpoint(where)
    checkpoint.verify()
    load_training(checkpoint, engine.optimizer.pieces(), control)
    return step, said, ([], [], engine.optimizer.pieces())


def end(rank: int, ranks: int, folder: str, each: int) -> None:
    with saver_of(*begin(rank, ranks, folder, each)):
        pass


class Runs:
    """A run for each size of its machines, saved once, whose memory is put back for each test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved: dict[int, Learnt] = {}

    def machines(self, each: int) -> Path:
        folder = self.folder / str(each)
        if each not in self.saved:
            for machine in range(RANKS // each):
                (folder / "machines" / str(machine)).mkdir(parents=True)
            (folder / "run").mkdir()
            self.saved[each] = outcome(pool().run(save, RANKS, str(folder), each)).state
            shutil.copytree(folder / "machines", folder / "kept")
        shutil.rmtree(folder / "machines")
        shutil.copytree(folder / "kept", folder / "machines")
        return folder / "machines"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def lose(*machines: int) -> Callable[[Path], None]:
    def deed(folder: Path) -> None:
        for machine in machines:
            shutil.rmtree(folder / str(machine))
            (folder / str(machine)).mkdir()

    return deed


def files(folder: Path, machine: int, name: str) -> list[Path]:
    return sorted((folder / str(machine)).glob(f"*/checkpoints/*/{name}"))


def flip(name: str, *machines: int) -> Callable[[Path], None]:
    def deed(folder: Path) -> None:
        for machine in machines:
            (path,) = files(folder, machine, name)
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)

    return deed


@pytest.mark.parametrize(
    ("each", "deed", "step", "words"),
    [
        pytest.param(2, lose(), MEMORY, [], id="all there"),
        pytest.param(2, lose(0), MEMORY, [], id="the first machine lost"),
        pytest.param(2, lose(1), MEMORY, [], id="the other machine lost", marks=pytest.mark.slow),
        pytest.param(2, flip("rank-00003.safetensors", 0), MEMORY, ["its contents changed"], id="a file damaged"),
        pytest.param(2, flip("manifest.json", 1), MEMORY, ["does not match the COMPLETE marker"], id="a manifest damaged"),
        pytest.param(
            2, flip("rank-00003.safetensors", 0, 1), DISK, [*2 * ["changed"], "no machine has a good rank-00003"], id="both copies"
        ),
        pytest.param(2, lose(0, 1), DISK, [], id="both machines lost"),
        pytest.param(1, lose(0, 2), MEMORY, [], id="every second machine of four lost"),
        pytest.param(1, lose(1, 2), DISK, ["no machine has a good rank-00001"], id="neighbours of four lost"),
    ],
)
def test_the_newest_state_that_is_left_is_gone_on_from(
    runs: Runs, each: int, deed: Callable[[Path], None], step: int, words: list[str]
) -> None:
    machines = runs.machines(each)
    deed(machines)
    results = pool().run(go_on, RANKS, str(machines.parent), each)
    said = results[0][1]
    assert ([result[0] for result in results], len(said)) == ([step] * RANKS, len(words)), said
    assert all(word in sentence for word, sentence in zip(words, said, strict=True)), said
    if step == MEMORY:
        loaded = outcome(result[2] for result in results).state
        assert loaded.keys() == runs.saved[each].keys()
        assert all(torch.equal(loaded[name], saved) for name, saved in runs.saved[each].items())
        assert all(len(files(machines, machine, "rank-*")) == RANKS for machine in range(RANKS // each))


def test_a_machine_holds_its_own_files_and_those_of_the_machine_before(runs: Runs) -> None:
    machines = runs.machines(1)
    for machine in range(RANKS):
        held = {path.name for path in files(machines, machine, "*")}
        assert held == {"manifest.json", "COMPLETE", *(f"rank-{rank % RANKS:05d}.safetensors" for rank in (machine, machine + RANKS - 1))}


def test_every_machine_is_left_empty_at_an_orderly_end(runs: Runs) -> None:
    """Also one that was replaced, and one with what is no longer the run's."""
    machines = runs.machines(2)
    lose(0)(machines)
    pool().run(end, RANKS, str(machines.parent), 2)
    assert [os.listdir(machines / machine) for machine in ("0", "1")] == [[], []]
    runs.saved.pop(2)  # its note is gone
    shutil.rmtree(machines.parent)


@pytest.mark.parametrize("places", [[(0, 3), (1, 3), (2, 3), (0, 1)], [(0, 2), (0, 2), (1, 2), (1, 2)]], ids=["uneven", "in turns"])
def test_ranks_that_are_not_spread_evenly_use_no_memory(places: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Group, "gather_bytes", lambda group, text: [str(list(place)).encode() for place in places])
    machines = find_machines(Group((0, 1, 2, 3)), None)
    assert (machines.each, machines.several, machines.leads) == (0, False, False)
