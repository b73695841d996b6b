"""What the families are built of: embedding, attention, blocks, head. Single-device code; shape letters: `leaves.py`."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from teratron.config import ModelConfig
from teratron.models.attention import AttentionCore, heads_of
from teratron.models.contrast import TokenContrast
from teratron.models.feed_forward import FeedForward, activate
from teratron.models.head import LanguageHead
from teratron.models.join import Join
from teratron.models.latent import LatentAttention
from teratron.models.leaves import Dropout, Embedding, Linear, Norm
from teratron.models.moe import MoE
from teratron.models.positions import Waves, rotate
from teratron.models.relative import RELATIVE, relative_table
from teratron.models.units import Shared, State, with_routing

TYPES = "token_types"
"""Of a state: which segment each token is in, int64 [B, S]; all in the first where it is absent."""


class TokenEmbedding(nn.Module):
    """Tokens, learned positions and types of segments to hidden features. With `table` it uses another embedding's table of tokens."""

    def __init__(
        self, config: ModelConfig, site: str = "embedding", reads: str = "tokens", table: Embedding | None = None, name: str = ".weight"
    ) -> None:
        """site: name of its dropout; reads: name of the tokens in the state; name: of the table's part."""
        super().__init__()
        self.reads = reads
        self.tokens = table or Embedding(config.vocab_size, config.hidden, config.table_std, config.vocab_multiple, name)
        self.offset, places = config.position_offset, config.positions + config.position_offset
        self.positions = Embedding(places, config.hidden, config.init_std) if config.position == "learned" else None
        self.waves = Waves(config.hidden) if config.position == "sinusoidal" else None
        self.factor = math.sqrt(config.hidden) if config.scale_embeddings else 1.0
        self.types = Embedding(config.token_types, config.hidden, config.init_std) if config.token_types else None
        self.relative = relative_table(config)
        self.norm = block_norm(config) if config.embedding_norm else None
        self.dropout = Dropout(config.dropout, f"{site}.dropout")

    def forward(self, state: State, shared: Shared) -> State:
        rest = {name: tensor for name, tensor in state.items() if name not in (self.reads, TYPES)}
        hidden_BSH = self.tokens(state[self.reads]) * self.factor if self.factor != 1 else self.tokens(state[self.reads])
        if self.positions is not None:
            hidden_BSH = hidden_BSH + self.positions(shared.positions + self.offset)
        if self.waves is not None:
            hidden_BSH = hidden_BSH + self.waves(shared.positions, hidden_BSH.dtype)
        if self.types is not None:
            hidden_BSH = hidden_BSH + self.types(state[TYPES] if TYPES in state else torch.zeros_like(shared.positions))
        if self.norm is not None:
            hidden_BSH = self.norm(hidden_BSH)
        if self.relative is not None:
            rest[RELATIVE] = self.relative()
        return {**rest, "hidden": self.dropout(hidden_BSH, shared.keys)}


class Attention(nn.Module):
    """Self-attention with grouped key/value heads."""

    def __init__(self, config: ModelConfig, layer: int, site: str) -> None:
        super().__init__()
        self.layer, self.head_features, self.everywhere = layer, config.head_features, config.attends_everywhere(layer)
        queries, pairs = config.heads * config.head_features, config.key_value_heads * config.head_features
        widths = {"q": queries, "k": pairs, "v": pairs}
        stds = {"q": config.query_std, "k": config.matrix_std, "v": config.matrix_std}
        self.qkv = Linear(config.hidden, widths, config.bias or config.qkv_bias, stds, granule=config.head_features)
        self.query_factor = config.query_factor
        self.q_norm = Norm(config.head_features, "rmsnorm", False, config.norm_eps, config.norm_less_one) if config.qk_norm else None
        self.k_norm = Norm(config.head_features, "rmsnorm", False, config.norm_eps, config.norm_less_one) if config.qk_norm else None
        self.core = AttentionCore(config.attention_dropout, f"{site}.core", config.attention_cap, config.position == "alibi")
        self.output = Linear(queries, config.hidden, config.bias, config.matrix_std / math.sqrt(2 * config.layers))

    def forward(self, x_BSH: Tensor, shared: Shared) -> Tensor:
        parts = self.qkv(x_BSH).split(list(self.qkv.widths.values()), dim=-1)
        q, k, v = (heads_of(part, self.head_features) for part in parts)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        turned = shared.rotary if self.everywhere else shared.rotary_in_window or shared.rotary
        if turned is not None:
            q, k = rotate(q, *turned), rotate(k, *turned)
        if self.query_factor != 1:
            q = q * self.query_factor
        sight = shared.sight.full if self.everywhere else shared.sight
        if shared.cache is not None:
            k, v, sight = shared.cache.append(self.layer, k, v, sight)
        if shared.relative is not None:
            sight = replace(sight, relative=shared.relative)
        mixed_BNSD = self.core(q, k, v, sight, shared.keys)
        return self.output(mixed_BNSD.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention of the decoder to the encoder's memory."""

    def __init__(self, config: ModelConfig, layer: int, site: str) -> None:
        super().__init__()
        self.layer, self.head_features = layer, config.head_features
        queries, pairs = config.heads * config.head_features, config.key_value_heads * config.head_features
        self.q = Linear(config.hidden, queries, config.bias, config.query_std, granule=config.head_features)
        self.kv = Linear(config.hidden, {"k": pairs, "v": pairs}, config.bias, config.matrix_std, granule=config.head_features)
        self.query_factor = config.query_factor
        self.core = AttentionCore(config.attention_dropout, f"{site}.core", config.attention_cap)
        self.output = Linear(queries, config.hidden, config.bias, config.matrix_std / math.sqrt(2 * config.layers))

    def forward(self, x_BSH: Tensor, memory_BTH: Tensor, shared: Shared) -> Tensor:
        q = heads_of(self.q(x_BSH), self.head_features) * self.query_factor
        pair = self._pair(memory_BTH) if shared.cache is None else shared.cache.memory(self.layer, lambda: self._pair(memory_BTH))
        mixed_BNSD = self.core(q, *pair, shared.memory_sight, shared.keys)
        return self.output(mixed_BNSD.transpose(1, 2).flatten(2))

    def _pair(self, memory_BTH: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the memory, [B, K, T, D] each."""
        k, v = self.kv(memory_BTH).split(list(self.kv.widths.values()), dim=-1)
        return heads_of(k, self.head_features), heads_of(v, self.head_features)


class Block(nn.Module):
    """One transformer layer; with `cross` it also attends to the encoder's memory."""

    attention: nn.Module
    cross_attention: nn.Module
    ffn: nn.Module

    def __init__(self, config: ModelConfig, layer: int, site: str, cross: bool = False) -> None:
        super().__init__()
        self.norm_place, self.order, self.cross, self.site = config.norm_place, config.block, cross, site
        self._put("attention", (LatentAttention if config.latent else Attention)(config, layer, f"{site}.attention"), config)
        if cross:
            self._put("cross_attention", CrossAttention(config, layer, f"{site}.cross_attention"), config)
        self._put("ffn", MoE(config) if config.routed(layer) else FeedForward(config, config.ffn_width, config.bias), config)

    def _put(self, name: str, layer: nn.Module, config: ModelConfig) -> None:
        """A layer with the norms and the dropout around it."""
        if name != "ffn" or self.order != "parallel_one_norm":
            self.add_module(f"{name}_norm", block_norm(config))
        self.add_module(name, layer)
        if self.norm_place == "sandwich":
            self.add_module(f"{name}_output_norm", block_norm(config))
        self.add_module(f"{name}_dropout", Dropout(config.dropout, f"{self.site}.{name}.dropout"))

    def forward(self, state: State, shared: Shared) -> State:
        hidden = state["hidden"]
        if RELATIVE in state:
            shared = replace(shared, relative=state[RELATIVE])
        x = self._before("attention", hidden)
        mixed = self.attention(x, shared)
        if self.order != "sequential":
            fed, state = self._fed(x if self.order == "parallel_one_norm" else self._before("ffn", hidden), state, shared)
            return {**state, "hidden": self._added("ffn", self._added("attention", hidden, mixed, shared.keys), fed, shared.keys)}
        hidden = self._added("attention", hidden, mixed, shared.keys)
        if self.cross:
            mixed = self.cross_attention(self._before("cross_attention", hidden), state["memory"], shared)
            hidden = self._added("cross_attention", hidden, mixed, shared.keys)
        fed, state = self._fed(self._before("ffn", hidden), state, shared)
        return {**state, "hidden": self._added("ffn", hidden, fed, shared.keys)}

    def _fed(self, x_BSH: Tensor, state: State, shared: Shared) -> tuple[Tensor, State]:
        """What the feed-forward layer or its experts make, and the state with what these leave in it."""
        if not isinstance(self.ffn, MoE):
            return self.ffn(x_BSH), state
        # A generated token would compete for capacity with those before it, which are not here: then nothing is dropped.
        fed, routing = self.ffn(x_BSH, shared.real, dropless=shared.cache is not None)
        return fed, with_routing(state, f"{self.site}.ffn.router", routing.terms, routing.load_E)

    def _before(self, name: str, hidden: Tensor) -> Tensor:
        """What a layer reads of the residual stream."""
        return hidden if self.norm_place == "post" else self.get_submodule(f"{name}_norm")(hidden)

    def _added(self, name: str, hidden: Tensor, made: Tensor, keys: Tensor | None) -> Tensor:
        """The residual stream with what a layer has made; keys: of dropout."""
        if self.norm_place == "sandwich":
            made = self.get_submodule(f"{name}_output_norm")(made)
        total = hidden + self.get_submodule(f"{name}_dropout")(made, keys)
        return self.get_submodule(f"{name}_norm")(total) if self.norm_place == "post" else total


class Head(nn.Module):
    """Last unit: final norm, with `transform` a dense layer; `output` then gives logits or losses of tokens, or `classes` scores.

    `sentence` gives those of `pooled`, which `classes` too reads where there is a pooler; `contrast` the contrastive loss. `join` is for
    losses that compare tokens.
    """

    def __init__(self, config: ModelConfig, tied_to: str, shared_weight: nn.Parameter | None) -> None:
        """tied_to: the part whose weight a tied head uses; shared_weight: that weight, where it is at hand."""
        super().__init__()
        self.norm = block_norm(config) if config.norm_place != "post" else None
        self.shrinking, self.activation, width = config.output_factor, config.activation, config.hidden
        language = config.head == "language"
        self.transforms, self.pools = config.head_transform and language, config.pooler
        self.join = Join()
        if self.pools:
            self.pooler = Linear(width, width, config.bias, config.matrix_std)
        if config.head == "classes":
            self.classes = LanguageHead(width, config.classes, 1, config.init_std, bias=config.class_bias)
        if not language:
            return
        if self.transforms:
            self.transform, self.transform_norm = Linear(width, width, config.bias, config.matrix_std), block_norm(config)
        if self.pools:
            self.sentence = LanguageHead(width, 2, 1, config.init_std, bias=config.bias)
        name, bias = f"/{tied_to}" if config.tie_embeddings else ".weight", config.output_bias
        std = config.table_std if config.tie_embeddings else config.init_std
        self.output = LanguageHead(width, config.vocab_size, config.vocab_multiple, std, shared_weight, name, bias, config.output_cap)
        self.contrast = TokenContrast()

    def forward(self, state: State, shared: Shared) -> State:
        hidden = self.norm(state["hidden"]) if self.norm is not None else state["hidden"]
        if self.pools:  # of every token, as the first may be on another rank: the whole costs less than a hundredth of a block
            state = {**state, "pooled": self.pooler(hidden).tanh()}
        if self.transforms:
            hidden = self.transform_norm(activate(self.transform(hidden), self.activation))
        return {**state, "hidden": hidden if self.shrinking == 1 else hidden * self.shrinking}

    def scores(self, state: State) -> Tensor:
        """Of the classes at this rank's tokens, [B, s, C], from the last state."""
        scores: Tensor = self.classes(state["pooled" if self.pools else "hidden"])
        return scores


def block_norm(config: ModelConfig) -> Norm:
    """The norm of the residual stream."""
    return Norm(config.hidden, config.norm, config.bias, config.norm_eps, config.norm_less_one)
