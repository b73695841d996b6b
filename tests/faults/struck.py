"""Tiny runs of two ranks, struck or not, and what they must come to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forked import End, server
from tiny import assert_same_state, options

from teratron.train.history import read_history

STEPS = 8


class Runs:
    """Runs in a folder, all by the same command."""

    def __init__(self, folder: Path, text: Path) -> None:
        self.folder, self.text = folder, text

    def train(self, name: str, *blows: dict[str, Any], ranks: int = 2, words: Sequence[str] = (), **keys: Any) -> End:
        """The command of the run `name`; checkpoints at every second step, all kept, written while training waits."""
        fixed = {"data__text": self.text, "train__steps": STEPS, "log__every": 1, "parallel__shard": "parameters"}
        fixed |= {"checkpoint__keep": 0, "checkpoint__asynchronous": False}
        command = ["train", *options(**fixed | keys), "--device=cpu", "--run", str(self.folder / name), *words]
        return server().run(ranks, command, self.folder, blows)

    def saved(self, name: str) -> list[int]:
        """Steps of the checkpoints that lie in a run; what has no whole name counts as step -1."""
        found = [path.name for path in (self.folder / name / "checkpoints").glob("*")]
        return sorted(int(name.removeprefix("step-")) if name.startswith("step-") else -1 for name in found)

    def assert_goes_on(self, name: str, step: int, undisturbed: Path, **keys: Any) -> End:
        """The same command goes on from a step, to the end of the run that was never struck, bit for bit."""
        end = self.train(name, **keys)
        assert end.codes == [0, 0], end.text
        found, expected = (read_history(run / "metrics.jsonl") for run in (self.folder / name, undisturbed))
        assert [event["step"] for event in found.events if event["event"] == "resume"] == [step] * (0 < step < STEPS)
        assert (found.columns["step"], found.columns["loss"]) == (expected.columns["step"], expected.columns["loss"])
        assert_same_state(self.folder / name, undisturbed)
        assert -1 not in self.saved(name), "something half-written is left"
        return end
