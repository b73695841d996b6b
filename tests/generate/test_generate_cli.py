"""`teratron generate`: streaming, files of prompts, records, and refusals, on a model opened in its place."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest

from teratron.checkpoint import LoadedModel
from teratron.cli.main import main
from teratron.generate import generate


@pytest.fixture(autouse=True)
def _opened(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any folder opens as the small model."""
    monkeypatch.setattr("teratron.checkpoint.open_model", lambda source, device, dtype, mesh: loaded)


def continued(loaded: LoadedModel, prompt: str, seed: int = 0) -> str:
    return str(generate(loaded, prompt, max_new_tokens=20, seed=seed))


def test_prompt_and_continuation_are_streamed(loaded: LoadedModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "run", "Hi", "--max-new-tokens", "20"]) == 0
    out, err = capsys.readouterr()
    assert out == f"Hi{continued(loaded, 'Hi')}\n"
    assert "20 tokens, " in err
    assert "tokens/s" in err


@pytest.mark.parametrize(
    ("arguments", "prompt"),
    [
        (["run", "--max-new-tokens", "20", "Hi"], "Hi"),
        (["--max-new-tokens", "20", "run", "Hi"], "Hi"),
        (["run", "--max-new-tokens", "20", ""], ""),
        (["run", "--max-new-tokens", "20", "--", "--Hi"], "--Hi"),
    ],
)
def test_the_prompt_may_stand_behind_options(
    loaded: LoadedModel, capsys: pytest.CaptureFixture[str], arguments: list[str], prompt: str
) -> None:
    assert main(["generate", *arguments]) == 0
    assert capsys.readouterr().out == f"{prompt}{continued(loaded, prompt)}\n"


def test_complete_text_is_the_streamed_text(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "run", "Hi", "--max-new-tokens", "20", "--temperature", "0.9", "--top-k", "50", "--top-p", "0.9", "--seed", "3"]
    assert main(command) == main([*command, "--no-stream"]) == 0
    lines = capsys.readouterr().out
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :]


@pytest.mark.parametrize("options", [["--lookup", "4"], ["--draft", "small", "--draft-tokens", "3"]], ids=" ".join)
def test_guesses_ahead_leave_the_text(loaded: LoadedModel, capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    assert main(["generate", "run", "Hi", "--max-new-tokens", "20", *options]) == 0
    assert capsys.readouterr().out == f"Hi{continued(loaded, 'Hi')}\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lookup", "4", "--draft", "small"], "lookup = 4 and draft small are both given: keep one"),
        (["--draft-tokens", "4"], "draft_tokens = 4 needs draft"),
        (["--lookup", "4", "--beams", "2"], "leave lookup and draft out"),
    ],
    ids=str,
)
def test_guesses_that_contradict_are_refused(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert main(["generate", "run", "Hi", *options]) == 2
    assert message in capsys.readouterr().err


def test_contrastive_search(loaded: LoadedModel, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "run", "Hi", "--max-new-tokens", "20", "--contrastive-k", "5", "--contrastive-alpha", "0.4"]
    assert main(command) == main([*command, "--no-stream"]) == 0
    expected = generate(loaded, "Hi", max_new_tokens=20, contrastive_k=5, contrastive_alpha=0.4)
    assert capsys.readouterr().out == f"Hi{expected}\n" * 2


def test_prompt_from_standard_input(loaded: LoadedModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
    assert main(["generate", "run", "-", "--max-new-tokens", "20"]) == 0
    assert capsys.readouterr().out == f"two\nlines{continued(loaded, chr(10).join(['two', 'lines']))}\n"


def test_prompts_of_a_text_file_are_printed_under_headings(loaded: LoadedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("Hi\n\nThe cat sat\n")
    assert main(["generate", "run", "--prompts", str(tmp_path / "prompts.txt"), "--max-new-tokens", "20", "--samples", "2"]) == 0
    expected = [(prompt, seed) for prompt in ("Hi", "The cat sat") for seed in (0, 1)]
    assert capsys.readouterr().out == "".join(
        f"--- {number} of 4, seed {seed}\n{prompt}{continued(loaded, prompt, seed)}\n" for number, (prompt, seed) in enumerate(expected, 1)
    )


def test_records_in_and_out(loaded: LoadedModel, tmp_path: Path) -> None:
    prompts = ["two\nlines", "é"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"question": prompt}) + "\n" for prompt in prompts))
    files = ["--prompts", str(tmp_path / "in.jsonl"), "--prompt-key", "question", "--output", str(tmp_path / "out.jsonl")]
    assert main(["generate", "run", *files, "--max-new-tokens", "20", "--batch", "1"]) == 0
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
    assert [record["prompt"] for record in records] == prompts
    assert [record["text"] for record in records] == [continued(loaded, prompt) for prompt in prompts]
    assert all(len(record["tokens"]) == 20 for record in records)


def test_stop_texts_and_tokenizer(loaded: LoadedModel, capsys: pytest.CaptureFixture[str]) -> None:
    stop = continued(loaded, "Hi")[3:5]
    assert main(["generate", "run", "Hi", "--max-new-tokens", "20", "--stop", "never", "--stop", stop, "--tokenizer", "bytes"]) == 0
    assert capsys.readouterr().out == f"Hi{continued(loaded, 'Hi').partition(stop)[0]}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Hi", "--prompts", "{folder}/good.txt"], "are both given"),
        (["--prompts", "{folder}/missing.txt"], "missing.txt: cannot be read"),
        (["--prompts", "{folder}/latin.txt"], "cannot be read as UTF-8"),
        (["--prompts", "{folder}/blank.txt"], "holds no prompt"),
        (["--prompts", "{folder}/bad.jsonl"], "bad.jsonl:2: not a JSON record"),
        (["--prompts", "{folder}/deep.jsonl"], "deep.jsonl:1: not a JSON record"),
        (["--prompts", "{folder}/keys.jsonl"], "keys.jsonl:1: expected a record with a text under 'prompt'"),
        (["Hi", "--output", "{folder}/none/out.jsonl"], "expected a file in a folder that exists"),
        (["Hi", "--temperature", "-1"], "temperature = -1.0"),
        (["Hi", "--max-new-tokens", "100"], "ask for at most 62"),
        (["Hi", "--samples", "0"], "samples = 0"),
        (["Hi", "--samples", "2", "--contrastive-k", "4"], "samples = 2: contrastive search draws nothing"),
        (["Hi", "--top-p", "0.9", "--contrastive-k", "4"], "top_p = 0.9 with contrastive_k = 4"),
        (["Hi", "--samples", "1", "Ho"], "unexpected argument 'Ho'"),
        (["--sample", "1", "Hi"], "unknown option '--sample'"),
        (["Hi", "--device", "tpu"], "--device tpu: expected auto, cpu or cuda"),
        (["Hi", "--precision", "fp8"], "invalid choice: 'fp8'"),
    ],
)
def test_refusals_are_one_line_and_code_2(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "good.txt").write_text("Hi\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    (tmp_path / "keys.jsonl").write_text('{"text": "a"}\n')
    assert main(["generate", "run", *(argument.format(folder=tmp_path) for argument in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_refused_prompt_leaves_the_old_output(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("old\n")
    assert main(["generate", "run", "x" * 100, "--output", str(tmp_path / "out.jsonl")]) == 2
    assert (tmp_path / "out.jsonl").read_text() == "old\n"


def test_beams_are_printed_best_first_and_recorded_with_their_scores(loaded: LoadedModel, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    options = ["--beams", "3", "--samples", "2", "--length-penalty", "0.5", "--max-new-tokens", "9"]
    assert main(["generate", "run", "Hi", *options, "--output", str(output)]) == 0
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["prompt"] for record in records] == ["Hi", "Hi"]
    assert records[0]["score"] >= records[1]["score"]
    assert records[0]["text"] == generate(loaded, "Hi", beams=3, length_penalty=0.5, max_new_tokens=9)
    assert not records[0]["finished"]


def test_text_is_constrained(loaded: LoadedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "run", "Hi ", "--choice", "yes", "--choice", "no"]) == 0
    assert capsys.readouterr().out in ("Hi yes\n", "Hi no\n")
    pytest.importorskip("llguidance")
    assert main(["generate", "run", "Hi", "--regex", " [0-9]{3}"]) == 0
    assert re.fullmatch("Hi [0-9]{3}\n", capsys.readouterr().out)
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": false}')
    assert main(["generate", "run", "Hi", "--beams", "2", "--json-schema", str(schema)]) == 0
    assert capsys.readouterr().out in ('Hi{"n": 1}\n', 'Hi{"n": 2}\n')
    assert main(["generate", "run", "Hi", "--regex", "[0-9]{30}", "--max-new-tokens", "5"]) == 0
    assert "1 cut before the constraint was met: raise --max-new-tokens" in capsys.readouterr().err


def test_a_schema_that_cannot_be_read_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "run", "Hi", "--json-schema", str(tmp_path / "none.json")]) == 2
    assert "none.json: cannot be read as UTF-8 text" in capsys.readouterr().err
