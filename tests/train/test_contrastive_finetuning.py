"""A run trained on with the contrastive term: the same weights first, the term in its steps, the held-out loss without it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import events, tiny, write_text

from teratron.train import Trainer


def test_a_branch_is_finetuned_with_the_term(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    Trainer(tiny(text), tmp_path / "base", echo=False).train()
    for name, weight in (("plain", 0.0), ("contrastive", 0.5)):
        config = tiny(text, train__steps=9, objective__contrastive=weight)
        Trainer(config, tmp_path / "base", fork_to=tmp_path / name, echo=False).train()
    plain, contrastive = ([e for e in events(tmp_path / name, "step") if e["step"] > 6] for name in ("plain", "contrastive"))
    assert [event["step"] for event in contrastive] == [7, 8, 9]
    assert contrastive[0]["terms"]["next_token"] == plain[0]["terms"]["next_token"], "the same weights and batch"
    for event in contrastive:
        assert event["terms"]["contrastive"] > 0.1
        assert event["loss"] == pytest.approx(event["terms"]["next_token"] + 0.5 * event["terms"]["contrastive"], rel=1e-6)
    for evaluation in events(tmp_path / "contrastive", "eval"):
        assert evaluation["terms"] == {"next_token": evaluation["loss"]}
