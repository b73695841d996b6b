"""A checkpoint that megatron-core wrote is read with equal logits, and it reads one that was written here, in float64."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_megatron import GPT2, LLAMA, STYLES, batch, by_part, made, megatron, run_worker  # noqa: F401 (megatron is a fixture)
from torch import Tensor

from teratron.checkpoint.exchange import open_weights
from teratron.checkpoint.megatron.write import Layout, write_megatron
from teratron.checkpoint.source import Weights
from teratron.checkpoint.stream import Entry
from teratron.models import GPT, build_model, load_parts

WORKER = Path(__file__).with_name("megatron_checkpoint_worker.py")
MIXTURE = dataclasses.replace(LLAMA, experts=4, expert_ffn=8, normalise_gates=True, router_balance="none")
CASES = {
    "gpt2-1": (GPT2, 1),
    "gpt2-2": (GPT2, 2),
    "llama-2": (LLAMA, 2),
    "normed-2": (dataclasses.replace(STYLES["normed-wide-heads"], activation="swiglu"), 2),
    "mixture-1": (MIXTURE, 1),
}
"""Models, and the tensor ranks that write and read them."""


def logits(model: GPT) -> Tensor:
    tokens = batch()["tokens"]
    state = model({"tokens": tokens, "positions": torch.arange(tokens.shape[1]).expand(tokens.shape)})
    assert model.head is not None
    return model.head.output(state["hidden"]).detach()


def written(model: GPT, place: Path, tensor: int) -> None:
    """Both formats, as runs of step 7."""
    entries = [Entry(name, part.dtype, part.shape, lambda part=part: part) for name, part in by_part(model, False).items()]
    weights = Weights(model.config, entries, None, "a model", None, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.distributed.checkpoint tells that there is one process
        write_megatron(weights, place.with_suffix(".ours"), Layout(tensor))
    write_megatron(weights, place.with_suffix(".ours-legacy"), Layout(tensor), "legacy")


@pytest.mark.slow
def test_checkpoints_of_megatron_core_in_both_directions(megatron: Path, tmp_path: Path) -> None:  # noqa: F811
    cases, models = {}, {}
    for name, (config, tensor) in CASES.items():
        model = models[name] = made(config)
        save_file(by_part(model, False) | {"batch.tokens": batch()["tokens"]}, tmp_path / f"{name}.inputs")
        written(model, tmp_path / name, tensor)
        cases[name] = {"model": dataclasses.asdict(config), "inputs": f"{name}.inputs", "tensor": tensor}
    (tmp_path / "cases.json").write_text(json.dumps(cases), "utf-8")
    run_worker(WORKER, tmp_path, megatron, seconds=900)
    for name, model in models.items():
        expected, theirs = logits(model), load_file(tmp_path / f"{name}.safetensors")
        for way, found in theirs.items():
            difference = (found[..., : model.config.vocab_size] - expected).abs().max() / expected.abs().max()
            assert difference < (1e-6 if model.config.experts else 1e-12), f"{name}, {way}: {difference:.2g}"
        weights = open_weights(tmp_path / f"{name}.theirs")
        assert weights.config == model.config
        assert weights.step == 7
        copy = build_model(weights.config, dtype=torch.float64)
        load_parts(copy, {entry.name: entry.values() for entry in weights.parts})
        assert isinstance(copy, GPT)
        assert torch.equal(logits(copy), expected)
