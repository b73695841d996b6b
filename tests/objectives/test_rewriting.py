"""What is read and written, as batches: for an encoder and a decoder, for a decoder alone, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from teratron.config import Config, UserError
from teratron.data.samples import PADDING
from teratron.data.special import SpecialTokens
from teratron.objectives import Batch, build_objective
from teratron.objectives.rewriting import Rewriting

LENGTH, FIRST = 64, 200
NAMES = ["span_corruption", "denoising", "ul2"]


class Rows:
    """Tokens below 150 that tell their place; every third row is short."""

    count: int | None = None

    def __init__(self, seq_length: int) -> None:
        self.seq_length = seq_length

    def rows(self, index: np.ndarray) -> np.ndarray:
        rows = np.tile(np.arange(self.seq_length + 1), (len(index), 1))
        rows[2::3, 5:] = PADDING
        return rows


def made(name: str, family: str, **keys: Any) -> tuple[Rewriting, SpecialTokens]:
    config = Config().override(
        {"model.family": family, "objective.name": name, "model.seq_length": LENGTH, "model.vocab_size": 300, **keys}
    )
    objective = build_objective(config)
    assert isinstance(objective, Rewriting)
    return objective, SpecialTokens(300, 150, {role: FIRST + number for number, role in enumerate(objective.needs.roles)})


def batch_of(objective: Rewriting, special: SpecialTokens, count: int = 9) -> Batch:
    return objective.prepare(Rows(objective.needs.length), np.arange(count), special)


@pytest.mark.parametrize("name", NAMES)
def test_a_decoder_is_given_what_it_has_written_so_far(name: str) -> None:
    objective, special = made(name, "encoder_decoder")
    batch = batch_of(objective, special)
    assert (batch["tokens"][:, 0] == special.ids["pad"]).all()
    assert torch.equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    lengths = batch["weights"].sum(1).long()
    for row, length in enumerate(lengths):
        assert batch["targets"][row, length - 1] == special.ids["sep"], "what is written ends"
        assert (batch["targets"][row, length:] == 0).all()
        assert (batch["weights"][row, :length] == 1).all()
    assert batch["encoder_tokens"].shape == (9, LENGTH)
    real = batch["encoder_segments"] >= 0
    for row in range(9):
        read = batch["encoder_tokens"][row][real[row]]
        assert read[-1] == special.ids["sep"]
        everything = {*read.tolist(), *batch["targets"][row].tolist()}
        assert everything >= set(range(5 if row % 3 == 2 else objective.needs.length + 1)), "no token is lost"


def test_t5_reads_as_many_tokens_as_the_model_has() -> None:
    objective, special = made("span_corruption", "encoder_decoder")
    samples = Rows(objective.needs.length)
    batch = objective.prepare(samples, np.arange(2), special)  # two whole rows
    assert "encoder_segments" not in batch
    assert batch["encoder_tokens"].shape == (2, LENGTH)
    assert batch["weights"].all()


@pytest.mark.parametrize("name", ["span_corruption", "ul2", "prefix"])
def test_a_decoder_alone_writes_behind_what_it_has_read(name: str) -> None:
    objective, special = made(name, "gpt")
    batch = batch_of(objective, special)
    assert batch["tokens"].shape == (9, LENGTH)
    read, written = batch["prefix"], batch["weights"] > 0
    assert torch.equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    for row in range(9):
        first, last = int(read[row].sum()), int(written[row].nonzero().max())
        assert read[row, :first].all()
        assert written[row].nonzero().flatten().tolist() == list(range(first - 1, last + 1)), "all that follows what is read is learnt"
        if name != "prefix":
            assert batch["tokens"][row, first - 1] == batch["targets"][row, last] == special.ids["sep"]
    whole = torch.arange(9) % 3 != 2
    assert int(batch["weights"][whole].sum(1).max()) <= objective.written


def test_a_prefix_is_cut_anywhere() -> None:
    objective, special = made("prefix", "gpt")
    lengths = objective.prepare(Rows(LENGTH), np.arange(3000), special)["prefix"].sum(1)[torch.arange(3000) % 3 != 2]
    assert (int(lengths.min()), int(lengths.max())) == (1, LENGTH)
    assert float(lengths.double().mean()) == pytest.approx((LENGTH + 1) / 2, rel=0.05)


def test_ul2_mixes_its_denoisers_evenly_and_says_which() -> None:
    objective, special = made("ul2", "encoder_decoder")
    batch = batch_of(objective, special, 1800)
    whole = torch.arange(1800) % 3 != 2
    kinds, written = batch["encoder_tokens"][whole, 0], batch["weights"][whole].sum(1)
    shares = {role: float((kinds == special.ids[role]).double().mean()) for role in ("[R]", "[S]", "[X]")}
    assert shares == {"[R]": pytest.approx(2 / 7, abs=0.04), "[S]": pytest.approx(1 / 7, abs=0.04), "[X]": pytest.approx(4 / 7, abs=0.04)}
    sequential = kinds == special.ids["[S]"]
    sentinels = (batch["encoder_tokens"][whole] > special.ids["[X]"]) & (batch["encoder_tokens"][whole] < special.ids["sep"])
    assert not sentinels[sequential].any()
    assert sentinels[~sequential].any(1).all()
    assert float(written[sequential].mean()) == pytest.approx(1 + (objective.needs.length + 1) / 4, rel=0.1)


@pytest.mark.parametrize(("name", "family"), [("span_corruption", "encoder_decoder"), ("denoising", "encoder_decoder"), ("ul2", "gpt")])
def test_a_batch_is_a_function_of_its_samples_alone(name: str, family: str) -> None:
    objective, special = made(name, family)
    whole = batch_of(objective, special)
    halves = [objective.prepare(Rows(objective.needs.length), np.arange(9)[part], special) for part in (slice(0, 3), slice(3, 9))]
    for field in ("tokens", "targets", "weights", "positions"):
        assert torch.equal(whole[field], torch.cat([half[field] for half in halves])), field


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"objective.name": "prefix", "model.family": "encoder_decoder"}, "objective.name = prefix does not fit .*choose model.family gpt"),
        ({"objective.name": "denoising", "model.family": "gpt"}, "choose model.family encoder_decoder"),
        ({"objective.name": "next_token", "model.family": "encoder_decoder"}, "model.family gpt or xlnet, or objective.name span"),
        ({"objective.name": "ul2", "data.isolate_documents": True}, "data.isolate_documents concerns objective.name = next_token"),
        ({"objective.name": "ul2", "objective.contrastive": 1.0}, "objective.contrastive = 1.0 goes with"),
    ],
)
def test_what_does_not_fit_is_refused(keys: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        Config().override(keys)


def test_a_sequence_without_room_is_refused() -> None:
    config = Config().override({"model.family": "encoder_decoder", "objective.name": "ul2", "model.seq_length": 3})
    with pytest.raises(UserError, match=r"model.seq_length = 3 is too short for objective.name = ul2: choose at least 16"):
        build_objective(config)
