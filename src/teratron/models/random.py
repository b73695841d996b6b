"""Every random number of a model as a function of names and coordinates, so that any shard can be made alone (contracts C4, C8)."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

ROW_BLOCK = 64
"""Rows of dimension 0 that share one generator when initial values are drawn; of stacked matrices each has its own."""


def seed_of(*parts: object) -> int:
    """A 63-bit seed from any printable parts; stable over processes, platforms and Python versions."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def normal_box(seed: int, name: str, shape: tuple[int, ...], box: tuple[slice, ...]) -> Tensor:
    """A region of the standard-normal tensor `name` of full `shape`, float32 on CPU.

    Each block of rows has its own generator: no value depends on which others are asked for, and no more than the
    region and one block are ever in memory.
    """
    start, stop = box[0].start, box[0].stop
    inner = (slice(None), *box[1:])
    rows = torch.empty((stop - start, *(part.stop - part.start for part in box[1:])))
    height = ROW_BLOCK if len(shape) < 3 else 1
    for block in range(start // height, -(-stop // height)):
        first, last = block * height, min((block + 1) * height, shape[0])
        generator = torch.Generator().manual_seed(seed_of(seed, name, shape, block))
        values = torch.randn((last - first, *shape[1:]), generator=generator)
        kept = values[max(start - first, 0) : stop - first][inner]
        place = max(first - start, 0)
        rows[place : place + kept.shape[0]] = kept
    return rows


def mask_keys(seed: int, step: int, sample: Tensor, positions: Tensor, segments: Tensor | None = None) -> Tensor:
    """One 32-bit key for each token of a batch, from its global coordinates.

    Args: sample [B] global sample index; positions, segments [B, S]. Returns int32 [B, S].
    """
    base = seed_of("mask", seed, step) & 0x7FFFFFFFFFFF
    place = positions if segments is None else positions + (segments << 32)
    mixed = _mix64(sample[:, None] + base) + _mix64(place + 1)
    return _to_int32(_mix64(mixed))


def keep_mask(keys: Tensor, features: Tensor, probability: float) -> Tensor:
    """True where an element survives dropout: a hash of its token key and its feature key is above the threshold.

    Args: keys int32 [...], features int32 (from `feature_keys`) that broadcast against keys[..., None], probability of
    dropping. Returns bool [..., F].
    """
    return _crossed(keys, features) >= int(probability * 2**32) - 2**31


def short_bits(keys: Tensor, features: Tensor) -> Tensor:
    """16 random bits for each pair of a key [...] and a feature, int32 [..., F] in [0, 65536)."""
    return (_crossed(keys, features) >> 16) & 0xFFFF


def _crossed(keys: Tensor, features: Tensor) -> Tensor:
    """A hash of keys[..., None] and features, int32, whose top bits are good."""
    # Two multiplications and one xor-shift: the top bits then depend on all 32 bits of both keys.
    bits = keys.unsqueeze(-1) ^ features
    bits = bits * -2048144789
    bits = bits ^ (bits >> 15)
    return bits * -1028477387


@torch.library.custom_op("teratron::feature_keys", mutates_args=())
def feature_keys(site: int, count: int, device: torch.device) -> Tensor:
    """One 32-bit key for each feature of a dropout site (`seed_of` its name), int32 [count].

    An operator of its own, because torch.compile must not look inside: it generates C++ whose signed overflow is undefined.
    """
    return _to_int32(_mix64(torch.arange(count, device=device) * 0x9E3779B97F + site))


@feature_keys.register_fake
def _(site: int, count: int, device: torch.device) -> Tensor:
    return torch.empty(count, dtype=torch.int32, device=device)


def _mix64(x: Tensor) -> Tensor:
    x = (x ^ (x >> 31)) * 0x7FB5D329728EA185
    x = (x ^ (x >> 27)) * -0x7E25210B43D22BB3
    return x ^ (x >> 33)


def _to_int32(x: Tensor) -> Tensor:
    return (x >> 16).to(torch.int32)  # keeps the low 32 bits of the shifted value, wrapping
