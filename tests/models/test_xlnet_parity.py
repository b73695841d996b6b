"""The same weights give the same logits and gradients as transformers' XLNet: both streams, given orders, memory of the stretch before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import gradients, read_weights
from torch import Tensor

from teratron.config import Config
from teratron.models import Model, State, build_model, load_parts, parameter_count, parts_of

transformers = pytest.importorskip("transformers", reason="transformers is the oracle: pip install transformers")

VOCAB, LENGTH, HIDDEN, HEADS, LAYERS, PREDICTED = 83, 20, 48, 4, 2, 6


def theirs() -> Any:
    """A `transformers` model with random weights that make logits of size 1."""
    config = transformers.XLNetConfig(
        vocab_size=VOCAB, d_model=HIDDEN, n_layer=LAYERS, n_head=HEADS, d_inner=80, dropout=0, mem_len=LENGTH
    )  # fmt: skip
    model = transformers.XLNetLMHeadModel(config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            centre = 1.0 if "layer_norm.weight" in path else 0.0
            parameter.copy_(centre + 0.15 * torch.randn(parameter.shape, generator=generator))
    return model.float().eval()


def ours(model: Any, folder: Path, recurrence: int = 0) -> Model:
    """Without what concerns segments A and B, which ours has not."""
    model.save_pretrained(folder)
    config, weights = read_weights(folder)
    twin = build_model(replace(config, seq_length=LENGTH * 2 if recurrence else LENGTH, recurrence=recurrence))
    load_parts(twin, weights)
    return twin


def drawn(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens and their turns [2, S], the places of those that are predicted, and labels [2, P]."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (2, LENGTH), generator=draw)
    places = torch.stack([torch.randperm(LENGTH, generator=draw)[:PREDICTED] for _ in range(2)])
    turns = torch.zeros(2, LENGTH, dtype=torch.int64).scatter(1, places, torch.arange(1, PREDICTED + 1).expand(2, -1))
    return tokens, turns, places.sort(1).values, torch.randint(VOCAB, (2, PREDICTED), generator=draw)


def theirs_of(turns: Tensor, places: Tensor) -> dict[str, Tensor]:
    """An order as their masks."""
    hidden = (turns[:, None, :] > 0) & (turns[:, None, :] >= turns[:, :, None])
    return {"perm_mask": hidden.float(), "target_mapping": F.one_hot(places, LENGTH).float()}


def state_of(tokens: Tensor, turns: Tensor, places: Tensor) -> State:
    return {"tokens": tokens, "positions": torch.arange(tokens.shape[1]).expand(tokens.shape), "turns": turns, "target_positions": places}


def close(found: Tensor, expected: Tensor) -> None:
    """To 1e-5 of the largest."""
    scale = float(expected.detach().abs().max())
    assert scale > 0.5
    assert float((found - expected).detach().abs().max()) <= 1e-5 * scale


def assert_learns_alike(model: Any, logits: Tensor, twin: Model, state: State, labels: Tensor, folder: Path) -> None:
    """Logits, the sum of losses, and every part's gradient to 1e-4 of its largest element."""
    hidden = twin(state)["hidden"]
    close(twin.head.output(hidden), logits)
    F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    twin.head.output.loss_sum(hidden, labels, torch.ones(labels.shape)).backward()
    expected = gradients(model, folder)
    parameters = dict(twin.named_parameters())
    for part in parts_of(twin):
        gradient, right = part.of(parameters[part.parameter].grad), expected[part.name]
        assert float(right.abs().max()) > 0
        assert float((gradient - right).abs().max()) <= 1e-4 * float(right.abs().max()), part.name


def test_both_streams_equal_transformers(tmp_path: Path) -> None:
    model = theirs()
    tokens, turns, places, labels = drawn(1)
    logits = model(tokens, **theirs_of(turns, places)).logits
    assert_learns_alike(model, logits, ours(model, tmp_path / "weights"), state_of(tokens, turns, places), labels, tmp_path / "gradients")


def test_the_content_alone_equals_transformers_from_left_to_right(tmp_path: Path) -> None:
    """Then it is Transformer-XL, but for XLNet's details."""
    model = theirs()
    tokens, twin = drawn(2)[0], ours(model, tmp_path / "weights")
    mask = torch.ones(LENGTH, LENGTH).triu(1).expand(2, -1, -1)
    state = {name: tensor for name, tensor in state_of(tokens, tokens, tokens).items() if name in ("tokens", "positions")}
    close(twin.head.output(twin(state)["hidden"]), model(tokens, perm_mask=mask).logits)


def test_memory_equals_transformers_mems(tmp_path: Path) -> None:
    """Two stretches of one sample against two calls, the second with what the first has left: no gradient flows back to it."""
    model = theirs()
    first, second = drawn(3), drawn(4)
    before = model(first[0], **theirs_of(*first[1:3]), use_mems=True)
    after = model(second[0], **theirs_of(*second[1:3]), mems=before.mems)
    tokens, turns, places, labels = (torch.cat(pair, dim=1) for pair in zip(first, second, strict=True))
    places = places + LENGTH * (torch.arange(2 * PREDICTED) >= PREDICTED)
    logits = torch.cat([before.logits, after.logits], dim=1)
    twin = ours(model, tmp_path / "weights", recurrence=LENGTH)
    assert_learns_alike(model, logits, twin, state_of(tokens, turns, places), labels, tmp_path / "gradients")


def test_presets_have_the_published_sizes() -> None:
    """As transformers counts them, less what concerns segments A and B."""
    for name, hidden, layers, heads in (("xlnet-base", 768, 12, 12), ("xlnet-large", 1024, 24, 16)):
        settings = transformers.XLNetConfig(d_model=hidden, n_layer=layers, n_head=heads, d_inner=4 * hidden)
        with torch.device("meta"):
            theirs = transformers.XLNetLMHeadModel(settings)
        counted = {path: parameter.numel() for path, parameter in theirs.named_parameters()}
        apart = sum(count for path, count in counted.items() if path.endswith(("seg_embed", "r_s_bias")))
        assert parameter_count(build_model(Config.preset(name).model, device="meta")) == sum(counted.values()) - apart
