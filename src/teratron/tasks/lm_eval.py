"""Teratron as a model of EleutherAI's lm-eval, so that all its tasks run: `python -m teratron.tasks.lm_eval --model teratron ...`.

lm-eval finds models in its own table only; this module adds one line to it and hands the command line over.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from teratron.config import UserError
from teratron.generate import Request, Sampling, complete, open_source
from teratron.tasks.evaluate.likelihood import ModelScorer, rolling
from teratron.tasks.evaluate.likelihood import Request as Scored

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError:
    MISSING = "the package lm-eval is missing: pip install lm-eval"
    if __name__ == "__main__":
        sys.exit(f"teratron: error: {MISSING}")
    raise UserError(MISSING) from None

UNUSED = ("do_sample", "temperature", "top_k", "top_p", "seed")
"""What sampling takes; `until` and `max_gen_toks` are read apart."""


@register_model("teratron")
class TeratronLM(LM):
    """Likelihoods and texts of a run, checkpoint or Hugging Face folder."""

    def __init__(
        self,
        path: str,
        batch_size: int | str = 16,
        device: str | None = None,
        precision: str | None = None,
        tokenizer: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        """The arguments of `--model_args`, beside --batch_size and --device.

        Args: precision: fp32 or bf16; None = fp32, or fp64 as trained. max_batch_size: lm-eval gives it; unused.
        """
        super().__init__()
        if not str(batch_size).isdecimal():
            raise UserError(f"--batch_size {batch_size}: expected a number, such as 16")
        self.loaded = open_source(path, device or "auto", precision, tokenizer)
        self.scorer, self.batch = ModelScorer(self.loaded, int(batch_size)), int(batch_size)
        self._device = self.scorer.device
        self._rank, self._world_size = 0, 1

    @property
    def tokenizer_name(self) -> str:
        return self.scorer.frame.tokenizer.fingerprint

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each continuation behind its context, and whether the model would write it."""
        found = self.scorer.likelihoods([self.scorer.pair(*request.args) for request in requests])
        return [(one.total, one.greedy) for one in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of each whole text, in windows that touch, as lm-eval cuts them; a bos that the tokenizer puts before it is scored, too."""
        windows = [self._windows(request.args[0]) for request in requests]
        found = iter(self.scorer.likelihoods([window for some in windows for window in some]))
        return [sum(next(found).total for _ in some) for some in windows]

    def _windows(self, text: str) -> list[Scored]:
        tokens, length = self.scorer.frame.read(text), self.loaded.config.positions
        if self.scorer.first is None:
            raise UserError(f"{self.loaded.name}: its tokenizer has no token for the start or end of a text, before which one is scored")
        return list(rolling(tokens, self.scorer.first, length, length))

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Each context's continuation up to a stop text; a context too long for the model's positions loses its beginning."""
        found: dict[int, str] = {}
        by_way: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            by_way.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        for way, numbers in by_way.items():
            texts = self._generate([requests[number].args[0] for number in numbers], json.loads(way))
            found.update(zip(numbers, texts, strict=True))
        return [found[number] for number in range(len(requests))]

    def _generate(self, contexts: Sequence[str], asked: dict[str, Any]) -> list[str]:
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(asked))
        stop, limit = tuple(text for text in kwargs.pop("until") if text), int(kwargs.pop("max_gen_toks"))
        unknown = next((name for name in kwargs if name not in UNUSED), None)
        if unknown is not None:
            raise UserError(f"gen_kwargs {unknown}={kwargs[unknown]}: is not known here; expected until, max_gen_toks, {', '.join(UNUSED)}")
        heat = float(kwargs.get("temperature") or 0) if kwargs.get("do_sample") else 0.0
        sampling = Sampling(heat, int(kwargs.get("top_k") or 0), float(kwargs.get("top_p") or 1), int(kwargs.get("seed") or 0))
        room = self.loaded.config.positions - (0 if self.scorer.frame.start is not None else limit)
        if room < 1:
            raise UserError(f"max_gen_toks = {limit}: the model has {self.loaded.config.positions} positions: ask for fewer (--gen_kwargs)")
        prompts = [self.scorer.frame.read(context)[-room:] for context in contexts]
        order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
        done = complete(self.loaded, [prompts[number] for number in order], Request(sampling, limit, stop, batch=self.batch))
        texts = dict(zip(order, (one.text for one in done), strict=True))
        return [texts[number] for number in range(len(prompts))]


def main() -> int:
    """lm-eval's own command line, which now knows the model `teratron`."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as error:
        print(f"teratron: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
