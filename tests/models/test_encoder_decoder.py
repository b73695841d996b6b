"""The encoder and the encoder-decoder: both directions, a memory that is used, isolation, padding, and any range of units."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from teratron.config import ModelConfig
from teratron.models import Model, State, build_model, initialise, parts_of, with_dropout

LENGTH, MEMORY, VOCAB = 10, 7, 50
T5 = ModelConfig(family="encoder_decoder", layers=2, hidden=32, heads=4, seq_length=16, vocab_size=VOCAB, vocab_multiple=16, init_std=0.3)
ROPE = dataclasses.replace(
    T5, kv_heads=2, ffn=40, norm="rmsnorm", activation="swiglu", position="rope", tie_embeddings=False, bias=False, qk_norm=True
)
STYLES = pytest.mark.parametrize("config", [T5, ROPE], ids=["learned", "rope"])


def made(config: ModelConfig, units: range | None = None) -> Model:
    """A float64 model; its biases and norms are random too, by name."""
    model = build_model(config, units, dtype=torch.float64)
    initialise(model, 1)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    return model


def encoder(config: ModelConfig) -> Model:
    return made(dataclasses.replace(config, family="encoder"))


def state_of(batch: int = 2) -> State:
    draw = torch.Generator().manual_seed(0)
    return {
        "tokens": torch.randint(VOCAB, (batch, LENGTH), generator=draw),
        "positions": torch.arange(LENGTH).expand(batch, LENGTH),
        "encoder_tokens": torch.randint(VOCAB, (batch, MEMORY), generator=draw),
        "encoder_positions": torch.arange(MEMORY).expand(batch, MEMORY),
    }


def one_stream(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not name.startswith("encoder_")}


def changed(state: State, name: str, place: int) -> State:
    tokens = state[name].clone()
    tokens[:, place] = (tokens[:, place] + 1) % VOCAB
    return {**state, name: tokens}


def logits_of(model: Model, state: State) -> Tensor:
    return model.head.output(model(state)["hidden"])


def moved(model: Model, state: State, name: str, place: int) -> Tensor:
    """How far each position's logits move when one token is another: [B, S]."""
    return (logits_of(model, changed(state, name, place)) - logits_of(model, state)).abs().amax(-1)


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * float(expected.detach().abs().max()))


@STYLES
def test_an_encoder_sees_both_directions(config: ModelConfig) -> None:
    model, state = encoder(config), one_stream(state_of())
    for place in (0, 4, LENGTH - 1):
        assert moved(model, state, "tokens", place).min() > 1e-6


@STYLES
def test_a_decoder_sees_all_of_the_memory_and_of_itself_what_is_not_later(config: ModelConfig) -> None:
    model, state = made(config), state_of()
    for place in (0, 3, MEMORY - 1):
        assert moved(model, state, "encoder_tokens", place).min() > 1e-6
    for place in (0, 4, LENGTH - 1):
        moves = moved(model, state, "tokens", place)
        assert (moves[:, :place] < 1e-12).all()
        assert (moves[:, place:] > 1e-6).all()


def segments_of(*lengths: int) -> tuple[Tensor, Tensor]:
    """Segments and positions of documents side by side, [1, S] each."""
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None], positions


@STYLES
def test_isolated_documents_of_an_encoder_equal_each_alone(config: ModelConfig) -> None:
    model, lengths = encoder(config), (4, 1, 5)
    state = one_stream(state_of(1))
    segments, positions = segments_of(*lengths)
    together = logits_of(model, state | {"segments": segments, "positions": positions})
    for part, alone in zip(together.split(lengths, 1), state["tokens"].split(lengths, 1), strict=True):
        assert_near(part, logits_of(model, {"tokens": alone, "positions": torch.arange(alone.shape[1])[None]}))


@STYLES
def test_packed_pairs_of_an_encoder_decoder_equal_each_pair_alone(config: ModelConfig) -> None:
    """A decoder's document attends to the memory of its own number only."""
    model, lengths, memories = made(config), (4, 1, 5), (2, 4, 1)
    state = state_of(1)
    (segments, positions), (encoder_segments, encoder_positions) = segments_of(*lengths), segments_of(*memories)
    packed = state | {"segments": segments, "positions": positions}
    packed |= {"encoder_segments": encoder_segments, "encoder_positions": encoder_positions}
    found = logits_of(model, packed).split(lengths, 1)
    pairs = zip(found, state["tokens"].split(lengths, 1), state["encoder_tokens"].split(memories, 1), strict=True)
    for part, tokens, read in pairs:
        alone = {"tokens": tokens, "positions": torch.arange(tokens.shape[1])[None]}
        alone |= {"encoder_tokens": read, "encoder_positions": torch.arange(read.shape[1])[None]}
        assert_near(part, logits_of(model, alone))


@STYLES
def test_padding_is_seen_by_no_token_and_harms_none(config: ModelConfig) -> None:
    """Tokens whose segment is -1: with others in their place nothing else changes, and nothing is NaN."""
    both, single, state = made(config), encoder(config), state_of(1)
    own, read = torch.zeros(1, LENGTH, dtype=torch.int64), torch.zeros(1, MEMORY, dtype=torch.int64)
    own[:, -3:], read[:, -2:] = -1, -1
    for model, given in ((single, one_stream(state)), (both, state | {"encoder_segments": read})):
        padded = given | {"segments": own}
        assert logits_of(model, padded).isfinite().all()
        for name in ("tokens", "encoder_tokens") if model is both else ("tokens",):
            place = padded[name].shape[1] - 1
            assert (moved(model, padded, name, place)[:, :-3] < 1e-12).all(), name
            assert (moved(model, given if name == "tokens" else state, name, place) > 1e-6).any(), "without segments it is seen"
    shorter = {name: tensor[:, : MEMORY - 2] if name.startswith("encoder_") else tensor for name, tensor in state.items()}
    assert_near(logits_of(both, state | {"encoder_segments": read}), logits_of(both, shorter))


def test_dropout_acts_on_both_streams_and_not_without_keys() -> None:
    model, state = made(dataclasses.replace(T5, dropout=0.3, attention_dropout=0.2)), state_of()
    state = with_dropout(state, model.streams, 1, 1, torch.arange(2))
    assert {"keys", "encoder_keys"} <= state.keys()
    results = []
    for without in ((), ("keys",), ("encoder_keys",), ("keys", "encoder_keys")):
        results.append(logits_of(model, {name: tensor for name, tensor in state.items() if name not in without}))
    for one, other in itertools.combinations(results, 2):
        assert not torch.allclose(one, other)
    assert torch.equal(results[-1], logits_of(made(T5), state_of()))


UNITS = 2 * T5.layers + 3


@pytest.mark.parametrize("cuts", [(1,), (3,), (4,), (6,), (2, 5), (3, 4), tuple(range(1, UNITS))])
@pytest.mark.parametrize("packed", [False, True])
def test_stage_by_stage_equals_the_whole_model(cuts: tuple[int, ...], packed: bool) -> None:
    config = dataclasses.replace(ROPE, dropout=0.3, attention_dropout=0.2)
    state, whole = state_of(1), made(config)
    if packed:
        (state["segments"], state["positions"]), read = segments_of(4, 6), segments_of(5, 2)
        state["encoder_segments"], state["encoder_positions"] = read
    state = with_dropout(state, whole.streams, 3, 5, torch.tensor([9]))
    expected = whole(dict(state))
    own = {name: tensor for name, tensor in state.items() if not name.endswith("tokens")}
    sent = {name: tensor for name, tensor in state.items() if name.endswith("tokens")}
    stages = [made(config, range(start, stop)) for start, stop in itertools.pairwise((0, *cuts, UNITS))]
    for stage in stages:
        sent = stage(sent | own)
        assert not sent.keys() & own.keys(), "what each rank knows is not sent"
    assert set(sent) == {"hidden", "memory"}
    for name, tensor in expected.items():
        assert torch.equal(sent[name], tensor), name
    assert torch.equal(stages[-1].head.output(sent["hidden"]), whole.head.output(expected["hidden"]))
    for kind in ("encoder", "decoder"):
        assert [name for stage in stages for name in stage.get_submodule(kind)._modules] == ["0", "1"], "global numbers"
    names = [part.name for stage in stages for part in parts_of(stage) if part.name != "embedding.tokens.weight"]
    assert sorted(names) == sorted(part.name for part in parts_of(whole) if part.name != "embedding.tokens.weight")


@STYLES
@pytest.mark.parametrize("family", ["encoder", "encoder_decoder"])
def test_gradients_are_the_slopes_of_the_loss(config: ModelConfig, family: str) -> None:
    model = made(dataclasses.replace(config, family=family, dropout=0.1))
    state = with_dropout(state_of() if family == "encoder_decoder" else one_stream(state_of()), model.streams, 1, 1, torch.arange(2))
    targets, weights = state["tokens"].roll(-1, 1), torch.linspace(0, 1, 2 * LENGTH).view(2, LENGTH)
    parameters = list(model.parameters())
    draw = torch.Generator().manual_seed(3)
    directions = [torch.randn(parameter.shape, generator=draw, dtype=torch.float64) for parameter in parameters]

    def loss() -> Tensor:
        return model.head.output.loss_sum(model(state)["hidden"], targets, weights)

    loss().backward()
    assert all(parameter.grad is not None and bool(parameter.grad.abs().max() > 0) for parameter in parameters)
    slope = sum(float((parameter.grad * direction).sum()) for parameter, direction in zip(parameters, directions, strict=True))  # type: ignore[operator]
    values = []
    with torch.no_grad():
        for change in (1e-7, -2e-7):
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += change * direction
            values.append(float(loss()))
    assert (values[0] - values[1]) / 2e-7 == pytest.approx(slope, rel=1e-5)
