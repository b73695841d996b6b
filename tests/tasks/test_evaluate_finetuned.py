"""A fine-tuned run, evaluated on its test rows again, has the scores that `teratron finetune` told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tuned import BAD, GOOD, finetune, scores, write

from teratron.cli.main import main
from teratron.models import Model
from teratron.tasks.finetune import Classify


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("evaluated")
    rows = [{"review": f"it was {word}", "label": label} for label, words in (("good", GOOD), ("bad", BAD)) for word in words] * 6
    more = ("--columns", "text=review", "--epochs", "1")
    assert finetune("classify", home, "encoder", rows, rows[:9], *more) == 0
    return home


def test_scores_are_those_of_finetuning(folder: Path, tmp_path: Path) -> None:
    words = ["eval", str(folder / "run"), "classify", "--data", str(folder / "test.jsonl"), "--columns", "text=review"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    (found,) = json.loads((tmp_path / "eval.json").read_text("utf-8"))["results"]
    told = scores(folder)
    assert found["metrics"] == told["metrics"]
    assert found["facts"]["baseline accuracy"] == told["baseline"]["accuracy"]
    wrong = [row for row in told["predictions"] if row["good"] < 1]
    assert (found["count"], found["wrong_count"], len(found["wrong"])) == (9, len(wrong), len(wrong))


def test_the_seed_draws_the_intervals_alone(folder: Path, tmp_path: Path) -> None:
    found = []
    for seed in ("0", "1"):
        words = ["eval", str(folder / "run"), "classify", "--data", str(folder / "train.jsonl"), "--columns", "text=review"]
        assert main([*words, "--seed", seed, "--out", str(tmp_path / seed)]) == 0
        (result,) = json.loads((tmp_path / seed / "eval.json").read_text("utf-8"))["results"]
        found.append(result["metrics"])
    values, bounds = ([{name: metric[key] for name, metric in one.items()} for one in found] for key in ("value", "low"))
    assert values[0] == values[1]
    assert bounds[0] != bounds[1]


def test_the_batch_is_what_was_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    predict = Classify.predict

    def counted(self: Classify, model: Model, *rest: Any) -> Any:
        model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0]["tokens"])))
        return predict(self, model, *rest)

    monkeypatch.setattr(Classify, "predict", counted)
    words = ["eval", str(folder / "run"), "classify", "--data", str(folder / "test.jsonl"), "--columns", "text=review"]
    assert main([*words, "--batch", "4"]) == 0
    assert seen == [4, 4, 1]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("tag", "was fine-tuned for classify, not for tag"),
        ("choice", "gives texts no probability|gives a text no probability|does not continue text"),
    ],
)
def test_another_task_is_refused(folder: Path, capsys: pytest.CaptureFixture[str], task: str, message: str) -> None:
    data = write(folder / "choice.jsonl", [{"query": "x", "choices": ["a", "b"], "gold": 0}])
    assert main(["eval", str(folder / "run"), task, "--data", str(data)]) == 2
    error = capsys.readouterr().err
    assert any(part in error for part in message.split("|")), error
