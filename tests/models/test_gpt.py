"""The GPT family: causality, isolation, attention, dropout, grouped heads, and every combination of its parts."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from teratron.config import ModelConfig
from teratron.models import Model, State, build_model, initialise, load_parts, parts_of, with_dropout
from teratron.models.attention import AttentionCore
from teratron.models.blocks import Attention
from teratron.models.random import mask_keys
from teratron.models.sight import Sight
from teratron.models.units import Shared

LENGTH, VOCAB = 16, 50
GPT2 = ModelConfig(layers=2, hidden=32, heads=4, seq_length=LENGTH, vocab_size=VOCAB, vocab_multiple=16, init_std=0.3)
LLAMA = dataclasses.replace(
    GPT2, kv_heads=2, ffn=40, norm="rmsnorm", activation="swiglu", position="rope", tie_embeddings=False, bias=False, qk_norm=True
)
STYLES = pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])


def made(config: ModelConfig, seed: int = 1) -> Model:
    """A float64 model whose biases and norms are random too."""
    model = build_model(config, dtype=torch.float64)
    initialise(model, seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def state_of(batch: int = 3, seed: int = 0) -> State:
    tokens = torch.randint(VOCAB, (batch, LENGTH), generator=torch.Generator().manual_seed(seed))
    return {"tokens": tokens, "positions": torch.arange(LENGTH).expand(batch, LENGTH)}


def dropped(model: Model, state: State, step: int = 1) -> State:
    """The state of a training step."""
    return with_dropout(state, model.streams, 9, step, torch.arange(len(state["tokens"])))


def logits_of(model: Model, state: State) -> Tensor:
    return model.head.output(model(state)["hidden"])


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * float(expected.detach().abs().max()))


@STYLES
def test_a_token_changes_no_earlier_logit(config: ModelConfig) -> None:
    model, state = made(config), state_of()
    before = logits_of(model, state)
    for changed in (1, 7, LENGTH - 1):
        tokens = state["tokens"].clone()
        tokens[:, changed] = (tokens[:, changed] + 1) % VOCAB
        after = logits_of(model, {**state, "tokens": tokens})
        assert_near(after[:, :changed], before[:, :changed])
        assert (after[:, changed:] - before[:, changed:]).abs().amax(-1).min() > 1e-6


@STYLES
def test_isolated_documents_equal_each_document_alone(config: ModelConfig) -> None:
    model, lengths = made(config), (5, 1, 7, 3)
    tokens = state_of(1)["tokens"]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    segments = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    together = logits_of(model, {"tokens": tokens, "positions": positions, "segments": segments})
    for part, alone in zip(together.split(lengths, dim=1), tokens.split(lengths, dim=1), strict=True):
        assert_near(part, logits_of(model, {"tokens": alone, "positions": torch.arange(alone.shape[1])[None]}))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("isolated", [False, True])
def test_fused_attention_equals_its_plain_twin(groups: int, isolated: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, LENGTH, 8) for heads in (4, groups, groups)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    documents = (torch.arange(LENGTH) // 6).expand(2, LENGTH)
    sight = Sight(True, segments=documents if isolated else None)
    core = AttentionCore(0.0, "core")
    fused, plain = core(*inputs, sight, None), core.plain(*inputs, sight, None)
    assert_near(fused, plain)
    upstream = torch.randn(fused.shape, generator=generator, dtype=torch.float64)
    gradients = [torch.autograd.grad(output, inputs, upstream) for output in (fused, plain)]
    for found, expected in zip(*gradients, strict=True):
        assert_near(found, expected)


def test_attention_dropout_keeps_the_expectation_and_only_works_with_keys() -> None:
    generator, samples = torch.Generator().manual_seed(0), 4000
    q, k, v = (torch.randn((1, heads, 6, 4), generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    core = AttentionCore(0.3, "core")
    positions = torch.arange(6).expand(samples, 6)
    keys = mask_keys(1, 1, torch.arange(samples), positions, torch.zeros_like(positions))
    thinned = core(q.expand(samples, -1, -1, -1), k.expand(samples, -1, -1, -1), v.expand(samples, -1, -1, -1), Sight(True), keys)
    expected = core(q, k, v, Sight(True), None)[0]
    assert_near(expected, core.plain(q, k, v, Sight(True), None)[0])
    errors = (thinned.mean(0) - expected) / (thinned.std(0) / math.sqrt(samples))
    assert errors.abs().max() < 5
    assert (thinned.std(0) > 0).all()


@STYLES
def test_dropout_is_off_without_keys_and_scales_features_with_them(config: ModelConfig) -> None:
    state = state_of()
    model, dropping = made(config), made(dataclasses.replace(config, dropout=0.4, attention_dropout=0.2))
    assert torch.equal(logits_of(dropping, state), logits_of(model, state))
    whole = model.units()[0](state, Shared(state["positions"], None, Sight(True), None))["hidden"]
    keys = dropped(model, state)["keys"]
    thinned = dropping.units()[0](state, Shared(state["positions"], None, Sight(True), keys))["hidden"]
    kept = thinned != 0
    torch.testing.assert_close(thinned[kept], whole[kept] / 0.6, rtol=1e-14, atol=0)
    assert 0.5 < kept.double().mean() < 0.7


@STYLES
def test_the_same_keys_give_identical_numbers_also_when_recomputed(config: ModelConfig) -> None:
    model, state = made(dataclasses.replace(config, dropout=0.3, attention_dropout=0.2)), state_of()
    one, other = dropped(model, state), dropped(model, state, step=2)
    assert not torch.equal(logits_of(model, one), logits_of(model, other))
    gradients = []
    for recompute in (False, True):
        shared, running = model.shared(one, "", None), model.sent(one)
        for unit in model.units():
            again = {"use_reentrant": False, "preserve_rng_state": False}  # there is no generator to bring back
            running = checkpoint(unit, running, shared, **again) if recompute else unit(running, shared)
        gradients.append(torch.autograd.grad(running["hidden"].square().sum(), list(model.parameters()), allow_unused=True))
    for found, expected in zip(*gradients, strict=True):
        assert found is expected is None or torch.equal(found, expected)


@STYLES
def test_a_sample_is_the_same_in_any_batch_dropout_included(config: ModelConfig) -> None:
    model, state = made(dataclasses.replace(config, dropout=0.3, attention_dropout=0.2)), state_of(5)
    state = dropped(model, state)
    whole = logits_of(model, state)
    for rows in (slice(0, 2), slice(3, 4)):
        assert_near(logits_of(model, {name: values[rows] for name, values in state.items()}), whole[rows])


def test_grouped_heads_equal_repeated_key_value_heads() -> None:
    grouped, full = made(LLAMA), made(dataclasses.replace(LLAMA, kv_heads=4))
    parameters = dict(grouped.named_parameters())
    parts = {part.name: part.of(parameters[part.parameter]) for part in parts_of(grouped)}
    for name, tensor in parts.items():
        if name.endswith((".k.weight", ".v.weight")):
            parts[name] = tensor.unflatten(0, (2, -1)).repeat_interleave(2, dim=0).flatten(0, 1)
    load_parts(full, parts)
    assert_near(logits_of(full, state_of()), logits_of(grouped, state_of()))


def test_the_fused_projection_holds_q_k_v_in_order() -> None:
    attention = Attention(dataclasses.replace(GPT2, kv_heads=2), 0, "attention").double()
    generator = torch.Generator().manual_seed(0)
    for parameter in attention.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    x = torch.randn((2, LENGTH, 32), generator=generator, dtype=torch.float64)
    heads = {}
    for part in parts_of(attention):
        kind = part.name[:1]
        if part.name.startswith(("q.", "k.", "v.")):
            rows = slice(part.start, part.start + part.shape[0])
            projected = x @ attention.qkv.weight[rows].t() + attention.qkv.bias[rows]
            heads[kind] = projected.unflatten(-1, (-1, 8)).transpose(1, 2)
    assert {kind: tensor.shape[1] for kind, tensor in heads.items()} == {"q": 4, "k": 2, "v": 2}
    mixed = attention.core.plain(heads["q"], heads["k"], heads["v"], Sight(True), None).transpose(1, 2).flatten(2)
    assert_near(attention(x, Shared(torch.arange(x.shape[1])[None], None, Sight(True), None)), attention.output(mixed))


NORMS, ACTIVATIONS = ("layernorm", "rmsnorm"), ("gelu", "gelu_tanh", "relu", "swiglu", "geglu")
COMBINATIONS = list(itertools.product(NORMS, ACTIVATIONS, ("learned", "rope", "none"), (True, False)))


@pytest.mark.parametrize(("norm", "activation", "position", "plain"), COMBINATIONS)
def test_every_combination_has_right_slopes(norm: str, activation: str, position: str, plain: bool) -> None:
    """The gradient along a random direction is the slope of the loss; `plain`: biases, tied, no QK norm, no groups."""
    config = dataclasses.replace(
        GPT2, norm=norm, activation=activation, position=position, bias=plain, tie_embeddings=plain, qk_norm=not plain,
        kv_heads=4 if plain else 2, dropout=0.1, attention_dropout=0.0 if plain else 0.1,
    )  # fmt: skip
    model = made(config)
    state = dropped(model, state_of(2))
    targets, weights = state["tokens"].roll(-1, 1), torch.linspace(0, 1, 2 * LENGTH).view(2, LENGTH)

    def loss() -> Tensor:
        return model.head.output.loss_sum(model(state)["hidden"], targets, weights)

    loss().backward()
    parameters, generator = list(model.parameters()), torch.Generator().manual_seed(3)
    directions = [torch.randn(parameter.shape, generator=generator, dtype=torch.float64) for parameter in parameters]
    slope = sum(float((parameter.grad * direction).sum()) for parameter, direction in zip(parameters, directions, strict=True))
    values = []
    with torch.no_grad():
        for change in (1e-8, -2e-8):  # small: relu has kinks
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += change * direction
            values.append(float(loss()))
    assert (values[0] - values[1]) / 2e-8 == pytest.approx(slope, rel=1e-5)
    assert all(bool(parameter.grad.abs().max() > 0) for parameter in parameters)
