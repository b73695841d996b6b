"""What `teratron finetune` prepares: whose tokenizer it is, which parts learn, that examples stay what they are; and where it judges."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from tuned import BAD, COLOURS, GOOD, encoder, finetune, pretrained, reading

from teratron.checkpoint.exchange import open_weights
from teratron.cli.main import main
from teratron.config import Config
from teratron.config.groups import parse_group
from teratron.tasks.finetune.judge import best_model
from teratron.tasks.finetune.task import forward

ROWS = [{"text": f"it was {word}", "label": label} for label, words in (("good", GOOD), ("bad", BAD)) for word in words] * 6
PAIRS = [{"source": colour, "target": colour} for colour in COLOURS] * 4
PREPARE = "--prepare"


def test_weights_without_a_tokenizer_are_given_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, folder = tmp_path / "encoder.safetensors", pretrained("encoder") / "tokenizer"
    assert main(["convert", str(pretrained("encoder")), str(weights)]) == 0
    assert finetune("classify", tmp_path, "encoder", ROWS, ROWS[:9], "--model", str(weights)) == 2
    assert "has no tokenizer beside it: give the model's own with --tokenizer FILE_OR_FOLDER" in capsys.readouterr().err
    (tmp_path / "whole").mkdir()
    more = (PREPARE, "--model", str(weights), "--tokenizer", str(folder))
    assert finetune("classify", tmp_path, "encoder", ROWS, ROWS[:9], *more) == 0
    assert finetune("classify", tmp_path / "whole", "encoder", ROWS, ROWS[:9], PREPARE) == 0
    for name in ("train.safetensors", "valid.safetensors"):
        given, found = ((home / "run" / "examples" / name).read_bytes() for home in (tmp_path, tmp_path / "whole"))
        assert given == found


def test_a_tokenizer_with_more_tokens_than_the_weights_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune("classify", tmp_path, "encoder", ROWS, ROWS[:9], "--tokenizer", "bytes") == 2
    error = capsys.readouterr().err
    assert "its tokenizer has 257 tokens" in error
    assert "give the right one with --tokenizer FILE_OR_FOLDER" in error


@pytest.mark.parametrize(
    "more",
    [
        ["--length", "10"],
        ["--stride", "4"],
        ["--class-weights", "balanced"],
        ["--freeze", "1"],
        ["--layer-decay", "0.5"],
        ["--train.seed", "5"],
        ["--scratch"],
    ],
)
def test_the_examples_of_a_run_are_not_made_anew_in_another_way(
    tmp_path: Path, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune("classify", tmp_path, "encoder", ROWS, ROWS[:9], PREPARE) == 0
    files = [tmp_path / "run" / "examples" / name for name in ("train.safetensors", "valid.safetensors", "config.toml")]
    kept = [file.read_bytes() for file in files]
    assert finetune("classify", tmp_path, "encoder", ROWS, ROWS[:9], PREPARE) == 0, "the same once more"
    capsys.readouterr()
    assert finetune("classify", tmp_path, "encoder", ROWS, ROWS[:9], PREPARE, *more) == 2
    name = more[0].removeprefix("--").removeprefix("train.").replace("-", "_")
    assert f"holds a fine-tuning with {name} = " in capsys.readouterr().err
    assert [file.read_bytes() for file in files] == kept


def test_several_seeds_are_not_prepared_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune("classify", tmp_path, "encoder", ROWS, ROWS[:9], PREPARE, "--seeds", "2") == 2
    assert "--prepare --seeds 2: prepares one run" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def _learning(folder: Path, family: str, task: str, rows: list[Any], *more: str) -> dict[str, float]:
    """The factor of each part's learning rate in a prepared run, 0 where it is frozen."""
    assert finetune(task, folder, family, rows, rows[:9], PREPARE, *more) == 0
    groups = [parse_group(text) for text in Config.load(folder / "run" / "examples" / "config.toml").optim.groups]
    rates = {}
    for entry in open_weights(pretrained(family)).parts:
        rates[entry.name] = 1.0
        for group in groups:
            if group.matches(entry.name):
                rates[entry.name] = 0.0 if group.frozen else group.lr or 1.0
    return rates


def _rates(found: dict[str, float], pattern: str) -> set[float]:
    return {rate for name, rate in found.items() if fnmatch.fnmatchcase(name, pattern)}


def test_of_an_encoder_and_a_decoder_the_decoder_is_above(tmp_path: Path) -> None:
    found = _learning(tmp_path, "encoder_decoder", "seq2seq", PAIRS, "--layer-decay", "0.5", "--freeze", "1")
    assert _rates(found, "head.*") == {1.0}
    assert _rates(found, "decoder.*") == _rates(found, "bridge.norm.*") == {0.5}
    assert _rates(found, "encoder.*") == _rates(found, "embedding.*") == _rates(found, "bridge.embedding.*") == {0.0}


@pytest.mark.parametrize(("family", "task", "rows", "most"), [("encoder", "classify", ROWS, 1), ("encoder_decoder", "seq2seq", PAIRS, 2)])
def test_no_more_blocks_are_frozen_than_there_are(
    tmp_path: Path, family: str, task: str, rows: list[Any], most: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(task, tmp_path, family, rows, rows[:9], PREPARE, "--freeze", str(most + 1)) == 2
    assert f"--freeze {most + 1}: expected 0 to {most}, the blocks of the model" in capsys.readouterr().err


@pytest.mark.slow
def test_a_frozen_encoder_stays_while_the_decoder_learns(tmp_path: Path) -> None:
    assert finetune("seq2seq", tmp_path, "encoder_decoder", PAIRS, PAIRS[:9], "--freeze", "1", "--epochs", "1") == 0
    before, after = ({e.name: e.values() for e in open_weights(run).parts} for run in (pretrained("encoder_decoder"), tmp_path / "run"))
    moved = {name for name in before if not bool((before[name] == after[name]).all())}
    assert moved
    assert all(name.startswith(("decoder.", "bridge.norm.", "head.")) for name in moved)
    assert any(name.startswith("decoder.") for name in moved)


def test_one_task_begins_where_another_ended(tmp_path: Path) -> None:
    (tmp_path / "then").mkdir()
    assert finetune("embed", tmp_path, "encoder", PAIRS, PAIRS[:9], "--epochs", "1") == 0
    more = ("--model", str(tmp_path / "run"), "--epochs", "1", "--freeze", "1")
    assert finetune("classify", tmp_path / "then", "encoder", ROWS, ROWS[:9], *more) == 0
    runs = (pretrained("encoder"), tmp_path / "run", tmp_path / "then" / "run")
    first, second, third = ({e.name: e.values() for e in open_weights(run).parts if e.name.startswith("blocks.")} for run in runs)
    assert all(bool((second[name] == third[name]).all()) for name in second)
    assert not all(bool((first[name] == second[name]).all()) for name in first)


def test_a_run_is_judged_on_the_device_that_is_asked_for() -> None:
    # The meta device stands for any that is not the CPU: all that is not moved there would be refused.
    (model, _, _), of = best_model(pretrained("encoder"), torch.device("meta")), encoder()
    fields = of.fields(of.framed(of.encode(["red cat"])[0]))
    example = fields | {"targets": fields["tokens"], "weights": fields["tokens"] * 0.0}
    ((_, batch, state),) = forward(model, reading("classes", 2), [example])
    assert {tensor.device.type for tensor in (*batch.values(), *state.values())} == {"meta"}
