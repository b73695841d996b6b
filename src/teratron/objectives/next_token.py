"""Next-token prediction: cross-entropy of each token given those before it; beside it, if asked for, a contrastive term or tokens ahead."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from teratron.config import Config
from teratron.data.batch import make_batch
from teratron.data.samples import Samples
from teratron.data.special import Needs, SpecialTokens
from teratron.models import Model, State
from teratron.objectives.contrastive import Contrast
from teratron.objectives.multi_token import Ahead
from teratron.objectives.terms import Batch, Term


class NextToken:
    """Targets are the tokens one place on, shifted before any cut."""

    needs = Needs()

    def __init__(self, config: Config) -> None:
        self.data, self.smoothing = config.data, config.objective.label_smoothing
        self.contrast, self.ahead = Contrast(config.objective), Ahead(config)

    def prepare(self, samples: Samples, index: np.ndarray, special: SpecialTokens) -> Batch:
        isolate, mask = self.data.isolate_documents, self.data.mask_end_of_document
        batch = make_batch(samples.rows(index), index, eod=special.eod, isolate_documents=isolate, mask_end_of_document=mask)
        return batch | self.ahead.labels(batch)

    def inputs(self, batch: Batch) -> State:
        return {name: batch[name] for name in ("tokens", "positions", "segments", "real") if name in batch}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        # float64: a float32 sum of uneven weights would depend on how the global batch is cut
        return {"next_token": batch["weights"].sum(dtype=torch.float64)} | self.contrast.counts(batch) | self.ahead.counts(batch)

    def terms(self, model: Model, state: State, batch: Batch) -> list[Term]:
        if model.head is None:  # a stage before the last
            return []
        loss_sum = model.head.output.loss_sum(state["hidden"], batch["targets"], batch["weights"], self.smoothing)
        return [Term("next_token", loss_sum), *self.contrast.terms(model, state, batch), *self.ahead.terms(model, state, batch)]
