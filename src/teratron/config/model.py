"""The shape of a model: its section of a run's config, every field with its unit, meaning and checks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from teratron.config.errors import UserError, nearest
from teratron.config.keys import Section, above, at_least, between, key
from teratron.config.variants import check_variants

ADAPTABLE = ("q", "k", "v", "output", "gate", "up", "down")
"""The linear layers that may have adapters."""


@dataclass(frozen=True)
class ModelConfig(Section):
    """The shape of the model."""

    section: ClassVar[str] = "model"

    family: Literal["gpt", "encoder", "encoder_decoder", "xlnet"] = key("gpt")
    """Model family: gpt = decoder only; encoder (BERT, RoBERTa); xlnet (XLNet, Transformer-XL); encoder_decoder (T5, BART), layers of
    each."""
    layers: int = key(12, at_least(1))
    """Transformer blocks."""
    hidden: int = key(768, at_least(1))
    """Width of the residual stream, in features."""
    heads: int = key(12, at_least(1))
    """Query heads of each attention layer."""
    kv_heads: int = key(0, at_least(0))
    """Key/value heads (grouped-query attention); 0 = as many as query heads."""
    head_dim: int = key(0, at_least(0))
    """Features of one head; 0 = hidden / heads."""
    ffn: int = key(0, at_least(0))
    """Width of the feed-forward layer, in features; 0 = 4 * hidden."""
    seq_length: int = key(1024, at_least(1))
    """Tokens of one training sample (the context length)."""
    max_positions: int = key(0, at_least(0))
    """Longest context the model can hold, in tokens; 0 = seq_length."""
    vocab_size: int = key(0, at_least(0))
    """Token ids of the model; 0 = as many as the tokenizer has."""
    vocab_multiple: int = key(128, at_least(1))
    """The vocabulary's weights are padded in memory to a multiple of this, for fast matrix products; padding is masked out."""
    norm: Literal["layernorm", "rmsnorm"] = key("layernorm")
    """Kind of normalisation."""
    norm_place: Literal["pre", "post", "sandwich"] = key("pre")
    """Where blocks normalise: pre = the input of attention and feed-forward layer, and the last output; post = each sum (original BERT);
    sandwich = as pre, and the output of each layer before it is added (Gemma 2)."""
    block: Literal["sequential", "parallel", "parallel_one_norm"] = key("sequential")
    """The feed-forward layer reads what attention has added to, or beside attention the same input, behind a norm of its own (GPT-NeoX) or
    attention's (GPT-J, PaLM)."""
    norm_eps: float = key(1e-5, above(0))
    """Added to the variance inside a norm."""
    norm_less_one: bool = key(False)
    """The weights of norms are kept less 1, and so decay towards 1 (Gemma, Megatron-LM's layernorm 1p)."""
    activation: Literal["gelu", "gelu_tanh", "relu", "swiglu", "geglu", "geglu_tanh"] = key("gelu")
    """Feed-forward activation; swiglu, geglu and geglu_tanh (T5 1.1) add a gate projection."""
    position: Literal["learned", "sinusoidal", "rope", "relative", "alibi", "transformer_xl", "none"] = key("learned")
    """How positions enter: a learned table, waves (Vaswani et al. 2017), rotary embedding (halves rotated), relative = T5's biases of
    attention, alibi = scores that fall with the distance (Press et al. 2022; decoders only), sinusoids of distances (xlnet), or none."""
    relative_buckets: int = key(32, at_least(4))
    """Distances that position = relative tells apart, in encoders half of them for later tokens; far ones share a bucket."""
    relative_distance: int = key(128, at_least(2))
    """Distance from which on all are the same to position = relative, in tokens."""
    position_offset: int = key(0, at_least(0))
    """Number of the first row of the learned table that is used, which has so many rows more (RoBERTa: 2)."""
    token_types: int = key(0, at_least(0))
    """Kinds of segments, each with a vector that is added to its tokens' embeddings (BERT: 2); 0 = none."""
    embedding_norm: bool = key(False)
    """Normalise the sum of embeddings (BERT)."""
    rope_theta: float = key(10000.0, at_least(1))
    """Base of the rotary frequencies."""
    rope_share: float = key(1.0, above(0))
    """Share of each head's features that is rotated, the first ones (GPT-NeoX: 0.25)."""
    rope_scaling: Literal["none", "linear", "ntk", "yarn", "llama3"] = key("none")
    """How rotary frequencies stretch to contexts model.rope_factor times as long: linear = all alike, ntk = by a larger base, yarn (Peng et
    al. 2024) and llama3 = slow ones alone."""
    rope_factor: float = key(1.0, at_least(1))
    """How many times as long the context becomes by model.rope_scaling."""
    rope_original: int = key(0, at_least(0))
    """Tokens of the context before that (yarn, llama3)."""
    rope_slow: float = key(1.0, above(0))
    """Frequencies with fewer turns in that context are stretched in full (yarn, llama3)."""
    rope_fast: float = key(0.0, at_least(0))
    """Frequencies with more turns in that context are left as they are (yarn, llama3); 0 = 32 for yarn, 4 for llama3."""
    rope_sharpness: float = key(0.0, at_least(0))
    """Factor of queries and keys with yarn; 0 = 0.1 ln(model.rope_factor) + 1."""
    tie_embeddings: bool = key(True)
    """Use the token embedding as the output projection."""
    scale_embeddings: bool = key(False)
    """Multiply token embeddings by sqrt(hidden) (Vaswani et al. 2017, Gemma)."""
    output_cap: float = key(0.0, at_least(0))
    """Bound of the output's logits, which become cap * tanh(logit / cap) (Gemma 2: 30); 0 = none."""
    scale_output: bool = key(False)
    """Divide the last features by sqrt(hidden) before the output projection (T5 with tied embeddings)."""
    logit_scale: float = key(1.0, above(0))
    """Factor of the output's logits (Cohere)."""
    scale_attention: bool = key(True)
    """Divide attention's scores by sqrt(head_dim); false = initial queries are so much smaller instead (T5)."""
    head: Literal["language", "classes", "none"] = key("language")
    """What the last unit gives: scores of the vocabulary; of model.classes classes at every token (fine-tuning); or its vectors alone."""
    classes: int = key(0, at_least(0))
    """Classes, tags or kinds of places that model.head = classes scores."""
    class_bias: bool = key(True)
    """Give the scores of model.head = classes a bias; false = as in Hugging Face's decoders that classify whole texts."""
    adapter_rank: int = key(0, at_least(0))
    """Rank of the low-rank adapters (LoRA, Hu et al. 2022) that alone learn, with a new head, while all else is frozen; 0 = none."""
    adapter_alpha: float = key(16.0, above(0))
    """What the adapters add is multiplied by this / model.adapter_rank."""
    adapter_targets: tuple[str, ...] = key(ADAPTABLE)
    """Linear layers of the blocks that have adapters."""
    adapter_dora: bool = key(False)
    """Learn the length of each row of an adapted weight apart from its direction (DoRA, Liu et al. 2024)."""
    head_transform: bool = key(False)
    """A dense layer, the activation and a norm before the output projection, which then has biases (BERT)."""
    pooler: bool = key(False)
    """A dense layer with tanh, whose first token tells how two segments belong together (objective.sentence)."""
    predict_tokens: int = key(1, at_least(1))
    """Tokens that are predicted at each place: the next, and the further ones each by a head of one block, which works beside the last
    block and shares the output projection (Gloeckle et al. 2024). Generation and evaluation use the next alone."""
    window: int = key(0, at_least(0))
    """Attention reaches back over so many tokens, its own counted, and in encoders as far ahead; 0 = over all."""
    pattern: Literal["window", "strided", "fixed"] = key("window")
    """What else a window lets see: nothing, every model.window-th token before and behind (strided), or (fixed) of each block of
    model.window tokens the last model.summary, and of the token's own block all, in place of its neighbours (Child et al. 2019)."""
    dilation: int = key(1, at_least(1))
    """Of the window only every so many-th token is seen, counted from the token itself (Beltagy et al. 2020)."""
    summary: int = key(1, at_least(1))
    """Tokens at the end of each block that all see (pattern = fixed)."""
    global_tokens: int = key(0, at_least(0))
    """The first so many tokens of a sample are seen from anywhere, attention sinks (Xiao et al. 2024), and in encoders see all."""
    global_every: int = key(0, at_least(0))
    """Every so many-th layer attends over all tokens, the others over the window (Gemma 2 and 3, GPT-OSS); 0 = none does."""
    window_theta: float = key(0.0, at_least(0))
    """Base of the rotary frequencies, never stretched, in layers that attend over the window (Gemma 3: 10,000); 0 = as in the others."""
    recurrence: int = key(0, at_least(0))
    """Tokens of one stretch of a sample: attention sees its own stretch and, without gradient, the one before (Dai et al. 2019); xlnet
    only; 0 = the whole sample is one."""
    bias: bool = key(True)
    """Biases in linear layers and LayerNorm."""
    qkv_bias: bool = key(False)
    """Biases of queries, keys and values also where model.bias = false (Qwen 2)."""
    qk_norm: bool = key(False)
    """Normalise each head's queries and keys (RMSNorm over head_dim)."""
    attention_cap: float = key(0.0, at_least(0))
    """Bound of attention's scores, as model.output_cap (Gemma 2: 50; slower, as the fused kernels have none); 0 = none."""
    latent: int = key(0, at_least(0))
    """Multi-head latent attention (DeepSeek-V2): keys and values are made from so many features a token, all that is cached; 0 = off."""
    latent_query: int = key(0, at_least(0))
    """With model.latent, queries too are made from so many features; 0 = from all."""
    rope_dim: int = key(0, at_least(0))
    """With model.latent, further features of a head that are rotated, their keys one for all heads; the head_dim others are not."""
    value_dim: int = key(0, at_least(0))
    """With model.latent, features of a head's values; 0 = head_dim."""
    dropout: float = key(0.0, between(0, 1))
    """Probability of dropping an embedding or residual feature."""
    attention_dropout: float = key(0.0, between(0, 1))
    """Probability of dropping an attention weight (slower: the fused kernels draw their own numbers, so they are not used)."""
    init_std: float = key(0.02, at_least(0))
    """Standard deviation of initial weights; output projections of blocks divide it by sqrt(2 * layers)."""
    embedding_std: float = key(0.0, at_least(0))
    """Standard deviation of initial token embeddings; 0 = init_std (T5: 1)."""
    mup_base: int = key(0, at_least(0))
    """Width at which the hyper-parameters were found: they then hold at model.hidden (maximal update parametrisation); 0 = off."""
    mup_base_head: int = key(0, at_least(0))
    """Features of one head at width mup_base; 0 = as many as here."""
    experts: int = key(0, at_least(0))
    """Experts of each mixture-of-experts layer, which takes the place of a feed-forward layer and has no biases; 0 = none."""
    experts_per_token: int = key(2, at_least(1))
    """Experts that compute each token, chosen by the router."""
    expert_ffn: int = key(0, at_least(0))
    """Width of one expert, in features; 0 = that of the feed-forward layer."""
    shared_experts: int = key(0, at_least(0))
    """Experts beside the routed ones that compute every token."""
    moe_every: int = key(1, at_least(1))
    """Every so many-th block has experts, beginning with the first after moe_first_dense."""
    moe_first_dense: int = key(0, at_least(0))
    """Leading blocks without experts."""
    router: Literal["softmax", "sigmoid"] = key("softmax")
    """How scores of experts are made: softmax over all experts, or a sigmoid for each."""
    router_groups: int = key(1, at_least(1))
    """Experts are in so many groups, of which a token uses only the best model.groups_per_token (DeepSeek-V2, -V3)."""
    groups_per_token: int = key(1, at_least(1))
    """Groups of experts that a token may use, by their best expert's score (softmax) or the sum of their best two (sigmoid)."""
    normalise_gates: bool = key(False)
    """Divide the scores of a token's experts by their sum before they weigh the experts' outputs."""
    gate_scale: float = key(1.0, above(0))
    """Factor of the weights of the experts' outputs."""
    router_balance: Literal["aux", "bias", "none"] = key("aux")
    """How experts are kept evenly loaded: an auxiliary loss a sequence, a bias of the choice moved after each step, or not."""
    aux_loss: float = key(0.01, at_least(0))
    """Weight of the auxiliary loss (router_balance = aux), which is 1 a layer when experts are evenly loaded."""
    bias_rate: float = key(0.001, above(0))
    """How far a step moves the bias of an expert's score (router_balance = bias)."""
    z_loss: float = key(0.0, at_least(0))
    """Weight of the squared log-sum-exp of the router's logits, a mean over tokens."""
    capacity: float = key(0.0, at_least(0))
    """Of each sequence an expert takes the first ceil(capacity * its even share) tokens, the rest pass it by; 0 = no limit.

    Generation has no limit."""

    def check(self) -> None:
        if self.head_dim == 0 and self.hidden % self.heads:
            raise UserError(
                f"model.hidden = {self.hidden} is not divisible by model.heads = {self.heads}: change one of them, or set model.head_dim"
            )
        if self.heads % self.key_value_heads:
            raise UserError(
                f"model.heads = {self.heads} is not divisible by model.kv_heads = {self.kv_heads}: choose a divisor of model.heads"
            )
        if self.head_transform and self.gated:
            raise UserError(
                f"model.activation = {self.activation} is gated, which model.head_transform has no place for: choose gelu, or leave it out"
            )
        if (self.head == "classes") != bool(self.classes):
            raise UserError(
                f"model.classes = {self.classes} with model.head = {self.head}: set --model.head classes and --model.classes N, or neither"
            )
        if self.head != "language" and self.predict_tokens > 1:
            raise UserError(
                f"model.predict_tokens = {self.predict_tokens} predicts tokens, model.head = {self.head} does not: leave it out"
            )
        if self.position_offset and self.position != "learned":
            raise UserError(
                f"model.position_offset = {self.position_offset} shifts a learned table, model.position is {self.position}: leave it out"
            )
        if self.predict_tokens > max(1, self.seq_length - 1):
            raise UserError(
                f"model.predict_tokens = {self.predict_tokens} reaches beyond model.seq_length = {self.seq_length}: lower it, such as to 4"
            )
        if self.mup_base_head and not self.mup_base:
            raise UserError(f"model.mup_base_head = {self.mup_base_head} without model.mup_base: set both, or leave it out")
        self._check_relative()
        self._check_pattern()
        self._check_distances()
        self._check_experts()
        self._check_adapters()
        check_variants(self)

    def _check_relative(self) -> None:
        if self.relative_distance <= self.relative_buckets // 2:
            raise UserError(
                f"model.relative_distance = {self.relative_distance} is within the distances that half of model.relative_buckets = "
                f"{self.relative_buckets} tell apart: raise the first or lower the second"
            )
        if self.mup_base_head and not self.scale_attention:
            raise UserError(
                f"model.mup_base_head = {self.mup_base_head} scales attention's scores, which model.scale_attention = false leaves as they "
                "are: leave one of them out"
            )

    def _check_pattern(self) -> None:
        usual = {"pattern": "window", "dilation": 1, "summary": 1, "global_tokens": 0, "global_every": 0}
        for name, value in usual.items() if not self.window else ():
            if getattr(self, name) != value:
                raise UserError(
                    f"model.{name} = {getattr(self, name)} concerns attention over a window, but model.window = 0 is attention over all: "
                    "set model.window, or leave it out"
                )
        if self.window > self.seq_length:
            raise UserError(
                f"model.window = {self.window} is longer than model.seq_length = {self.seq_length}: lower it, or leave it out for "
                "attention over all tokens"
            )
        if self.dilation > 1 and (self.pattern != "window" or self.dilation >= self.window):
            raise UserError(
                f"model.dilation = {self.dilation} does not fit model.pattern = {self.pattern} with model.window = {self.window}: "
                "choose pattern window and a dilation below the window"
            )
        if self.summary > 1 and (self.pattern != "fixed" or self.summary >= self.window):
            raise UserError(
                f"model.summary = {self.summary} does not fit model.pattern = {self.pattern} with model.window = {self.window}: "
                "choose pattern fixed and a summary below the window"
            )
        if self.global_tokens >= self.seq_length:
            raise UserError(
                f"model.global_tokens = {self.global_tokens} leaves no other token of model.seq_length = {self.seq_length}: lower it"
            )
        if self.global_every == 1:
            raise UserError("model.global_every = 1 makes every layer attend over all tokens: leave it and model.window out, or raise it")
        if self.global_every > self.layers:
            raise UserError(
                f"model.global_every = {self.global_every} makes none of model.layers = {self.layers} attend over all tokens: "
                "lower it, or leave it out"
            )

    def _check_distances(self) -> None:
        """What belongs to attention by distances, and what it has not."""
        xlnet = self.family == "xlnet"
        if xlnet != (self.position == "transformer_xl"):
            choose = "--model.position transformer_xl" if xlnet else "--model.family xlnet, or another position"
            raise UserError(f"model.position = {self.position} does not fit model.family = {self.family}: choose {choose}")
        if self.recurrence and (not xlnet or self.seq_length % self.recurrence):
            wrong = f"does not divide model.seq_length = {self.seq_length}" if xlnet else f"does not fit model.family = {self.family}"
            choose = "choose a divisor" if xlnet else "choose xlnet, or model.window for a long reach"
            raise UserError(f"model.recurrence = {self.recurrence} {wrong}: {choose}, or leave it out")
        if xlnet and self.hidden % 2:
            raise UserError(f"model.hidden = {self.hidden} is odd: sinusoids of distances need an even number of features")
        absent = ("kv_heads", "window", "qk_norm", "experts", "mup_base", "token_types", "pooler", "attention_cap", "scale_embeddings")
        for name in absent if xlnet else ():
            if getattr(self, name):
                raise UserError(f"model.{name} = {str(getattr(self, name)).lower()} does not go with model.family = xlnet: leave it out")

    def _check_experts(self) -> None:
        wanted = {name: getattr(self, name) for name in ("expert_ffn", "shared_experts", "moe_first_dense", "z_loss", "capacity")}
        for name, value in wanted.items() if not self.experts else ():
            if value:
                raise UserError(f"model.{name} = {value} concerns experts, but model.experts = 0: set model.experts, or leave it out")
        if not self.experts:
            return
        if self.experts_per_token > self.experts:
            raise UserError(
                f"model.experts_per_token = {self.experts_per_token} exceeds model.experts = {self.experts}: "
                "lower the first or raise the second"
            )
        if self.normalise_gates and self.experts_per_token == 1:
            raise UserError(
                "model.normalise_gates = true with model.experts_per_token = 1 makes every gate 1, and the router learns nothing: "
                "raise model.experts_per_token, or leave model.normalise_gates out"
            )
        size, left = divmod(self.experts, self.router_groups)
        if left or self.groups_per_token > self.router_groups or self.groups_per_token * size < self.experts_per_token:
            raise UserError(
                f"model.router_groups = {self.router_groups} with model.groups_per_token = {self.groups_per_token} does not fit "
                f"model.experts = {self.experts} and model.experts_per_token = {self.experts_per_token}: expected groups of one size, "
                "of which those of a token hold experts enough"
            )
        if self.moe_first_dense >= self.layers:
            raise UserError(
                f"model.moe_first_dense = {self.moe_first_dense} leaves none of model.layers = {self.layers} blocks to model.experts = "
                f"{self.experts}: lower it"
            )

    def _check_adapters(self) -> None:
        wrong = [name for name in self.adapter_targets if name not in ADAPTABLE]
        if wrong or not self.adapter_targets:
            found = wrong[0] if wrong else ""
            raise UserError(f"model.adapter_targets has {found!r}: expected some of {', '.join(ADAPTABLE)}{nearest(found, ADAPTABLE)}")
        if self.adapter_dora and not self.adapter_rank:
            raise UserError("model.adapter_dora concerns adapters, but model.adapter_rank = 0: set it, such as to 8, or leave this out")
        if self.adapter_rank and self.mup_base:
            raise UserError(
                f"model.adapter_rank = {self.adapter_rank} does not go with model.mup_base = {self.mup_base}: leave one of them out"
            )

    def routed(self, layer: int) -> bool:
        """Whether a block (from 0) has experts."""
        return self.experts > 0 and layer >= self.moe_first_dense and (layer - self.moe_first_dense) % self.moe_every == 0

    @property
    def widening(self) -> float:
        """How many times as wide as at `mup_base`; 1 without."""
        return self.hidden / self.mup_base if self.mup_base else 1.0

    @property
    def rotary_features(self) -> int:
        """Features of a head that are rotated."""
        return self.rope_dim if self.latent else int(self.head_features * self.rope_share)

    @property
    def fast_turns(self) -> float:
        """Turns in the first context above which a rotary frequency stays as it is."""
        return self.rope_fast or {"yarn": 32.0, "llama3": 4.0}.get(self.rope_scaling, 0.0)

    @property
    def sharpness(self) -> float:
        """Factor of queries and keys by the rotary scaling."""
        return (self.rope_sharpness or 0.1 * math.log(self.rope_factor) + 1) if self.rope_scaling == "yarn" else 1.0

    @property
    def key_features(self) -> int:
        """Features of one head's queries and keys."""
        return self.head_features + (self.rope_dim if self.latent else 0)

    @property
    def value_features(self) -> int:
        """Features of one head's values."""
        return self.value_dim or self.head_features

    @property
    def adapter_scale(self) -> float:
        """Factor of what the adapters add."""
        return self.adapter_alpha / self.adapter_rank if self.adapter_rank else 0.0

    @property
    def matrix_std(self) -> float:
        """Standard deviation of initial values of matrices between features."""
        return self.init_std / math.sqrt(self.widening)

    @property
    def query_factor(self) -> float:
        """Of queries, beside the usual 1 / sqrt(head features)."""
        if not self.scale_attention:
            return math.sqrt(self.head_features)
        return math.sqrt(self.mup_base_head / self.head_features) if self.mup_base_head else 1.0

    def attends_everywhere(self, layer: int) -> bool:
        """Whether a block (from 0) has no window, though the model has."""
        return self.global_every > 0 and (layer + 1) % self.global_every == 0

    @property
    def query_std(self) -> float:
        """Standard deviation of initial values of the matrices that make queries."""
        return self.matrix_std if self.scale_attention else self.matrix_std / math.sqrt(self.head_features)

    @property
    def table_std(self) -> float:
        """Standard deviation of initial token embeddings."""
        return self.embedding_std or self.init_std

    @property
    def output_factor(self) -> float:
        """Of the last features, before the output projection."""
        return self.logit_scale * (1 / math.sqrt(self.hidden) if self.scale_output else 1.0) / self.widening

    @property
    def expert_width(self) -> int:
        return self.expert_ffn or self.ffn_width

    @property
    def ties_output(self) -> bool:
        """Whether the output projection is the table of tokens."""
        return self.tie_embeddings and self.head == "language"

    @property
    def output_bias(self) -> bool:
        """Whether the output projection has a bias."""
        return self.bias and (self.head_transform or self.family == "xlnet")

    @property
    def key_value_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def head_features(self) -> int:
        return self.head_dim or self.hidden // self.heads

    @property
    def ffn_width(self) -> int:
        return self.ffn or 4 * self.hidden

    @property
    def positions(self) -> int:
        return self.max_positions or self.seq_length

    @property
    def gated(self) -> bool:
        return self.activation in ("swiglu", "geglu", "geglu_tanh")
