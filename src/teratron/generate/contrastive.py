"""Contrastive search: of the likeliest tokens the one whose hidden state is least like those before it (Su et al. 2022)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from teratron.config import UserError
from teratron.generate.engine import TokenStream
from teratron.generate.sampler import Sampling, finite_peaks, top_columns
from teratron.models import GPT
from teratron.models.leaves import accurate


@dataclass(frozen=True)
class ContrastiveSearch:
    """How a token is chosen: the candidate v with the highest (1 - alpha) p(v) - alpha max_j cosine(h_v, h_j), j over all tokens before.

    Nothing is drawn at random. Among equals the lowest id is chosen.
    """

    k: int
    """Candidates: so many likeliest tokens."""
    alpha: float = 0.6
    """How much likeness counts, against probability; 0 = greedy."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UserError(f"contrastive_k = {self.k}: expected at least 1, such as 4")
        if not 0 <= self.alpha <= 1:
            raise UserError(f"contrastive_alpha = {self.alpha}: expected a number from 0 to 1; 0 always takes the likeliest token")


class ContrastiveStream(TokenStream):
    """A `TokenStream` by contrastive search.

    A step is one pass of all candidates, each a row of its own behind the cached keys and values of the row it may continue; of those rows
    the chosen ones stay, and their states, from which the next candidates come.
    """

    def __init__(
        self,
        model: GPT,
        prompts: Sequence[Sequence[int]],
        search: ContrastiveSearch,
        max_new_tokens: int | None = None,
        stop_ids: Collection[int] = (),
        vocab: int | None = None,
    ) -> None:
        """Arguments as of `TokenStream`."""
        super().__init__(model, prompts, Sampling(temperature=0), max_new_tokens, stop_ids, vocab=vocab)
        self.candidates, self.alpha = min(search.k, self.vocab), search.alpha

    @torch.inference_mode()
    def _prefill(self) -> Tensor:
        hidden_BSH = super()._prefill()
        rows, width, features = hidden_BSH.shape
        lengths = torch.tensor([len(prompt) for prompt in self.prompts], device=hidden_BSH.device)
        self._seen = torch.arange(width + max(self.limits), device=hidden_BSH.device) >= width - lengths[:, None]
        self._units = hidden_BSH.new_empty(rows, self._seen.shape[1], features, dtype=accurate(hidden_BSH.dtype))
        self._used = 0
        self._remember(hidden_BSH)
        return hidden_BSH

    @torch.inference_mode()
    def _choose(self, logits_BV: Tensor, place: int) -> Tensor:
        """The chosen token has been through the model already when this returns."""
        likely_BV = (logits_BV.double() - finite_peaks(logits_BV)).softmax(-1)
        ids_BC = top_columns(logits_BV, self.candidates)
        rows_B = torch.arange(len(ids_BC), device=ids_BC.device)
        super()._keep(rows_B.repeat_interleave(self.candidates))
        hidden_BCH = super()._feed(ids_BC.flatten()).view(*ids_BC.shape, -1)
        scores_BC = (1 - self.alpha) * likely_BV.gather(-1, ids_BC) - self.alpha * self._likeness(hidden_BCH)
        best_B = scores_BC.argmax(-1)
        super()._keep(rows_B * self.candidates + best_B)
        self._ahead = hidden_BCH[rows_B, best_B][:, None]
        self._remember(self._ahead)
        return ids_BC[rows_B, best_B]

    def _likeness(self, hidden_BCH: Tensor) -> Tensor:
        """The highest cosine of each candidate with a token before it, float64 [B, C]."""
        cosines_BCT = unit(hidden_BCH) @ self._units[:, : self._used].mT
        return cosines_BCT.masked_fill(~self._seen[:, None, : self._used], -1).amax(-1).double()

    def _remember(self, hidden_BSH: Tensor) -> None:
        """What later candidates are compared with."""
        first, self._used = self._used, self._used + hidden_BSH.shape[1]
        self._units[:, first : self._used] = unit(hidden_BSH)

    @torch.inference_mode()
    def _keep(self, rows: Tensor) -> None:
        super()._keep(rows)
        self._ahead, self._units, self._seen = self._ahead[rows], self._units[rows], self._seen[rows]

    @torch.inference_mode()
    def _feed(self, tokens_B: Tensor) -> Tensor:
        return self._ahead


def unit(hidden: Tensor) -> Tensor:
    """Hidden states of length 1, in float32 for half types."""
    return F.normalize(hidden.to(accurate(hidden.dtype)), dim=-1)


def chosen_by(
    temperature: float, top_k: int, top_p: float, seed: int, contrastive_k: int, contrastive_alpha: float | None
) -> Sampling | ContrastiveSearch:
    """What the options ask for. Raises `UserError` for those that contradict each other."""
    if not contrastive_k:
        if contrastive_alpha is not None:
            raise UserError(f"contrastive_alpha = {contrastive_alpha} needs contrastive_k: give that, too, such as 4")
        return Sampling(temperature, top_k, top_p, seed)
    drawn = {"temperature": (temperature, 1.0), "top_k": (top_k, 0), "top_p": (top_p, 1.0)}
    for name, (value, default) in drawn.items():
        if value != default:
            raise UserError(f"{name} = {value} with contrastive_k = {contrastive_k}, which draws nothing at random: leave one of them out")
    return ContrastiveSearch(contrastive_k) if contrastive_alpha is None else ContrastiveSearch(contrastive_k, contrastive_alpha)
