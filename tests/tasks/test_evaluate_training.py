"""Tasks that are measured in a training job have the numbers that `teratron eval` finds in its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import events, options, tiny, write_text

from teratron.cli.main import main
from teratron.config import UserError
from teratron.tasks.evaluate.training import examiner
from teratron.train import Trainer


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured")
    write_text(folder / "text.txt")
    rows = [
        {"query": f"the {word}", "choices": ["cat", "mat", "a"], "gold": n % 3} for n, word in enumerate(("cat", "mat", "a", "sat", "on"))
    ]
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "t.txt").write_text("quietly the cat sat on a mat\n")
    return folder


def keys(home: Path, **more: Any) -> dict[str, Any]:
    files = (f"choice:{home / 'q.jsonl'}", f"perplexity:{home / 't.txt'}")
    return {"train__eval_tasks": files, "train__eval_tasks_every": 2, "train__eval_tasks_limit": 4, "model__seq_length": 16, **more}


def test_a_run_measures_what_eval_finds_in_it(home: Path, tmp_path: Path) -> None:
    words = [word for word in options(**keys(home, train__eval_tasks=None)) if "eval_tasks=" not in word]
    files = ["--train.eval_tasks", f"choice:{home / 'q.jsonl'}", f"perplexity:{home / 't.txt'}"]
    assert main(["train", "--run", str(tmp_path / "run"), "--data.text", str(home / "text.txt"), *words, *files]) == 0
    found = events(tmp_path / "run", "task")
    assert [(event["step"], event["task"], event["examples"]) for event in found] == [
        (step, task, count) for step in (2, 4, 6) for task, count in (("choice", 4), ("perplexity", 3))
    ]
    data = ["--data", str(home / "q.jsonl"), str(home / "t.txt")]
    assert main(["eval", str(tmp_path / "run"), "choice", "perplexity", *data, "--limit", "4", "--out", str(tmp_path)]) == 0
    later = json.loads((tmp_path / "eval.json").read_text("utf-8"))["results"]
    for event, result in zip(found[-2:], later, strict=True):
        assert event["metrics"] == pytest.approx({name: one["value"] for name, one in result["metrics"].items()}, rel=1e-5)
    assert "choice, q.jsonl" in (tmp_path / "run" / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("choise:{home}/q.jsonl", "there is no task 'choise' .did you mean 'choice'"),
        ("choice:{home}/none.jsonl", "none.jsonl: no such file"),
        ("lambada:{home}/q.jsonl", "found the columns query, choices, gold, expected a text in a column 'text'"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_first_step(home: Path, tmp_path: Path, task: str, message: str) -> None:
    config = tiny(home / "text.txt", train__eval_tasks=(task.format(home=home),))
    with pytest.raises(UserError, match=message):
        Trainer(config, tmp_path / "run", echo=False, examiner=examiner)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_tasks_without_somebody_to_measure_are_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nobody is there to measure"):
        Trainer(tiny(home / "text.txt", **keys(home)), tmp_path / "run", echo=False)


def test_a_task_without_a_file_is_refused(home: Path) -> None:
    with pytest.raises(UserError, match=r"train\.eval_tasks = choice: expected TASK:FILE"):
        tiny(home / "text.txt", train__eval_tasks=("choice",))
