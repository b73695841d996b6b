"""What tasks write: prompts of token ids become texts, by greedy or beam search, and how likely answers that are given are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch

from teratron.checkpoint.open import LoadedModel
from teratron.config import Config
from teratron.data.examples import Example
from teratron.generate import BeamSearch, Request, Sampling, complete
from teratron.models import GPT, EncoderDecoder, Model
from teratron.tasks.finetune.coder import Coder
from teratron.tasks.finetune.task import BATCH, forward

USUAL_LENGTH = 128


def room_to_write(coder: Coder, wanted: int) -> int:
    """Tokens of the longest text that is written: `wanted`, or with 0 128, but no more than half of the model's positions."""
    return wanted or min(USUAL_LENGTH, coder.config.positions // 2)


def written(
    model: Model, config: Config, prompts: Sequence[np.ndarray], coder: Coder, most: int, beams: int, batch: int, stop: Sequence[str] = ()
) -> list[str]:
    """The texts that a model writes behind prompts (or, with an encoder, about them), in their order, at most `most` tokens each.

    What is written for one prompt does not depend on the others.
    """
    loaded = LoadedModel(cast("GPT | EncoderDecoder", model), config.model, coder.tokenizer, "the run", config.objective.name)
    how = BeamSearch(beams) if beams > 1 else Sampling(temperature=0.0)
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    request = Request(how, most, tuple(stop), batch=batch * beams)
    done = complete(loaded, [prompts[number].tolist() for number in order], request)
    texts = dict(zip(order, (completion.text.strip() for completion in done), strict=True))
    return [texts[number] for number in range(len(prompts))]


@torch.no_grad()
def losses(model: Model, config: Config, examples: Sequence[Example], size: int = BATCH) -> np.ndarray:
    """Cross-entropy in nats of the weighed tokens of each example, float64 [N]."""
    found = np.zeros(len(examples))
    for numbers, batch, state in forward(model, config, examples, size):
        for row, number in enumerate(numbers):
            own = (tensor[row : row + 1] for tensor in (state["hidden"], batch["targets"], batch["weights"]))
            found[number] = float(model.head.output.loss_sum(*own))
    return found
