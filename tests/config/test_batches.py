"""How many sequences each step takes: Megatron-LM's ramp, steps, tokens, and their sums."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teratron.config import Config, UserError
from teratron.config.batches import Batches, plan_batches


def ramp(start: int, increment: int, length: int, last: int, steps: int) -> list[int]:
    """The size of each step by Megatron-LM's rule, step by step: what `--rampup-batch-size` does with the samples consumed so far."""
    taken, sizes, count = 0, list[int](), (last - start) // increment
    for _ in range(steps):
        sizes.append(last if taken > length else min(last, start + taken * count // length * increment))
        taken += sizes[-1]
    return sizes


@given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 12), st.integers(1, 3000))
@settings(max_examples=100, deadline=None)
def test_a_ramp_is_megatrons_step_by_step(start: int, increment: int, count: int, length: int) -> None:
    last = start + increment * count
    batches = plan_batches(last, 0, f"{start} {increment} {length}", 8)
    expected = ramp(start, increment, length, last, 200)
    assert [batches.size(step) for step in range(1, 201)] == expected
    assert [batches.until(step) for step in range(201)] == [0, *itertools.accumulate(expected)]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 50)), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_steps_take_the_samples_after_those_before_them(pairs: list[tuple[int, int]]) -> None:
    starts = [0, *itertools.accumulate(length for length, _ in pairs)][: len(pairs)]
    text = ", ".join(f"{start}:{size}" for start, (_, size) in zip(starts, pairs, strict=True))
    batches = plan_batches(pairs[-1][1], 0, text if ":" in text else "", 8)
    sizes = [size for length, size in pairs for _ in range(length)] + [pairs[-1][1]] * 5
    assert [batches.size(step) for step in range(1, len(sizes) + 1)] == sizes
    assert [batches.until(step) for step in range(len(sizes) + 1)] == [0, *itertools.accumulate(sizes)]


@given(st.integers(0, 400))
def test_steps_is_the_inverse_of_until(step: int) -> None:
    batches = Batches([(0, 3), (10, 5), (11, 64)])
    assert batches.steps(batches.until(step)) == step
    halfway = (batches.until(step) + batches.until(step + 1)) / 2
    assert batches.steps(halfway) == pytest.approx(step + 0.5)


def test_sizes_in_tokens_are_those_in_sequences() -> None:
    tokens = Config().override({"train.batch_tokens": 64 * 1024, "train.batch_schedule": "16384 16384 1024000"})
    sequences = Config().override({"train.global_batch": 64, "train.batch_schedule": "16 16 1000"})
    assert tokens.batches.stages == sequences.batches.stages
    assert len(tokens.batches.stages) == 4
    assert tokens.largest_batch == 64


def test_a_size_that_the_run_never_comes_to_is_told() -> None:
    batches = plan_batches(12, 0, "0:4, 100:12", 8)
    assert batches.unreached(100) == "the batch never grows to 12 sequences, which begin after step 100"
    assert batches.unreached(101) == ""
    assert plan_batches(12, 0, "", 8).unreached(1) == ""


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"train.batch_schedule": "16000 16384 1024000"},
            r"'16000 16384 1024000': START = 16000 is not a multiple .* choose 15360 or 16384",
        ),
        ({"optim.warmup_steps": "9M tokens", "train.steps": 100}, r"9M tokens exceeds the 6,553,600 tokens of train\.steps = 100"),
    ],
)
def test_what_tokens_cannot_be_is_refused(keys: dict[str, str | int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Config().override({"train.batch_tokens": 64 * 1024, **keys})
