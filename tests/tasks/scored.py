"""Small models with random weights for the tests of evaluation, and what a text's likelihood is without any batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from teratron.checkpoint import LoadedModel
from teratron.config import ModelConfig
from teratron.data.tokenizer import ByteTokenizer
from teratron.models import build_model, initialise

torch.set_num_threads(1)


class Framed(ByteTokenizer):
    """Bytes, with the tokens that an encoder-decoder needs around its texts."""

    vocab_size = 259

    def token_id(self, token: str) -> int | None:
        return {"<pad>": 257, "</s>": 258}.get(token, super().token_id(token))


def random_model(objective: str = "next_token", **keys: Any) -> LoadedModel:
    """A float64 model over bytes whose probabilities are far from even, as if opened from a folder."""
    sizes = {"layers": 2, "hidden": 32, "heads": 4, "seq_length": 32, "vocab_size": 259, "init_std": 0.3, "norm": "rmsnorm"}
    config = ModelConfig(**(sizes | keys))
    model = build_model(config, dtype=torch.float64)
    initialise(model, seed=1)
    return LoadedModel(model.eval(), config, Framed(), "random", objective)  # type: ignore[arg-type]


def log_probabilities(loaded: LoadedModel, tokens: Sequence[int], **state: Tensor) -> Tensor:
    """Of every token but the first, given those before it, in one whole forward pass; [S - 1]."""
    row = torch.tensor([list(tokens)])
    state |= {"tokens": row[:, :-1], "positions": torch.arange(row.shape[1] - 1)[None]}
    with torch.no_grad():
        logits = loaded.model.head.output(loaded.model(state)["hidden"])[0]
    return logits.log_softmax(-1).gather(-1, row[0, 1:, None])[:, 0]
