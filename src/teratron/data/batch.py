"""From rows of token ids to a batch of tensors: inputs, targets, weights, positions, segments (contract C4)."""

from __future__ import annotations

import numpy as np
import torch

from teratron.config import UserError


def make_batch(
    rows: np.ndarray, sample: np.ndarray, *, eod: int | None, isolate_documents: bool, mask_end_of_document: bool
) -> dict[str, torch.Tensor]:
    """Turn rows [B, S + 1] (-1 = padding) of the global samples `sample` [B] into a batch.

    Returns `tokens` and `targets` int64 [B, S], shifted by one (padding becomes id 0); `weights` float32 [B, S], 0 where the target is
    padding or, with `mask_end_of_document`, the input is `eod`; `positions` and `segments` int64 [B, S], the place in the document and
    the document's number in the sample when `isolate_documents` (the token after an `eod` begins the next), else the place in the
    sample and 0; `sample` int64 [B]. Raises `UserError` when an end-of-document token is needed and there is none.
    """
    if isolate_documents or mask_end_of_document:
        check_eod(eod, "isolate_documents" if isolate_documents else "mask_end_of_document")
    inputs, targets = rows[:, :-1], rows[:, 1:]
    ends = inputs == eod if eod is not None else np.zeros(inputs.shape, bool)
    weights = targets >= 0
    if mask_end_of_document:
        weights &= ~ends
    batch = {
        "tokens": torch.from_numpy(np.maximum(inputs, 0)),
        "targets": torch.from_numpy(np.maximum(targets, 0)),
        "weights": torch.from_numpy(weights.astype(np.float32)),
        "positions": torch.arange(inputs.shape[1]).expand(inputs.shape),
        "sample": torch.from_numpy(np.array(sample, np.int64)),
    }
    if isolate_documents:
        batch["positions"], batch["segments"] = map(torch.from_numpy, document_places(ends))
    return batch


def coordinates(tokens: np.ndarray, real: np.ndarray, eod: int | None, isolate_documents: bool) -> dict[str, np.ndarray]:
    """`positions` [B, S] of whole samples, and `segments` where documents are isolated or there is padding, of which they are -1.

    tokens, real [B, S]: ids, and False at padding. Raises `UserError` when an end-of-document token is needed and there is none.
    """
    places = np.tile(np.arange(tokens.shape[1]), (len(tokens), 1))
    if not isolate_documents:
        return {"positions": places} if real.all() else {"positions": places, "segments": real.astype(np.int64) - 1}
    check_eod(eod, "isolate_documents")
    positions, segments = document_places(tokens == eod)
    return {"positions": positions, "segments": np.where(real, segments, -1)}


def check_eod(eod: int | None, key: str) -> None:
    """Raise `UserError` where a key of `data` needs an end-of-document token and there is none."""
    if eod is None:
        raise UserError(f"data.{key} = true: the tokenizer has no end-of-document token; use one that has, or leave data.{key} out")


def document_places(ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(positions, segments) int64 [B, S] that begin anew after every True of `ends` [B, S]."""
    begins = np.zeros_like(ends)
    begins[:, 1:] = ends[:, :-1]
    place = np.arange(ends.shape[1])
    return place - np.maximum.accumulate(np.where(begins, place, 0), axis=1), np.cumsum(begins, axis=1, dtype=np.int64)
