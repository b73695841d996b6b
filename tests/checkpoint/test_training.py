"""The training state in checkpoints: any layout saves, any other loads, only the same model takes it, and old ones go."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from held import blank, cut_pieces, full, on_ranks, succeed, whole_pieces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import tiny
from torch import Tensor

from teratron.checkpoint import TrainingState, load_training, newest_checkpoint, open_checkpoint, save_training, saved_state
from teratron.checkpoint import format as writer
from teratron.checkpoint.format import checkpoint_bytes
from teratron.checkpoint.manifest import StoredPiece, StoredTensor
from teratron.checkpoint.tensors import fill_pieces
from teratron.config import Config, UserError
from teratron.models import build_model, parts_of
from teratron.optim import LossScale
from teratron.parallel.boxes import Box, Piece
from teratron.parallel.mesh import Group

STATE = TrainingState(3, 96, 1.5, (4, 2))
KINDS = ("weight", "moment1", "moment2")


def config(**keys: Any) -> Config:
    return tiny("text.txt", **({"model__vocab_size": 11} | keys))


def training_state(config: Config, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random numbers for every part of a config's model, as AdamW keeps them."""
    draw = torch.Generator().manual_seed(1)
    parts = parts_of(build_model(config.model, device="meta"))
    return {f"{kind}/{part.name}": torch.rand(part.shape, generator=draw).to(dtype) for kind in KINDS for part in parts}


def pieces_of(config: Config) -> list[Piece]:
    return whole_pieces(training_state(config))


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a power cut would show a missing flush; hundreds of them cost seconds."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_saved_is_what_is_loaded(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = training_state(config(), dtype)
    checkpoint = open_checkpoint(save_training(tmp_path, config(), saved := whole_pieces(tensors), STATE))
    load_training(checkpoint, loaded := blank(saved))
    assert saved_state(checkpoint) == STATE
    assert_equal(loaded, tensors)
    found = checkpoint.load()
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == dtype for name in tensors)


def test_the_memory_decides_the_type_of_numbers(tmp_path: Path) -> None:
    tensors = training_state(config(), torch.float64)
    checkpoint = open_checkpoint(save_training(tmp_path, config(), saved := whole_pieces(tensors), STATE))
    halves = [dataclasses.replace(piece, values=torch.empty_like(piece.values, dtype=torch.bfloat16)) for piece in saved]
    load_training(checkpoint, halves)
    assert all(torch.equal(piece.values, tensors[piece.name].to(torch.bfloat16).view(-1)) for piece in halves)


def assert_equal(pieces: Sequence[Piece], tensors: dict[str, Tensor]) -> None:
    """Bit for bit."""
    for piece in pieces:
        expected = [tensors[piece.name][box.slices()].reshape(-1) for box in piece.boxes]
        assert torch.equal(piece.values, torch.cat(expected)), piece


SHAPES = {"a": (7, 5), "b": (3, 4, 6), "c": (13,), "d": (), "e": (1, 8), "f": (6, 1, 3)}


@given(seed=st.integers(0, 2**32), ranks=st.tuples(st.integers(1, 4), st.integers(1, 4)))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_layout_saves_and_any_other_loads(tmp_path: Path, seed: int, ranks: tuple[int, int]) -> None:
    """Flat ranges that begin in the middle of a row, slabs of any dimension, copies on several ranks, ranks that hold nothing."""
    draw, savers, loaders = random.Random(seed), *ranks
    numbers = torch.Generator().manual_seed(seed)
    tensors = {f"{kind}/{name}": torch.rand(shape, generator=numbers) for kind in KINDS for name, shape in SHAPES.items()}
    saved, wanted = cut_pieces(tensors, savers, draw), [blank(pieces) for pieces in cut_pieces(tensors, loaders, draw)]
    run = tmp_path / "run"
    (folder,) = set(succeed(on_ranks(savers, lambda group: save_training(run, config(), saved[group.rank], STATE, group=group))))
    checkpoint = open_checkpoint(folder)
    checkpoint.verify()
    succeed(on_ranks(loaders, lambda group: load_training(checkpoint, wanted[group.rank], group)))
    for pieces in wanted:
        assert_equal(pieces, tensors)
    found = checkpoint.load("weight/")
    assert found.keys() == SHAPES.keys()
    assert all(torch.equal(found[name], tensors[f"weight/{name}"]) for name in SHAPES)
    for name, shape in SHAPES.items():
        region = some_box(shape, draw)
        assert torch.equal(checkpoint.read(f"moment1/{name}", region), tensors[f"moment1/{name}"][region.slices()])
    shutil.rmtree(run)


def some_box(shape: tuple[int, ...], draw: random.Random) -> Box:
    offset = tuple(draw.randrange(length) for length in shape)
    return Box(offset, tuple(draw.randrange(1, length - first + 1) for first, length in zip(offset, shape, strict=True)))


def test_random_layouts_are_what_they_are_meant_to_be() -> None:
    """Else the test above would show less than it says."""
    tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    layouts = [cut_pieces(tensors, 3, random.Random(seed)) for seed in range(50)]
    pieces = [piece for layout in layouts for held in layout for piece in held]
    assert any(len(piece.boxes) >= 3 for piece in pieces), "ranges that begin and end within rows"
    assert any(piece.boxes[0].size[1] < 5 for piece in pieces if piece.name == "a" and len(piece.boxes) == 1), "cuts in dimension 1"
    assert any(not piece.first for piece in pieces), "copies"
    assert any(len({id(held) for held in layout for piece in held if piece.name == "a"}) > 1 for layout in layouts), "shared tensors"
    assert any(all(piece.name != "a" for piece in held) for layout in layouts for held in layout), "ranks without a part"


def test_each_byte_is_written_once_and_read_by_safetensors_itself(tmp_path: Path) -> None:
    """A tensor that lies whole in a file has its plain name and shape there; a rank with nothing to save writes no file."""
    tensors = training_state(config())
    whole = whole_pieces(tensors)
    held = [whole[:4], [dataclasses.replace(piece, first=False) for piece in whole], whole[4:]]
    (folder, *_) = succeed(on_ranks(3, lambda group: save_training(tmp_path, config(), held[group.rank], STATE, group=group)))
    assert sorted(path.name for path in folder.glob("*.safetensors")) == ["rank-00000.safetensors", "rank-00002.safetensors"]
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        stored = load_file(path)
        assert path.stat().st_size == header + sum(tensor.nbytes for tensor in stored.values())
        assert not found.keys() & stored.keys()
        found |= stored
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_only_what_overlaps_is_read(tmp_path: Path) -> None:
    """A rank that needs nothing of a file never opens it."""
    tensors = {"weight/a": torch.rand(4, 6)}
    halves = [[Piece("weight/a", (4, 6), (Box((row, 0), (2, 6)),), tensors["weight/a"][row : row + 2].reshape(-1))] for row in (0, 2)]
    (folder, _) = succeed(on_ranks(2, lambda group: save_training(tmp_path, config(), halves[group.rank], STATE, group=group)))
    checkpoint = open_checkpoint(folder)
    (folder / "rank-00001.safetensors").unlink()
    load_training(checkpoint, wanted := blank(halves[0]))
    assert_equal(wanted, tensors)
    assert torch.equal(checkpoint.read("weight/a", Box((1, 2), (1, 3))), tensors["weight/a"][1:2, 2:5])
    with pytest.raises(UserError, match="damaged checkpoint"):
        load_training(checkpoint, blank(halves[1]))


def test_memory_that_is_not_covered_is_never_taken_for_loaded(tmp_path: Path) -> None:
    """A manifest with a gap is refused before; this is what stands behind that."""
    tensors = {"weight/a": StoredTensor("weight/a", torch.float32, (4,), (StoredPiece("f", "k", (Box((0,), (2,)),)),))}
    with pytest.raises(UserError, match="2 elements of weight/a are missing"):
        fill_pieces(tmp_path, tensors, whole_pieces({"weight/a": torch.zeros(4)}))


def test_reading_names_what_is_not_there(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_training(tmp_path, config(), whole_pieces({"weight/a": torch.rand(4, 6)}), STATE))
    with pytest.raises(UserError, match=r"holds no weight/b .did you mean 'weight/a'"):
        checkpoint.read("weight/b", full((4, 6)))
    with pytest.raises(ValueError, match="asked for"):
        checkpoint.read("weight/a", Box((3, 0), (2, 6)))


def test_space_is_what_all_ranks_write(tmp_path: Path) -> None:
    whole = whole_pieces({"weight/a": torch.zeros(300)})
    held = [whole, [dataclasses.replace(piece, first=False) for piece in whole], whole_pieces({"weight/b": torch.zeros(5)})]
    assert succeed(on_ranks(3, lambda group: checkpoint_bytes(held[group.rank], group))) == [2**20 + 1220] * 3


HALF = Piece("weight/a", (4,), (Box((0,), (2,)),), torch.zeros(2))
LAYOUT_DEFECTS = {
    "a missing half": ([HALF], []),
    "a half twice": ([HALF], [HALF]),
    "overlapping": ([HALF], [Piece("weight/a", (4,), (Box((1,), (2,)),), torch.zeros(2))]),
    "outside": ([HALF], [Piece("weight/a", (4,), (Box((3,), (2,)),), torch.zeros(2))]),
    "two shapes": ([HALF], [Piece("weight/a", (5,), (Box((2,), (2,)),), torch.zeros(2))]),
    "two types": ([HALF], [Piece("weight/a", (4,), (Box((2,), (2,)),), torch.zeros(2, dtype=torch.float64))]),
}


@pytest.mark.parametrize("held", LAYOUT_DEFECTS.values(), ids=LAYOUT_DEFECTS.keys())
def test_ranks_that_do_not_make_up_the_state_save_nothing(tmp_path: Path, held: tuple[list[Piece], list[Piece]]) -> None:
    """A defect of the layout, found before a file is written, by every rank."""
    results = on_ranks(2, lambda group: save_training(tmp_path, config(), held[group.rank], STATE, group=group))
    assert [type(result) for result in results] == [RuntimeError] * 2
    assert len({str(result) for result in results}) == 1
    assert "weight/a" in str(results[0])
    assert os.listdir(tmp_path) == []


def test_values_that_do_not_fill_their_boxes_are_a_defect(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weight/a: 3 values for boxes of 2 elements"):
        save_training(tmp_path, config(), [dataclasses.replace(HALF, values=torch.zeros(3))], STATE)


def two_ranks() -> list[list[Piece]]:
    """Each rank holds half of the parts."""
    whole = pieces_of(config())
    return [whole[::2], whole[1::2]]


def saved_by(held: Sequence[Sequence[Piece]], run: Path, step: int = 3, **keys: Any) -> list[Path | BaseException]:
    state = TrainingState(step)
    return on_ranks(len(held), lambda group: save_training(run, config(**keys), held[group.rank], state, group=group))


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("code", [28, 5])
def test_what_one_rank_cannot_write_all_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, code: int) -> None:
    """A disk that fills up under one rank: the same sentence on all, nothing left behind, earlier checkpoints intact."""
    held = [*two_ranks(), []]
    held[2] = [held[0].pop()]
    succeed(saved_by(held, tmp_path, 1))
    original = writer.write_safetensors

    def refuse(path: Path, entries: Any) -> dict[str, Any]:
        if path.name == f"rank-{rank:05d}.safetensors":
            path.write_bytes(b"half")
            raise OSError(code, os.strerror(code))
        return original(path, entries)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_safetensors", refuse)
        results = saved_by(held, tmp_path, 2)
    assert [type(result) for result in results] == [UserError] * 3
    assert len({str(result) for result in results}) == 1
    assert ("disk full" if code == 28 else "Input/output error") in str(results[0])
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000001"]
    assert newest_checkpoint(tmp_path, pytest.fail).step == 1  # type: ignore[union-attr]
    succeed(saved_by(held, tmp_path, 2))


def test_a_folder_that_one_rank_does_not_see_is_refused_by_all(tmp_path: Path) -> None:
    """Two nodes whose run folders are not the same disk."""
    held = two_ranks()

    def save(group: Group) -> Path:
        return save_training(tmp_path / str(group.rank), config(), held[group.rank], STATE, group=group)

    results = on_ranks(2, save)
    assert [type(result) for result in results] == [UserError] * 2
    assert "file system that all nodes share" in str(results[0])
    assert list(tmp_path.rglob("*.safetensors")) == []


@pytest.mark.parametrize(
    ("module", "name"), [(Path, "mkdir"), (writer, "_copy"), (writer, "_seal"), (writer, "publish"), (shutil, "rmtree")]
)
def test_what_the_first_rank_cannot_do_for_all_all_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
    """So none leaves before the checkpoint is in its place and old ones are removed: it could exit and end the job."""
    held, extra = two_ranks(), [tmp_path / "small.json"]
    extra[0].write_text("{}")
    run = tmp_path / "run"
    succeed(saved_by(held, run, 1))

    def refuse(*arguments: Any, **options: Any) -> None:
        if not options.get("ignore_errors"):
            raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(module, name, refuse)
        results = on_ranks(
            2,
            lambda group: save_training(
                run, config(checkpoint__keep=1), held[group.rank], TrainingState(2), extra if group.rank == 0 else (), group
            ),
        )
    assert [type(result) for result in results] == [UserError] * 2
    assert str(results[0]) == str(results[1])
    assert "Input/output error" in str(results[0])
    assert 1 in steps_on_disk(run)


def test_old_ones_go_before_any_rank_leaves(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        succeed(saved_by(two_ranks(), tmp_path, step, checkpoint__keep=2))
    assert steps_on_disk(tmp_path) == [2, 3]


@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_rank_cannot_read_all_refuse(tmp_path: Path, rank: int) -> None:
    held = two_ranks()
    (folder, _) = succeed(saved_by(held, tmp_path))
    (folder / f"rank-{rank:05d}.safetensors").unlink()
    checkpoint = open_checkpoint(folder)
    results = on_ranks(2, lambda group: load_training(checkpoint, blank(held[group.rank]), group))
    assert [type(result) for result in results] == [UserError] * 2
    assert "damaged checkpoint" in str(results[0])
    assert str(results[0]) == str(results[1])


def test_ranks_that_together_lack_a_part_are_refused(tmp_path: Path) -> None:
    """A rank may hold nothing of a part, as long as another one does."""
    held = two_ranks()
    checkpoint = open_checkpoint(succeed(saved_by(held, tmp_path))[0])
    succeed(on_ranks(2, lambda group: load_training(checkpoint, blank(held[group.rank]), group)))
    lost = held[1].pop()
    results = on_ranks(2, lambda group: load_training(checkpoint, blank(held[group.rank]), group))
    assert [type(result) for result in results] == [UserError] * 2
    assert f"holds {lost.name}, which the model lacks" in str(results[0])


@pytest.mark.parametrize(("kinds", "found"), [(("weight",), "weight"), (("weight", "momentum"), "momentum, weight")])
def test_the_state_of_another_optimizer_is_refused_by_name(tmp_path: Path, kinds: tuple[str, ...], found: str) -> None:
    tensors = {f"{kind}/a": torch.zeros(3) for kind in kinds}
    checkpoint = open_checkpoint(save_training(tmp_path, config(), whole_pieces(tensors), STATE))
    wanted = whole_pieces({f"{kind}/a": torch.zeros(3) for kind in KINDS})
    with pytest.raises(UserError, match=rf"holds the state {found}, the optimizer needs moment1, moment2, weight: optim\.name differs"):
        load_training(checkpoint, wanted)


def test_the_config_comes_back_equal(tmp_path: Path) -> None:
    made = config(optim__lr=0.1 + 0.2, data__text=('a "quoted" name', "naïve\n"), model__position="rope")
    assert open_checkpoint(save_training(tmp_path, made, pieces_of(made), STATE)).config() == made


def test_the_layout_and_the_time_are_noted(tmp_path: Path) -> None:
    layout = {"ranks": 4, "tensor": 2, "shard": 2}
    noted = open_checkpoint(save_training(tmp_path, config(), pieces_of(config()), STATE, layout=layout)).manifest
    assert noted["layout"] == layout
    assert noted["time"] == pytest.approx((tmp_path / "checkpoints").stat().st_mtime, abs=100)


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
    checkpoint = open_checkpoint(save_training(tmp_path, config(), pieces_of(config()), STATE))
    with pytest.raises(UserError, match=r"model\.\* differs") as error:
        load_training(checkpoint, blank(pieces_of(config(**keys))))
    assert part in str(error.value)
    assert str(checkpoint.folder) in str(error.value)


def steps_on_disk(run: Path) -> list[int]:
    return sorted(int(name.removeprefix("step-")) for name in os.listdir(run / "checkpoints"))


@pytest.mark.parametrize(("keep", "left"), [(0, [1, 2, 3, 4, 5]), (1, [5]), (2, [4, 5]), (9, [1, 2, 3, 4, 5])])
def test_the_newest_are_kept(tmp_path: Path, keep: int, left: list[int]) -> None:
    made = config(checkpoint__keep=keep)
    for step in range(1, 6):
        save_training(tmp_path, made, pieces_of(made), TrainingState(step, phases=(5,)))
    assert steps_on_disk(tmp_path) == left


def test_a_damaged_later_checkpoint_does_not_push_out_the_good_one(tmp_path: Path) -> None:
    """A run that passed over step 9 and saves at step 4 with room for one checkpoint must keep step 4."""
    made = config(checkpoint__keep=1)
    for step in (3, 9):
        save_training(tmp_path, config(checkpoint__keep=0), pieces_of(made), TrainingState(step))
    (tmp_path / "checkpoints" / "step-00000009" / "COMPLETE").unlink()
    save_training(tmp_path, made, pieces_of(made), TrainingState(4))
    assert steps_on_disk(tmp_path) == [4, 9]
    assert newest_checkpoint(tmp_path, lambda text: None).step == 4  # type: ignore[union-attr]


def test_the_former_checkpoint_goes_only_after_the_new_one_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config(checkpoint__keep=1)
    save_training(tmp_path, made, pieces_of(made), TrainingState(1))

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "_write_safetensors", full)
    with pytest.raises(UserError, match="disk full"):
        save_training(tmp_path, made, pieces_of(made), TrainingState(2))
    assert steps_on_disk(tmp_path) == [1]


GOOD = {"step": 1, "tokens": 0, "seconds": 0, "phases": []}


@pytest.mark.parametrize("state", [TrainingState(), STATE, TrainingState(9, 1, 0.5, (10,), 2, LossScale(2.0**20, 5, 1))])
def test_the_state_comes_back_equal(tmp_path: Path, state: TrainingState) -> None:
    assert saved_state(open_checkpoint(save_training(tmp_path, config(), pieces_of(config()), state))) == state


def test_a_state_of_an_older_release_has_no_loss_scale(tmp_path: Path) -> None:
    writer.write_checkpoint(tmp_path / "c", pieces_of(config()), {"step": 1, "config": {}, "state": GOOD})
    assert saved_state(open_checkpoint(tmp_path / "c")) == TrainingState(1)


@pytest.mark.parametrize(
    "saved", [None, {}, [], {"step": 1}, GOOD | {"step": "x"}, GOOD | {"loss_scale": [1]}, GOOD | {"loss_scale": {"scale": "x"}}]
)
def test_a_checkpoint_without_a_training_state_is_refused(tmp_path: Path, saved: Any) -> None:
    folder = tmp_path / "checkpoints" / "step-00000001"
    writer.write_checkpoint(folder, pieces_of(config()), {"step": 1, "config": {}, **({"state": saved} if saved is not None else {})})
    with pytest.raises(UserError, match="no state of a training run"):
        saved_state(open_checkpoint(folder))
