"""Moments in bfloat16: rounding is right on the mean, keeps what fits, and is a function of coordinates alone."""

from __future__ import annotations

import torch
from torch import Tensor
from trials import learn, made, optimizer_of

from teratron.config import OptimConfig
from teratron.optim.rounding import round_into
from teratron.parallel.boxes import Box, Piece, boxes_of

SHAPE = (3, 40, 50)
WHOLE = Box((0, 0, 0), SHAPE)


def rounded(values: Tensor, start: int = 0, stop: int = 6000, name: str = "moment1/a", seed: int = 1, number: int = 1) -> Tensor:
    """A range of a tensor of SHAPE, of which only that range is held."""
    piece = Piece(name, SHAPE, tuple(boxes_of(WHOLE, start, stop)), torch.zeros(stop - start, dtype=torch.bfloat16))
    round_into(piece, values[start:stop], seed, number)
    return piece.values


def test_the_mean_of_what_is_rounded_is_the_value() -> None:
    """1 + 2^-7 is the neighbour of 1: of values a share p above 1 the share p goes up, within five standard deviations."""
    for share in (0.1, 0.5, 0.9):
        for sign in (1.0, -1.0):
            found = rounded(torch.full((6000,), sign * (1 + share * 2**-7)))
            assert set(found.abs().tolist()) == {1.0, 1 + 2**-7}
            up = float((found.abs() > 1).double().mean())
            assert abs(up - share) < 5 * (share * (1 - share) / 6000) ** 0.5


def test_what_fits_stays() -> None:
    values = torch.randn(6000, generator=torch.Generator().manual_seed(0)).bfloat16()
    values[:3] = torch.tensor([0.0, -0.0, 1e-38])
    assert torch.equal(rounded(values.float()), values)


def test_a_piece_is_rounded_as_in_the_whole() -> None:
    values = torch.randn(6000, generator=torch.Generator().manual_seed(0))
    whole = rounded(values)
    for start, stop in ((0, 1), (17, 4321), (2049, 2060), (1990, 2010), (5999, 6000)):
        assert torch.equal(rounded(values, start, stop), whole[start:stop])


def test_tensors_updates_and_seeds_are_rounded_apart() -> None:
    values = torch.randn(6000, generator=torch.Generator().manual_seed(0))
    others = [rounded(values, name="moment2/a"), rounded(values, number=2), rounded(values, seed=2)]
    for found in others:
        same = float((found == rounded(values)).double().mean())
        assert 0.5 < same < 0.8  # two independent draws agree in 2/3 of the cases, on the mean


def test_moments_in_half_the_memory_follow_the_others() -> None:
    """Ten steps: weights differ, by less than a tenth of the way that they have gone."""
    found = {}
    for moments in ("fp32", "bf16"):
        optimizer = optimizer_of(made(torch.float32), OptimConfig(moments=moments))  # type: ignore[arg-type]
        before = {piece.name: piece.values.clone() for piece in optimizer.pieces() if piece.name.startswith("weight/")}
        for step in range(1, 11):
            learn(optimizer, step, step, 1e-3)
        kinds = {piece.values.dtype for piece in optimizer.pieces() if piece.name.startswith("moment")}
        assert kinds == {torch.float32 if moments == "fp32" else torch.bfloat16}
        after = {piece.name: piece.values for piece in optimizer.pieces()}
        found[moments] = torch.cat([after[name] - values for name, values in before.items()])
    difference = float((found["bf16"] - found["fp32"]).norm() / found["fp32"].norm())
    assert 0 < difference < 0.1
