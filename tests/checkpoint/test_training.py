"""The training state in checkpoints: nothing of the layout in memory is stored, only the same model takes it, old ones go."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny

from teratron.checkpoint import TrainingState, load_training, newest_checkpoint, open_checkpoint, save_training, saved_state
from teratron.checkpoint import format as writer
from teratron.checkpoint.training import state_tensors
from teratron.config import Config, UserError
from teratron.models import build_model, initialise, parts_of
from teratron.optim import AdamW

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
STATE = TrainingState(3, 96, 1.5, (4, 2))


def config(**keys: Any) -> Config:
    return tiny("text.txt", **({"model__vocab_size": 11} | keys))


def optimizer(config: Config, fill: float | None = None, seed: int = 1) -> AdamW:
    """An optimizer of the config's model, its memory filled, or initialised and its moments drawn."""
    model = build_model(config.model, dtype=DTYPES[config.train.precision])
    initialise(model, seed)
    made = AdamW(model, config.optim)
    for bucket, moments in zip(made.buckets, made.moments, strict=True):
        for flat in moments:
            flat.uniform_(generator=torch.Generator().manual_seed(seed))
        if fill is not None:
            for flat in (bucket.master, bucket.weights, *moments):
                flat.fill_(fill)
    return made


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_what_is_saved_is_what_is_loaded(tmp_path: Path, precision: str) -> None:
    settings = config(train__precision=precision)
    saved, loaded = optimizer(settings), optimizer(settings, fill=torch.nan)
    checkpoint = open_checkpoint(save_training(tmp_path, settings, saved, STATE))
    load_training(checkpoint, loaded)
    assert saved_state(checkpoint) == STATE
    for (name, a), (_, b) in zip(state_tensors(saved), state_tensors(loaded), strict=True):
        assert torch.equal(a, b), name
        assert a.dtype == (torch.float64 if precision == "fp64" else torch.float32)
    for a, b in zip(saved.buckets, loaded.buckets, strict=True):
        b.publish()
        assert torch.equal(a.weights, b.weights), "what the model computes with"


def test_loading_leaves_nothing_of_uninitialised_memory(tmp_path: Path) -> None:
    """The rows that pad the vocabulary are in no checkpoint; left as they were, a NaN there reaches every gradient."""
    settings = config(model__vocab_multiple=64)
    load_training(open_checkpoint(save_training(tmp_path, settings, optimizer(settings), STATE)), fresh := optimizer(settings, torch.nan))
    for bucket, moments in zip(fresh.buckets, fresh.moments, strict=True):
        for flat in (bucket.master, bucket.weights, *moments):
            assert torch.isfinite(flat).all()


def test_every_part_is_stored_in_its_full_shape_without_padding(tmp_path: Path) -> None:
    settings = config(model__vocab_multiple=64)
    folder = save_training(tmp_path, settings, optimizer(settings), STATE)
    tensors = open_checkpoint(folder).manifest["tensors"]
    parts = {part.name: list(part.shape) for part in parts_of(build_model(settings.model))}
    assert {name: entry["shape"] for name, entry in tensors.items()} == {
        f"{kind}/{name}": shape for kind in ("weight", "moment1", "moment2") for name, shape in parts.items()
    }
    assert parts["embedding.tokens.weight"] == [11, 16]


def test_another_padding_takes_the_same_checkpoint(tmp_path: Path) -> None:
    saved, loaded = optimizer(config(model__vocab_multiple=1)), optimizer(config(model__vocab_multiple=64), fill=torch.nan)
    load_training(open_checkpoint(save_training(tmp_path, config(), saved, STATE)), loaded)
    for (name, a), (_, b) in zip(state_tensors(saved), state_tensors(loaded), strict=True):
        assert torch.equal(a, b), name


def test_the_config_comes_back_equal(tmp_path: Path) -> None:
    settings = config(optim__lr=0.1 + 0.2, data__text=('a "quoted" name', "naïve\n"), model__position="rope")
    assert open_checkpoint(save_training(tmp_path, settings, optimizer(settings), STATE)).config() == settings


def test_each_byte_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is as long as its header and the state's numbers: weights that two modules share are there once."""
    settings = config(model__tie_embeddings=True)
    made = optimizer(settings)
    path = save_training(tmp_path, settings, made, STATE) / writer.TENSORS
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    parameters = sum(part.numel() for part in map(torch.Size, (p.shape for p in parts_of(build_model(settings.model)))))
    assert path.stat().st_size == header + 3 * 4 * parameters


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"model__hidden": 32}, "embedding.tokens.weight"),
        ({"model__layers": 2}, "blocks.1."),
        ({"model__bias": False}, "bias"),
        ({"model__vocab_size": 12}, "embedding.tokens.weight"),
        ({"model__kv_heads": 1}, "blocks.0.attention.k.weight"),
    ],
)
def test_another_model_is_refused_by_the_name_of_a_part(tmp_path: Path, keys: dict[str, Any], part: str) -> None:
    checkpoint = open_checkpoint(save_training(tmp_path, config(), optimizer(config()), STATE))
    with pytest.raises(UserError, match=r"model\.\* differs") as error:
        load_training(checkpoint, optimizer(config(**keys)))
    assert part in str(error.value)
    assert str(checkpoint.folder) in str(error.value)


def steps_on_disk(run: Path) -> list[int]:
    return sorted(int(name.removeprefix("step-")) for name in os.listdir(run / "checkpoints"))


@pytest.mark.parametrize(("keep", "left"), [(0, [1, 2, 3, 4, 5]), (1, [5]), (2, [4, 5]), (9, [1, 2, 3, 4, 5])])
def test_the_newest_are_kept(tmp_path: Path, keep: int, left: list[int]) -> None:
    settings = config(checkpoint__keep=keep)
    for step in range(1, 6):
        save_training(tmp_path, settings, optimizer(settings), TrainingState(step, phases=(5,)))
    assert steps_on_disk(tmp_path) == left


def test_a_damaged_later_checkpoint_does_not_push_out_the_good_one(tmp_path: Path) -> None:
    """A run that passed over step 9 and saves at step 4 with room for one checkpoint must keep step 4."""
    settings = config(checkpoint__keep=1)
    for step in (3, 9):
        save_training(tmp_path, config(checkpoint__keep=0), optimizer(settings), TrainingState(step))
    (tmp_path / "checkpoints" / "step-00000009" / "COMPLETE").unlink()
    save_training(tmp_path, settings, optimizer(settings), TrainingState(4))
    assert steps_on_disk(tmp_path) == [4, 9]
    assert newest_checkpoint(tmp_path, lambda text: None).step == 4  # type: ignore[union-attr]


def test_the_former_checkpoint_goes_only_after_the_new_one_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(checkpoint__keep=1)
    save_training(tmp_path, settings, optimizer(settings), TrainingState(1))

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "_write_safetensors", full)
    with pytest.raises(UserError, match="disk full"):
        save_training(tmp_path, settings, optimizer(settings), TrainingState(2))
    assert steps_on_disk(tmp_path) == [1]


@pytest.mark.parametrize("saved", [None, {}, {"step": 1}, {"step": "x", "tokens": 0, "seconds": 0, "phases": []}])
def test_a_checkpoint_without_a_training_state_is_refused(tmp_path: Path, saved: Any) -> None:
    folder = tmp_path / "checkpoints" / "step-00000001"
    writer.write_checkpoint(
        folder, state_tensors(optimizer(config())), {"step": 1, "config": {}, **({"state": saved} if saved is not None else {})}
    )
    with pytest.raises(UserError, match="no state of a training run"):
        saved_state(open_checkpoint(folder))
