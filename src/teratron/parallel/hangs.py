"""Runs that stand still: noticed by their heartbeats, told with what every rank is at, its stacks, and collectives that do not match."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from teratron.parallel.doing import Beat, read_beat
from teratron.parallel.worker import ASK_STACK, STACK

ANSWER = 10.0
"""Seconds in which a process has to write its stacks; one that is stuck in a driver, or swapped out, does not."""


def account(beats: Sequence[Beat], notes: Mapping[int, str] | None = None) -> str:
    """A line for each group whose ranks have come to different collectives, and one for each rank; notes: behind a rank's line."""
    notes = notes or {}
    ranks = [f"  rank {rank}: {beat.words}{notes.get(rank, '')}" for rank, beat in enumerate(beats)]
    return "\n".join([*differences(beats), *ranks])


def differences(beats: Sequence[Beat], certain: bool = False) -> list[str]:
    """Groups whose ranks have come to different collectives, in words, a line each.

    certain: only those where the same number has different names, types or shapes, which is a defect whatever else has happened;
    numbers alone also differ where a rank is late or has died.
    """
    lines = []
    for group in dict.fromkeys(group for beat in beats for group in beat.collectives):
        last = {rank: beat.collectives[group] for rank, beat in enumerate(beats) if group in beat.collectives}
        kinds = {kind: [rank for rank, own in last.items() if own == kind] for kind in sorted(set(last.values()), reverse=True)}
        if len(kinds) == 1 or (certain and len({number for number, _ in kinds}) == len(kinds)):
            continue
        words = ", ".join(f"{ranks_in_words(ranks)} at {f'#{number} {what}'.strip()}" for (number, what), ranks in kinds.items())
        lines.append(f"  collectives {group}: {words}")
    return lines


def ranks_in_words(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


class Watchdog(threading.Thread):
    """Ends a job whose ranks are all in training and have all made no progress for a while; a context."""

    def __init__(self, folder: Path, nproc: int, timeout: float, run: Path | None) -> None:
        """folder: the launcher's. timeout: seconds; 0 = wait for ever. run: where the stacks are kept, in `hangs/`."""
        super().__init__(daemon=True)
        self._folder, self._nproc, self._timeout, self._home = folder, nproc, timeout, run
        self._over = threading.Event()
        self.verdict = ""
        """What has been found, for people; "" = no hang."""
        self.blamed: int | None = None
        """The rank that the others wait for, where one can tell."""

    def __enter__(self) -> Watchdog:
        if self._timeout:
            self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        if self._timeout:
            self.join()

    def beats(self) -> list[Beat]:
        return [read_beat(self._folder / f"doing-{rank}") for rank in range(self._nproc)]

    def run(self) -> None:
        before, since = None, time.monotonic()
        while not self._over.wait(min(1.0, self._timeout / 10)):
            beats = self.beats()
            counts = [beat.count for beat in beats]
            if counts != before or not all(beat.step for beat in beats):
                before, since = counts, time.monotonic()
            elif time.monotonic() - since > self._timeout:
                self._end(beats)
                return

    def _end(self, beats: list[Beat]) -> None:
        """Tell, and kill all ranks."""
        processes = workers(self._folder)
        stopped = {rank for rank, process in processes.items() if _is_stopped(process)}
        stacks = self._stacks({rank: process for rank, process in processes.items() if rank not in stopped})
        silent = {rank for rank in processes if not stacks.get(rank)} - stopped
        notes = {**dict.fromkeys(stopped, "; is stopped (SIGSTOP)"), **dict.fromkeys(silent, "; does not answer")}
        late = [rank for rank, beat in enumerate(beats) if rank in notes or "waiting for " not in beat.what]
        self.blamed = min([rank for rank in late if rank in notes] or late, default=None)
        who = f"{ranks_in_words(late)} did not go on" if late else "all ranks wait for others"
        self.verdict = f"teratron: error: no progress for {self._timeout:g} s: {who}\n{account(beats, notes)}"
        self._keep({rank: stacks.get(rank, "") for rank in processes}, beats[0].step)
        kill(processes.values())

    def _stacks(self, processes: Mapping[int, int]) -> dict[int, str]:
        """The Python stacks of processes, from those that answer."""
        files = {rank: self._folder / f"{STACK}{rank}" for rank in processes}
        before = {rank: _size(path) for rank, path in files.items()}
        for process in processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, ASK_STACK)
        sizes, deadline = dict.fromkeys(files, -1), time.monotonic() + ANSWER
        while time.monotonic() < deadline:
            former, sizes = sizes, {rank: _size(path) for rank, path in files.items()}
            if sizes == former and all(sizes[rank] > before[rank] for rank in files):
                break
            time.sleep(0.1)
        return {rank: path.read_bytes()[before[rank] :].decode(errors="replace") for rank, path in files.items() if path.exists()}

    def _keep(self, stacks: Mapping[int, str], step: int) -> None:
        """Leave everything in a file of the run."""
        if self._home is None:
            return
        path = self._home / "hangs" / f"step-{step:08d}-{int(time.time())}.txt"
        texts = [f"rank {rank}\n{stack.strip() or '(no answer)'}\n" for rank, stack in sorted(stacks.items())]
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_text("\n".join([f"{self.verdict}\n", *texts]), "utf-8")
            self.verdict += f"\n  Python stacks of all ranks: {path}"
        except OSError as error:
            self.verdict += f"\n  the Python stacks could not be written to {path}: {error.strerror}"


def workers(folder: Path) -> dict[int, int]:
    """By rank the processes that have begun and not come to an orderly end."""
    found = (path.name.split("-")[1:] for path in folder.glob("process-*"))
    return {int(rank): int(process) for rank, process in found}


def leads_session(process: int) -> bool:
    """Whether the process exists, and leads a session as every worker does."""
    try:
        return os.getsid(process) == process
    except OSError:
        return False


def kill(processes: Iterable[int]) -> None:
    """End workers, and what they have started."""
    for process in processes:
        if leads_session(process):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)


def _is_stopped(process: int) -> bool:
    """Whether the process does not run until SIGCONT; False where the system does not tell."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    return False


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
