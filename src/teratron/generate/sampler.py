"""The sampler: from logits to the next token, with random numbers that are a function of (seed, place of the token) alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from teratron.config import UserError
from teratron.models.random import seed_of

ROUNDING = 1e-6
"""Relative error of a sum of probabilities whose logits are float32: masses nearer than this to top_p have reached it."""

LIKELIEST = 1024
"""Tokens that nearly always hold the share top_p: sorting only them gives the same set, about four times as fast for 50,000 ids."""


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. Temperature first, then top_k, then top_p of what top_k left."""

    temperature: float = 1.0
    """Logits are divided by it; 0 = greedy: always the likeliest token, the lowest id where several are."""
    top_k: int = 0
    """Only the k likeliest tokens, lower ids first among equals; 0 = all."""
    top_p: float = 1.0
    """Only the smallest set of likeliest tokens whose probability reaches p (Holtzman et al. 2020), at least one token; 1 = all."""
    seed: int = 0
    """Every random number follows from it."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature = {self.temperature}: expected a number of at least 0; 0 always takes the likeliest token")
        if self.top_k < 0:
            raise UserError(f"top_k = {self.top_k}: expected at least 0; 0 keeps every token")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p}: expected a number above 0 and at most 1; 1 keeps every token")
        if self.seed < 0:
            raise UserError(f"seed = {self.seed}: expected at least 0")


def uniform(seed: int, place: int) -> float:
    """The number in [0, 1) that chooses new token `place` (from 0) of a sequence, whatever else is in its batch."""
    return (seed_of("token", seed, place) >> 10) * 2.0**-53


def choose(logits_BV: Tensor, sampling: Sampling, uniforms: list[float]) -> Tensor:
    """One token id for each row, int64 [B]; `uniforms` holds a number in [0, 1) for each row.

    Probabilities and their sums are float64. Raises `UserError` when logits are NaN or infinite.
    """
    peaks = finite_peaks(logits_BV)
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    scores = (logits_BV.double() - peaks.double()) / sampling.temperature
    ids = torch.arange(scores.shape[-1], device=scores.device).expand_as(scores)
    if 0 < sampling.top_k < scores.shape[-1]:
        ids = top_columns(scores, sampling.top_k)
        scores = scores.gather(-1, ids)
    weights = scores.exp()
    if sampling.top_p < 1:
        weights, ids = _top_p(weights, ids, sampling.top_p)
    numbers = torch.tensor(uniforms, dtype=torch.float64, device=weights.device)
    return ids.gather(-1, _draw(weights, numbers)[:, None])[:, 0]


def finite_peaks(logits_BV: Tensor) -> Tensor:
    """Each row's highest logit [B, 1]; raises `UserError` for NaN and infinity."""
    peaks = logits_BV.amax(-1, keepdim=True)
    if not bool(torch.isfinite(peaks).all()):
        raise UserError(
            "the model's logits are not finite: its weights are damaged or overflow in this precision; try fp32 or an older checkpoint"
        )
    return peaks


def top_columns(scores: Tensor, k: int) -> Tensor:
    """The columns of each row's k highest scores, int64 [B, k], ascending."""
    lowest = scores.topk(k).values[:, -1:]
    above, equal = scores > lowest, scores == lowest
    places_left = k - above.sum(-1, keepdim=True)
    return (above | (equal & (equal.cumsum(-1) <= places_left))).nonzero()[:, 1].view(-1, k)


def _top_p(weights: Tensor, ids: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Weights and ids in descending order, the weights zero from where those before have reached the share p of the row's total."""
    needed = p * (1 - ROUNDING) * weights.sum(-1, keepdim=True)
    if weights.shape[-1] > LIKELIEST:
        columns = top_columns(weights, LIKELIEST)
        likeliest = weights.gather(-1, columns)
        if bool((likeliest.sum(-1, keepdim=True) >= needed).all()):
            weights, ids = likeliest, ids.gather(-1, columns)
    weights, order = weights.sort(stable=True, dim=-1, descending=True)
    return weights * (_running_sum(weights) - weights < needed), ids.gather(-1, order)


def _draw(weights: Tensor, numbers: Tensor) -> Tensor:
    """Inverse of the cumulative distribution: the first column whose running sum exceeds number * total, int64 [B]."""
    sums = _running_sum(weights)
    # Rounding could lift number * total to the total itself, which no running sum exceeds.
    targets = torch.minimum(numbers * sums[:, -1], sums[:, -1].nextafter(torch.zeros_like(numbers)))
    return torch.searchsorted(sums, targets[:, None], right=True)[:, 0]


def _running_sum(weights: Tensor) -> Tensor:
    """Sums along each row; CUDA's own have no deterministic form, so a process that demands one gets the CPU's."""
    if weights.is_cuda and torch.are_deterministic_algorithms_enabled():
        return weights.cpu().cumsum(-1).to(weights.device)
    return weights.cumsum(-1)
