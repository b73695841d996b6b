"""`teratron finetune classify`: learns what can be learnt, keeps the best weights, goes on when killed, and refuses in a sentence."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from teratron.cli.main import main
from teratron.config import Config, UserError
from teratron.data.tokenizer import load_tokenizer
from teratron.tasks.finetune.classify import Classify, starts
from teratron.tasks.finetune.coder import Coder
from teratron.tasks.finetune.judge import judge
from teratron.tasks.finetune.rows import read_table
from teratron.tasks.finetune.task import Options
from teratron.train import Trainer

GOOD, BAD = ("splendid", "lovely", "fine"), ("dreadful", "dull", "poor")
TEXT = "a film that was so very splendid lovely fine dreadful dull poor and the actors too\n"


def rows(count: int, seed: int) -> list[dict[str, str]]:
    """A text's label is whether its one adjective is a good one."""
    draw = np.random.default_rng(seed)
    filler = ["a", "film", "that", "was", "so", "very", "and", "the", "actors", "too"]
    found = []
    for _ in range(count):
        label = int(draw.integers(2))
        words = [*draw.choice(filler, 4), str(draw.choice((BAD, GOOD)[label]))]
        found.append({"review": " ".join(draw.permutation(words)), "stars": "good" if label else "bad"})
    return found


def write(path: Path, content: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content), "utf-8")
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained encoder and decoder, barely, and examples."""
    folder = tmp_path_factory.mktemp("classify")
    (folder / "text.txt").write_text(TEXT * 40)
    shape = {
        "model.layers": 1,
        "model.hidden": 32,
        "model.heads": 2,
        "model.seq_length": 24,
        "model.init_std": 0.1,
        "optim.warmup_steps": 0,
    }
    shape |= {
        "train.steps": 2,
        "train.global_batch": 4,
        "train.eval_every": 0,
        "log.tensorboard": False,
        "data.text": str(folder / "text.txt"),
    }
    families = {
        "encoder": {"model.family": "encoder", "objective.name": "masked", "data.tokenizer": "wordpiece:120"},
        "gpt": {"data.tokenizer": "bpe:280"},
        "xlnet": {
            "model.family": "xlnet", "model.position": "transformer_xl", "model.recurrence": 12, "objective.name": "permuted",
            "data.tokenizer": "bpe:280",
        },
    }  # fmt: skip
    for name, keys in families.items():
        Trainer(Config().override(shape | keys), folder / name, echo=False).train()
    write(folder / "train.jsonl", rows(400, 1))
    write(folder / "test.jsonl", rows(60, 2))
    return folder


def finetune(home: Path, run: Path, model: str = "encoder", *more: str) -> int:
    files = ["--data", home / "train.jsonl", "--test", home / "test.jsonl", "--columns", "text=review", "label=stars"]
    keys = ["--log.tensorboard=false", "--optim.lr=1e-2", "--model.dropout=0"]
    return main([str(word) for word in ["finetune", "classify", "--model", home / model, *files, "--run", run, *keys, *more]])


@pytest.mark.parametrize("model", ["encoder", "gpt", "xlnet"])
def test_it_learns_and_is_judged_beside_the_commonest_class(
    home: Path, tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(home, tmp_path / "run", model, "--epochs", "8") == 0
    told = capsys.readouterr().out
    assert "360 rows, 360 examples; columns text=review, label=stars" in told
    assert f"new: head.classes.weight{'' if model == 'gpt' else ', head.classes.bias'}\n" in told
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert scores["metrics"]["accuracy"]["value"] > 0.9 > 0.7 > scores["baseline"]["accuracy"]
    assert scores["metrics"]["accuracy"]["low"] <= scores["metrics"]["accuracy"]["value"] <= scores["metrics"]["accuracy"]["high"]
    assert len(scores["predictions"]) == scores["examples"] == 60
    wrong = [row for row in scores["predictions"] if row["predicted"] != row["gold"]]
    assert len(wrong) == round((1 - scores["metrics"]["accuracy"]["value"]) * 60)


def test_the_best_weights_are_judged_and_training_ends_when_it_gets_no_better(home: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert (
        finetune(home, run, "encoder", "--epochs", "40", "--train.patience", "2", "--train.eval_every", "10", "--checkpoint.keep", "1") == 0
    )
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [(event["terms"]["accuracy"], event["step"]) for event in events if event["event"] == "eval"]
    best = max(accuracy for accuracy, _ in found)
    first = min(step for accuracy, step in found if accuracy == best)
    assert found[-1][1] == first + 20, "two evaluations after the best"
    assert json.loads((run / "scores.json").read_text())["step"] == first
    assert {int(folder.name[5:]) for folder in (run / "checkpoints").glob("step-*")} == {first, found[-1][1]}


def test_the_same_command_goes_on_to_the_same_weights(home: Path, tmp_path: Path) -> None:
    options = ("--epochs", "2", "--train.patience", "0")
    assert finetune(home, tmp_path / "whole", "encoder", *options) == 0
    assert finetune(home, tmp_path / "cut", "encoder", *options, "--train.stop_after", "1e-9") == 75
    assert finetune(home, tmp_path / "cut", "encoder", *options) == 0
    whole, cut = (json.loads((tmp_path / name / "scores.json").read_text()) for name in ("whole", "cut"))
    assert whole == cut


def test_seeds_give_a_mean_and_a_deviation(home: Path, tmp_path: Path) -> None:
    assert finetune(home, tmp_path / "run", "encoder", "--epochs", "1", "--seeds", "2", "--scratch") == 0
    told = json.loads((tmp_path / "run" / "seeds.json").read_text())["accuracy"]
    values = [json.loads((tmp_path / "run" / f"seed-{n}" / "scores.json").read_text())["metrics"]["accuracy"]["value"] for n in (1, 2)]
    assert told["values"] == values
    assert told["mean"] == pytest.approx(np.mean(values))
    assert told["deviation"] == pytest.approx(np.std(values, ddof=1))


def test_frozen_blocks_stay_and_lower_blocks_learn_slower(home: Path, tmp_path: Path) -> None:
    from teratron.checkpoint.exchange import open_weights

    assert finetune(home, tmp_path / "run", "encoder", "--epochs", "1", "--freeze", "1") == 0
    before, after = ({e.name: e.values() for e in open_weights(folder).parts} for folder in (home / "encoder", tmp_path / "run"))
    same = {name for name in after if name in before and bool((before[name] == after[name]).all())}
    assert same == {name for name in after if name.startswith(("embedding.", "blocks.0."))}
    assert main(["finetune", "classify", "--prepare", "--model", str(home / "encoder"), "--data", str(home / "train.jsonl"), "--run",
                 str(tmp_path / "decay"), "--columns", "text=review", "label=stars", "--layer-decay", "0.5"]) == 0  # fmt: skip
    groups = Config.load(tmp_path / "decay" / "examples" / "config.toml").optim.groups
    assert set(groups) == {"blocks.0.*: lr=0.5", "embedding.*: lr=0.25"}


def test_two_processes_learn_what_one_does(home: Path, tmp_path: Path) -> None:
    options = ("--epochs", "1", "--train.precision", "fp64", "--train.patience", "0")
    assert finetune(home, tmp_path / "one", "encoder", *options) == 0
    assert finetune(home, tmp_path / "two", "encoder", *options, "--nproc", "2", "--parallel.tensor", "2") == 0
    one, two = (json.loads((tmp_path / name / "scores.json").read_text()) for name in ("one", "two"))
    assert one["predictions"] == two["predictions"]
    steps = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("one", "two")]
    losses = [[event["loss"] for event in found if event["event"] == "step"] for found in steps]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def coder(home: Path, length: int = 12) -> Coder:
    config = Config.load(home / "encoder" / "config.toml").model
    return Coder(load_tokenizer(home / "encoder" / "tokenizer"), config, length)


def test_a_long_document_is_read_in_pieces_that_leave_nothing_out(home: Path) -> None:
    for length in (1, 9, 10, 11, 30, 57):
        for stride in (1, 4, 9):
            pieces = [range(start, min(start + 10, length)) for start in starts(length, 10, stride)]
            assert set().union(*pieces) == set(range(length))
            assert all(a.stop - b.start == stride for a, b in itertools.pairwise(pieces))
    task, text = Classify(Options(12, stride=3)), " ".join(["splendid"] * 40)
    task.facts = {"labels": ["bad", "good"], "counts": [1, 1]}
    examples = task.examples([{"text": text, "label": "good"}], coder(home))
    assert len(examples) > 1
    assert sum(float(example["weights"].sum()) for example in examples) == pytest.approx(1.0), "a document counts once"
    assert all(len(example["tokens"]) <= 12 for example in examples)


def test_balanced_classes_weigh_alike(home: Path) -> None:
    task = Classify(Options(12, class_weights="balanced"))
    given = [{"text": "fine", "label": "a"}] * 9 + [{"text": "poor", "label": "b"}] * 3
    task.learn(given)
    found = task.examples(given, coder(home))
    assert sum(e["weights"].sum() for e in found[:9]) == pytest.approx(sum(e["weights"].sum() for e in found[9:]))
    assert sum(e["weights"].sum() for e in found) == pytest.approx(12)


def test_of_two_texts_the_longer_is_cut_first(home: Path) -> None:
    found = coder(home)
    for a, b in ((3, 20), (20, 3), (20, 20), (2, 2)):
        framed = found.framed(np.full(a, 50), np.full(b, 60))
        kept = [(framed.tokens == number).sum() for number in (50, 60)]
        assert len(framed.tokens) == min(12, a + b + 3)
        assert kept == ([a, b] if a + b <= 9 else [a, 9 - a] if a < 5 else [9 - b, b] if b < 5 else [4, 5]), kept
        assert framed.tokens[framed.starts[1]] == 60
        assert framed.mark == 0


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        ([{"review": "x", "stars": "good"}] * 12, [], "every example has the label 'good': expected two labels at least"),
        ([{"body": "x", "stars": "good"}] * 12, [], "no column 'review'; found body, stars: name it with --columns text=COLUMN"),
        ([{"review": "x"}, *rows(30, 0)], [], "example 1: its 'stars' is missing"),
        ([{"review": f"{n}", "stars": f"{n}"} for n in range(30)], [], "27 different labels for 27 examples"),
        ([], [], "holds no example"),
        (rows(5, 0), [], "5 rows are too few to hold some out: give --valid FILE"),
        (rows(30, 0), ["--length", "999"], "--length 999: expected 1 to 24"),
        (rows(30, 0), ["--freeze", "7"], "--freeze 7: expected 0 to 1, the blocks of the model"),
        (rows(30, 0), ["--beams", "3"], "--beams 3 concerns seq2seq"),
        ([*rows(30, 0), {"review": ["x"], "stars": "good"}], [], "has a list in column 'text', expected text"),
    ],
)
def test_bad_input_is_named_with_the_fix(home: Path, tmp_path: Path, content: Any, more: list[str], message: str, capsys: Any) -> None:
    data = write(tmp_path / "data.jsonl", content)
    command = [
        "finetune",
        "classify",
        "--model",
        home / "encoder",
        "--data",
        data,
        "--run",
        tmp_path / "run",
        "--columns",
        "text=review",
        "label=stars",
    ]
    assert main([str(word) for word in [*command, *more]]) == 2
    assert message in capsys.readouterr().err


def test_what_training_has_not_seen_is_named(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "test.jsonl", [*rows(3, 0), {"review": "x", "stars": "godo"}])
    command = ["finetune", "classify", "--model", home / "encoder", "--data", home / "train.jsonl", "--test", tmp_path / "test.jsonl"]
    assert main([str(word) for word in [*command, "--run", tmp_path / "run", "--columns", "text=review", "label=stars"]]) == 2
    assert "example 4: label 'godo' is unseen in training (did you mean 'good'?): add examples" in capsys.readouterr().err


def test_a_run_of_something_else_is_left_alone(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune(home, tmp_path / "run", "encoder", "--epochs", "1") == 0
    kept = (tmp_path / "run" / "examples" / "train.safetensors").read_bytes()
    capsys.readouterr()
    assert finetune(home, tmp_path / "run", "gpt", "--epochs", "1") == 2
    assert "holds a fine-tuning with model" in capsys.readouterr().err
    assert (tmp_path / "run" / "examples" / "train.safetensors").read_bytes() == kept
    with pytest.raises(UserError, match="says no task: give a run of `teratron finetune`"):
        judge(home / "encoder", [], torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", 'text,label\n"x, y",1\nz,2\n', [{"text": "x, y", "label": "1"}, {"text": "z", "label": "2"}]),
        ("a.tsv", 'text\tlabel\nsay "hi\t1\n', [{"text": 'say "hi', "label": "1"}]),
        ("a.jsonl", '\ufeff{"text": "x"}\n\n', [{"text": "x"}]),
        ("a.json", '[{"text": "x"}]', [{"text": "x"}]),
        (
            "a.conll",
            "-DOCSTART- O\n\nRome B-loc\nis O\n\nBig O\n",
            [{"words": ["Rome", "is"], "tags": ["B-loc", "O"]}, {"words": ["Big"], "tags": ["O"]}],
        ),
    ],
)
def test_every_kind_of_file_is_read(tmp_path: Path, name: str, content: str, expected: list[dict[str, Any]]) -> None:
    (tmp_path / name).write_text(content, "utf-8")
    assert read_table([tmp_path / name]).rows == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\nx\n", "line 2: 1 columns, the first line names 2"),
        ("a.csv", "text,label\nx,1,2\n", "line 2: 3 columns, the first line names 2"),
        ("a.jsonl", '{"text": "x"}\n{\n', "line 2: no JSON"),
        ("a.jsonl", "[1]\n", "line 1: found a JSON list, expected an object"),
        ("a.json", '{"data": [1]}', "expected a list of objects"),
        ("a.json", '{"data": [{"paragraphs": [{}]}]}', "an article is not as SQuAD has it"),
        ("a.conll", "Rome\n", "line 1: found 'Rome', expected a word and its tag"),
        ("a.xyz", "x", "unknown kind of file"),
        ("a.csv", b"text\n\xff\n", "cannot be read as UTF-8 text"),
    ],
)
def test_damaged_files_are_named_with_their_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        read_table([tmp_path / name])
    assert message in str(error.value)
