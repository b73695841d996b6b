"""The report of an evaluation: its page and its JSON hold the metrics and what went wrong, and nothing from elsewhere."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from tiny import tiny, write_text

from teratron.cli.main import main
from teratron.tasks.evaluate import Mistake, Report
from teratron.tasks.evaluate.page import shown, write_page
from teratron.tasks.evaluate.report import write_json
from teratron.tasks.metrics import Estimate
from teratron.train import Trainer

WRONG = (Mistake("2 < 3 & <b>?", "yes", "no"), Mistake("x" * 5000, "", "maybe"))
METRICS = {"accuracy": Estimate(0.5, 0.25, 0.75), "r": Estimate(math.nan, math.nan, math.nan)}
REPORT = Report("choice", "some/file.jsonl", 7, METRICS, {"chance": 0.25}, WRONG, 2, 1.5)


def test_page_shows_metrics_and_mistakes(tmp_path: Path) -> None:
    write_page([REPORT], "a <model>", tmp_path / "eval.html")
    page = (tmp_path / "eval.html").read_text("utf-8")
    text = re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.S)
    for wanted in (
        "a &lt;model&gt;",
        "0.500",
        "0.250 to 0.750",
        "2 of 7 went wrong",
        "2 &lt; 3 &amp; &lt;b&gt;?",
        "yes",
        "no",
        "chance 0.250",
    ):
        assert wanted in text, wanted
    assert "x" * 1201 not in page
    assert not re.search(r"(src|href)=|url\(|@import|https?:", page)


def test_json_has_null_for_what_is_no_number(tmp_path: Path) -> None:
    write_json([REPORT], "m", tmp_path / "eval.json")
    (found,) = json.loads((tmp_path / "eval.json").read_text("utf-8"))["results"]
    assert found["metrics"] == {"accuracy": {"value": 0.5, "low": 0.25, "high": 0.75}, "r": {"value": None, "low": None, "high": None}}
    assert found["wrong"][0] == {"question": "2 < 3 & <b>?", "expected": "yes", "found": "no"}
    assert (found["task"], found["count"], found["wrong_count"]) == ("choice", 7, 2)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.09938, "0.099"),
        (0.0, "0.000"),
        (2e-5, "2.00e-05"),
        (31.256, "31.26"),
        (12657355.2, "12,657,355"),
        (3e9, "3.00e+09"),
        (math.nan, "none"),
    ],
)
def test_values_are_short(value: float, text: str) -> None:
    assert shown(value) == text


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    Trainer(tiny(write_text(folder / "text.txt"), train__steps=2, model__seq_length=16), folder / "run").train()
    return folder / "run"


def test_eval_measures_a_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.txt").write_text("the cat sat on a mat quietly on a mat\n" * 3)
    (tmp_path / "q.jsonl").write_text('{"query": "the cat", "choices": ["sat on", "a mat", "quietly"], "gold": 1}\n' * 2)
    words = ["eval", str(run), "perplexity", "choice", "--data", str(tmp_path / "t.txt"), str(tmp_path / "q.jsonl")]
    assert main([*words, "--limit", "2", "--out", str(tmp_path / "out" / "deep")]) == 0
    printed = capsys.readouterr().out
    assert "token_perplexity" in printed
    assert "examples left out" in printed
    content = json.loads((tmp_path / "out" / "deep" / "eval.json").read_text("utf-8"))
    assert [(found["task"], found["count"]) for found in content["results"]] == [("perplexity", 2), ("choice", 2)]
    assert (tmp_path / "out" / "deep" / "eval.html").stat().st_size > 2000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["perplexty", "--data", "t.txt"], "there is no task 'perplexty' (did you mean 'perplexity'?)"),
        (["choise", "--data", "t.txt"], "there is no task 'choise' (did you mean 'choice'?)"),
        (["choice", "--data", "t.jsonl", "--stride", "32"], "--stride: concerns perplexity alone, not choice: leave it out"),
        (
            ["lambada", "choice", "--data", "a", "b", "--detokenise=wikitext"],
            "--detokenise: concerns perplexity alone, not lambada or choice",
        ),
        (["choice", "--data", "t.jsonl", "--columns", "text=a"], "--columns: concerns the task of a fine-tuned run"),
        (["classify", "--data", "t.jsonl", "--nproc", "2"], "--nproc: classify, the task of a fine-tuned run, runs in one process"),
        (["classify", "--data", "t.jsonl", "--precision=bf16"], "with the numbers that it was trained with: leave --precision out"),
        (["tag", "--data", "t.jsonl", "--tokenizer", "bytes"], "leave --tokenizer out"),
        (["choice", "lambada", "--data", "a", "b", "c"], "2 tasks and 3 files under --data"),
        (["choice", "--data", "t.txt", "--batch", "0"], "--batch 0: expected at least 1"),
        (["choice", "--data", "none.jsonl"], "none.jsonl: no such file"),
        (["classify", "--data", "t.jsonl"], "says no task: give a run of `teratron finetune`"),
    ],
)
def test_refusals(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["eval", str(run), *words]) == 2
    assert message in capsys.readouterr().err
