"""Whether what was written is what was read: bit for bit, and by what the model makes of a few tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from teratron.checkpoint.source import Weights, load_entries
from teratron.config import UserError
from teratron.models import State, build_model

TEXT = "The quick brown fox jumps over the lazy dog, and 12 of them would like to know why it is always the same dog."
TOKENS = 32
MOST = 2**28
"""Parameters of the largest model that is computed whole."""


@dataclass(frozen=True)
class Compared:
    """What was found alike."""

    parts: int
    """0 = parts are not stored as such."""
    tokens: int
    """0 = the model is too large to be computed here."""
    difference: float
    """The largest of the logits."""

    def __str__(self) -> str:
        told = f"{self.parts:,} parts are equal, " if self.parts else ""
        if not self.tokens:
            return f"{told}the model is too large to compare logits"
        return f"{told}logits of {self.tokens} tokens differ by at most {self.difference:.3g}"


def compare(source: Weights, written: Weights) -> Compared:
    """Raise `UserError` unless two models have the same parts, bit for bit, and give the same logits; the second may be of another type."""
    ours, theirs = ({entry.name: entry for entry in weights.parts} for weights in (source, written))
    if ours.keys() != theirs.keys():
        raise _wrong(written, f"{min(ours.keys() ^ theirs.keys())} is in one of the two alone")
    for name, entry in ours.items():
        if not torch.equal(_bits(entry.values().to(theirs[name].dtype)), _bits(theirs[name].values())):
            raise _wrong(written, f"{name} differs")
    return replace(compare_logits(source.cast(written.parts[0].dtype), written), parts=len(ours))


def compare_logits(source: Weights, written: Weights) -> Compared:
    """Raise `UserError` unless two models, of which not every part need be alike, give the same logits."""
    if sum(math.prod(entry.shape) for entry in source.parts) > MOST:
        return Compared(0, 0, 0.0)
    expected, found = (logits_of(weights, tokens_for(source)) for weights in (source, written))
    difference = float((expected - found).nan_to_num().abs().max())
    if not torch.allclose(found, expected, rtol=0, atol=1e-5 * float(expected.nan_to_num(posinf=0, neginf=0).abs().max()), equal_nan=True):
        raise _wrong(written, f"logits differ by {difference:.3g}")
    return Compared(0, found.shape[1], difference)


def _bits(values: Tensor) -> Tensor:
    """What compares alike also where numbers are none."""
    return values.contiguous().view(torch.uint8)


def _wrong(written: Weights, what: str) -> UserError:
    return UserError(f"{written.name}: not what was read: {what}; nothing was put in place: convert it again")


def tokens_for(weights: Weights) -> Tensor:
    """A few tokens that the model knows, int64 [1, S]."""
    config = weights.config
    count = min(TOKENS, config.seq_length, config.recurrence or TOKENS)
    ids = weights.tokenizer.encode(_known(weights)) if weights.tokenizer is not None else []
    drawn = torch.randint(config.vocab_size, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    return torch.tensor([[*ids, *drawn][:count]])


def _known(weights: Weights) -> str:
    """The text, or what of it a tokenizer of characters knows."""
    tokenizer = weights.tokenizer
    return "".join(c for c in TEXT if tokenizer is None or tokenizer.kind != "chars" or tokenizer.token_id(c) is not None)


def logits_of(weights: Weights, tokens: Tensor) -> Tensor:
    """Logits of the vocabulary or of classes, or vectors where there are none; float32 (float64 where weights are), on CPU."""
    kind = torch.promote_types(weights.parts[0].dtype, torch.float32)
    model = build_model(weights.config, dtype=kind).eval()
    load_entries(model, weights.parts)
    state: State = {"tokens": tokens, "positions": torch.arange(tokens.shape[1]).expand(tokens.shape)}
    if weights.config.family == "encoder_decoder":
        state |= {f"encoder_{name}": tensor for name, tensor in state.items()}
    with torch.inference_mode():
        state = model(state)
        if weights.config.head == "language":
            return model.head.output(state["hidden"])
        return model.head.scores(state) if weights.config.head == "classes" else state["hidden"]
