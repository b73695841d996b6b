"""Lay out samples over data sets: split, order, blend, phases (contract C14)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from teratron.config import Config, UserError
from teratron.data.blend import megatron_requests, normalized, parse_blend
from teratron.data.indexed import IndexedDataset
from teratron.data.order import parse_split, split_documents
from teratron.data.samples import BlendedSamples, MegatronSamples, NativeSamples, PhasedSamples, Samples, Windows


@dataclass(frozen=True)
class Source:
    """One data set with its weight in the blend (None = by its length)."""

    dataset: IndexedDataset
    weight: float | None


def open_sources(items: Sequence[str]) -> list[Source]:
    """Data sets of `data.train` or `data.valid`."""
    return [Source(IndexedDataset(prefix), weight) for weight, prefix in parse_blend(items)]


def token_ranges(dataset: IndexedDataset, order: str, split: str) -> list[range | None]:
    """The token ranges of training and validation: native order cuts the token stream, megatron order the documents."""
    if order == "megatron":
        bounds = np.append(dataset.starts, dataset.total_tokens)
        parts = split_documents(split, len(dataset.lengths))
        return [range(int(bounds[part.start]), int(bounds[part.stop])) if part else None for part in parts[:2]]
    total, shares = dataset.total_tokens, parse_split(split)
    # Rounded down, as nanoGPT cuts its data, so that its recipes see the same tokens.
    first, second = (int(total * (sum(shares[:count]) / sum(shares))) for count in (1, 2))
    return [range(0, first) if first else None, range(first, second) if first < second else None]


def train_samples(config: Config, sources: Sequence[Source], split: str, phases: Sequence[int], length: int = 0) -> tuple[Samples, int]:
    """The training samples in `data.order`, and the number of tokens that they are drawn from.

    phases: steps of each phase of the run; each has its own order in megatron mode, whose order depends on its length.
    length: inputs of a row; 0 = model.seq_length.
    """
    ranges = [token_ranges(source.dataset, config.data.order, split)[0] for source in sources]
    for source, part in zip(sources, ranges, strict=True):
        if part is None:
            raise UserError(f"{source.dataset.prefix}: nothing is left for training with data.split = {split!r}")
    tokens = sum(len(part) for part in ranges if part is not None)
    seed, length = config.train.seed, length or config.model.seq_length
    if config.data.order == "native":
        parts = [
            NativeSamples(source.dataset, part.start, part.stop, length, seed + number)
            for number, (source, part) in enumerate(zip(sources, ranges, strict=True))
            if part is not None
        ]
        return (parts[0] if len(parts) == 1 else BlendedSamples.native(parts, _weights(sources), seed)), tokens
    ends = [config.batches.until(steps) for steps in (0, *itertools.accumulate(phases))]
    orders: list[tuple[int, Samples]] = []
    for number, (start, end) in enumerate(itertools.pairwise(ends)):
        orders.append((end - start, _megatron(sources, split, end - start, length, seed + number)))
    return (orders[0][1] if len(orders) == 1 else PhasedSamples(orders)), tokens


def valid_windows(config: Config, sources: Sequence[Source], split: str, length: int = 0) -> tuple[PhasedSamples | None, int]:
    """The held-out windows of `length` (0 = model.seq_length), or None when the split leaves nothing, and the number of their targets."""
    found = []
    for source in sources:
        part = token_ranges(source.dataset, config.data.order, split)[1]
        if part is not None and len(part) > 1:
            found.append(Windows(source.dataset, part.start, part.stop, length or config.model.seq_length))
    windows = PhasedSamples([(part.count, part) for part in found]) if found else None
    return windows, sum(part.target_tokens for part in found)


def _weights(sources: Sequence[Source]) -> list[float]:
    return [source.dataset.total_tokens if source.weight is None else source.weight for source in sources]


def _megatron(sources: Sequence[Source], split: str, count: int, length: int, seed: int) -> Samples:
    """One phase in Megatron-LM's order; several data sets are blended by its rule."""
    documents = [split_documents(split, len(source.dataset.lengths))[0] for source in sources]
    if len(sources) == 1:
        return MegatronSamples(sources[0].dataset, documents[0] or range(0), count, length, seed)
    if any(source.weight is None for source in sources):
        parts = [MegatronSamples(s.dataset, d or range(0), None, length, seed) for s, d in zip(sources, documents, strict=True)]
        available = sum(part.count for part in parts)
        if available < count:
            raise UserError(
                f"data.train without weights holds {available:,} samples, the run draws {count:,}: give weights, or fewer steps"
            )
        return BlendedSamples.megatron(parts, [part.count for part in parts], count)
    weights = normalized(_weights(sources))
    requests, size = megatron_requests(weights, count)
    parts = [MegatronSamples(s.dataset, d or range(0), n, length, seed) for s, d, n in zip(sources, documents, requests, strict=True)]
    return BlendedSamples.megatron(parts, weights, size)
