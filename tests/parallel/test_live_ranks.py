"""Live changes on several ranks: rank 0 alone looks at the file, all take the same changes, and the numbers are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cases import engine_of
from parity import assert_parity
from pool import pool
from tiny import losses, options, state, write_text

from teratron.cli.main import main
from teratron.train import live
from teratron.train.live import Live

pytestmark = pytest.mark.xdist_group("ranks")


def looked(rank: int, ranks: int, folder: str) -> list[Any]:
    """What a rank knows as the file comes, is wrong, changes and goes; each rank has a folder of its own, but for rank 0 an empty one."""
    live.PERIOD = 0.0
    run = Path(folder) / str(rank)
    run.mkdir()
    told: list[str] = []
    watched, changes, found = Live(run, engine_of(rank, ranks, {}).mesh, told.append), live.changed((), []), []
    for step, content in enumerate(("lr = 0.1\nstop_step = 7", "lr =", "clip = 2.0", None), 1):
        if rank == 0 and content is not None:
            (run / live.NAME).write_text(content)
        elif rank == 0:
            (run / live.NAME).unlink()
        asked = watched.asked()
        watched.look()
        changes, news = watched.take(changes, step)
        found.append((asked, changes, news, watched.last_step(10)))
    return [*found, len(told)]


def test_all_ranks_take_what_rank_0_reads(tmp_path: Path) -> None:
    first, second = pool().run(looked, 2, str(tmp_path))
    both = [known[1:] for known in first[:-1]]
    assert both == [known[1:] for known in second[:-1]]
    assert [asked for asked, *_ in first[:-1]] == [True] * 4
    assert [asked for asked, *_ in second[:-1]] == [False] * 4
    lr, clip = (1, "lr", 0.1), (3, "clip", 2.0)
    assert [changes for changes, *_ in both] == [(lr,), (lr,), (lr, clip), (lr, clip)]
    assert [news for _, news, _ in both] == [{"lr": 0.1, "stop_step": 7}, {}, {"clip": 2.0, "stop_step": 0}, {}]
    assert [last for *_, last in both] == [7, 7, 10, 10]
    assert (first[-1], second[-1]) == (1, 0), "of the wrong file rank 0 has told, once"


@pytest.mark.slow
def test_a_changed_run_is_the_same_on_two_ranks(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    for name, layout in (("alone", []), ("two", ["--nproc=2", "--parallel.shard=parameters"])):
        run = tmp_path / name
        run.mkdir()
        for content in ("lr_factor = 0.5\nstop_step = 3", "weight_decay = 0.5\nclip = 0.1"):
            (run / live.NAME).write_text(content)
            keys = options(data__text=text, train__precision="fp64", optim__eps=1e-6)
            assert main(["train", *keys, *layout, "--run", str(run), "--device=cpu"]) == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "alone"), rel=1e-9)
    assert_parity(state(tmp_path / "two"), state(tmp_path / "alone"), 1e-9, lr=1e-2, steps=6)
