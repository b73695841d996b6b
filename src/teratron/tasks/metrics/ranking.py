"""Retrieval: how high the relevant documents stand among all. Scores and relevance are [queries, documents]."""

from __future__ import annotations

import numpy as np


def ndcg(scores_QD: np.ndarray, relevance_QD: np.ndarray, k: int = 10) -> np.ndarray:
    """Normalised discounted cumulative gain of the first k (Järvelin and Kekäläinen 2002) of each query, [Q].

    Gains are the relevances themselves. Documents of equal scores each gain the mean of them all (McSherry and Najork 2008). 0 for a
    query without a relevant document.
    """
    discount = 1 / np.log2(np.arange(relevance_QD.shape[1]) + 2)
    discount[k:] = 0
    reached = np.array([_gain(s, r, discount) for s, r in zip(scores_QD, relevance_QD, strict=True)])
    best = -np.sort(-relevance_QD, axis=1) @ discount
    return np.divide(reached, best, out=np.zeros(len(best)), where=best > 0)


def _gain(scores: np.ndarray, relevance: np.ndarray, discount: np.ndarray) -> float:
    _, group, sizes = np.unique(-scores, return_inverse=True, return_counts=True)
    gains = np.bincount(group, weights=relevance) / sizes
    ends = np.cumsum(sizes)
    until = np.concatenate([[0.0], np.cumsum(discount)])
    return float(gains @ (until[ends] - until[ends - sizes]))


def reciprocal_rank(scores_QD: np.ndarray, relevance_QD: np.ndarray) -> np.ndarray:
    """1 / rank of the first relevant document of each query, [Q]; 0 without one. Equal scores count against it."""
    ranks = np.where(relevance_QD > 0, _ranks(scores_QD), np.inf)
    return 1 / ranks.min(axis=1)


def recall_at(scores_QD: np.ndarray, relevance_QD: np.ndarray, k: int) -> np.ndarray:
    """Share of each query's relevant documents among its first k, [Q]; 0 without one. Equal scores count against them."""
    relevant = relevance_QD > 0
    found = (relevant & (_ranks(scores_QD) <= k)).sum(axis=1)
    return found / np.maximum(relevant.sum(axis=1), 1)


def _ranks(scores_QD: np.ndarray) -> np.ndarray:
    """Of each document: how many have at least its score."""
    ordered = np.sort(scores_QD, axis=1)
    below = [np.searchsorted(row, scores, side="left") for row, scores in zip(ordered, scores_QD, strict=True)]
    return scores_QD.shape[1] - np.array(below)
