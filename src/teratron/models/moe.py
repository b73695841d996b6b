"""Mixture of experts: a router chooses a few experts for each token, which alone compute it (Shazeer et al. 2017).

Shape letters: see `leaves.py`; here also C: the experts of one token, best first, and R: token copies in the experts' order.
Balance, capacity and statistics are those of a sequence, never of a micro-batch or a device (contract C3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teratron.config import ModelConfig
from teratron.models.feed_forward import FeedForward, activate, gated
from teratron.models.leaves import Leaf, Part, accurate
from teratron.models.products import linear

ROWS_ALIGNED = 8
"""Grouped products on CUDA want each group's rows of half types to begin at multiples of 16 bytes."""


class MoE(nn.Module):
    """In place of a feed-forward layer: routed experts, and shared ones that see every token. No biases."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.router = Router(config)
        self.dispatch = Dispatch()
        self.experts = Experts(config)
        shared = config.shared_experts * config.expert_width  # side by side they are one wide expert
        self.shared = FeedForward(config, shared, bias=False) if shared else None

    def forward(self, x_BSH: Tensor, real_BS: Tensor | None, dropless: bool) -> tuple[Tensor, Routing]:
        """real: False at padding, which counts nowhere; None = no padding. dropless: set capacity aside."""
        routing = self.router(x_BSH, real_BS, dropless)
        mixed_BSH = self.dispatch(x_BSH, routing, self.experts)
        return mixed_BSH if self.shared is None else mixed_BSH + self.shared(x_BSH), routing


@dataclass(frozen=True)
class Routing:
    """Where tokens go, and what it costs."""

    experts_BSC: Tensor
    """int64: each token's experts, best first."""
    gates_BSC: Tensor
    """Their weights in the mixture."""
    kept_BSC: Tensor | None
    """False where an expert's capacity is exceeded, and at padding; None = everything is kept."""
    load_E: Tensor
    """int64: how many real tokens chose each expert, before any is dropped."""
    terms: dict[str, Tensor]
    """Sums of the layer's own loss terms over the tokens here, by name (contract C2)."""


class Router(Leaf):
    """Scores each token's experts and takes the best; ties go to the lower number. In float32 for half types.

    `bias` (Wang et al. 2024) shifts the scores in the choice alone; it is training state without a gradient, see `balance`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.experts, config.hidden))
        biased = config.router_balance == "bias"
        self.bias = nn.Parameter(torch.empty(config.experts), requires_grad=False) if biased else None

    def forward(self, x_BSH: Tensor, real_BS: Tensor | None, dropless: bool) -> Routing:
        config, exact = self.config, accurate(x_BSH.dtype)
        logits_BSE = F.linear(x_BSH.to(exact), self.weight.to(exact))
        scores_BSE = logits_BSE.softmax(-1) if config.router == "softmax" else logits_BSE.sigmoid()
        experts_BSC = self.choose(scores_BSE.detach())
        here_BE = count_choices(experts_BSC, real_BS, config.experts)
        whole_BE = self.whole(here_BE)
        kept_BSC = self.within_capacity(experts_BSC, real_BS, whole_BE) if config.capacity and not dropless else None
        terms = {}
        if config.router_balance == "aux":
            terms["aux_loss"] = balance_loss(scores_BSE, whole_BE, config.experts_per_token, real_BS)
        if config.z_loss:
            terms["z_loss"] = _sum_real(logits_BSE.logsumexp(-1).square(), real_BS).sum()
        return Routing(experts_BSC, self.gates(scores_BSE, experts_BSC), kept_BSC, here_BE.sum(0), terms)

    def choose(self, scores_BSE: Tensor) -> Tensor:
        """The best experts of each token."""
        shifted = scores_BSE if self.bias is None else scores_BSE + self.bias
        if self.config.router_groups > 1:
            shifted = self.within_groups(shifted)
        # topk promises no order among equals: a stable sort does, so that every layout chooses alike
        return shifted.sort(dim=-1, descending=True, stable=True).indices[..., : self.config.experts_per_token]

    def within_groups(self, scores_BSE: Tensor) -> Tensor:
        """The scores of each token's best groups of experts, minus infinity elsewhere (DeepSeek-AI 2024: V2 and V3)."""
        grouped = scores_BSE.unflatten(-1, (self.config.router_groups, -1))
        counted = min(1 if self.config.router == "softmax" else 2, grouped.shape[-1])
        best = grouped.sort(dim=-1, descending=True).values[..., :counted].sum(-1)
        chosen = best.sort(dim=-1, descending=True, stable=True).indices[..., : self.config.groups_per_token]
        usable = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, chosen, True)
        return grouped.masked_fill(~usable.unsqueeze(-1), -math.inf).flatten(-2)

    def gates(self, scores_BSE: Tensor, experts_BSC: Tensor) -> Tensor:
        gates_BSC = scores_BSE.gather(-1, experts_BSC)
        if self.config.normalise_gates:
            gates_BSC = gates_BSC / gates_BSC.sum(-1, keepdim=True).clamp(min=1e-20)
        return gates_BSC * self.config.gate_scale

    def within_capacity(self, experts_BSC: Tensor, real_BS: Tensor | None, whole_BE: Tensor) -> Tensor:
        """Which choices an expert takes: in each sequence the first that come, so that no token depends on a later one."""
        real_BS1 = torch.ones_like(experts_BSC[..., :1], dtype=torch.bool) if real_BS is None else real_BS.unsqueeze(-1)
        asked_BSE = F.one_hot(experts_BSC, self.config.experts).sum(2) * real_BS1
        earlier_BSE = asked_BSE.cumsum(1) - asked_BSE + self.before(asked_BSE)
        # less a hair, since 1.1 * 50 / 5 is above 11 in binary
        limit_B = (whole_BE.sum(-1, dtype=torch.float64) * self.config.capacity / self.config.experts - 1e-9).ceil()
        return (earlier_BSE.gather(-1, experts_BSC) < limit_B[:, None, None]) & real_BS1

    def whole(self, here_BE: Tensor) -> Tensor:
        """Choices of whole sequences, from those of the tokens at hand: here these are all."""
        return here_BE

    def before(self, asked_BSE: Tensor) -> Tensor:
        """Choices by earlier tokens of each sequence that are not at hand: here there are none."""
        return torch.zeros_like(asked_BSE[:, :1])

    def leaf_parts(self) -> Iterator[Part]:
        std = self.config.init_std / self.config.widening  # there are no more experts in a wider model
        yield Part(".weight", "weight", 0, tuple(self.weight.shape), std, inner=True)
        if self.bias is not None:
            yield Part(".bias", "bias", 0, tuple(self.bias.shape), None)

    def _apply(self, fn: Any, recurse: bool = True) -> Router:
        """Moves and casts; the bias is never of a half type, in which its small steps would be lost."""
        before = self.bias.data if self.bias is not None else None
        super()._apply(fn, recurse)
        if self.bias is not None and before is not None and self.bias.dtype != accurate(self.bias.dtype):
            self.bias.data = before.to(self.bias.device, accurate(self.bias.dtype))
        return self


class Dispatch(nn.Module):
    """Brings copies of tokens to their experts, and mixes what comes back."""

    def forward(self, x_BSH: Tensor, routing: Routing, experts: Experts) -> Tensor:
        x_TH, chosen_TC = x_BSH.flatten(0, 1), routing.experts_BSC.flatten(0, 1)
        kept_TC = routing.kept_BSC.flatten(0, 1) if routing.kept_BSC is not None else None
        place = Places.of(chosen_TC, kept_TC, self.total(experts))
        y_RH = self.compute(place.send(x_TH), place, experts)
        y_TCH = place.bring_back(y_RH).unflatten(0, chosen_TC.shape).to(routing.gates_BSC.dtype)
        mixed_TH = (routing.gates_BSC.flatten(0, 1).unsqueeze(-1) * y_TCH).sum(1)
        return mixed_TH.to(x_BSH.dtype).view_as(x_BSH)

    def total(self, experts: Experts) -> int:
        """Experts of the layer, of which some may be elsewhere."""
        return experts.count

    def compute(self, rows_RH: Tensor, place: Places, experts: Experts) -> Tensor:
        """Rows in the order of all experts, through their experts."""
        return experts(rows_RH, place.ends_E)


@dataclass(frozen=True)
class Places:
    """The order of token copies by expert, and by token within an expert; those that are dropped lie at the end, as zeros."""

    order_R: Tensor
    """Which copy lies in a row; copy number = token * C + choice."""
    row_R: Tensor
    """The inverse: in which row a copy lies."""
    ends_E: Tensor
    """int32: the row at which each expert's group ends; the next one's begins there."""
    copies: int
    kept_R: Tensor | None
    """Whether a row is computed; None = all are."""

    @classmethod
    def of(cls, chosen_TC: Tensor, kept_TC: Tensor | None, experts: int) -> Places:
        numbers = chosen_TC if kept_TC is None else chosen_TC.where(kept_TC, experts)
        grouped, order = numbers.flatten().sort(stable=True)
        row = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        ends = torch.searchsorted(grouped, torch.arange(experts, device=order.device), right=True).int()
        return cls(order, row, ends, chosen_TC.shape[1], None if kept_TC is None else grouped < experts)

    def send(self, x_TH: Tensor) -> Tensor:
        """The rows that the experts get."""
        return self._only_kept(TakeRows.apply(x_TH, self.order_R, self.row_R, self.copies))

    def bring_back(self, y_RH: Tensor) -> Tensor:
        """The rows in the copies' order."""
        return TakeRows.apply(self._only_kept(y_RH), self.row_R, self.order_R, 1)

    def _only_kept(self, rows: Tensor) -> Tensor:
        # In both directions, and of the gradients too: a grouped product leaves undefined what lies behind the last group.
        return rows if self.kept_R is None else rows.masked_fill(~self.kept_R.unsqueeze(-1), 0)


class TakeRows(torch.autograd.Function):
    """x[order // copies], where order is a permutation: its gradient is a permutation and a sum, without atomic additions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x.index_select(0, order // copies)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return upstream[0].index_select(0, inverse).unflatten(0, (-1, ctx.copies)).sum(1), None, None, None


class Experts(Leaf):
    """Feed-forward layers side by side, stacked: `up` and, where the activation is gated, `gate` [E, F, H]; `down` [E, H, F]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        count, hidden, width = config.experts, config.hidden, config.expert_width
        self.activation, self.std, self.down_std = config.activation, config.matrix_std, config.matrix_std / math.sqrt(2 * config.layers)
        self.gate = nn.Parameter(torch.empty(count, width, hidden)) if config.gated else None
        self.up = nn.Parameter(torch.empty(count, width, hidden))
        self.down = nn.Parameter(torch.empty(count, hidden, width))

    @property
    def count(self) -> int:
        """Experts here."""
        return self.up.shape[0]

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # sizes of groups are data: it would be compiled anew for each
    def forward(self, x_RH: Tensor, ends_E: Tensor) -> Tensor:
        """Each group of rows through its expert; `ends` int32, see `Places`. Rows behind the last group are undefined."""
        if x_RH.is_cuda and x_RH.dtype == torch.bfloat16:
            product: Callable[[Tensor, Tensor], Tensor] = partial(grouped_product, ends_E=ends_E)
        else:
            product = partial(looped_product, ends=self.read_ends(ends_E, len(x_RH)))
        up_RF = product(x_RH, self.up)
        if self.gate is None:
            return product(activate(up_RF, self.activation), self.down)
        return product(gated(product(x_RH, self.gate), up_RF, self.activation), self.down)

    def read_ends(self, ends_E: Tensor, rows: int) -> list[int]:
        """The ends on the host, for a loop over `rows` rows. A dry run, which has no numbers, puts an estimate in place of this."""
        ends: list[int] = ends_E.tolist()
        return ends

    def leaf_parts(self) -> Iterator[Part]:
        for name, weight in (("gate", self.gate), ("up", self.up), ("down", self.down)):
            if weight is not None:
                yield Part(f".{name}.weight", name, 0, tuple(weight.shape), self.down_std if name == "down" else self.std, inner=True)


def looped_product(x_RI: Tensor, weight_EOI: Tensor, ends: Sequence[int]) -> Tensor:
    """Each group of rows times its expert's matrix, one after the other; zeros behind the last group. Returns [R, O]."""
    # unbind, because each index of its own would have a gradient as large as all experts together
    pieces = [linear(x_RI[start:end], w) for start, end, w in zip([0, *ends], ends, weight_EOI.unbind(), strict=False)]
    return torch.cat([*pieces, x_RI.new_zeros(x_RI.shape[0] - ends[-1], weight_EOI.shape[1])])


def grouped_product(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """The same in one kernel and without waiting for the sizes; undefined behind the last group."""
    count, sizes = len(ends_E), ends_E.diff(prepend=ends_E.new_zeros(1))
    wide_ends = ((sizes + ROWS_ALIGNED - 1) // ROWS_ALIGNED * ROWS_ALIGNED).cumsum(0, dtype=torch.int32)
    rows = torch.arange(x_RI.shape[0], device=x_RI.device)
    expert_R = torch.searchsorted(ends_E, rows, right=True, out_int32=True)
    shift_E = F.pad(wide_ends - ends_E, (1, 0))  # a group moves by the padding of those before it
    place_R = rows + shift_E[expert_R]
    wide = x_RI.new_zeros(x_RI.shape[0] + count * ROWS_ALIGNED, x_RI.shape[1]).index_copy(0, place_R, x_RI)
    return F.grouped_mm(wide, weight_EOI.transpose(1, 2), offs=wide_ends).index_select(0, place_R)


def count_choices(experts_BSC: Tensor, real_BS: Tensor | None, experts: int) -> Tensor:
    """How many real tokens of each sequence chose each expert, int64 [B, E]."""
    ones = torch.ones_like(experts_BSC) if real_BS is None else real_BS.unsqueeze(-1).expand_as(experts_BSC).long()
    counts = ones.new_zeros(experts_BSC.shape[0], experts)
    return counts.scatter_add_(1, experts_BSC.flatten(1), ones.flatten(1))


def balance_loss(scores_BSE: Tensor, whole_BE: Tensor, choices: int, real_BS: Tensor | None) -> Tensor:
    """The auxiliary loss, summed over sequences: E sum_e f_e P_e (Fedus et al. 2021, a sequence as DeepSeek-V3); 1 = even.

    f = share of a sequence's choices that went to an expert, P = mean over its tokens of the expert's share of their scores.
    Counts have no gradient, so that this is a sum over tokens, given the counts of the `whole` sequences.
    """
    tokens_B1 = (whole_BE.sum(-1, keepdim=True) // choices).clamp(min=1).to(scores_BSE.dtype)
    shares_BSE = scores_BSE / scores_BSE.sum(-1, keepdim=True).clamp(min=1e-20)
    means_BE = _sum_real(shares_BSE, real_BS) / tokens_B1
    return (whole_BE.shape[1] * whole_BE / (choices * tokens_B1) * means_BE).sum()


def balance(model: nn.Module, loads: Mapping[str, Tensor], rate: float | Tensor) -> None:
    """After an optimizer step: a router's bias of experts chosen more often than the mean falls by `rate`, of others it rises.

    Loss-free balancing (Wang et al. 2024). Args: loads: each router's path and the whole global batch's choices [E].
    """
    for path, load_E in loads.items():
        bias = model.get_submodule(path).bias
        if isinstance(bias, Tensor):
            with torch.no_grad():
                bias += (load_E.mean(dtype=torch.float64) - load_E).sign().to(bias.dtype) * rate


def _sum_real(values: Tensor, real_BS: Tensor | None) -> Tensor:
    """The sum over each sequence's real tokens of values [B, S, ...]."""
    if real_BS is not None:
        values = values * real_BS.view(*real_BS.shape, *[1] * (values.dim() - 2))
    return values.sum(1)
