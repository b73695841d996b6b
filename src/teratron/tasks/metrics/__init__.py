"""The field's metrics, on plain sequences and arrays; every one equals its reference package, see docs/eval.md."""

from teratron.tasks.metrics.bootstrap import Estimate, Metric, estimate
from teratron.tasks.metrics.calibration import brier, calibration_error
from teratron.tasks.metrics.classes import accuracy, f1, matthews
from teratron.tasks.metrics.entities import entities, entity_counts, entity_f1, f1_of
from teratron.tasks.metrics.perplexity import Text, perplexities
from teratron.tasks.metrics.ranking import ndcg, recall_at, reciprocal_rank
from teratron.tasks.metrics.similarity import pearson, spearman
from teratron.tasks.metrics.spans import exact_match, normalise_answer, span_f1
from teratron.tasks.metrics.texts import bleu, chrf, rouge

__all__ = [
    "Estimate",
    "Metric",
    "Text",
    "accuracy",
    "bleu",
    "brier",
    "calibration_error",
    "chrf",
    "entities",
    "entity_counts",
    "entity_f1",
    "estimate",
    "exact_match",
    "f1",
    "f1_of",
    "matthews",
    "ndcg",
    "normalise_answer",
    "pearson",
    "perplexities",
    "recall_at",
    "reciprocal_rank",
    "rouge",
    "span_f1",
    "spearman",
]
