"""Multi-head latent attention (DeepSeek-V2, DeepSeek-AI 2024): keys and values of all heads are made from a few features of a token.

Shape letters: see `leaves.py`; here also C: the features from which keys and values are made, R: those that are rotated.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from teratron.config import ModelConfig
from teratron.models.attention import AttentionCore, heads_of, mixed
from teratron.models.leaves import Linear, Norm
from teratron.models.positions import rotate
from teratron.models.sight import Sight
from teratron.models.units import Shared


class Spread(nn.Module):
    """Features of a token that all heads use: from the residual stream to wherever heads are."""

    def forward(self, x_BSF: Tensor) -> Tensor:
        return x_BSF


class LatentAttention(nn.Module):
    """Self-attention whose cache holds C + R features a token.

    A head's queries and keys have D features without positions and R that are rotated, whose keys are one for all heads.
    """

    def __init__(self, config: ModelConfig, layer: int, site: str) -> None:
        super().__init__()
        self.layer, self.everywhere = layer, config.attends_everywhere(layer)
        self.plain, self.rotated, self.values = config.head_features, config.rope_dim, config.value_features
        hidden, heads, std = config.hidden, config.heads, config.matrix_std
        width = self.plain + self.rotated
        if config.latent_query:
            self.q_down = Linear(hidden, config.latent_query, config.bias, std)
            self.q_down_norm = Norm(config.latent_query, "rmsnorm", False, config.norm_eps, config.norm_less_one)
            self.q_up = Linear(config.latent_query, heads * width, False, std, granule=width)
        else:
            self.q = Linear(hidden, heads * width, config.bias, std, granule=width)
        self.shortened = config.latent_query > 0
        self.kv_down = Linear(hidden, {"latent": config.latent, "k_rotated": self.rotated}, config.bias, std)
        self.kv_down_norm = Norm(config.latent, "rmsnorm", False, config.norm_eps, config.norm_less_one)
        self.kv_up = Linear(config.latent, heads * (self.plain + self.values), False, std, granule=self.plain + self.values)
        self.spread = Spread()
        self.factor = config.sharpness**2
        self.core = AttentionCore(config.attention_dropout, f"{site}.core", config.attention_cap)
        self.output = Linear(heads * self.values, hidden, config.bias, std / math.sqrt(2 * config.layers))

    def forward(self, x_BSH: Tensor, shared: Shared) -> Tensor:
        queries = self.q_up(self.q_down_norm(self.q_down(x_BSH))) if self.shortened else self.q(x_BSH)
        q_BNSD, q_BNSR = heads_of(queries, self.plain + self.rotated).split([self.plain, self.rotated], dim=-1)
        latent_BSC, k_BSR = self.kv_down(x_BSH).split(list(self.kv_down.widths.values()), dim=-1)
        latent_BSC, k_B1SR = self.kv_down_norm(latent_BSC), self.spread(k_BSR).unsqueeze(1)
        if shared.rotary is not None:
            q_BNSR, k_B1SR = rotate(q_BNSR, *shared.rotary), rotate(k_B1SR, *shared.rotary)
        sight = shared.sight.full if self.everywhere else shared.sight
        if shared.cache is not None:
            held, k_B1SR, sight = shared.cache.append(self.layer, latent_BSC.unsqueeze(1), k_B1SR, sight)
            latent_BSC = held.squeeze(1)
        few = shared.cache is not None and q_BNSD.shape[2] < latent_BSC.shape[1]
        attend = self.on_latents if few else self.on_heads
        mixed_BNSV = attend(q_BNSD * self.factor, q_BNSR * self.factor, latent_BSC, k_B1SR, sight, shared.keys)
        return self.output(mixed_BNSV.transpose(1, 2).flatten(2))

    def on_heads(self, q_BNSD: Tensor, q_BNSR: Tensor, latent_BTC: Tensor, k_B1TR: Tensor, sight: Sight, keys: Tensor | None) -> Tensor:
        """Attention with keys and values of every head."""
        k_BNTD, v_BNTV = heads_of(self.kv_up(latent_BTC), self.plain + self.values).split([self.plain, self.values], dim=-1)
        k = torch.cat((k_BNTD, k_B1TR.expand(-1, k_BNTD.shape[1], -1, -1)), dim=-1)
        return mixed(self.core, torch.cat((q_BNSD, q_BNSR), dim=-1), k, v_BNTV, sight, keys)

    def on_latents(self, q_BNSD: Tensor, q_BNSR: Tensor, latent_BTC: Tensor, k_B1TR: Tensor, sight: Sight, keys: Tensor | None) -> Tensor:
        """The same for few queries: these meet the latents themselves, as one head's keys and values, and no others are made."""
        of_keys, of_values = self.kv_up.weight.unflatten(0, (-1, self.plain + self.values)).split([self.plain, self.values], dim=1)
        latent_B1TC = latent_BTC.unsqueeze(1)
        q = torch.cat((q_BNSD @ of_keys, q_BNSR), dim=-1)
        q = q * math.sqrt(q.shape[-1] / (self.plain + self.rotated))  # the core divides by the root of these features
        mixed_BNSC = mixed(self.core, q, torch.cat((latent_B1TC, k_B1TR), dim=-1), latent_B1TC, sight, keys)
        return mixed_BNSC @ of_values.transpose(-1, -2)
