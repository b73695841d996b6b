"""Opening a model for use: from a run, from one checkpoint; what is damaged or absent is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import state, tiny, write_text

from teratron.checkpoint import open_model
from teratron.config import UserError
from teratron.models import parts_of
from teratron.train import Trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("open")
    run = folder / "run"
    Trainer(tiny(write_text(folder / "text.txt"), train__steps=4, checkpoint__keep=0), run, device="cpu", echo=False).train()
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged; it holds only what opening needs."""
    for path in trained.glob("checkpoints/**/*"):
        if path.is_file():
            copy = tmp_path / "run" / path.relative_to(trained)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return tmp_path / "run"


@pytest.mark.parametrize("source", [".", "checkpoints/step-00000004"])
def test_a_run_and_its_checkpoint_give_the_trained_weights_and_the_tokenizer(run: Path, source: str) -> None:
    opened = open_model(run / source)
    expected, parameters = state(run), dict(opened.model.named_parameters())
    for part in parts_of(opened.model):
        assert torch.equal(part.of(parameters[part.parameter]), expected[f"weight/{part.name}"])
    assert opened.tokenizer is not None
    assert opened.tokenizer.decode(opened.tokenizer.encode("the cat")) == "the cat"
    assert opened.config.vocab_size == opened.tokenizer.vocab_size
    assert "step 4" in opened.name


def test_an_older_checkpoint_can_be_named(run: Path) -> None:
    assert "step 2" in open_model(run / "checkpoints" / "step-00000002").name


def test_the_type_of_numbers_can_be_chosen(run: Path) -> None:
    assert next(open_model(run).model.parameters()).dtype == torch.float32
    assert next(open_model(run, dtype=torch.bfloat16).model.parameters()).dtype == torch.bfloat16


def test_a_damaged_newest_checkpoint_is_passed_over_and_named_apart_from_the_output(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    harm(run / "checkpoints" / "step-00000004" / "rank-00000.safetensors")
    assert "step 2" in open_model(run).name
    out, err = capsys.readouterr()
    assert out == "", "standard output belongs to the generated text"
    assert "step-00000004/rank-00000.safetensors" in err


def test_a_damaged_checkpoint_that_was_named_is_refused(run: Path) -> None:
    folder = run / "checkpoints" / "step-00000004"
    harm(folder / "rank-00000.safetensors")
    with pytest.raises(UserError, match="checksum differs"):
        open_model(folder)


@pytest.mark.parametrize(("name", "message"), [("runn", r"no such run.*did you mean 'run'"), ("empty", "no checkpoint here")])
def test_what_is_no_model_is_refused(run: Path, name: str, message: str) -> None:
    (run.parent / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        open_model(run.parent / name)


def harm(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
