"""Generated texts against references: BLEU and chrF by sacrebleu, ROUGE by rouge-score."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from teratron.config import UserError
from teratron.tasks.metrics.bootstrap import Metric

ROUGES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def bleu(predicted: Sequence[str], references: Sequence[Sequence[str]], tokenize: str | None = None) -> Metric:
    """Corpus BLEU, 0 to 100 (Papineni et al. 2002); references: one or more for each text.

    tokenize: how sacrebleu cuts words, such as zh or ja-mecab; None = its default, 13a.
    """
    return _corpus("bleu", _package("sacrebleu").BLEU(tokenize=tokenize), predicted, references)


def chrf(predicted: Sequence[str], references: Sequence[Sequence[str]]) -> Metric:
    """Corpus chrF2, 0 to 100 (Popović 2015): F-score of character n-grams."""
    return _corpus("chrf", _package("sacrebleu").CHRF(), predicted, references)


def rouge(predicted: Sequence[str], references: Sequence[Sequence[str]]) -> list[Metric]:
    """F-scores of shared words, word pairs and longest common subsequences, 0 to 1 (Lin 2004), of the nearest reference, stemmed.

    rouge-score reads Latin letters and digits only: other scripts have no words in it.
    """
    _package("rouge_score")
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGES), use_stemmer=True)
    scores = [scorer.score_multi(list(rights), text) for text, rights in zip(predicted, references, strict=True)]
    return [Metric.mean(name, [score[name].fmeasure for score in scores]) for name in ROUGES]


def _corpus(name: str, scorer: Any, predicted: Sequence[str], references: Sequence[Sequence[str]]) -> Metric:
    """A score of the sum of sentences' n-gram counts, which are made once and then summed over any choice of sentences."""
    most = max(map(len, references))
    columns = [[rights[number] if number < len(rights) else None for rights in references] for number in range(most)]
    counts = np.array(scorer._extract_corpus_statistics(list(predicted), columns))
    return Metric(name, lambda chosen: float(scorer._aggregate_and_compute(counts[chosen].tolist()).score))


def _package(name: str) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.replace("_", "-")
        raise UserError(f"the package {package} is missing for this metric: pip install {package}") from None
