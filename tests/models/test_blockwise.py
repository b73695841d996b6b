"""Attention tile by tile equals the dense one, in values, gradients, dropout; it is chosen where it saves work."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from teratron.models.attention import AttentionCore, most_rows
from teratron.models.blockwise import Encounter, blockwise
from teratron.models.flex import flexible
from teratron.models.patterns import FULL, Pattern, tiles_of
from teratron.models.random import mask_keys
from teratron.models.sight import Sight

PATTERNS = [
    FULL,
    Pattern(5),
    Pattern(7, dilation=3),
    Pattern(6, "strided"),
    Pattern(6, "fixed", summary=2),
    Pattern(5, global_tokens=3),
    Pattern(6, "strided", global_tokens=2),
    Pattern(6, "fixed", global_tokens=1),
]
SHAPES = [(37, 2, 4, 2, True, 0.0), (40, 1, 2, 2, False, 0.3), (33, 2, 2, 1, True, 0.3)]
"""Length, batch, heads of queries and of keys, several documents and padding, dropout."""


def inputs_of(length: int, batch: int, heads: int, groups: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(length)
    shapes = [(batch, count, length, 8) for count in (heads, groups, groups)]
    return [torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True) for shape in shapes]


def documents(batch: int, length: int) -> Tensor:
    """Borders where no tile has any, another in every row; padding at the end."""
    segments = torch.arange(length)[None] // torch.tensor([[length // 3], [length // 2]])[:batch]
    segments[:, -2:] = -1
    return segments


def assert_equal(found: Tensor, expected: Tensor, inputs: list[Tensor], tol: float = 1e-12) -> None:
    """Values, and gradients of the inputs, to a part of the largest."""
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=expected.dtype)
    gradients = [torch.autograd.grad(output, inputs, upstream, retain_graph=True) for output in (found, expected)]
    for one, other in zip((found, *gradients[0]), (expected, *gradients[1]), strict=True):
        assert (one - other).abs().max() <= tol * other.abs().max()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "batch", "heads", "groups", "isolated", "dropout"), SHAPES)
def test_tiles_equal_the_dense_result(
    pattern: Pattern, causal: bool, length: int, batch: int, heads: int, groups: int, isolated: bool, dropout: float
) -> None:
    inputs, segments = inputs_of(length, batch, heads, groups), documents(batch, length) if isolated else None
    core, sight = AttentionCore(dropout, "core"), Sight(causal, pattern, segments)
    keys = mask_keys(1, 1, torch.arange(batch), torch.arange(length).expand(batch, length)) if dropout else None
    tiles = tiles_of(pattern, causal, (range(length),), (range(length),), 8)
    found = blockwise(*inputs, Encounter(tiles, segments, segments, core.dropped(keys, heads, length)))
    assert_equal(found, core.plain(*inputs, sight, keys), inputs)


@pytest.mark.parametrize(
    "pattern", [Pattern(20), Pattern(20, global_tokens=2), Pattern(20, "strided"), Pattern(20, "fixed", summary=3)], ids=str
)
def test_the_core_takes_tiles_for_long_sequences_and_the_dense_kernel_for_short_ones(pattern: Pattern) -> None:
    core = AttentionCore(0.0, "core")
    for length, sparse in ((500, True), (24, False)):
        inputs, sight = inputs_of(length, 1, 2, 1), Sight(True, pattern)
        assert bool(sight.tiles(length, length, most_rows(torch.device("cpu")))) is sparse
        assert_equal(core(*inputs, sight, None), core.plain(*inputs, sight, None), inputs)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_flex_attention_sees_what_the_dense_mask_lets_see(pattern: Pattern, causal: bool) -> None:
    inputs = [x.detach() for x in inputs_of(150, 2, 4, 2)]
    for segments in (None, documents(2, 150)):
        sight = Sight(causal, pattern, segments)
        found, expected = flexible(*inputs, sight, compiled=False), AttentionCore(0.0, "core").plain(*inputs, sight, None)
        assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_half_types_are_summed_in_float32() -> None:
    inputs, pattern = inputs_of(300, 1, 2, 1), Pattern(20)
    exact = AttentionCore(0.0, "core").plain(*inputs, Sight(True, pattern), None)
    halves = [x.detach().bfloat16() for x in inputs]
    found = AttentionCore(0.0, "core")(*halves, Sight(True, pattern), None)
    assert found.dtype == torch.bfloat16
    assert (found - exact).abs().max() < 0.02 * exact.abs().max()


def test_the_same_tiles_give_the_same_bits() -> None:
    inputs, sight = inputs_of(700, 2, 2, 2), Sight(True, Pattern(30, "strided"))
    results = []
    for _ in range(2):
        out = AttentionCore(0.0, "core")(*inputs, sight, None)
        results.append((out, *torch.autograd.grad(out.sum(), inputs)))
    assert all(map(torch.equal, *results))
