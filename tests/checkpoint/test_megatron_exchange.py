"""Megatron-LM's checkpoints become our parts and ours its: any release's names, any degrees, bit for bit; other things are refused."""

from __future__ import annotations

import argparse
import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from teratron.checkpoint import TrainingState, open_checkpoint, saved_state
from teratron.checkpoint.exchange import open_weights
from teratron.checkpoint.megatron.planned import Chunk, Planner
from teratron.checkpoint.megatron.write import Layout, write_megatron
from teratron.checkpoint.source import Weights
from teratron.checkpoint.stream import Entry
from teratron.cli.main import main
from teratron.config import Config, ModelConfig, UserError
from teratron.models import build_model, parts_of

GPT2 = ModelConfig(layers=4, hidden=16, heads=4, seq_length=12, vocab_size=50, vocab_multiple=16)
LLAMA = dataclasses.replace(
    GPT2, kv_heads=2, ffn=40, norm="rmsnorm", activation="swiglu", position="rope", tie_embeddings=False, bias=False, rope_theta=5e5
)
ROUTED = {"experts": 4, "expert_ffn": 8, "normalise_gates": True}
MODELS = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "wide-heads": dataclasses.replace(
        LLAMA, qk_norm=True, head_dim=6, qkv_bias=True, window=5, rope_scaling="llama3", rope_factor=8.0, rope_original=8192
    ),
    "experts": dataclasses.replace(LLAMA, **ROUTED, shared_experts=2, router="sigmoid", router_balance="bias"),
    "dense-first": dataclasses.replace(LLAMA, **ROUTED, moe_first_dense=1, aux_loss=0.02),
    "bert": dataclasses.replace(GPT2, family="encoder", token_types=2, head_transform=True, pooler=True, vocab_multiple=8),
}
Parts = dict[str, Tensor]


def random_parts(config: ModelConfig) -> Parts:
    """Every part with numbers of its own."""
    generator = torch.Generator().manual_seed(1)
    return {part.name: torch.randn(part.shape, generator=generator) for part in parts_of(build_model(config, device="meta"))}


def weights_of(config: ModelConfig, parts: Parts, step: int = 7) -> Weights:
    entries = [Entry(name, part.dtype, tuple(part.shape), lambda part=part: part) for name, part in parts.items()]  # type: ignore[misc]
    return Weights(config, entries, None, "a model", None, step)


def read(folder: Path) -> Parts:
    return {entry.name: entry.values() for entry in open_weights(folder).parts}


def assert_same(found: Parts, expected: Parts) -> None:
    assert found.keys() == expected.keys()
    wrong = [name for name, part in expected.items() if not torch.equal(found[name], part)]
    assert not wrong, wrong


@pytest.mark.parametrize("kind", ["torch_dist", "legacy"])
@pytest.mark.parametrize("name", MODELS)
def test_round_trips_are_exact(tmp_path: Path, name: str, kind: str) -> None:
    config = MODELS[name]
    parts, layout = random_parts(config), Layout(2, 2) if kind == "legacy" else Layout(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.distributed.checkpoint tells that there is one process
        compared = write_megatron(weights_of(config, parts), tmp_path, layout, kind)
    found = open_weights(tmp_path)
    assert (compared.parts, compared.difference) == (len(parts), 0)
    assert (tmp_path / "iter_0000007").is_dir()
    assert (found.config, found.step) == (config, 7)
    assert_same({entry.name: entry.values() for entry in found.parts}, parts)


# A second writer, of the layouts that releases before megatron-core had, in plain words of the specification.

OLD_NAMES = {"input": "input_layernorm", "after": "post_attention_layernorm", "final": "final_layernorm", "stack": "transformer"}
NEWER_NAMES = {"input": "input_norm", "after": "post_attention_norm", "final": "final_norm", "stack": "encoder"}


def arguments(config: ModelConfig, tensor: int, pipeline: int) -> argparse.Namespace:
    return argparse.Namespace(
        num_layers=config.layers, hidden_size=config.hidden, num_attention_heads=config.heads, padded_vocab_size=64,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.seq_length, seq_length=config.seq_length, make_vocab_size_divisible_by=16, bias_gelu_fusion=False,
        hidden_dropout=0.0, attention_dropout=0.0, layernorm_epsilon=1e-5, ffn_hidden_size=config.ffn_width,
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, init_method_std=0.02,
    )  # fmt: skip


def heads_in_turn(parts: Parts, name: str, rank: int, ranks: int, version: float) -> Tensor:
    """A rank's queries, keys and values: of each head in turn (version 2 and later), of each feature (1), or all of a kind (0)."""
    mine = [parts[f"{name}.{x}"].unflatten(0, (GPT2.heads, -1)).chunk(ranks)[rank] for x in ("q.weight", "k.weight", "v.weight")]
    stacked = torch.stack(mine)  # kind, head, feature, input
    order = {0.0: (0, 1, 2, 3), 1.0: (1, 2, 0, 3)}.get(version, (1, 0, 2, 3))
    return stacked.permute(order).flatten(0, 2)


def old_layers(parts: Parts, layers: range, rank: int, ranks: int, version: float, names: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    attention = "self_attention" if names["stack"] == "encoder" else "attention"
    for number, layer in enumerate(layers):
        ours, theirs = f"blocks.{layer}", f"layers.{number}"
        cut = {
            f"{attention}.dense.weight": parts[f"{ours}.attention.output.weight"].chunk(ranks, 1)[rank],
            "mlp.dense_h_to_4h.weight": parts[f"{ours}.ffn.up.weight"].chunk(ranks)[rank],
            "mlp.dense_h_to_4h.bias": parts[f"{ours}.ffn.up.bias"].chunk(ranks)[rank],
            "mlp.dense_4h_to_h.weight": parts[f"{ours}.ffn.down.weight"].chunk(ranks, 1)[rank],
            f"{attention}.dense.bias": parts[f"{ours}.attention.output.bias"],
            "mlp.dense_4h_to_h.bias": parts[f"{ours}.ffn.down.bias"],
            f"{attention}.query_key_value.weight": heads_in_turn(parts, f"{ours}.attention", rank, ranks, version),
        }
        biases = {x: parts[f"{ours}.attention.{x}.bias"][:, None] for x in "qkv"}
        cut[f"{attention}.query_key_value.bias"] = heads_in_turn(
            {f"b.{x}.weight": bias for x, bias in biases.items()}, "b", rank, ranks, version
        ).flatten()
        for kind in ("weight", "bias"):
            cut[f"{names['input']}.{kind}"] = parts[f"{ours}.attention_norm.{kind}"]
            cut[f"{names['after']}.{kind}"] = parts[f"{ours}.ffn_norm.{kind}"]
        yield from ((f"{theirs}.{name}", tensor) for name, tensor in cut.items())


def old_run(folder: Path, parts: Parts, tensor: int, pipeline: int, version: float, names: dict[str, str], chunks: int = 1) -> None:
    """Files of all ranks; stage p of chunk c has the layers that follow those of all stages of the chunks before it."""
    table = torch.cat((parts["embedding.tokens.weight"], torch.zeros(14, 16)))
    per_chunk = GPT2.layers // pipeline // chunks
    for stage in range(pipeline):
        for rank in range(tensor):
            content: dict[str, Any] = {"args": arguments(GPT2, tensor, pipeline), "iteration": 9, "checkpoint_version": version}
            for chunk in range(chunks):
                first = (chunk * pipeline + stage) * per_chunk
                stack = dict(old_layers(parts, range(first, first + per_chunk), rank, tensor, version, names))
                model: dict[str, Any] = {names["stack"]: stack}
                if (stage, chunk) == (0, 0):
                    positions = {"weight": parts["embedding.positions.weight"]}
                    model["embedding"] = {"word_embeddings": {"weight": table.chunk(tensor)[rank]}, "position_embeddings": positions}
                if (stage, chunk) == (pipeline - 1, chunks - 1):
                    stack |= {f"{names['final']}.{kind}": parts[f"head.norm.{kind}"] for kind in ("weight", "bias")}
                last = {"word_embeddings_for_head": {"weight": table.chunk(tensor)[rank]}} if stage and stage == pipeline - 1 else {}
                content[f"model{chunk}" if chunks > 1 else "model"] = {"language_model": model, **last}
            place = folder / "iter_0000009" / (f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pipeline > 1 else ""))
            place.mkdir(parents=True)
            torch.save(content, place / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("9\n")


@pytest.mark.parametrize(
    ("tensor", "pipeline", "version", "names", "chunks"),
    [
        (1, 1, 0.0, OLD_NAMES, 1),
        (2, 1, 1.0, OLD_NAMES, 1),
        (2, 2, 3.0, NEWER_NAMES, 1),
        (2, 2, 3.0, NEWER_NAMES, 2),
        (2, 1, 0.0, OLD_NAMES, 1),
    ],
)
def test_releases_before_megatron_core_are_read(
    tmp_path: Path, tensor: int, pipeline: int, version: float, names: dict[str, str], chunks: int
) -> None:
    parts = random_parts(GPT2)
    old_run(tmp_path, parts, tensor, pipeline, version, names, chunks)
    found = open_weights(tmp_path)
    assert (found.config, found.step) == (GPT2, 9)
    assert_same({entry.name: entry.values() for entry in found.parts}, parts)


def test_padding_of_the_vocabulary_follows_the_tensor_ranks(tmp_path: Path) -> None:
    write_megatron(weights_of(LLAMA, random_parts(LLAMA)), tmp_path, Layout(2), "legacy")
    model = torch.load(tmp_path / "iter_0000007/mp_rank_01/model_optim_rng.pt", weights_only=False)["model"]
    assert model["embedding.word_embeddings.weight"].shape == (32, 16)
    assert not model["output_layer.weight"][50 - 32 :].any()
    # A rank's file holds its share alone, not the whole that it is a view of.
    assert (tmp_path / "iter_0000007/mp_rank_01/model_optim_rng.pt").stat().st_size < 4 * 64 * 1024


@pytest.fixture
def run(tmp_path: Path) -> Path:
    old_run(tmp_path / "run", random_parts(GPT2), 2, 1, 3.0, NEWER_NAMES)
    return tmp_path / "run"


def with_optimizer(content: dict[str, Any]) -> None:
    """As Megatron-LM's optimizer of half types: groups of parameters that decay or not, which have numbers in place of names."""
    weights = {name: tensor for name, tensor in content["model"].items() if tensor is not None}
    groups = [[name for name, weight in weights.items() if (weight.dim() > 1) is decays] for decays in (False, True)]
    numbers = {name: number for number, name in enumerate(name for group in groups for name in group)}
    content["optimizer"] = {
        "optimizer": {
            "state": {numbers[name]: {"exp_avg": 2 * weight, "exp_avg_sq": weight**2} for name, weight in weights.items()},
            "param_groups": [
                {"params": [numbers[name] for name in group], "wd_mult": float(decays)} for decays, group in enumerate(groups)
            ],
        },
        "fp32_from_fp16_params": [[weights[name] + 1 for name in group] for group in groups],
    }
    trained = {"micro_batch_size": 1, "global_batch_size": 4, "lr": 1e-3, "train_iters": 20, "lr_decay_style": "constant"}
    content["args"].__dict__.update(trained)


def assert_state(folder: Path, parts: Parts) -> None:
    """Of a checkpoint that `with_optimizer` made."""
    checkpoint = open_checkpoint(folder)
    assert saved_state(checkpoint) == TrainingState(7, 7 * 4 * 12, phases=(20,))
    assert_same(checkpoint.load("weight/"), {name: part + 1 for name, part in parts.items()})
    assert_same(checkpoint.load("moment1/"), {name: 2 * part for name, part in parts.items()})
    assert_same(checkpoint.load("moment2/"), {name: part**2 for name, part in parts.items()})


@pytest.mark.parametrize("layout", [Layout(2), Layout(1, 2)])
def test_the_optimizer_of_rank_files_goes_on(tmp_path: Path, layout: Layout) -> None:
    parts = random_parts(LLAMA)
    write_megatron(weights_of(LLAMA, parts), tmp_path / "theirs", layout, "legacy")
    for path in (tmp_path / "theirs").rglob("*.pt"):
        content = torch.load(path, weights_only=False)
        with_optimizer(content)
        torch.save(content, path)
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "run"), "--to", "run"]) == 0
    assert_state(tmp_path / "run/checkpoints/step-00000007", parts)
    assert Config.load(tmp_path / "run").optim.schedule == "constant"


def test_the_optimizer_of_torch_dist_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where it is stored by parameter."""
    parts, states = random_parts(LLAMA), {"fp32_param": lambda x: x + 1, "exp_avg": lambda x: 2 * x, "exp_avg_sq": lambda x: x**2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_megatron(weights_of(LLAMA, parts), tmp_path / "weights", Layout())
        assert main(["convert", str(tmp_path / "weights"), str(tmp_path / "run"), "--to", "run"]) == 2
        assert "holds no exp_avg by parameter" in capsys.readouterr().err

        def more(chunks: list[Chunk], objects: Any) -> Planner:
            named = [(c, f"optimizer.state.{kind}.{c.name}", change) for c in chunks for kind, change in states.items()]
            return Planner([*chunks, *(c._replace(name=n, values=lambda c=c, f=f: f(c.values())) for c, n, f in named)], objects)  # type: ignore[misc]

        monkeypatch.setattr("teratron.checkpoint.megatron.planned.Planner", more)
        write_megatron(weights_of(LLAMA, parts), tmp_path / "theirs", Layout())
    file = tmp_path / "theirs/iter_0000007/common.pt"
    common = torch.load(file, weights_only=False)
    with_optimizer(common | {"model": {}})
    torch.save(common, file)
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "run"), "--to", "run"]) == 0
    assert_state(tmp_path / "run/checkpoints/step-00000007", parts)


def changed(run: Path, change: Any, rank: int = 0) -> None:
    """A rank's file with something else in it."""
    path = run / f"iter_0000009/mp_rank_{rank:02d}/model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def test_a_missing_rank_is_named(run: Path) -> None:
    (run / "iter_0000009/mp_rank_01").rename(run / "away")
    with pytest.raises(UserError, match=r"mp_rank_01 is missing \(1 of 2\)"):
        open_weights(run)


def test_a_truncated_file_is_named(run: Path) -> None:
    path = run / "iter_0000009/mp_rank_01/model_optim_rng.pt"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"mp_rank_01/model_optim_rng\.pt: .*truncated"):
        open_weights(run)


STACKED = ("language_model", "encoder")
WRONG = {
    "missing": (lambda c: stack_of(c).pop("layers.2.mlp.dense_4h_to_h.bias"), r"blocks\.layers\.2\.mlp\.linear_fc2\.bias is missing"),
    "surplus": (lambda c: stack_of(c).update({"layers.2.mlp.gate.weight": torch.ones(2)}), r"mlp\.gate\.weight, which args do not"),
    "shape": (lambda c: stack_of(c).update({"layers.1.input_norm.weight": torch.ones(3)}), r"input_layernorm\.weight has shape \[3\]"),
    "numbers": (lambda c: stack_of(c).update({"layers.1.input_norm.weight": torch.ones(16).long()}), r"holds torch\.int64"),
    "architecture": (lambda c: setattr(c["args"], "squared_relu", True), "--squared-relu"),
    "norms": (lambda c: setattr(c["args"], "apply_layernorm_1p", True), "--apply-layernorm-1p"),
    "layers": (lambda c: setattr(c["args"], "num_layers", 5), r"layers\.4\..* is missing"),
    "vocabulary": (lambda c: setattr(c["args"], "vocab_size", 70), "--vocab-size = 70"),
    "no args": (lambda c: c.pop("args"), "holds no args"),
    "no model": (lambda c: c.pop("model"), "holds no 'model'"),
}


def stack_of(content: dict[str, Any]) -> dict[str, Tensor]:
    return content["model"]["language_model"]["encoder"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_refused_by_name(run: Path, what: str) -> None:
    change, message = WRONG[what]
    for rank in (0, 1):
        changed(run, change, rank)
    with pytest.raises(UserError, match=message):
        open_weights(run)


def test_a_tracker_that_leads_nowhere_is_named(run: Path) -> None:
    (run / "latest_checkpointed_iteration.txt").write_text("10")
    with pytest.raises(UserError, match="iter_0000010 is not in the folder"):
        open_weights(run)
    (run / "latest_checkpointed_iteration.txt").write_text("soon")
    with pytest.raises(UserError, match="expected a number of steps or 'release'"):
        open_weights(run)


def test_what_was_written_wrongly_does_not_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teratron.checkpoint.megatron.write._share", lambda source, row, rank: 2 * source.tensor(row))
    with pytest.raises(UserError, match=r"embedding.tokens.weight differs; nothing was put in place"):
        write_megatron(weights_of(GPT2, random_parts(GPT2)), tmp_path / "out", Layout(), "legacy")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("keys", "layout", "message"),
    [
        ({"norm_place": "post"}, Layout(), r"model\.norm_place = post"),
        ({"family": "encoder_decoder"}, Layout(), r"model\.family = encoder_decoder"),
        ({"activation": "relu"}, Layout(), r"model\.activation = relu"),
        ({"bias": False}, Layout(), "whose norms keep biases"),
        ({}, Layout(3), "--tensor 3 does not divide"),
        ({}, Layout(1, 3), "--pipeline 3 does not divide"),
    ],
)
def test_what_megatron_has_not_is_not_written(tmp_path: Path, keys: dict[str, Any], layout: Layout, message: str) -> None:
    config = dataclasses.replace(GPT2, **keys)
    with pytest.raises(UserError, match=message):
        write_megatron(weights_of(config, {}), tmp_path / "out", layout, "legacy")
    assert not (tmp_path / "out").exists()


def test_the_command_line_writes_and_reads(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(run), str(tmp_path / "w.safetensors")]) == 0
    again = [str(tmp_path / "w.safetensors"), str(tmp_path / "out"), "--to", "megatron", "--format", "legacy", "--tensor", "2"]
    assert main(["convert", *again]) == 0
    assert_same(read(tmp_path / "out"), random_parts(GPT2))
    assert main(["convert", *again]) == 2
    assert "exists" in capsys.readouterr().err
