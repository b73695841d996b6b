"""Examples: what is taken is what was written, padded and in an order of its own in each epoch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from teratron.config import UserError
from teratron.data.examples import Examples, write_examples


def some(count: int, seed: int = 0, **more: type) -> list[dict[str, np.ndarray]]:
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 12, count)
    return [
        {"tokens": draw.integers(1, 99, length), "weights": draw.random(length).astype(np.float32)}
        | {name: make(length) for name, make in more.items()}
        for length in lengths
    ]


def test_every_field_comes_back_and_the_rest_is_padding(tmp_path: Path) -> None:
    written = some(9, segments=np.zeros)
    write_examples(tmp_path / "train.safetensors", written)
    held = Examples.load(tmp_path / "train.safetensors", seq_length=12)
    assert held.count == held.size == 9
    index = np.array([4, 0, 8])
    batch = held.take(index)
    assert batch["sample"].tolist() == index.tolist()
    for row, number in enumerate(index):
        length = len(written[number]["tokens"])
        for name in ("tokens", "weights"):
            assert batch[name][row, :length].tolist() == written[number][name].tolist()
            assert not batch[name][row, length:].any()
        assert batch["positions"][row].tolist() == list(range(batch["tokens"].shape[1]))
        assert (batch["segments"][row, length:] == -1).all()
        assert (batch["segments"][row, :length] == 0).all()


def test_examples_without_segments_say_where_they_are_real() -> None:
    held = Examples.of([{"tokens": np.arange(3)}, {"tokens": np.arange(8)}])
    batch = held.take(np.array([0, 1]))
    assert batch["real"].sum(1).tolist() == [3, 8]
    assert "real" not in held.take(np.array([1]))
    assert "segments" not in batch


def test_two_streams_have_lengths_of_their_own() -> None:
    held = Examples.of([{"encoder_tokens": np.arange(7), "tokens": np.arange(2)}, {"encoder_tokens": np.arange(9), "tokens": np.arange(3)}])
    batch = held.take(np.array([0, 1]))
    assert batch["encoder_real"].sum(1).tolist() == [7, 9]
    assert batch["real"].sum(1).tolist() == [2, 3]
    assert held.tokens == 21
    assert held.lengths.tolist() == [7, 9]


@pytest.mark.parametrize("count", [1, 2, 7, 50])
def test_each_epoch_has_every_example_once_in_another_order(count: int) -> None:
    held = Examples.of(some(count))
    endless = Examples({**held._fields, "lengths": held._lengths[""]}, 12, seed=3)
    epochs = [endless.numbers(np.arange(epoch * count, (epoch + 1) * count)).tolist() for epoch in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert count < 7 or len({tuple(epoch) for epoch in epochs}) == 3
    assert endless.count is None
    assert [int(endless.numbers(np.array([place]))[0]) for place in range(count)] == epochs[0], "a sample is a function of its index"


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds an example of 9 tokens, model.seq_length is 8: raise it to 9"):
        Examples({"tokens": np.arange(9), "lengths": np.array([9])}, 8, name="x")
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match=r"bad.safetensors: no readable file of examples"):
        Examples.load(tmp_path / "bad.safetensors", 8)


def test_the_identity_follows_the_content() -> None:
    one, other = some(5), some(5)
    assert Examples.of(one).identity() == Examples.of(other).identity()
    other[2]["tokens"][0] += 1
    assert Examples.of(one).identity() != Examples.of(other).identity()
