"""Mixture of experts: equal to a loop over tokens, nothing lost or doubled, capacity and balance by sequence."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from teratron.config import ModelConfig, UserError
from teratron.generate.cache import KVCache
from teratron.models import Model, State, build_model, flops_per_token, initialise, parameter_count, parts_of
from teratron.models.leaves import Leaf
from teratron.models.moe import Dispatch, MoE, Places, Routing, balance, grouped_product, looped_product
from teratron.models.random import normal_box
from teratron.parallel.apply import find_cut

torch.set_num_threads(1)

LENGTH, VOCAB = 12, 40
PLAIN = ModelConfig(
    layers=2, hidden=16, heads=2, ffn=24, seq_length=LENGTH, vocab_size=VOCAB, vocab_multiple=8, init_std=0.3, experts=5, z_loss=0.1
)
STYLES = {
    "softmax": PLAIN,
    "normalised": dataclasses.replace(PLAIN, normalise_gates=True, gate_scale=2.5, activation="swiglu", bias=False, expert_ffn=8),
    "sigmoid": dataclasses.replace(PLAIN, router="sigmoid", normalise_gates=True, experts_per_token=3, activation="geglu"),
    "switch": dataclasses.replace(PLAIN, experts_per_token=1, capacity=1.0, activation="relu"),
    "shared": dataclasses.replace(PLAIN, shared_experts=2, expert_ffn=8, activation="swiglu", capacity=0.8),
    "loss-free": dataclasses.replace(PLAIN, router="sigmoid", router_balance="bias", shared_experts=1, capacity=1.2),
    "everyone": dataclasses.replace(PLAIN, experts=3, experts_per_token=3),
    "unbalanced": dataclasses.replace(PLAIN, router_balance="none", z_loss=0.0),
}
every_style = pytest.mark.parametrize("config", STYLES.values(), ids=STYLES)


def layer(config: ModelConfig, seed: int = 1) -> MoE:
    """A float64 layer of random weights; the router's bias is large enough to change choices."""
    moe = MoE(config).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in moe.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return moe


def hidden(batch: int = 3, length: int = LENGTH, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((batch, length, PLAIN.hidden), generator=generator, dtype=torch.float64, requires_grad=True)


def padding(batch: int = 3, length: int = LENGTH) -> Tensor:
    """Real tokens: a whole sequence, one with padding within and behind, one of padding alone."""
    real = torch.ones(batch, length, dtype=torch.bool)
    real[1, 3], real[1, length - 4 :], real[2] = False, False, False
    return real


def one_expert(moe: MoE, number: int, x: Tensor) -> Tensor:
    up, kind = moe.experts.up[number] @ x, moe.experts.activation
    if moe.experts.gate is not None:
        gate = moe.experts.gate[number] @ x
        return moe.experts.down[number] @ ((F.silu(gate) if kind == "swiglu" else F.gelu(gate)) * up)
    return moe.experts.down[number] @ (F.relu(up) if kind == "relu" else F.gelu(up))


def by_token(moe: MoE, config: ModelConfig, x: Tensor, real: Tensor) -> tuple[Tensor, dict[str, Tensor], list[int]]:
    """The layer as a textbook says it: token after token, expert after expert."""
    outputs, terms, loads = [], {"aux_loss": torch.zeros(()), "z_loss": torch.zeros(())}, [0] * config.experts
    k, experts = config.experts_per_token, range(config.experts)
    for row in range(x.shape[0]):
        tokens = [place for place in range(x.shape[1]) if real[row, place]]
        limit = math.ceil(config.capacity * k * len(tokens) / config.experts - 1e-9) if config.capacity else x.shape[1]
        taken, chosen_by, means = [0] * config.experts, [0] * config.experts, [torch.zeros(())] * config.experts
        for place in range(x.shape[1]):
            logits = [moe.router.weight[e] @ x[row, place] for e in experts]
            total = sum(logit.exp() for logit in logits)
            scores = [logit.exp() / total if config.router == "softmax" else 1 / (1 + (-logit).exp()) for logit in logits]
            shift = [0.0] * config.experts if moe.router.bias is None else moe.router.bias.tolist()
            best = sorted(experts, key=lambda e: -(scores[e].item() + shift[e]))[:k]
            norm = sum(scores[e] for e in best) if config.normalise_gates else 1.0
            output = torch.zeros(config.hidden, dtype=torch.float64) if moe.shared is None else moe.shared(x[row, place])
            for e in best:
                if taken[e] < limit and (real[row, place] or not config.capacity):
                    output = output + scores[e] / norm * config.gate_scale * one_expert(moe, e, x[row, place])
                if real[row, place]:
                    taken[e], chosen_by[e], loads[e] = taken[e] + 1, chosen_by[e] + 1, loads[e] + 1
            outputs.append(output)
            if real[row, place]:
                terms["z_loss"] = terms["z_loss"] + total.log() ** 2
                means = [mean + score / sum(scores) / len(tokens) for mean, score in zip(means, scores, strict=True)]
        if tokens:
            shares = [config.experts * count / (k * len(tokens)) for count in chosen_by]
            terms["aux_loss"] = terms["aux_loss"] + sum(f * p for f, p in zip(shares, means, strict=True))
    wanted = {"aux_loss": config.router_balance == "aux", "z_loss": config.z_loss > 0}
    return torch.stack(outputs).view_as(x), {name: term for name, term in terms.items() if wanted[name]}, loads


def slopes(moe: MoE, x: Tensor, output: Tensor, terms: dict[str, Tensor]) -> list[Tensor]:
    """Gradients of everything that learns, of a number into which all results enter."""
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    total = (output * upstream).sum() + sum(3 * term for term in terms.values())
    return list(torch.autograd.grad(total, [x, *(p for p in moe.parameters() if p.requires_grad)]))


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * max(1.0, float(expected.detach().abs().max())))


@every_style
@pytest.mark.parametrize("padded", [False, True])
def test_layer_equals_a_loop_over_tokens_gradients_included(config: ModelConfig, padded: bool) -> None:
    moe, x = layer(config), hidden()
    real = padding() if padded else torch.ones(x.shape[:2], dtype=torch.bool)
    output, routing = moe(x, real if padded else None, dropless=False)
    expected, terms, loads = by_token(moe, config, x, real)
    assert_near(output, expected)
    assert routing.load_E.tolist() == loads
    assert routing.terms.keys() == terms.keys()
    for name, term in terms.items():
        assert_near(routing.terms[name], term)
    for found, right in zip(slopes(moe, x, output, routing.terms), slopes(moe, x, expected, terms), strict=True):
        assert right.abs().max() > 1e-3
        assert_near(found, right)
    if config.capacity and not padded:  # it does bind
        assert not routing.kept_BSC.all()
        assert not torch.equal(moe(x, None, dropless=True)[0], output)


@every_style
def test_dropless_equals_every_expert_on_every_token(config: ModelConfig) -> None:
    moe, x = layer(config), hidden()
    output, routing = moe(x, None, dropless=True)
    weights = torch.zeros(*x.shape[:2], config.experts, dtype=torch.float64).scatter(-1, routing.experts_BSC, routing.gates_BSC)
    everything = [torch.stack([one_expert(moe, e, token) for token in x.flatten(0, 1)]).view_as(x) for e in range(config.experts)]
    dense = sum(weights[..., e, None] * everything[e] for e in range(config.experts))
    assert_near(output, dense if moe.shared is None else dense + moe.shared(x))


def test_capacity_keeps_the_first_of_each_sequence() -> None:
    config = dataclasses.replace(PLAIN, hidden=2, heads=1, experts=2, experts_per_token=1, capacity=1.0, z_loss=0.0)
    moe = layer(config)
    moe.router.weight.data = torch.eye(2, dtype=torch.float64)
    first, second = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double()
    x = torch.stack([torch.stack([first, second, first, first, first, first]), torch.stack([second, first] * 3)])
    _, routing = moe(x, None, dropless=False)
    assert routing.experts_BSC[..., 0].tolist() == [[0, 1, 0, 0, 0, 0], [1, 0, 1, 0, 1, 0]]
    assert routing.kept_BSC[..., 0].tolist() == [[True, True, True, True, False, False], [True] * 6]
    real = torch.tensor([[False, True, True, True, True, False], [True] * 6])
    kept = moe(x, real, dropless=False)[1].kept_BSC[..., 0]  # four real tokens: two for each expert
    assert kept.tolist() == [[False, True, True, True, False, False], [True] * 6]


@pytest.mark.parametrize(("capacity", "limit"), [(1.1, 11), (1.0, 10), (1.11, 12), (0.01, 1)])
def test_capacity_is_rounded_up_as_decimals_are(capacity: float, limit: int) -> None:
    config = dataclasses.replace(PLAIN, experts=5, experts_per_token=1, capacity=capacity)
    moe, x = layer(config), hidden(1, 1).expand(1, 50, -1)
    assert moe(x, None, dropless=False)[1].kept_BSC.sum() == limit


def test_capacity_lets_no_token_depend_on_a_later_one() -> None:
    moe, x = layer(STYLES["shared"]), hidden(1).detach()
    before = moe(x, None, dropless=False)[0]
    for place in range(1, LENGTH):
        changed = torch.cat([x[:, :place], -x[:, place:]], dim=1)
        assert_near(moe(changed, None, dropless=False)[0][:, :place], before[:, :place])


def test_auxiliary_loss_is_one_for_even_loads_and_the_number_of_experts_for_one_expert() -> None:
    config = dataclasses.replace(PLAIN, hidden=4, experts=4, experts_per_token=1)
    moe = layer(config)
    moe.router.weight.data = 50 * torch.eye(4, dtype=torch.float64)
    even, single = torch.eye(4).double().repeat(3, 1)[None], torch.eye(4).double()[:1].repeat(12, 1)[None]
    for x, loss in ((even, 1), (single, 4), (torch.cat([even, single]), 5)):  # a sum over sequences
        assert moe(x, None, False)[1].terms["aux_loss"].item() == pytest.approx(loss, abs=1e-9)


def test_ties_go_to_the_lower_expert() -> None:
    moe = layer(dataclasses.replace(PLAIN, experts=64, experts_per_token=6))
    moe.router.weight.data.zero_()
    routing = moe(hidden(), None, False)[1]
    assert torch.equal(routing.experts_BSC, torch.arange(6).expand(3, LENGTH, 6))


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_bias_balancing_evens_the_loads_and_leaves_the_gates_alone(router: str) -> None:
    config = dataclasses.replace(PLAIN, router=router, router_balance="bias", experts=8, expert_ffn=4)
    moe, x = layer(config), hidden(8, 32).detach()
    moe.router.bias.data.zero_()
    moe.router.weight.data[0] += 0.5 * x.mean((0, 1)) / x.mean((0, 1)).square().mean()  # a favourite
    moe.router.weight.data *= 0.3  # a steep softmax is 0 or 1, and a bias would have a long way between
    mean = 8 * 32 * 2 / 8
    loads = []
    for step in range(500):
        loads.append(moe.router(x, None, False).load_E)
        balance(moe, {"router": loads[-1]}, rate=0.01 * 0.985**step)
    assert loads[0].max() > 1.5 * mean
    late = torch.stack(loads[-50:]).double().mean(0)
    assert (late / mean - 1).abs().max() < 0.2
    routing = moe(x, None, False)[1]
    logits = x @ moe.router.weight.t()
    scores = logits.softmax(-1) if router == "softmax" else logits.sigmoid()
    assert_near(routing.gates_BSC, scores.gather(-1, routing.experts_BSC))


def test_a_bias_moves_by_the_rate_against_the_load() -> None:
    moe = layer(STYLES["loss-free"])
    before = moe.router.bias.clone()
    balance(moe, {"router": torch.tensor([9.0, 1.0, 5.0, 4.0, 6.0])}, rate=0.25)
    assert_near(moe.router.bias - before, torch.tensor([-0.25, 0.25, 0.0, 0.25, -0.25]).double())


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(1, 9), st.integers(1, 6), st.booleans())
def test_no_copy_is_lost_or_doubled(data: st.DataObject, tokens: int, experts: int, dropping: bool) -> None:
    """With experts that multiply by their number, the output is known for any routing."""
    choices = data.draw(st.integers(1, experts))
    orders = [data.draw(st.permutations(range(experts)))[:choices] for _ in range(tokens)]
    chosen = torch.tensor(orders)
    kept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=chosen.numel(), max_size=chosen.numel()))).view_as(chosen)
    place = Places.of(chosen, kept if dropping else None, experts)
    assert sorted(place.order_R.tolist()) == list(range(chosen.numel()))
    assert place.order_R[place.row_R].tolist() == list(range(chosen.numel()))
    groups = [chosen.flatten()[place.order_R[start:end]] for start, end in itertools.pairwise([0, *place.ends_E.tolist()])]
    assert all((group == number).all() for number, group in enumerate(groups))

    class Multiply(torch.nn.Module):
        count = experts

        def forward(self, x: Tensor, ends: Tensor) -> Tensor:
            numbers = torch.searchsorted(ends, torch.arange(len(x)), right=True)
            return torch.where(numbers[:, None] < experts, x * (numbers[:, None] + 1), math.nan)  # undefined behind the last

    x = torch.randn(1, tokens, 3, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(1, tokens, choices, dtype=torch.float64)
    alive = kept.double() if dropping else torch.ones_like(gates[0])
    routing = Routing(chosen[None], gates, kept[None] if dropping else None, torch.zeros(experts), {})
    mixed = Dispatch()(x, routing, Multiply())
    factor = (gates[0] * alive * (chosen + 1)).sum(-1, keepdim=True)
    assert_near(mixed[0], factor * x[0])
    (slope,) = torch.autograd.grad(mixed.sum(), x)
    assert_near(slope[0], factor.expand_as(slope[0]))


@pytest.mark.parametrize("sizes", [(3, 0, 8, 5), (0, 0, 0, 1), (16, 8, 0, 0), (7, 9, 1, 2)])
@pytest.mark.parametrize("behind", [0, 5])
def test_grouped_product_equals_its_looped_twin(sizes: tuple[int, ...], behind: int) -> None:
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor(sizes).cumsum(0).int()
    x = torch.randn((sum(sizes) + behind, 16), generator=generator).bfloat16().requires_grad_()
    weight = torch.randn((4, 24, 16), generator=generator).bfloat16().requires_grad_()
    upstream = torch.randn((sum(sizes), 24), generator=generator).bfloat16()
    results = []
    for product in (lambda x, weight, ends: looped_product(x, weight, ends.tolist()), grouped_product):
        y = product(x, weight, ends)[: sum(sizes)]
        x_slope, w_slope = torch.autograd.grad(y, (x, weight), upstream)
        results.append((y, x_slope[: sum(sizes)], w_slope))
    for found, expected in zip(*results, strict=True):
        assert expected.abs().max() > 1
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.05)


def test_half_types_route_in_float32_and_keep_the_bias_in_it() -> None:
    config = STYLES["loss-free"]
    exact = build_model(config)
    initialise(exact, 1)
    half = build_model(config, dtype=torch.bfloat16)
    router = half.blocks["0"].ffn.router
    assert (router.bias.dtype, router.weight.dtype) == (torch.float32, torch.bfloat16)
    router.weight.data.copy_(exact.blocks["0"].ffn.router.weight)
    router.bias.data.fill_(0.1)
    assert half.to(torch.bfloat16).blocks["0"].ffn.router.bias[0] == torch.tensor(0.1)  # unrounded
    x = hidden().detach().bfloat16()
    routing = router(x, None, False)
    assert routing.gates_BSC.dtype == torch.float32
    scores = (x.float() @ router.weight.float().t()).sigmoid()
    torch.testing.assert_close(routing.gates_BSC, scores.gather(-1, routing.experts_BSC))


# The model with experts


def made(config: ModelConfig) -> Model:
    model = build_model(config, dtype=torch.float64)
    initialise(model, 1)
    return model


def state_of(batch: int = 3, length: int = LENGTH) -> State:
    tokens = torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(0))
    return {"tokens": tokens, "positions": torch.arange(length).expand(batch, length)}


def test_blocks_with_experts_are_every_nth_after_the_dense_ones() -> None:
    config = dataclasses.replace(PLAIN, layers=7, moe_first_dense=2, moe_every=2)
    routed = [isinstance(block.ffn, MoE) for block in build_model(config, device="meta").blocks.values()]
    assert routed == [False, False, True, False, True, False, True]


@every_style
def test_padding_behind_a_sequence_changes_nothing(config: ModelConfig) -> None:
    model, short = made(config), state_of()
    expected = model(short)
    real = torch.ones(3, LENGTH, dtype=torch.bool)
    long = {name: F.pad(tensor, (0, 4)) for name, tensor in (short | {"real": real}).items()}
    found = model({**long, "positions": torch.arange(LENGTH + 4).expand(3, -1).clamp(max=LENGTH - 1)})
    assert found.keys() == expected.keys()
    assert {name.partition(".")[0] for name in found} >= {"hidden", "load"}
    for name, tensor in expected.items():
        assert_near(found[name][:, :LENGTH] if name == "hidden" else found[name], tensor)


def test_padding_of_segments_counts_nowhere() -> None:
    model, state = made(PLAIN), state_of(1)
    segments = torch.zeros(1, LENGTH, dtype=torch.int64)
    segments[:, 8:] = -1
    found, expected = model({**state, "segments": segments}), model({name: tensor[:, :8] for name, tensor in state.items()})
    for name in (name for name in expected if name != "hidden"):
        assert_near(found[name], expected[name])


@every_style
def test_a_sample_is_the_same_in_any_batch(config: ModelConfig) -> None:
    model, state = made(config), state_of(5)
    whole = model(state)
    for rows in (slice(0, 2), slice(3, 4)):
        found = model({name: values[rows] for name, values in state.items()})
        assert_near(found["hidden"], whole["hidden"][rows])


def test_padding_may_be_said_by_segments_and_by_length_together() -> None:
    model, state = made(PLAIN), state_of(1)
    segments, real = torch.zeros(1, LENGTH, dtype=torch.int64), torch.ones(1, LENGTH, dtype=torch.bool)
    segments[:, 9:], real[:, 11:] = -1, False
    assert int(model({**state, "segments": segments, "real": real})["load.blocks.0.ffn.router"].sum()) == 9 * 2
    assert int(model({**state, "segments": segments, "real": ~real})["load.blocks.0.ffn.router"].sum()) == 0


def test_a_cache_sets_capacity_aside() -> None:
    """A generated token cannot compete with the earlier ones of its sequence, which are no longer there."""
    limited, free = (made(dataclasses.replace(PLAIN, capacity=capacity)) for capacity in (0.01, 0.0))
    state = state_of(1)
    with torch.no_grad():
        assert (limited(state)["hidden"] - free(state)["hidden"]).abs().max() > 0.1
        assert_near(limited(state, cache=KVCache(LENGTH))["hidden"], free(state)["hidden"])


def test_terms_and_loads_of_all_layers_are_in_the_last_state_whatever_the_range_of_units() -> None:
    config = dataclasses.replace(PLAIN, layers=3)
    model, state = made(config), state_of()
    expected = model(state)
    assert {name for name in expected if name.startswith("load.")} == {f"load.blocks.{n}.ffn.router" for n in range(3)}
    assert all(int(load.sum()) == 3 * LENGTH * 2 for name, load in expected.items() if name.startswith("load."))
    weights = dict(model.named_parameters())
    sums, sent = {"term.aux_loss": 0.0, "term.z_loss": 0.0}, state
    for units in (range(2), range(2, 4), range(4, 5)):
        stage = build_model(config, units, dtype=torch.float64)
        for name, parameter in stage.named_parameters():
            parameter.data.copy_(weights["embedding.tokens.weight" if name == "head.output.weight" else name])
        last = stage({**sent, "positions": state["positions"]})
        sums = {name: value + (last[name].item() if name in last else 0.0) for name, value in sums.items()}
        sent = {"hidden": last["hidden"]}
    assert_near(sent["hidden"], expected["hidden"])
    for name, value in sums.items():
        assert value == pytest.approx(expected[name].item(), rel=1e-12)


@pytest.mark.parametrize("family", ["gpt", "encoder", "encoder_decoder"])
def test_every_leaf_has_a_row_in_the_plan(family: str) -> None:
    config = dataclasses.replace(STYLES["shared"], family=family, layers=2, moe_first_dense=1, router_balance="bias")
    model = build_model(config, device="meta")
    leaves = {path: module for path, module in model.named_modules() if isinstance(module, (Leaf, Dispatch))}
    assert sum(path.endswith("ffn.experts") for path in leaves) == (2 if family == "encoder_decoder" else 1)
    for path, leaf in leaves.items():
        cut = find_cut(model.plan, path)
        for dimensions in (cut.tensor, cut.expert):
            assert all(getattr(leaf, name, None) is None or dim < getattr(leaf, name).dim() for name, dim in dimensions.items())


def test_work_of_a_token_counts_the_experts_that_it_is_sent_to() -> None:
    dense = dataclasses.replace(PLAIN, experts=0, z_loss=0.0, ffn=3 * 8, bias=False, activation="swiglu")
    sparse = dataclasses.replace(dense, experts=16, expert_ffn=8, experts_per_token=2, shared_experts=1)
    router = 6 * PLAIN.layers * 16 * PLAIN.hidden
    models = [build_model(config, device="meta") for config in (dense, sparse)]
    assert flops_per_token(models[1], LENGTH) == flops_per_token(models[0], LENGTH) + router
    assert parameter_count(models[1]) - parameter_count(models[0]) == PLAIN.layers * (14 * 3 * 8 * 16 + 16 * 16)


def test_each_expert_starts_from_numbers_of_its_own() -> None:
    shape, everything = (6, 70, 9), (slice(0, 6), slice(0, 70), slice(0, 9))
    whole = normal_box(3, "experts.up.weight", shape, everything)
    for box in ((slice(2, 3), slice(0, 70), slice(0, 9)), (slice(1, 6), slice(60, 70), slice(4, 5))):
        assert torch.equal(normal_box(3, "experts.up.weight", shape, box), whole[box])
    flat = whole.flatten(1).double()
    correlations = (flat @ flat.t() / flat.shape[1]).fill_diagonal_(0)
    assert correlations.abs().max() < 5 / math.sqrt(flat.shape[1])
    assert abs(flat.std() - 1) < 0.1


def test_initial_values_of_one_expert_draw_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, draw = [], torch.randn
    monkeypatch.setattr(torch, "randn", lambda shape, generator: drawn.append(math.prod(shape)) or draw(shape, generator=generator))
    normal_box(3, "experts.up.weight", (6, 70, 9), (slice(2, 4), slice(0, 5), slice(0, 9)))
    assert drawn == [70 * 9, 70 * 9]


def test_initial_standard_deviations_are_those_of_a_feed_forward_layer() -> None:
    config = dataclasses.replace(PLAIN, layers=8, hidden=64, ffn=64, experts=8, activation="swiglu", init_std=0.03)
    model = build_model(config)
    initialise(model, 1)
    parameters = dict(model.named_parameters())
    stacked = [part for part in parts_of(model) if len(part.shape) == 3]
    assert {part.name.split(".", 3)[3] for part in stacked} == {f"experts.{name}.weight" for name in ("gate", "up", "down")}
    for part in stacked:
        values = part.of(parameters[part.parameter])
        expected = 0.03 / math.sqrt(2 * 8) if ".down." in part.name else 0.03
        assert abs(values.std() / expected - 1) < 5 / math.sqrt(2 * values.numel()), part.name


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"experts": 0, "z_loss": 0.1}, r"^model\.z_loss = 0\.1 concerns experts, but model\.experts = 0: "),
        ({"experts": 0, "z_loss": 0.0, "shared_experts": 1}, r"^model\.shared_experts = 1 concerns experts, "),
        ({"experts": 1}, r"^model\.experts_per_token = 2 exceeds model\.experts = 1: "),
        ({"experts_per_token": 1, "normalise_gates": True}, r"^model\.normalise_gates = true .* learns nothing"),
        ({"moe_first_dense": 2}, r"^model\.moe_first_dense = 2 leaves none of model\.layers = 2 "),
        ({"gate_scale": 0.0}, r"^model\.gate_scale = 0\.0: expected above 0"),
    ],
)
def test_impossible_experts_are_refused(keys: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        dataclasses.replace(PLAIN, **keys)
