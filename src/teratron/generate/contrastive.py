"""Contrastive search: of the likeliest tokens the one whose hidden state is least like those before it (Su et al. 2022)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from teratron.config import UserError
from teratron.generate.decoder import Decoder
from teratron.generate.engine import TokenStream
from teratron.generate.guides import Guide
from teratron.generate.sampler import Sampling, finite_peaks, top_columns
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
        self, decoder: Decoder, search: ContrastiveSearch, stop_ids: Collection[int] = (), guides: Sequence[Guide] | None = None
    ) -> None:
        """Arguments as of `TokenStream`."""
        super().__init__(decoder, Sampling(temperature=0), stop_ids, guides=guides)
        self.candidates, self.alpha = min(search.k, decoder.vocab), search.alpha

    @torch.inference_mode()
    def _prefill(self) -> Tensor:
        hidden_BSH = super()._prefill()
        rows, width, features = hidden_BSH.shape
        lengths = torch.tensor([len(prompt) for prompt in self.decoder.prompts], device=hidden_BSH.device)
        columns = torch.arange(width + max(self.decoder.limits), device=hidden_BSH.device)
        self._seen = columns >= width - lengths[:, None]
        self._units = hidden_BSH.new_empty(rows, len(columns), features, dtype=accurate(hidden_BSH.dtype))
        self._used = 0
        self._remember(hidden_BSH)
        return hidden_BSH

    @torch.inference_mode()
    def _choose(self, logits_BV: Tensor, place: int) -> Tensor:
        """The chosen token has been through the model already when this returns."""
        likely_BV = (logits_BV.double() - finite_peaks(logits_BV)).softmax(-1)
        ids_BC = top_columns(logits_BV, self.candidates)
        likely_BC = likely_BV.gather(-1, ids_BC)
        rows_B = torch.arange(len(ids_BC), device=ids_BC.device)
        self.decoder.keep(rows_B.repeat_interleave(self.candidates))
        hidden_BCH = self.decoder.feed(ids_BC.flatten()).view(*ids_BC.shape, -1)
        scores_BC = (1 - self.alpha) * likely_BC - self.alpha * self._likeness(hidden_BCH)
        best_B = scores_BC.masked_fill(likely_BC == 0, -torch.inf).argmax(-1)  # what a guide does not allow
        self.decoder.keep(rows_B * self.candidates + best_B)
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

    def _feed(self, tokens_B: Tensor) -> Tensor:
        return self._ahead


def unit(hidden: Tensor) -> Tensor:
    """Hidden states of length 1, in float32 for half types."""
    return F.normalize(hidden.to(accurate(hidden.dtype)), dim=-1)
