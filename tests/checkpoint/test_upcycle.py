"""A dense model that became a mixture computes what it did, trains on from there, and what cannot become one is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from held import whole_pieces
from tiny import tiny, write_text

from teratron.checkpoint import open_model, save_training
from teratron.checkpoint.training import TrainingState
from teratron.cli.main import main
from teratron.config import Config, UserError
from teratron.models import build_model, initialise, parts_of
from teratron.train import Trainer


def config(**keys: object) -> Config:
    return tiny("text.txt", **{"model__vocab_size": 257, "model__bias": False, **keys})


def saved(folder: Path, made: Config) -> Path:
    """A checkpoint of random weights."""
    model = build_model(made.model)
    initialise(model, 3)
    parameters = dict(model.named_parameters())
    pieces = whole_pieces({f"weight/{part.name}": part.of(parameters[part.parameter].data) for part in parts_of(model)})
    return save_training(folder, made, pieces, TrainingState(40))


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_the_mixture_computes_what_the_dense_model_did(activation: str, tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "run", config(model__activation=activation, model__init_std=0.2))
    output = tmp_path / "experts.safetensors"
    assert main(["convert", str(checkpoint), str(output), "--upcycle", "5", "--experts-per-token", "3"]) == 0
    dense, mixture = (open_model(path, dtype=torch.float64) for path in (checkpoint, output))
    assert (mixture.config.experts, mixture.config.experts_per_token) == (5, 3)
    tokens = torch.randint(257, (2, 8), generator=torch.Generator().manual_seed(1))
    state = {"tokens": tokens, "positions": torch.arange(8).expand(2, -1)}
    expected, found = (made.model(state)["hidden"] for made in (dense, mixture))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    router = dict(mixture.model.named_parameters())["blocks.0.ffn.router.weight"]
    assert router.std().item() > 0.1


def test_a_run_goes_on_with_experts_where_the_dense_one_stands(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"model__bias": False, "model__dropout": 0.0, "train__precision": "fp64", "train__steps": 12}
    dense = tiny(write_text(tmp_path / "text.txt"), **keys)
    first = Trainer(dense, tmp_path / "dense", device="cpu", echo=False)
    first.train()
    output = tmp_path / "experts.safetensors"
    assert main(["convert", str(tmp_path / "dense"), str(output), "--upcycle", "3"]) == 0
    changes = {"model.experts": 3, "model.expert_ffn": 64, "model.normalise_gates": True, "train.init": str(output)}
    second = Trainer(dense.override(changes), tmp_path / "mixture", device="cpu", echo=False)
    begun = second.evaluate()
    assert begun == pytest.approx(first.evaluate(), rel=1e-12)
    second.train()
    assert second.evaluate() < begun

    with pytest.raises(UserError, match=r"its weights have model.activation = gelu, the run relu: set --model.activation gelu"):
        Trainer(dense.override({**changes, "model.activation": "relu"}), tmp_path / "other", device="cpu", echo=False).train()


@pytest.mark.parametrize(
    ("keys", "arguments", "message"),
    [
        ({"model__bias": True}, (), "--upcycle 4: the model has model.bias = true, experts have no biases"),
        ({"model__experts": 2}, (), "--upcycle 4: the model has model.experts = 2 already"),
        ({}, ("--experts-per-token", "1"), "--experts-per-token 1: expected from 2 to the 4 of --upcycle"),
    ],
)
def test_what_is_refused(
    keys: dict[str, Any], arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = saved(tmp_path / "run", config(**keys))
    output = tmp_path / "out.safetensors"
    assert main(["convert", str(checkpoint), str(output), "--upcycle", "4", *arguments]) != 0
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_weights_to_begin_with_must_be_there(tmp_path: Path) -> None:
    from teratron.checkpoint import weights_for

    with pytest.raises(UserError, match="no such file or folder: give a run, a checkpoint, a file of `teratron convert`"):
        weights_for(tmp_path / "none.safetensors", config().model)
