"""`teratron finetune prefer`: its loss is the formula's on what its rows say, it learns, and refuses in a sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from tuned import ANIMALS, COLOURS, decoder, finetune, scores

from teratron.config import Config, ModelConfig, UserError
from teratron.data.examples import Examples
from teratron.data.special import SpecialTokens
from teratron.models import Model, build_model, initialise
from teratron.objectives import build_objective, total_loss
from teratron.tasks.finetune.prefer import Prefer, _with_references, answers
from teratron.tasks.finetune.rows import Row, Table
from teratron.tasks.finetune.task import Options

PAIRS = [("Name a colour.", "red", "seven"), ("And an animal?", "a small owl", "no"), ("", "yes", "yes, but no")]


def read(*rows: Mapping[str, Any]) -> list[Row]:
    return Prefer.read(Table("pairs", [dict(row) for row in rows])).rows


def rows_of(pairs: list[tuple[str, str, str]]) -> list[Row]:
    return read(*({"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in pairs))


def model_of(seed: int) -> Model:
    model = build_model(ModelConfig(layers=2, hidden=32, heads=2, seq_length=64, vocab_size=257, init_std=0.3), dtype=torch.float64)
    initialise(model, seed)
    return model


def config() -> Config:
    return Config(model=model_of(0).config).override({"objective.name": "preferred", "objective.beta": 0.3, "data.examples": "there"})


def log_probability(model: Model, prompt: str, answer: str) -> Tensor:
    """Of an answer and its end behind a prompt in the plain template, alone, from whole logits."""
    head = b"User: %s\nAssistant:" % prompt.encode()
    ids = torch.tensor([[*head, *b" ", *answer.encode(), 256]])
    state = model({"tokens": ids[:, :-1], "positions": torch.arange(ids.shape[1] - 1)[None]})
    scores = model.head.output(state["hidden"]).log_softmax(-1)
    return scores.gather(-1, ids[:, 1:, None])[0, len(head) - 1 :].sum()


def test_loss_and_gradients_are_those_of_the_formula() -> None:
    model, reference = model_of(1), model_of(2).requires_grad_(False)
    of, task, rows = decoder(64), Prefer(Options(64)), rows_of(PAIRS)
    found = task.examples(rows, of)
    referred = _with_references(found, answers(reference, config(), found))
    objective = build_objective(config())
    batch = objective.prepare(Examples.of(referred), np.arange(len(rows)), SpecialTokens(0))
    learned = total_loss(objective.terms(model, model(objective.inputs(batch)), batch), objective.counts(batch))
    learned.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}

    model.zero_grad()
    gaps = [log_probability(one, p, c) - log_probability(one, p, r) for p, c, r in PAIRS for one in (model, reference)]
    margins = 0.3 * (torch.stack(gaps[::2]) - torch.stack(gaps[1::2]))
    loss = -F.logsigmoid(margins).mean()
    loss.backward()
    # Files keep what the reference says in float32.
    assert learned.item() == pytest.approx(loss.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-7)


def test_both_answers_stand_behind_the_same_prompt_however_long() -> None:
    task, of = Prefer(Options(40)), decoder(40)
    rows = rows_of([("p" * 100, "c" * 3, "r" * 50), ("p", "c", "r" * 100)])
    for example in task.examples(rows, of):
        sides = [example["tokens"][example["segments"] == segment] for segment in (0, 1)]
        weights = [example["weights"][example["segments"] == segment] for segment in (0, 1)]
        heads = [side[: int(np.argmax(weight > 0))].tolist() for side, weight in zip(sides, weights, strict=True)]
        assert heads[0] == heads[1]
        assert max(map(len, sides)) <= 40
        assert all(weight.any() for weight in weights)
    assert task.notes() == ["2 too long: they lost their oldest turns, or the end of a text"]


def test_whole_conversations_that_differ_in_their_last_turn_are_pairs() -> None:
    head = [{"role": "user", "content": "Hi"}]
    sides = {side: [*head, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    assert read(sides) == read({"prompt": "Hi", "chosen": "chosen", "rejected": "rejected"}) == read(sides | {"prompt": head})


def test_it_learns_which_answers_are_better(tmp_path: Path) -> None:
    rows = [{"prompt": colour, "chosen": animal, "rejected": colour} for colour in COLOURS for animal in ANIMALS] * 2
    assert finetune("prefer", tmp_path, "gpt", rows, rows[:16], "--template", "text", "--epochs", "6", "--log.every", "1") == 0
    found = scores(tmp_path)
    assert found["metrics"]["accuracy"]["value"] > 0.9
    assert found["metrics"]["margin"]["value"] > 0.5
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first = next(event for event in events if event["event"] == "step")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)  # it begins as what it is compared with


def test_drawn_weights_are_no_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4
    assert finetune("prefer", tmp_path, "gpt", rows, rows, "--scratch") != 0
    assert "--scratch: prefer compares with the model that it begins with" in capsys.readouterr().err


@pytest.mark.parametrize("row", [{"chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "a", "rejected": 3}])
def test_what_is_no_pair_of_answers_is_refused_by_its_row(row: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="example 1: expected a prompt"):
        read(row)
