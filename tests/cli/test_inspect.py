"""`teratron inspect`: what it says is what the checkpoint or config holds, in few lines, without being led astray by damage."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from pathlib import Path

import pytest
import torch
from tiny import tiny

from teratron.checkpoint import TrainingState, open_checkpoint, save_training
from teratron.checkpoint.manifest import whole
from teratron.cli.main import main
from teratron.config import Config
from teratron.models import build_model, parts_of
from teratron.parallel.boxes import Box, Piece

LAYERS = 12
STATE = TrainingState(40, 1_280, 12.0, (50,))


def config() -> Config:
    return tiny("text.txt", model__vocab_size=11, model__layers=LAYERS, train__steps=50)


def pieces(kinds: tuple[str, ...] = ("weight", "moment1")) -> list[Piece]:
    """Every part in one piece, but one in two; in no order."""
    parts = parts_of(build_model(config().model, device="meta"))
    made = [
        Piece(f"{kind}/{part.name}", part.shape, (whole(part.shape),), torch.zeros(part.shape).view(-1)) for kind in kinds for part in parts
    ]
    found = [half for piece in made for half in (halves(piece) if piece.name == "weight/blocks.3.attention.q.weight" else [piece])]
    random.Random(0).shuffle(found)  # as many ranks and buckets leave them
    return found


def halves(piece: Piece) -> list[Piece]:
    rows, columns = piece.shape
    middle = rows // 2
    boxes = Box((0, 0), (middle, columns)), Box((middle, 0), (rows - middle, columns))
    return [dataclasses.replace(piece, boxes=(box,), values=torch.zeros(box.count)) for box in boxes]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save_training(tmp_path / "run", config(), pieces(), STATE, layout={"tensor": 2, "shard": 4})
    return tmp_path / "run"


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    assert main(["inspect", *map(str, arguments)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out.splitlines()


def row(lines: list[str], name: str) -> list[str]:
    """The words of the only line that begins with a name."""
    (found,) = [words for line in lines if (words := line.split()) and words[0] == name]
    return found[1:]


@pytest.mark.parametrize("place", [".", "checkpoints/step-00000040"])
def test_it_says_where_the_run_stands_and_what_made_it(run: Path, capsys: pytest.CaptureFixture[str], place: str) -> None:
    lines = said(capsys, run / place)
    assert lines[0] == str(run / "checkpoints" / "step-00000040")
    assert row(lines, "step") == ["40", "of", "50"]
    assert row(lines, "trained") == ["on", "1,280", "tokens,", "for", "12", "s"]
    assert "UTC; layout: tensor 2, shard 4" in " ".join(row(lines, "written"))
    assert " ".join(row(lines, "model")) == "gpt, 12 layers x 16, 2 heads, context 8, vocabulary 11"
    assert row(lines, "training")[:2] == ["fp32,", "adamw,"]


def test_it_counts_what_is_there(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, run)
    shapes = [part.shape for part in parts_of(build_model(config().model, device="meta"))]
    count = sum(torch.Size(shape).numel() for shape in shapes)
    assert row(lines, "parameters") == [f"{count:,}"]
    assert row(lines, "weight") == row(lines, "moment1") == [f"{4 * count / 2**10:,.1f}", "KiB", "in", "float32"]
    assert f"1 of tensors: {2 * len(shapes)} tensors in {2 * len(shapes) + 1} pieces" in " ".join(row(lines, "files"))


def test_layers_that_are_alike_share_a_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every part is in exactly one row of the table."""
    lines = said(capsys, run)
    table = [line.split()[0] for line in lines[lines.index("") + 2 :]]
    told = [name.replace("{0..11}", str(layer)) for name in table for layer in (range(LAYERS) if "{0..11}" in name else [0])]
    assert sorted(told) == sorted(part.name for part in parts_of(build_model(config().model, device="meta")))
    assert len(table) < 30
    assert row(lines, "blocks.{0..11}.attention.q.weight") == ["16", "x", "16", "float32", "1", "to", "2"]
    assert row(lines, "embedding.tokens.weight") == ["11", "x", "16", "float32", "1"]
    modules = [name.partition(".")[0] for name in table]
    assert list(dict.fromkeys(modules)) == ["embedding", "blocks", "head"], "in the order of the model"


def test_all_has_a_line_for_each_tensor(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, run, "--all")
    table = [line.split()[0] for line in lines[lines.index("") + 2 :]]
    assert sorted(table) == sorted(open_checkpoint(run / "checkpoints" / "step-00000040").tensors)
    assert row(lines, "weight/blocks.3.attention.q.weight")[-1] == "2"
    assert table.index("weight/blocks.2.attention.q.weight") < table.index("weight/blocks.10.attention.q.weight")


def test_parts_of_which_less_is_kept_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Such as frozen ones; where all are alike the column would only take room."""
    kept = [piece for piece in pieces() if piece.name != "moment1/blocks.5.attention.q.weight"]
    lines = said(capsys, save_training(tmp_path, config(), kept, STATE))
    assert row(lines, "blocks.{0..4,6..11}.attention.q.weight")[-2:] == ["weight", "moment1"]
    assert row(lines, "blocks.5.attention.q.weight")[-2:] == ["1", "weight"]


def test_it_fits_a_screen(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert max(map(len, said(capsys, "--all", run / "checkpoints" / "step-00000040")[1:])) <= 100


def test_verify_reads_every_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "1 files" not in said(capsys, run)[-1]
    assert said(capsys, run, "--verify")[-1] == "checksums: 1 file compared, all as written"
    path = run / "checkpoints" / "step-00000040" / "rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    said(capsys, run)
    assert main(["inspect", str(run), "--verify"]) == 2
    assert "checksum differs" in capsys.readouterr().err


def test_a_checkpoint_of_an_older_release_has_no_time_or_layout(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run / "checkpoints" / "step-00000040"
    manifest = json.loads((folder / "manifest.json").read_text())
    for key in ("time", "layout", "state"):
        del manifest[key]
    text = json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(text)
    (folder / "COMPLETE").write_text(hashlib.sha256(text).hexdigest())
    lines = said(capsys, folder)
    assert " ".join(row(lines, "written")) == "at an unknown time"
    assert "no state of a training run" in " ".join(row(lines, "trained"))


@pytest.mark.parametrize(
    ("name", "message"), [("nothing", "no such run"), (".", "no checkpoint here"), ("file", "file: is a file, expected")]
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str) -> None:
    (tmp_path / "file").touch()
    assert main(["inspect", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err


def test_a_config_is_drawn_on_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(
        capsys, "--layout", "gpt2-1.5b", "--world", 20, "--parallel.tensor", 5, "--parallel.pipeline", 2, "--svg", tmp_path / "a.svg"
    )
    assert "20 ranks = pipeline 2 x replicate 2 x shard 1 x context 1 x tensor 5" in lines
    assert row(lines, "1")[-2:] == ["10-14", "15-19"]
    assert ">gpt2-1.5b</text>" in (tmp_path / "a.svg").read_text("utf-8")


def test_schedules_are_drawn_before_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = ["--train.batch_schedule", "0:4, 500:8, 750:12", "--optim.warmup_steps", "10%", "--optim.weight_decay_ramp", "linear"]
    lines = said(capsys, "--schedule", "shakespeare-char", *keys, "--svg", tmp_path / "a.svg")
    assert row(lines, "200") == ["51.2", "k", "4", "0.001", "0.01"]
    assert row(lines, "501")[2] == "8"
    assert row(lines, "2,000")[-3:] == ["12", "0.0001", "0.1"]
    assert "in all 2,000 steps, 19,000 sequences, 1,216,000 tokens" in lines
    assert (tmp_path / "a.svg").read_text("utf-8").count('class="chart"') == 4


def test_a_vocabulary_that_only_the_data_knows_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert "drawn with 128: --model.vocab_size" in said(capsys, "--layout", "shakespeare-char", "--parallel.tensor", 2)[-1]
    assert "drawn with" not in said(capsys, "--layout", "shakespeare-char", "--model.vocab_size", 65)[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to inspect"),
        (["run", "--nproc", "2"], "--nproc is about a drawing"),
        (["run", "--model.layers", "2"], "--section.key is about a drawing"),
        (["run", "--layout", "gpt2-124m"], "CHECKPOINT is about a checkpoint"),
        (["--layout", "gpt2-124m", "--verify"], "--verify is about a checkpoint"),
        (["--layout", "gpt2-124m", "--nproc", "0"], "at least 1 process"),
        (["--layout", "gpt2-124m", "--nproc", "7"], "cannot be shared by 7 data ranks"),
        (["--layout", "gpt2"], "no preset or file 'gpt2'"),
        (["run", "--schedule", "gpt2-124m"], "CHECKPOINT is about a checkpoint"),
        (["--schedule", "gpt2-124m", "--layout", "gpt2-124m"], "--layout is about them"),
        (["--schedule", "gpt2-124m", "--nproc", "2"], "--nproc is about them"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", *arguments]) == 2
    assert message in capsys.readouterr().err
