"""The dry run counts what a run does: messages are the papers' closed forms, memory is that of real steps, on paper or executed."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from teratron.cli.main import main
from teratron.config import Config, UserError
from teratron.models import build_model, parameter_count
from teratron.optim import OPTIMIZERS
from teratron.parallel.mesh import Mesh, mesh_sizes
from teratron.plan.dryrun import DryRun, dry_run, fake_batch, label_state
from teratron.plan.dryrun_text import dry_run_text
from teratron.plan.meter import Message, Meter
from teratron.train.engine import Engine

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "parallel"))  # the pool of processes and its cases
from cases import KEYS, batch_of, config_of, share
from pool import pool

SHAPE: dict[str, Any] = {"model.vocab_size": 16, "model.dropout": 0.0, "train.micro_batch": 1}
ROWS, LENGTH, HIDDEN, VOCAB = 8, 8, 16, 16
WORD = 8
"""Bytes of a float64 number."""
STATE = 1 * LENGTH * HIDDEN * WORD
"""Bytes of the hidden state of a micro-batch."""


def dry(keys: Mapping[str, Any], world: int = 1, rank: int = 0, build: Any = Engine, **options: Any) -> DryRun:
    return dry_run(config_of(SHAPE | dict(keys)), world, rank, build, **options)


def per_layer(keys: Mapping[str, Any], world: int, rank: int = 0) -> dict[tuple[str, str], tuple[int, int, int]]:
    """Calls, bytes and bytes sent that another layer adds to a step, by what and along which axes."""
    one, two = (dry({**keys, "model.layers": layers}, world, rank).messages for layers in (1, 2))
    nothing = (0, 0, 0)
    found = {}
    for message in two:
        more = tuple(b - a for a, b in zip(one.get(message, nothing), two[message], strict=True))
        if any(more):
            found[message.what, message.axes] = more
    return found  # type: ignore[return-value]


LAYER = 12 * HIDDEN**2 + 13 * HIDDEN
"""Parameters of a layer."""


# Messages


def test_tensor_ranks_sum_activations_four_times_a_layer() -> None:
    """Shoeybi et al. 2019: two all-reduces forwards, two backwards, 2 (n - 1) / n of their bytes each."""
    calls = 4 * ROWS
    assert per_layer({"parallel.tensor": 4}, 4) == {("all-reduce", "tensor"): (calls, calls * STATE, calls * STATE * 3 // 2)}


def test_sequence_ranks_gather_and_scatter_instead() -> None:
    """Korthikanti et al. 2022: the same bytes, and two more gathers for what the forward pass has not kept."""
    shared = 6 * HIDDEN  # two norms and the biases of row-cut layers, of which each rank has a part of the gradient
    found = per_layer({"parallel.tensor": 4, "parallel.sequence": True}, 4)
    assert found.pop(("all-gather", "tensor")) == (6 * ROWS, 6 * ROWS * STATE, 6 * ROWS * STATE * 3 // 4)
    assert found.pop(("reduce-scatter", "tensor")) == (4 * ROWS, 4 * ROWS * STATE, 4 * ROWS * STATE * 3 // 4)
    assert found == {("all-reduce", "tensor"): (1, shared * WORD, shared * WORD * 3 // 2)}


@pytest.mark.parametrize("shard", ["none", "optimizer", "gradients", "parameters"])
def test_data_ranks_exchange_what_zero_says(shard: str) -> None:
    """Rajbhandari et al. 2020: all-reduce; or reduce-scatter and all-gather; gradients, and weights twice, in each micro-batch."""
    size, micro = LAYER * WORD, ROWS // 2
    gather, scatter = ("all-gather", "shard"), ("reduce-scatter", "shard")
    expected = {
        "none": {("all-reduce", "replicate"): (1, size, size)},
        "optimizer": {gather: (1, size, size // 2), scatter: (1, size, size // 2)},
        "gradients": {gather: (1, size, size // 2), scatter: (micro, micro * size, micro * size // 2)},
        "parameters": {gather: (2 * micro, 2 * micro * size, micro * size), scatter: (micro, micro * size, micro * size // 2)},
    }
    assert per_layer({"parallel.shard": shard}, 2) == expected[shard]


def test_gradients_of_half_types_are_summed_in_float32_or_as_asked() -> None:
    for reduce, width in (("fp32", 4), ("bf16", 2)):
        found = per_layer({"train.precision": "bf16", "parallel.reduce": reduce}, 2)
        assert found == {("all-reduce", "replicate"): (1, LAYER * width, LAYER * width)}


@pytest.mark.parametrize(("schedule", "chunks"), [("1f1b", 1), ("interleaved", 2), ("zbv", 2)])
def test_a_pipeline_sends_each_state_and_its_gradient(schedule: str, chunks: int) -> None:
    """Once between neighbouring stages of different ranks, for each micro-batch."""
    keys = {"parallel.pipeline": 2, "parallel.schedule": schedule, "model.layers": 4}
    borders = {"1f1b": 1, "interleaved": 3, "zbv": 2}[schedule]  # the fold of a V lies within a rank
    total = 0
    for rank in (0, 1):
        found = dry(keys, 2, rank).messages
        sent, received = (found[Message(what, "pipeline", 2)] for what in ("send", "receive"))
        total += sent[0]
        assert sent == (sent[0], sent[0] * STATE, sent[0] * STATE)
        assert received == (sent[0], sent[0] * STATE, 0)
    assert total == 2 * borders * ROWS


def test_the_ring_passes_keys_and_values_and_brings_gradients_home() -> None:
    """Liu et al. 2023: n - 1 shifts forwards; backwards n - 1 of keys and values, and n of their gradients."""
    ranks = 4
    pair, shifts = 2 * STATE // ranks, (ranks - 1) + (ranks - 1) + ranks
    found = per_layer({"parallel.context": ranks}, ranks)
    assert found[("shift", "context")] == (shifts * ROWS, shifts * ROWS * pair, shifts * ROWS * pair)


def test_heads_are_exchanged_for_tokens_eight_times_a_layer() -> None:
    """Jacobs et al. 2023: queries, keys, values and outputs, forwards and backwards."""
    part = STATE // 4
    found = per_layer({"parallel.context": 4, "parallel.context_method": "all_to_all"}, 4)
    assert found[("all-to-all", "context")] == (8 * ROWS, 8 * ROWS * part, 8 * ROWS * part * 3 // 4)


EXPERTS: dict[str, Any] = {"model.experts": 4, "parallel.expert": 2, "model.router_balance": "none"}


def test_token_copies_travel_to_their_experts_and_back() -> None:
    """Lepikhin et al. 2020: twice forwards, twice backwards; and the numbers of rows beforehand."""
    rows, micro = 2 * LENGTH, ROWS // 2
    found = per_layer(EXPERTS, 2)
    copies, sizes = rows * HIDDEN * WORD, 4 * 8
    assert found[("all-to-all", "expert")] == (5 * micro, micro * (4 * copies + sizes), micro * (4 * copies + sizes) // 2)


def test_a_worst_load_makes_the_experts_work_grow() -> None:
    """Twice the rows are twice the experts' operations: six for each weight of an expert and row."""
    even, worst = dry(EXPERTS, 2), dry(EXPERTS, 2, load=2.0)
    rows = 2 * LENGTH * ROWS // 2
    assert worst.flops - even.flops == 2 * rows * 6 * 8 * HIDDEN**2
    assert worst.total > even.total


# Operations


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_operations_are_those_of_the_formula(recompute: str) -> None:
    """6 for each weight and token, attention twice forwards and five times backwards, half of it masked; what is made again once more."""
    layers, tokens = 2, ROWS * LENGTH
    dense, attention = 2 * 12 * HIDDEN**2, 2 * LENGTH * HIDDEN // 2
    again = {"none": 0, "selective": 2 * attention, "full": dense + 2 * attention}[recompute]
    # The last product of a block is not made again: nothing in its backward pass asks for its result.
    again -= 2 * 4 * HIDDEN**2 if recompute == "full" else 0
    expected = tokens * (layers * (3 * dense + 7 * attention + again) + 6 * VOCAB * HIDDEN)
    assert dry({"train.recompute": recompute}).flops == expected


# Memory


@pytest.mark.parametrize(
    ("precision", "weight", "exact", "shard"),
    [
        ("fp32", 4, 4, "none"),
        ("fp32", 4, 4, "parameters"),
        ("bf16", 2, 4, "none"),
        ("bf16", 2, 4, "optimizer"),
        ("fp16", 2, 4, "gradients"),
        ("fp16", 2, 4, "parameters"),
        ("fp64", 8, 8, "gradients"),
    ],
)
def test_state_is_what_is_written_down_for_each_parameter(precision: str, weight: int, exact: int, shard: str) -> None:
    count, half = parameter_count(build_model(config_of(SHAPE).model, device="meta")), weight < exact
    held = {kind: 2 if shard in kinds else 1 for kind, kinds in SHARDED.items()}  # over how many ranks
    gradients = exact * count // held["gradients"] + (weight * count if half and held["gradients"] == 1 else 0)
    expected = {
        "weights": weight * count // held["weights"],
        "gradients": gradients,
        "optimizer": (2 + half) * exact * count // held["optimizer"],
    }
    assert dry({"train.precision": precision, "parallel.shard": shard}, 2).state == expected


SHARDED = {"optimizer": ("optimizer", "gradients", "parameters"), "gradients": ("gradients", "parameters"), "weights": ("parameters",)}


def activations(layers: int, **keys: Any) -> int:
    options = {f"train.{name}": value for name, value in keys.items()}
    return dry({"model.layers": layers, "train.precision": "fp32", **options}).peak["activations"]


def test_a_layer_keeps_the_activations_that_can_be_counted_by_hand() -> None:
    """In features a token: the residual stream, norm, queries, keys and values, mixed values, residual stream, norm, and twice four."""
    tokens = LENGTH
    statistics = 2 + 2 + KEYS["model.heads"]  # mean and deviation of each norm, and the log-sum-exp of each head
    assert activations(4) - activations(3) == 4 * tokens * ((1 + 1 + 3 + 1 + 1 + 1 + 4 + 4) * HIDDEN + statistics)


def test_a_layer_that_is_made_again_keeps_its_input() -> None:
    assert activations(4, recompute="full") - activations(3, recompute="full") == 4 * LENGTH * HIDDEN


class Apart(Mesh):
    """Ranks that share no memory: what dry runs are of."""

    def _meet(self) -> None:
        return None


def real(rank: int, ranks: int, keys: dict[str, Any]) -> tuple[dict[str, int], dict[str, int], int]:
    """Peak by kind, state, and operations of a real step under the same meter."""
    config = config_of(SHAPE | keys)
    with Meter() as meter:
        engine = Engine(config, Apart(mesh_sizes(config.parallel, ranks), rank))
        label_state(meter, engine)
        engine.flat.publish()
        state = {kind: meter.now.memory[kind] for kind in ("weights", "gradients", "optimizer")}
        batch = fake_batch(engine.objective, config, config.train.global_batch // engine.mesh.data.size)
        meter.label("batch", batch.values())
        meter.restart()
        engine.step(batch, step=1, number=1, lr=1e-3)
        return dict(meter.peak), state, meter.now.flops.total()


REAL: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (1, {"train.precision": "bf16", "train.recompute": "full", "model.layers": 3}),
    (2, {"parallel.tensor": 2, "parallel.sequence": True, "model.dropout": 0.1}),
    (2, {"parallel.shard": "parameters", "train.precision": "bf16"}),
    (2, {"parallel.pipeline": 2, "model.layers": 4}),
    (2, {"parallel.context": 2, "train.recompute": "selective"}),
]


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(("ranks", "keys"), REAL, ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "")
def test_the_peak_is_that_of_a_real_step(ranks: int, keys: dict[str, Any]) -> None:
    found = pool().run(real, ranks, keys)
    for rank, (peak, state, flops) in enumerate(found):
        paper = dry(keys, ranks, rank)
        # Threads of gloo let go of what they have sent a little later, of pipeline messages at the end of the step.
        assert paper.total <= sum(peak.values()) <= paper.total * (1.0 if ranks == 1 else 1.25)
        assert (paper.state, paper.flops) == (state, flops)
        for kind in ("weights", "gradients", "optimizer", "batch") if ranks == 1 else ():  # else the peak may lie elsewhere
            assert paper.peak.get(kind, 0) == peak.get(kind, 0), kind


# What is not executed


PLAYED: list[tuple[int, dict[str, Any]]] = [
    (2, {"parallel.pipeline": 2, "parallel.schedule": schedule, "model.layers": layers})
    for schedule, layers in {"gpipe": 2, "1f1b": 2, "interleaved": 4, "zb-h1": 2, "zb-h2": 2, "zbv": 4, "dualpipev": 4}.items()
]
PLAYED += [
    (1, {"train.recompute": "selective", "train.precision": "fp16"}),
    (4, {"parallel.pipeline": 2, "parallel.shard": "parameters", "train.global_batch": 16}),
    (8, {**EXPERTS, "parallel.tensor": 2, "parallel.sequence": True, "parallel.pipeline": 2, "parallel.context": 2}),
]


@pytest.mark.parametrize(("ranks", "keys"), PLAYED, ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "")
def test_micro_batches_on_paper_count_like_executed_ones(ranks: int, keys: dict[str, Any]) -> None:
    rank = ranks // 2
    assert dry(keys, ranks, rank) == dry(keys, ranks, rank, whole=True)


def test_a_step_of_many_micro_batches_needs_no_more_memory_than_one_of_two() -> None:
    """Beside the batch itself, every micro-batch executed."""
    keys = {"train.global_batch": 4, "train.micro_batch": 2}
    few, many = (dry(keys | more, whole=True) for more in ({}, {"train.global_batch": 32, "train.batch_schedule": "0:4, 5:32"}))
    assert (few.micro_batches, many.micro_batches) == (2, 16)
    assert many.total - many.peak["batch"] == few.total - few.peak["batch"]


def test_many_micro_batches_continue_the_line_of_the_first_ones() -> None:
    some, more, many = (dry({"train.global_batch": count}, 1).flops for count in (4, 5, 50))
    assert many == some + 46 * (more - some)


# The step


class NoReads(TorchDispatchMode):
    """Refuses to let the host read a number."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host reads a number"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("read", [lambda x: x.item(), bool, float, math.isfinite])
def test_a_read_is_found(read: Any) -> None:
    with pytest.raises(AssertionError, match="reads a number"), NoReads():
        read(torch.ones(()) * 2)


@pytest.mark.parametrize("read", [lambda x: x.sum().item(), lambda x: x.tolist(), lambda x: bool(x.any())], ids=["item", "tolist", "bool"])
def test_a_dry_run_fails_where_the_host_reads_a_number(read: Any) -> None:
    def build(config: Config, mesh: Mesh) -> Engine:
        engine = Engine(config, mesh)
        engine.model.blocks["0"].ffn_norm.register_forward_hook(lambda module, inputs, output: read(output) and None)
        return engine

    with pytest.raises(RuntimeError):
        dry({"model.layers": 1}, build=build)


def steady(optimizer: str) -> dict[str, Any]:
    """What an optimizer asks of the schedule."""
    return {"optim.schedule": "constant"} if optimizer == "schedule_free" else {}


FP16 = {"train.precision": "fp16", "train.recompute": "full", "model.dropout": 0.1}


@pytest.mark.parametrize("keys", [FP16, *({"optim.name": name} | steady(name) for name in OPTIMIZERS)], ids=["fp16", *OPTIMIZERS])
def test_a_step_of_a_dense_model_reads_nothing_on_the_host(keys: dict[str, Any]) -> None:
    config = config_of(SHAPE | keys)
    engine = Engine(config, Mesh())
    engine.optimizer.initialise(1)
    batch = share(engine, batch_of(config, 1))
    with NoReads():
        tally, norm = engine.step(batch, step=1, number=1, lr=1e-3)
    assert math.isfinite(tally.loss())
    assert float(norm) > 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_can_be_run_dry(name: str) -> None:
    found = dry({"optim.name": name, "parallel.tensor": 2, "parallel.shard": "optimizer"} | steady(name), 4)
    assert found.peak["optimizer"] >= found.state["optimizer"] > 0


# The face


def options(**changes: Any) -> list[str]:
    keys = KEYS | SHAPE | {name.replace("__", "."): value for name, value in changes.items()}
    return [word for name, value in keys.items() for word in (f"--{name}", str(value))]


def test_the_command_prints_and_writes_what_was_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "found.json"
    asked = ["--dry-run", "--world", "4", "--rank", "3", "--memory", "1", "--json", str(file)]
    assert main(["train", *options(parallel__tensor=2), *asked]) == 0
    shown, found = capsys.readouterr().out, dry({"parallel.tensor": 2, "model.dropout": 0.0}, 4, 3)
    assert shown == dry_run_text(found, 1.0) + "\n"
    assert "fits 1 GiB" in shown
    written = json.loads(file.read_text("utf-8"))
    assert (written["peak"], written["flops"], written["rank"], written["world"]) == (found.peak, found.flops, 3, 4)
    assert sum(message["calls"] for message in written["messages"]) == sum(calls for calls, *_ in found.messages.values())
    assert list(tmp_path.iterdir()) == [file]


def test_what_does_not_fit_is_said_with_by_how_much() -> None:
    found = replace(dry({}), peak={"activations": 3 * 2**30})
    assert "does not fit 2 GiB: takes 3.0 GiB, 1.0 GiB too much" in dry_run_text(found, 2.0)
    assert "fits 4 GiB: takes 3.0 GiB, 1.0 GiB are left" in dry_run_text(found, 4.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dry-run", "--world", "4", "--rank", "4"], "--rank 4: expected a rank from 0 to 3"),
        (["--dry-run", "--world", "4", "--rank", "-1"], "--rank -1: expected a rank from 0 to 3"),
        (["--dry-run", "--world", "3", "--parallel.tensor", "2"], "parallel.tensor = 2 does not divide the 3 processes"),
        (["--dry-run", "--world", "16"], "train.global_batch = 8 cannot be shared by 16 data ranks"),
        (["--dry-run", "--world", "0"], "--world 0: expected at least 1 process"),
        (["--dry-run", "--nproc", "2"], "--nproc with --dry-run"),
        (["--dry-run", "--run", "there"], "--run with --dry-run"),
        (["--dry-run", "--memory", "0"], "--memory 0: expected a number above 0"),
        (["--world", "4"], "--world is about a dry run: add --dry-run"),
        ([], "--run is missing"),
    ],
)
def test_what_cannot_be_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *options(), *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "world", "memory"), [("megatron-8.3b", 512, 32), ("gpt3-175b", 1536, 80), ("gpt-1t", 3072, 80)])
def test_the_papers_models_fit_the_devices_they_were_planned_for(preset: str, world: int, memory: int) -> None:
    config = Config.preset(preset)
    for rank in (0, world - 1):
        assert dry_run(config, world, rank, Engine).total < memory * 2**30


def test_an_error_names_the_rank_before_anything_is_built() -> None:
    with pytest.raises(UserError, match="--rank 2"):
        dry({}, 2, 2)
