"""What is masked, over 100,000 tokens: how many, whole words, runs of words, what becomes of them; it follows from (seed, index)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from teratron.config import Config, UserError
from teratron.data.order import keyed
from teratron.data.special import SpecialTokens, special_tokens
from teratron.objectives import build_objective
from teratron.objectives.masking import GEOMETRIC

LENGTH, VOCAB = 128, 500
CLS, SEP, MASK, EOD, WHOLE = 0, 1, 2, 3, 300
"""Ids from WHOLE on go on with a word."""
ROWS = 800


class Words:
    """A tokenizer of which nothing is asked but which ids are parts of words."""

    kind, vocab_size, eod = "wordpiece", VOCAB, EOD

    def pieces(self) -> list[str]:
        return [f"##{number}" if number >= WHOLE else str(number) for number in range(VOCAB)]

    def token_id(self, token: str) -> int | None:
        return {"[CLS]": CLS, "[SEP]": SEP, "[MASK]": MASK}.get(token)


class Rows:
    """Endless rows of any ordinary tokens, now and then an end of document."""

    count = None

    def __init__(self, seq_length: int) -> None:
        self.seq_length = seq_length

    def rows(self, index: np.ndarray) -> np.ndarray:
        drawn = keyed(9, np.asarray(index)[:, None], np.arange(self.seq_length + 1))
        tokens = (4 + drawn % np.uint64(VOCAB - 4)).astype(np.int64)
        return np.where(drawn % np.uint64(251) == 0, EOD, tokens)


SPECIAL = special_tokens(Words(), ("mask", "cls", "sep"), VOCAB, "masked")  # type: ignore[arg-type]


def batch_of(index: np.ndarray, **keys: Any) -> dict[str, np.ndarray]:
    base = {"model.family": "encoder", "model.seq_length": LENGTH, "objective.name": "masked"}
    base |= {f"objective.{name}": value for name, value in keys.items()}
    if "sentence" in keys:
        base["model.pooler"] = True
    objective = build_objective(Config().override(base))
    batch = objective.prepare(Rows(objective.needs.length), index, SPECIAL)
    return {name: tensor.numpy() for name, tensor in batch.items()}


def words_of(row: np.ndarray) -> list[range]:
    """The places of each word; a special token ends one."""
    found: list[range] = []
    for place, token in enumerate(row.tolist()):
        if token >= WHOLE and found and found[-1].stop == place:
            found[-1] = range(found[-1].start, place + 1)
        elif token > EOD:
            found.append(range(place, place + 1))
    return found


@pytest.fixture(scope="module")
def many() -> dict[str, np.ndarray]:
    """More than 100,000 tokens, masked by whole words."""
    return batch_of(np.arange(ROWS))


def test_rates_over_100000_tokens(many: dict[str, np.ndarray]) -> None:
    chosen, tokens, targets = many["weights"] == 1, many["tokens"], many["targets"]
    maskable = targets > EOD
    assert maskable.sum() >= 100_000 * 0.98
    assert tokens.size >= 100_000
    assert chosen.sum() / maskable.sum() == pytest.approx(0.15, abs=0.001)
    assert not chosen[~maskable].any(), "special tokens are never masked"
    assert (tokens[~chosen] == targets[~chosen]).all()
    fates = [(tokens == MASK) & chosen, (tokens != targets) & (tokens != MASK) & chosen, (tokens == targets) & chosen]
    shares = [fate.sum() / chosen.sum() for fate in fates]
    # Five deviations of a share of 15,000 draws; another token is by chance the same one time in 496.
    assert shares == pytest.approx([0.8, 0.1 * (1 - 1 / 496), 0.1 * (1 + 1 / 496)], abs=0.016)
    others = tokens[fates[1]]
    assert others.min() > EOD
    assert len(np.unique(others)) > 300, "a random token may be any"


def test_words_are_masked_whole(many: dict[str, np.ndarray]) -> None:
    for targets, weights in zip(many["targets"][:200], many["weights"][:200], strict=True):
        for word in words_of(targets):
            assert len(set(weights[word.start : word.stop].tolist())) == 1
    pieces = batch_of(np.arange(50), whole_words=False)
    cut = [set(w[word.start : word.stop]) for t, w in zip(pieces["targets"], pieces["weights"], strict=True) for word in words_of(t)]
    assert any(len(found) == 2 for found in cut), "without whole words some are masked in part"


@pytest.mark.parametrize(
    ("kind", "shares"), [("inverse", [6 / 11, 3 / 11, 2 / 11]), ("geometric", [1.0, 1 - GEOMETRIC, (1 - GEOMETRIC) ** 2])]
)
def test_lengths_of_runs_follow_their_law(kind: str, shares: list[float]) -> None:
    objective = build_objective(
        Config().override({"model.family": "encoder", "objective.name": "masked", "objective.max_ngram": 3, "objective.ngram": kind})
    )
    drawn = Counter(n for sample in range(200) for n in objective.masking.ngrams(100, sample))  # type: ignore[attr-defined]
    expected = np.array(shares) / sum(shares)
    assert [drawn[n] / 20_000 for n in (1, 2, 3)] == pytest.approx(expected.tolist(), abs=0.018)
    runs = batch_of(np.arange(60), max_ngram=3, ngram=kind)
    assert runs["weights"].sum() / (runs["targets"] > EOD).sum() == pytest.approx(0.15, abs=0.002)
    joined = [run for t, w in zip(runs["targets"], runs["weights"], strict=True) for run in masked_runs(t, w)]
    assert np.mean(joined) > 1.3 * np.mean(
        [run for t, w in zip(*(batch_of(np.arange(60))[n] for n in ("targets", "weights")), strict=True) for run in masked_runs(t, w)]
    )


def masked_runs(targets: np.ndarray, weights: np.ndarray) -> list[int]:
    """Words of each run of masked words."""
    runs: list[int] = []
    before = -1
    for word in words_of(targets):
        if weights[word.start]:
            runs = [*runs[:-1], runs[-1] + 1] if before == word.start else [*runs, 1]
            before = word.stop
    return runs


def test_a_mask_follows_from_the_seed_and_the_index_alone(many: dict[str, np.ndarray]) -> None:
    alone = batch_of(np.array([17, 3]))
    for name, values in alone.items():
        assert (values == many[name][[17, 3]]).all(), name
    again = batch_of(np.array([17 + ROWS]))
    assert (again["weights"] != many["weights"][17]).any(), "every index has another mask"


@pytest.mark.parametrize("sentence", ["next", "order"])
def test_pairs_are_right_as_often_as_wrong_and_say_so(sentence: str) -> None:
    batch = batch_of(np.arange(400), sentence=sentence)
    objective_length = LENGTH - 3
    rows = Rows(objective_length).rows(np.arange(400))[:, :-1]
    known = batch["sentence_weights"][:, 0] == 1
    assert known.mean() > 0.95
    labels = batch["sentence_targets"][known, 0]
    assert labels.mean() == pytest.approx(0.5, abs=0.13)
    assert not batch["sentence_weights"][:, 1:].any()
    for row, targets, types, label in zip(rows[known], batch["targets"][known], batch["token_types"][known], labels, strict=True):
        first, second = (targets[(types == kind) & (targets > EOD)].tolist() for kind in (0, 1))
        assert first
        assert second
        begin, other = (place_of(part, row.tolist()) for part in (first, second))
        assert begin is not None
        if sentence == "order":
            assert other == (begin + len(first) if label == 0 else begin - len(second))
        else:
            assert other == (begin + len(first) if label == 0 else None)


def place_of(part: list[int], text: list[int]) -> int | None:
    return next((start for start in range(len(text)) if text[start : start + len(part)] == part), None)


def test_padding_is_seen_by_none_and_whole_rows_need_no_mask(many: dict[str, np.ndarray]) -> None:
    assert "segments" not in many
    padded = batch_of(np.arange(20), sentence="order")
    ends = [int(np.flatnonzero(row == SEP).max()) for row in padded["targets"]]
    for segments, weights, end in zip(padded["segments"], padded["weights"], ends, strict=True):
        assert (segments[: end + 1] == 0).all()
        assert (segments[end + 1 :] == -1).all()
        assert not weights[end:].any()


def test_a_tokenizer_without_a_mask_token_is_refused() -> None:
    class Plain(Words):
        def token_id(self, token: str) -> int | None:
            return None

    with pytest.raises(UserError, match=r"needs the token \[MASK\] or <mask> and 2 more.*data.tokenizer wordpiece:SIZE or bpe:SIZE"):
        special_tokens(Plain(), ("mask", "cls", "sep"), VOCAB, "masked")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"set data\.tokenizer"):
        special_tokens(None, ("mask",), VOCAB, "masked")
    assert special_tokens(None, (), VOCAB, "next_token") == SpecialTokens(VOCAB)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"objective.name": "masked"}, r"does not fit model\.family = gpt: choose model\.family encoder, or objective\.name next_token"),
        ({"model.family": "encoder"}, r"choose model\.family gpt or xlnet, or objective\.name masked"),
        ({"objective.sentence": "next"}, r"goes with objective\.name = masked"),
        ({"model.family": "encoder", "objective.name": "masked", "objective.sentence": "next"}, r"set --model\.pooler"),
        ({"model.family": "encoder", "objective.name": "masked", "data.mask_end_of_document": True}, r"leave it out"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_choice(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Config().override(keys)
