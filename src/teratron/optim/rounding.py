"""Stochastic rounding to bfloat16, with random bits that are a function of (seed, name, update, element): the same on every layout."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from teratron.models.random import feature_keys, seed_of, short_bits
from teratron.parallel.boxes import Piece


def round_into(kept: Piece, values: Tensor, seed: int, number: int) -> None:
    """Put values, as many as the bfloat16 piece has, into it: each the neighbour above or below, so that the mean is the value.

    What bfloat16 can hold stays as it is. number: of the update.
    """
    site = seed_of(seed, "rounding", kept.name, number)
    rows, columns = math.prod(kept.shape[:-1]), kept.shape[-1]
    keys = feature_keys(site, rows, values.device).view(kept.shape[:-1])
    features = feature_keys(site + 1, columns, values.device)
    start = 0
    for box in kept.boxes:
        *lines, across = box.slices()
        bits = short_bits(keys[tuple(lines)].reshape(-1), features[across]).view(-1)
        place = slice(start, start + box.count)
        kept.values[place] = _rounded(values[place].to(torch.float32), bits)
        start += box.count


def _rounded(values: Tensor, bits: Tensor) -> Tensor:
    """float32 plus random bits below bfloat16's last one, which then are cut off."""
    return ((values.view(torch.int32) + bits) & -65536).view(torch.float32)
