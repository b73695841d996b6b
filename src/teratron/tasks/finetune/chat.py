"""`chat`: a decoder learns what the assistant says in conversations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from teratron.config import Config, UserError
from teratron.data.examples import Example, side_by_side
from teratron.models import Model
from teratron.tasks.finetune.coder import Coder
from teratron.tasks.finetune.conversations import Messages, conversations
from teratron.tasks.finetune.rows import Row, Table
from teratron.tasks.finetune.task import Scored, Task
from teratron.tasks.finetune.templates import Turn, Writer, template_of
from teratron.tasks.finetune.writing import losses, room_to_write, written
from teratron.tasks.metrics import Metric, chrf, rouge


@dataclass(frozen=True)
class Reply:
    """What is predicted for a conversation: how likely what the assistant said was, and what the model says at the last turn."""

    text: str
    loss: float = 0.0
    """Cross-entropy in nats of all that the assistant said."""
    tokens: int = 0
    """How many tokens that is; 0 = not known."""


class Chat(Task):
    """Learns the assistant's turns with their end marks, and nothing of what the others say."""

    name = "chat"
    summary = "what an assistant says in conversations"
    families = ("gpt",)
    objective = "supervised"
    columns: ClassVar[Mapping[str, Sequence[str]]] = {
        "messages": ("messages", "conversations", "conversation", "dialogue", "turns"),
        "instruction": ("instruction", "prompt", "question"),
        "input": ("input", "context"),
        "output": ("output", "response", "answer", "completion"),
        "instances": ("instances",),
    }
    optional = tuple(columns)
    takes = ("target_length", "beams", "template", "pack")

    @classmethod
    def read(cls, table: Table) -> Table:
        """Rows of `messages`, which are dicts of role and content and end with the assistant's."""
        rows = [found for number, row in enumerate(table.rows, 1) for found in conversations(row, f"--data {table.name}, example {number}")]
        return Table(table.name, [{"messages": messages} for messages in rows], table.notes)

    def examples(self, rows: Sequence[Row], coder: Coder) -> list[Example]:
        found = self._written(rows, coder)
        if not self.options.pack:
            return found
        packs = packed(found, coder.length)
        self._notes.append(f"{len(found):,} conversations in {len(packs):,} examples")
        return packs

    def _written(self, rows: Sequence[Row], coder: Coder) -> list[Example]:
        """One example a row."""
        writer, examples, shortened = Writer(template_of(self.options.template, coder.tokenizer), coder.tokenizer), [], 0
        for row in rows:
            turns = writer.turns(row["messages"])
            kept = fitted(turns, coder.length + 1 - len(writer.begin))  # the last token of all is a target only
            shortened += sum(turn.size for turn in kept) < sum(turn.size for turn in turns)
            examples.append(conversation(writer.begin, kept))
        self._notes = [f"{shortened:,} conversations too long: they lost their oldest turns, or the end of one"] if shortened else []
        return examples

    def notes(self) -> list[str]:
        return self._notes

    def predict(self, model: Model, config: Config, rows: Sequence[Row], coder: Coder) -> Sequence[Reply]:
        examples = self._written(rows, coder)
        texts = self.replies(model, config, [row["messages"][:-1] for row in rows], coder)
        counts = [int(example["weights"].sum()) for example in examples]
        return [Reply(*found) for found in zip(texts, losses(model, config, examples, self.batch).tolist(), counts, strict=True)]

    def replies(self, model: Model, config: Config, asked: Sequence[Messages], coder: Coder) -> list[str]:
        """What the model says next in each conversation."""
        writer = Writer(template_of(self.options.template, coder.tokenizer), coder.tokenizer)
        most, before = room_to_write(coder, self.options.target_length), writer.before("assistant")
        room = min(coder.length, coder.config.positions - most) - len(writer.begin) - len(before)
        turns = [fitted(writer.turns(messages), room) for messages in asked]
        prompts = [np.concatenate([writer.begin, *map(_ids, kept), before]).astype(np.int64) for kept in turns]
        stop = [writer.template.stop] if writer.template.stop else []
        return written(model, config, prompts, coder, most, self.options.beams, self.batch, stop)

    def score(self, rows: Sequence[Row], predictions: Sequence[Reply]) -> Scored:
        texts, gold = [reply.text for reply in predictions], [row["messages"][-1]["content"] for row in rows]
        references = [[text] for text in gold]
        sums, counts = (np.array([getattr(reply, name) for reply in predictions]) for name in ("loss", "tokens"))
        characters = chrf(texts, references)
        metrics = [characters, rouge(texts, references)[2]]
        if counts.any():
            metrics.insert(0, Metric("perplexity", lambda chosen: float(np.exp(sums[chosen].sum() / counts[chosen].sum()))))
        good = np.array([characters.of(np.array([number])) / 100 for number in range(len(rows))])
        shown = ["\n".join(f"{message['role']}: {message['content']}" for message in row["messages"][:-1]) for row in rows]
        return Scored(metrics, shown, texts, gold, good)

    def baseline(self, rows: Sequence[Row]) -> Sequence[Reply]:
        """The last user's words repeated."""
        return [Reply(row["messages"][-2]["content"]) for row in rows]


def fitted(turns: Sequence[Turn], room: int) -> list[Turn]:
    """What of a conversation is at most `room` tokens: without its oldest turns, and where two are too many with less in them.

    Raises `UserError` where even the marks of the last turns do not fit.
    """
    kept = list(turns)
    first = int(kept[0].role == "system")
    while _size(kept) > room and len(kept) - first > 2:
        del kept[first]
        while len(kept) - first > 2 and kept[first].role != "user":
            del kept[first]
    if _size(kept) > room:
        kept = kept[first:]
    # The first loses its end, but no more than leaves it a third of the room, then the last, then both what must be.
    for number, least in [(0, room // 3), *((number, 0) for number in reversed(range(len(kept))))]:
        over = min(_size(kept) - room, len(kept[number].content) - least)
        if over > 0:
            kept[number] = _shortened(kept[number], over)
    if _size(kept) > room:
        raise UserError(f"--length: the marks of one turn alone are {_size(kept)} tokens, more than {room}: raise it, or --template plain")
    return kept


def _shortened(turn: Turn, tokens: int) -> Turn:
    """A turn without the last tokens of its content; a reply that is cut off does not end."""
    return replace(turn, content=turn.content[: len(turn.content) - tokens], after=turn.after[: 0 if turn.role == "assistant" else None])


def _size(turns: Iterable[Turn]) -> int:
    return sum(turn.size for turn in turns)


def _ids(turn: Turn) -> np.ndarray:
    return np.concatenate([turn.before, turn.content, turn.after])


def conversation(begin: np.ndarray, turns: Sequence[Turn], first: int = 0) -> Example:
    """An example in which each token predicts the next one; those that the assistant says count, from turn number `first`."""
    ids = np.concatenate([begin, *map(_ids, turns)]).astype(np.int64)
    said = [turn.role == "assistant" and number >= first for number, turn in enumerate(turns)]
    learned = [np.arange(turn.size) >= (len(turn.before) if counts else turn.size) for turn, counts in zip(turns, said, strict=True)]
    weights = np.concatenate([np.zeros(len(begin), bool), *learned]).astype(float)
    return {"tokens": ids[:-1], "targets": ids[1:], "weights": weights[1:]}


def packed(examples: Sequence[Example], room: int) -> list[Example]:
    """Examples one behind the other in packs of at most `room` tokens, each a segment whose positions begin anew."""
    packs: list[list[Example]] = [[]]
    for example in examples:
        if packs[-1] and sum(len(held["tokens"]) for held in packs[-1]) + len(example["tokens"]) > room:
            packs.append([])
        packs[-1].append(example)
    return [side_by_side(pack) for pack in packs]
