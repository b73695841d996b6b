"""The seven pipeline schedules, each a list of words per rank.

`F0` is the forward of the rank's chunk 0, `B0` its backward, `I0` its backward of the inputs alone, `W` the oldest pending backward
of weights, `F0B1` an overlapped pair. Micro-batches are not written: each chunk takes them in turn. In the functions `rank` is the
rank of the list, of `ranks`; where a pattern needs a certain number of micro-batches it is made for more, and those are dropped.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Sequence

from teratron.parallel.schedule_actions import Action, Kind

_WORD = re.compile(r"([FBIW])(\d*)")


def gpipe(rank: int, ranks: int, micro_batches: int, chunks: int) -> list[str]:
    """All forwards, then all backwards (Huang et al. 2019)."""
    return ["F0"] * micro_batches + ["B0"] * micro_batches


def one_forward_one_backward(rank: int, ranks: int, micro_batches: int, chunks: int) -> list[str]:
    """1F1B: no more forwards ahead of their backwards than there are ranks behind (Narayanan et al. 2019, PipeDream-flush)."""
    return _alternate(["F0"] * micro_batches, ["B0"] * micro_batches, ranks - 1 - rank)


def interleaved(rank: int, ranks: int, micro_batches: int, chunks: int) -> list[str]:
    """1F1B over several chunks a rank, in groups of `ranks` micro-batches (Narayanan et al. 2021, Megatron-LM)."""
    groups = -(-micro_batches // ranks)
    forwards = [f"F{chunk}" for chunk in range(chunks) for _ in range(ranks)] * groups
    backwards = [f"B{chunk}" for chunk in reversed(range(chunks)) for _ in range(ranks)] * groups
    return _alternate(forwards, backwards, 2 * (ranks - 1 - rank) + (chunks - 1) * ranks)


def zb_h1(rank: int, ranks: int, micro_batches: int, chunks: int) -> list[str]:
    """1F1B with weight gradients put off into the bubble, in 1F1B's memory (Qi et al. 2023)."""
    return _defer_weights(one_forward_one_backward(rank, ranks, micro_batches, chunks), rank)


def zb_h2(rank: int, ranks: int, micro_batches: int, chunks: int) -> list[str]:
    """More forwards ahead as well: no bubble where forward, inputs and weights cost the same, in twice the memory (Qi et al. 2023)."""
    return _defer_weights(_alternate(["F0"] * micro_batches, ["B0"] * micro_batches, 2 * (ranks - 1 - rank)), 2 * rank)


def zbv(rank: int, ranks: int, micro_batches: int, chunks: int) -> list[str]:
    """Down the ranks and up again, so that rank 0 holds both ends: no bubble in 1F1B's memory (Qi et al. 2024)."""
    after = ranks - rank - 1
    steady = max(0, micro_batches - 2 * ranks + 1) + rank
    return [
        *["F0"] * (2 * after + 1),
        *["F1", "F0"] * rank,
        *["F1", "I1", "W"] * (after + 1),
        *["F0", "I0", "W", "F1", "I1", "W"] * steady,
        *["I0", "W", "F1", "I1", "W"] * after,
        *["I0", "I1"] * rank,
        *["I0", "W"] * (after + 1),
        *["W"] * (2 * rank),
    ]


def dualpipev(rank: int, ranks: int, micro_batches: int, chunks: int) -> list[str]:
    """The V of `zbv` with each forward beside a backward, to hide expert dispatch (DeepSeek-V3's DualPipe, cut in half)."""
    after = ranks - rank - 1
    steady = ["F0B1", "F1B0"] * (max(0, micro_batches - 2 * ranks) + rank + 1)
    if after == 0:  # this forward need not wait for the first gradient to come back to the last rank
        steady[:1] = ["F0", "B1"]
    return [
        *["F0"] * (2 * after),
        *["F0", "F1"] * (rank + 1),
        *["I1", "W", "F1"] * after,
        *steady,
        *["B1", "F1B0"] * after,
        *(["B1", "B0"] * (rank + 1))[: rank + 1],
        *(["I1", "I0"] * (rank + 1))[rank + 1 :],
        *["W", "I0"] * after,
        *["W"] * (rank + 1),
    ]


def _alternate(forwards: Sequence[str], backwards: Sequence[str], ahead: int) -> list[str]:
    """So many forwards, then a forward and a backward in turn, then the backwards that are left."""
    ahead = min(ahead, len(forwards))
    pairs = [word for pair in zip(forwards[ahead:], backwards, strict=False) for word in pair]
    return [*forwards[:ahead], *pairs, *backwards[len(backwards) - ahead :]]


def _defer_weights(words: Sequence[str], lag: int) -> list[str]:
    """Split each backward in two, and let the weights' part come `lag` backwards later, or at the end."""
    split, pending = [], 0
    for word in words:
        if word[0] == "B":
            split.append(f"I{word[1:]}")
            pending += 1
            if pending > lag:
                split.append("W")
                pending -= 1
        else:
            split.append(word)
    return split + ["W"] * pending


def number(words: Sequence[str], stages: Sequence[int], micro_batches: int) -> tuple[Action, ...]:
    """The actions that a rank's words stand for, without those of micro-batches that do not exist.

    `stages` are the global stages of the rank's chunks. Half of an overlapped pair is left as a plain action.
    """
    taken: Counter[tuple[bool, int]] = Counter()
    pending: deque[tuple[int, int]] = deque()
    actions = []
    for word in words:
        parts = []
        for letter, chunk in _WORD.findall(word):
            if letter == "W":
                stage, micro_batch = pending.popleft()
            else:
                stage, turn = stages[int(chunk)], (letter == "F", int(chunk))
                micro_batch = taken[turn]
                taken[turn] += 1
            if letter == "I":
                pending.append((stage, micro_batch))
            if micro_batch < micro_batches:
                parts.append(Action(Kind(letter), stage, micro_batch))
        if len(parts) == 2:
            parts = [Action(Kind.OVERLAP, parts[0].stage, parts[0].micro_batch, parts=tuple(parts))]
        actions += parts
    return tuple(actions)
