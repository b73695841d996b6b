"""Multi-token prediction: each head has its own target, and the next token is predicted as if the heads were not there."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from teratron.config import Config, UserError
from teratron.data.special import SpecialTokens
from teratron.generate import Decoder, Sampling, TokenStream
from teratron.models import build_model, initialise
from teratron.objectives import NextToken, total_loss

KEYS = {
    "model.layers": 2,
    "model.hidden": 16,
    "model.heads": 2,
    "model.seq_length": 12,
    "model.vocab_size": 11,
    "model.init_std": 0.3,
    "model.predict_tokens": 3,
    "objective.ahead_weight": 0.5,
    "data.mask_end_of_document": True,
}
CONFIG = Config().override(KEYS)
END = 3


class Rows:
    """Rows of any tokens."""

    seq_length, count = 12, None

    def rows(self, index: np.ndarray) -> np.ndarray:
        return np.random.default_rng(0).integers(11, size=(len(index), 13))


def prepared() -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    index = np.arange(4)
    return Rows().rows(index), NextToken(CONFIG).prepare(Rows(), index, SpecialTokens(11, END))


def test_targets_are_further_on_in_the_same_document() -> None:
    rows, batch = prepared()
    assert (rows == END).any()
    for place in (2, 3):
        targets, weights = batch[f"token_{place}_targets"], batch[f"token_{place}_weights"]
        for row in range(len(rows)):
            for position in range(12):
                between = rows[row, position : position + place]
                seen = position + place < 13 and END not in between.tolist()
                assert weights[row, position] == float(seen)
                assert not seen or targets[row, position] == rows[row, position + place]


def test_terms_are_the_cross_entropies_of_blocks_beside_the_last() -> None:
    _, batch = prepared()
    objective, model = NextToken(CONFIG), build_model(CONFIG.model, dtype=torch.float64)
    initialise(model, 1)
    state = model(objective.inputs(batch))
    counts = objective.counts(batch)
    terms = {term.name: term for term in objective.terms(model, state, batch)}
    assert set(terms) == set(counts) == {"next_token", "token_2", "token_3"}

    kept = model.shared(objective.inputs(batch), "", None)
    trunk = model.blocks["0"](model.embedding(objective.inputs(batch), kept), kept)
    expected = torch.zeros((), dtype=torch.float64)
    for name, block, weight in (
        ("next_token", model.blocks["1"], 1.0),
        ("token_2", model.head.ahead["2"], 0.5),
        ("token_3", model.head.ahead["3"], 0.5),
    ):
        labels = {"next_token": "targets"}.get(name, f"{name}_targets"), {"next_token": "weights"}.get(name, f"{name}_weights")
        logits = model.head.output(model.head.norm(block(trunk, kept)["hidden"]))
        losses = F.cross_entropy(logits.transpose(1, 2), batch[labels[0]], reduction="none") * batch[labels[1]]
        assert terms[name].sum.item() == pytest.approx(losses.sum().item(), rel=1e-12)
        assert counts[name] == batch[labels[1]].sum()
        expected += weight * losses.sum() / batch[labels[1]].sum()
    assert total_loss(terms.values(), counts).item() == pytest.approx(expected.item(), rel=1e-12)


def test_heads_ahead_change_nothing_of_the_next_token() -> None:
    """Neither its weights' first values nor its logits: evaluation and generation may pass them by."""
    _, batch = prepared()
    plain = Config().override({**KEYS, "model.predict_tokens": 1, "objective.ahead_weight": 1.0})
    logits = []
    for config in (CONFIG, plain):
        model = build_model(config.model)
        initialise(model, 1)
        logits.append(model.head.output(model(NextToken(config).inputs(batch))["hidden"]))
    assert torch.equal(*logits)


def test_generation_passes_the_heads_by() -> None:
    """With its cache a model with heads says what it says without."""
    tokens, said = [5, 2, 9, 1, 7], []
    for places in (3, 1):
        model = build_model(dataclasses.replace(CONFIG.model, predict_tokens=places), dtype=torch.float64)
        initialise(model, 1)
        called: list[object] = []
        for block in getattr(model.head, "ahead", {}).values():
            block.register_forward_hook(lambda *seen, called=called: called.append(seen))
        stream = TokenStream(Decoder(model.eval(), [tokens], 6), Sampling(temperature=0))
        said.append([token for step in stream for _, token in step])
        assert called == []
    assert len(said[0]) == 6
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.predict_tokens": 12}, "reaches beyond model.seq_length = 12"),
        ({"model.predict_tokens": 1}, "objective.ahead_weight = 0.5 weighs tokens after the next, but model.predict_tokens = 1"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Config().override({**KEYS, **changes})
