"""Permutation language modelling: what is predicted and in which order, that nobody sees what comes later, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from teratron.config import Config, UserError
from teratron.data.special import SpecialTokens
from teratron.models import Model, build_model, initialise
from teratron.objectives import Batch
from teratron.objectives.permuted import Permuted
from teratron.parallel.mesh import check_layout

KEYS = {
    "model.family": "xlnet",
    "model.position": "transformer_xl",
    "model.layers": 2,
    "model.hidden": 16,
    "model.heads": 2,
    "model.seq_length": 48,
    "model.recurrence": 24,
    "model.vocab_size": 40,
    "model.init_std": 0.3,
    "objective.name": "permuted",
    "objective.mask_rate": 0.25,
    "objective.max_ngram": 3,
}
CONFIG = Config().override(KEYS)
END = 3
SPECIAL = SpecialTokens(40, END)


class Rows:
    """Rows of any tokens; of every third sample the end is padding."""

    count = None

    def __init__(self, length: int = 48) -> None:
        self.seq_length = length

    def rows(self, index: np.ndarray) -> np.ndarray:
        rows = np.stack([np.random.default_rng(int(sample)).integers(40, size=self.seq_length + 1) for sample in index])
        rows[np.asarray(index) % 3 == 2, self.seq_length - 10 :] = -1
        return rows


def prepared(count: int = 6, **changes: object) -> Batch:
    config = Config().override(KEYS | {name.replace("__", "."): value for name, value in changes.items()})
    return Permuted(config).prepare(Rows(), np.arange(count), SPECIAL)


def test_each_stretch_has_an_order_of_its_own() -> None:
    batch, rows = prepared(), Rows().rows(np.arange(6))
    assert {name: tuple(batch[name].shape) for name in ("turns", "target_positions")} == {"turns": (6, 48), "target_positions": (6, 12)}
    for row in range(6):
        for stretch in range(2):
            turns = batch["turns"][row, stretch * 24 :][:24]
            taken = turns.nonzero().flatten()
            weights = batch["target_weights"][row, stretch * 6 :][:6]
            places = batch["target_positions"][row, stretch * 6 :][:6][weights > 0]
            assert sorted(turns[taken].tolist()) == list(range(1, len(taken) + 1))
            assert places.tolist() == (taken + stretch * 24).tolist()
            assert (rows[row, places] >= 0).all()
            assert END not in rows[row, places]
            assert batch["target_tokens"][row, stretch * 6 :][:6][weights > 0].tolist() == rows[row, places].tolist()


def test_a_sample_is_drawn_for_its_index_alone() -> None:
    whole, objective = prepared(), Permuted(CONFIG)
    one = objective.prepare(Rows(), np.array([4]), SPECIAL)
    again = objective.prepare(Rows(), np.array([0, 4]), SPECIAL)
    for name in ("turns", "target_positions", "target_weights", "target_tokens"):
        assert torch.equal(one[name][0], whole[name][4])
        assert torch.equal(again[name][1], whole[name][4])
    other = Permuted(Config().override({**KEYS, "train.seed": 7})).prepare(Rows(), np.arange(6), SPECIAL)
    assert not torch.equal(other["turns"], whole["turns"])


def test_as_many_are_predicted_as_asked_for_anywhere_and_in_any_order() -> None:
    """Rates over 100,000 tokens, to 4 standard deviations or so."""
    config = Config().override({**KEYS, "model.seq_length": 500, "model.recurrence": 0, "objective.mask_rate": 1 / 6})
    objective = Permuted(config)
    rows = Rows(500)
    turns = objective.prepare(rows, np.arange(300)[np.arange(300) % 3 != 2], SPECIAL)["turns"].numpy()
    tokens = rows.rows(np.arange(300)[np.arange(300) % 3 != 2])[:, :-1]
    assert turns.size == 100_000
    chosen = turns > 0
    assert abs(chosen.sum() / (tokens != END).sum() - 1 / 6) < 0.0005
    for half in (slice(0, 250), slice(250, 500)):
        assert abs(chosen[:, half].mean() - chosen.mean()) < 0.008
    earlier = [(row[row > 0][:-1] < row[row > 0][1:]).mean() for row in turns]
    assert abs(np.mean(earlier) - 0.5) < 0.02


def logits_of(model: Model, batch: Batch) -> torch.Tensor:
    return model.head.output(model(Permuted(CONFIG).inputs(batch))["hidden"])


def test_a_token_changes_only_what_may_know_it() -> None:
    """Those predicted after it in its own stretch, and with two layers all of the next, as memory reaches; never itself."""
    model = build_model(CONFIG.model, dtype=torch.float64)
    initialise(model, 1)
    batch = prepared(1)
    before = logits_of(model, batch)
    for index in range(12):
        place = int(batch["target_positions"][0, index])
        turn, stretch = int(batch["turns"][0, place]), place // 24
        changed = batch | {"tokens": batch["tokens"].clone()}
        changed["tokens"][0, place] += 1
        moved = ((logits_of(model, changed) - before).abs().amax(-1)[0] > 1e-12).tolist()
        for other in range(12):
            there = int(batch["target_positions"][0, other])
            later = there // 24 == stretch and int(batch["turns"][0, there]) > turn
            assert moved[other] == (later or there // 24 > stretch), (place, there)


def test_padding_and_other_documents_are_not_seen() -> None:
    model = build_model(CONFIG.model, dtype=torch.float64)
    initialise(model, 1)
    batch = Permuted(CONFIG).prepare(Rows(), np.array([2]), SPECIAL)
    assert (batch["segments"] < 0).sum() == 10
    changed = batch | {"tokens": torch.where(batch["segments"] < 0, 7, batch["tokens"])}
    assert torch.equal(logits_of(model, batch), logits_of(model, changed))


def test_memory_has_no_gradient() -> None:
    """What is predicted in the second stretch teaches the first nothing, though it sees it."""
    model = build_model(CONFIG.model, dtype=torch.float64)
    initialise(model, 1)
    batch, read = prepared(1), []
    model.embedding.register_forward_hook(lambda unit, inputs, state: read.append(state["hidden"]) or state["hidden"].retain_grad())
    logits_of(model, batch)[0, 6:].sum().backward()
    slope = read[0].grad[0]
    assert slope[:24].abs().max() == 0 < slope[24:].abs().max()


REFUSED = {
    "family": ({"model.family": "gpt", "model.position": "rope", "model.recurrence": 0}, "choose model.family xlnet, or objective.name"),
    "position": ({"model.position": "rope"}, "does not fit model.family = xlnet: choose --model.position transformer_xl"),
    "recurrence": ({"model.recurrence": 20}, "does not divide model.seq_length = 48: choose a divisor"),
    "window": ({"model.window": 4}, "model.window = 4 does not go with model.family = xlnet: leave it out"),
    "experts": ({"model.experts": 4}, "model.experts = 4 does not go with model.family = xlnet: leave it out"),
    "contrastive": ({"objective.contrastive": 1}, "goes with objective.name = next_token, not permuted"),
    "ends": ({"data.mask_end_of_document": True}, "permuted never predicts that token"),
    "ahead": ({"model.predict_tokens": 2}, "goes with model.family = gpt and objective.name = next_token, not with xlnet and permuted"),
    "padding": ({"parallel.tensor": 4, "parallel.sequence": True}, "model.recurrence and objective.mask_rate that give multiples of 4"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name: str) -> None:
    changes, said = REFUSED[name]
    with pytest.raises(UserError, match=said):
        Config().override({**KEYS, **changes})


def test_context_ranks_are_refused() -> None:
    config = CONFIG.override({"parallel.context": 2})
    with pytest.raises(UserError, match=r"model\.family = xlnet attends by distances within whole ones: choose --parallel\.tensor"):
        check_layout(config.model, config.parallel)
