"""Every optimizer equals its paper's formulas on whole tensors, in float64 to 1e-9; a step that is not finite changes nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trials import learn, loss_of, made, optimizer_of

from teratron.config import OptimConfig
from teratron.models import Model, Part, parts_of

Rule = Callable[[Tensor, Tensor, dict[str, Tensor], int, float, OptimConfig, Part], None]
"""Changes a whole part by its gradient: weight, gradient, state, number of the step, learning rate, config, part."""


GROUPS = ("*.weight: lr=0.5", "blocks.0.*: decay=0.7", "head.norm.*: lr=0")


def lr_factor(part: Part, config: OptimConfig) -> float:
    """What GROUPS say."""
    if not config.groups:
        return 1.0
    return 0.0 if part.name.startswith("head.norm.") else 0.5 if part.name.endswith(".weight") else 1.0


def decay_of(part: Part, config: OptimConfig) -> float:
    if config.groups and part.name.startswith("blocks.0."):
        return 0.7
    return config.weight_decay if len(part.shape) > 1 else 0.0


def moment(state: dict[str, Tensor], name: str, value: Tensor, beta: float) -> Tensor:
    """A running mean from zero."""
    state[name] = beta * state.get(name, torch.zeros_like(value)) + (1 - beta) * value
    return state[name]


def adam_direction(g: Tensor, state: dict[str, Tensor], t: int, config: OptimConfig) -> Tensor:
    m, v = moment(state, "m", g, config.beta1), moment(state, "v", g * g, config.beta2)
    return m / (1 - config.beta1**t) / ((v / (1 - config.beta2**t)).sqrt() + config.eps)


def adamw(w: Tensor, g: Tensor, state: dict[str, Tensor], t: int, lr: float, config: OptimConfig, part: Part) -> None:
    w -= lr * (adam_direction(g, state, t, config) + decay_of(part, config) * w)


def adam(w: Tensor, g: Tensor, state: dict[str, Tensor], t: int, lr: float, config: OptimConfig, part: Part) -> None:
    w -= lr * adam_direction(g + decay_of(part, config) * w, state, t, config)


def sgd(w: Tensor, g: Tensor, state: dict[str, Tensor], t: int, lr: float, config: OptimConfig, part: Part) -> None:
    g = g + decay_of(part, config) * w
    state["m"] = config.momentum * state.get("m", torch.zeros_like(g)) + g
    w -= lr * (g + config.momentum * state["m"] if config.nesterov else state["m"])


def lion(w: Tensor, g: Tensor, state: dict[str, Tensor], t: int, lr: float, config: OptimConfig, part: Part) -> None:
    before = state.get("m", torch.zeros_like(g))
    direction = config.beta1 * before + (1 - config.beta1) * g
    moment(state, "m", g, config.beta2)
    w -= lr * (direction.sign() + decay_of(part, config) * w)


def lamb(w: Tensor, g: Tensor, state: dict[str, Tensor], t: int, lr: float, config: OptimConfig, part: Part) -> None:
    direction = adam_direction(g, state, t, config) + decay_of(part, config) * w
    norm = min(max(float(w.norm()), config.trust_min), config.trust_max)
    w -= lr * (norm / direction.norm() if w.any() else 1.0) * direction


def muon(w: Tensor, g: Tensor, state: dict[str, Tensor], t: int, lr: float, config: OptimConfig, part: Part) -> None:
    if len(part.shape) == 1 or part.name.startswith(("embedding.", "head.")):
        adamw(w, g, state, t, lr * (config.adam_lr / config.lr if config.adam_lr else 1.0), config, part)
        return
    m = moment(state, "m", g, config.momentum)
    x = (1 - config.momentum) * g + config.momentum * m if config.nesterov else m
    x = x / x.norm()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    rows, columns = x.shape
    factor = 0.2 * max(rows, columns) ** 0.5 if config.muon_scale == "moonlight" else max(1, rows / columns) ** 0.5
    w -= lr * (factor * x + decay_of(part, config) * w)


def adafactor(w: Tensor, g: Tensor, state: dict[str, Tensor], t: int, lr: float, config: OptimConfig, part: Part) -> None:
    beta, squares = 1 - t**-0.8, g * g
    if len(part.shape) == 1:
        estimate = moment(state, "v", squares, beta)
    else:
        rows, columns = moment(state, "r", squares.mean(1), beta), moment(state, "c", squares.mean(0), beta)
        estimate = torch.outer(rows, columns) / rows.mean()
    direction = g / estimate.sqrt().clamp(min=config.eps)
    direction = direction / max(1.0, float(direction.square().mean().sqrt()))
    size = max(1e-3, float(w.square().mean().sqrt()))
    w -= lr * (size * direction + decay_of(part, config) * w)


def schedule_free(w: Tensor, g: Tensor, state: dict[str, Tensor], t: int, lr: float, config: OptimConfig, part: Part) -> None:
    """w is y, where gradients are taken."""
    x, z = state.setdefault("x", w.clone()), state.setdefault("z", w.clone())
    v = moment(state, "v", g * g, config.beta2)
    z -= lr * math.sqrt(1 - config.beta2**t) * (g / (v.sqrt() + config.eps) + decay_of(part, config) * w)
    gammas = [min(1, k / config.warmup_steps) ** 2 * (1 - config.beta2**k) for k in range(1, t + 1)]
    x += gammas[-1] / sum(gammas) * (z - x)
    w.copy_((1 - config.beta1) * z + config.beta1 * x)


CASES: list[tuple[str, Rule, dict[str, Any]]] = [
    ("adamw", adamw, {}),
    ("adam", adam, {}),
    ("sgd", sgd, {"lr": 0.1}),
    ("sgd", sgd, {"lr": 0.1, "nesterov": False}),
    ("lion", lion, {"beta2": 0.99}),
    ("lamb", lamb, {}),
    ("lamb", lamb, {"trust_min": 1.5, "trust_max": 4.0}),
    ("muon", muon, {}),
    ("muon", muon, {"nesterov": False, "muon_scale": "jordan", "adam_lr": 3e-3}),
    ("adafactor", adafactor, {}),
    ("schedule_free", schedule_free, {"schedule": "constant", "warmup_steps": 5}),
    *((name, rule, {"groups": GROUPS}) for name, rule in (("adamw", adamw), ("lamb", lamb), ("muon", muon))),
]
IDS = ["-".join([name, *(key if key == "groups" else f"{key}={value}" for key, value in keys.items())]) for name, _, keys in CASES]


def follow(rule: Rule, model: Model, states: dict[str, dict[str, Tensor]], t: int, lr: float, config: OptimConfig) -> None:
    """A step of the reference: clip by the global norm, then part by part."""
    nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for part in parts_of(model):
            parameter = parameters[part.parameter]
            assert parameter.grad is not None
            rule(
                part.of(parameter), part.of(parameter.grad), states.setdefault(part.name, {}), t, lr * lr_factor(part, config), config, part
            )
    model.zero_grad()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
@pytest.mark.parametrize(("name", "rule", "keys"), CASES, ids=IDS)
def test_twenty_steps_equal_the_papers_formulas(name: str, rule: Rule, keys: dict[str, Any], tied: bool) -> None:
    config = OptimConfig(**{"name": name, "lr": 1e-2, "weight_decay": 0.3, "beta1": 0.8, "clip": 1.0, **keys})
    model = made(tie_embeddings=tied)
    oracle, optimizer = copy.deepcopy(model), optimizer_of(model, config)
    states: dict[str, dict[str, Tensor]] = {}
    norms = []
    for step in range(1, 21):
        rate, scale = config.lr / math.sqrt(step), 2.0 if step % 2 else 0.05  # every other step is clipped
        loss_of(oracle, step, scale).backward()
        follow(rule, oracle, states, step, rate, config)
        optimizer.flat.backward(0, [loss_of(model, step, scale)], [None], last=True)
        optimizer.flat.finish()
        norms.append(float(optimizer.step(step, rate)))
    assert min(norms) < config.clip < max(norms)
    for (key, ours), theirs in zip(model.named_parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9 * float(theirs.detach().abs().max()), msg=key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", dict.fromkeys(name for name, _, _ in CASES))
def test_a_gradient_that_is_not_finite_changes_nothing(name: Any, dtype: torch.dtype) -> None:
    moments: Any = "bf16" if dtype == torch.bfloat16 else "fp32"
    optimizer = optimizer_of(made(dtype), OptimConfig(name=name, moments=moments, schedule="constant"))
    learn(optimizer, 1, 1, 1e-3)
    before = {piece.name: piece.values.clone() for piece in optimizer.pieces()}
    optimizer.flat.stages.stages()[0].get_parameter("blocks.0.attention.qkv.weight").grad[3, 5] = math.nan  # type: ignore[index]
    assert not math.isfinite(learn(optimizer, 2, 2, 1e-3))
    assert [piece.name for piece in optimizer.pieces() if not torch.equal(piece.values, before[piece.name])] == []
    assert 0 < learn(optimizer, 3, 2, 1e-3) < math.inf
    assert any(not torch.equal(piece.values, before[piece.name]) for piece in optimizer.pieces())


def test_noise_walks_no_weight_of_lion() -> None:
    """Softmax does not see a key's bias: its gradient is rounding, whose signs would move it by the learning rate in every step."""
    model = made(position="learned")
    optimizer = optimizer_of(model, OptimConfig(name="lion"))
    for step in range(1, 6):
        learn(optimizer, step, step, 1e-2)
    noise = next(piece.values for piece in optimizer.pieces() if piece.name == "moment1/blocks.0.attention.k.bias")
    assert noise.any()
    biases = {part.name: part.of(model.get_parameter(part.parameter)) for part in parts_of(model)}
    assert not biases["blocks.0.attention.k.bias"].any()
    assert biases["blocks.0.attention.q.bias"].all()
