"""Bad numbers over several processes: planted in one rank, found in every layout, and the rank, module or weight is named."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import assert_same_state, events, options, write_text

from teratron.checkpoint import newest_checkpoint, saved_state
from teratron.parallel.launch import launch
from teratron.train.engine import Engine
from teratron.train.replicas import Difference, compare_copies, digest, repeat_step
from teratron.train.trace import locate

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "parallel"))  # the pool of processes and its cases
from cases import batch_of, engine_of, layout, share
from pool import pool

pytestmark = pytest.mark.xdist_group("ranks")

LAST = 1
"""The rank in which faults are planted."""


def planted(engine: Engine, kind: str, name: str, call: int) -> Iterator[Any]:
    """Hooks that make NaN in one rank: of a module's output, of the gradient of its input, or of a weight's gradient.

    call: the forward pass of the module, from 1, in which the fault is planted.
    """
    calls = [0]

    def forward(module: Any, inputs: Any, output: Any) -> Any:
        calls[0] += 1
        return output * math.nan if calls[0] == call else None

    def backward(module: Any, inputs: Any) -> None:
        calls[0] += 1
        if calls[0] == call:
            inputs[0].register_hook(lambda slope: slope * math.nan)

    for model in engine.stages.stages().values():
        for path, module in model.named_modules():
            if path == name and kind == "forward":
                yield module.register_forward_hook(forward)
            if path == name and kind == "backward":
                yield module.register_forward_pre_hook(backward)
        for path, parameter in model.named_parameters():
            if path == name and kind == "gradient":
                yield parameter.register_hook(lambda slope: slope * math.nan)


PLANTS = (
    ("forward", "blocks.1.ffn.up", "the output of blocks.1.ffn.up in the forward pass of micro-batch {} on rank 1"),
    ("backward", "blocks.1.ffn.down", "the gradient of the input of blocks.1.ffn.down in the backward pass of micro-batch {} on rank 1"),
    ("gradient", "blocks.1.ffn_norm.weight", "the gradient of blocks.1.ffn_norm.weight on rank 1"),
)


def look(rank: int, ranks: int, keys: dict[str, Any], call: int) -> tuple[list[str], bool]:
    """What is found of each plant, and of none at last; and whether state and gradients are what they were."""
    engine = engine_of(rank, ranks, {"train.micro_batch": 2, **keys})
    batch = share(engine, batch_of(engine.config, 1))
    before = [int(digest(piece.values)) for piece in engine.optimizer.pieces()]
    found = []
    for kind, name, _ in PLANTS:
        hooks = list(planted(engine, kind, name, call)) if rank == LAST else []
        found.append(locate(engine, batch, 1, 1.0))
        for hook in hooks:
            hook.remove()
    found.append(locate(engine, batch, 1, 1.0))
    same = before == [int(digest(piece.values)) for piece in engine.optimizer.pieces()]
    return found, same and not any(bucket.gradient.any() for bucket in engine.flat.trained)


@pytest.mark.parametrize(
    "name",
    [
        "replicate 2",
        "shard parameters",
        "shard gradients x recompute",
        "tensor 2",
        "tensor 2 x sequence",
        "context 2",
        "pipeline 2 1f1b",
        "pipeline 2 zb-h1",
    ],
)
def test_numbers_that_are_not_finite_are_located(name: str) -> None:
    keys: dict[str, Any] = layout(name.removesuffix(" x recompute"))
    call = 2
    if name.endswith("recompute"):
        keys["train.recompute"] = "full"
        call = 1  # the second would be the same micro-batch in the backward pass
    expected = [words.format(call) for _, _, words in PLANTS] + [""]
    for found, unchanged in pool().run(look, 2, keys, call):
        assert found == expected
        assert unchanged


def both(rank: int, ranks: int, keys: dict[str, Any]) -> str:
    """NaN in the first stage's gradient of an input, which its cause in the second stage's forward pass comes before."""
    engine = engine_of(rank, ranks, {"train.micro_batch": 2, **keys})
    kind, name = (("backward", "blocks.0.ffn.down"), ("forward", "head.norm"))[rank]
    assert list(planted(engine, kind, name, 1 + 2 * rank))
    return locate(engine, share(engine, batch_of(engine.config, 1)), 1, 1.0)


def test_a_forward_pass_is_a_cause_before_any_backward_pass() -> None:
    found = pool().run(both, 2, layout("pipeline 2 1f1b"))
    assert found == ["the output of head.norm in the forward pass of micro-batch 3 on rank 1"] * 2


def flip(rank: int, ranks: int, keys: dict[str, Any], culprit: int, name: str) -> list[Difference | None]:
    """What the comparison says after two steps, and once a bit of one rank's numbers has been flipped."""
    engine = engine_of(rank, ranks, keys)
    for step in (1, 2):
        engine.step(share(engine, batch_of(engine.config, step)), step=step, number=step, lr=1e-2)
    found = [compare_copies(engine)]
    if rank == culprit:
        kind, _, part = name.partition("/")
        if kind == "used":
            (values,) = [b.weights[s.start : s.stop] for b in engine.flat.buckets for s in b.spans if s.part.name == part]
        else:
            values = next(piece.values for piece in engine.optimizer.pieces() if piece.name == name)
        values.view({2: torch.int16, 8: torch.int64}[values.element_size()])[-1] ^= 1
    return [*found, compare_copies(engine)]


FLIPS = [
    ("replicate 3", 3, 1, "weight/blocks.1.ffn.up.weight", (1,), True),
    ("replicate 2", 2, 1, "moment2/blocks.0.attention.q.weight", (0, 1), False),
    ("shard optimizer", 2, 0, "used/blocks.0.ffn.down.weight", (0, 1), False),
    ("replicate 2 x shard gradients", 4, 3, "moment1/blocks.1.ffn.down.weight", (1, 3), False),
    ("context 3", 3, 2, "weight/head.norm.weight", (2,), True),
    ("tensor 2 x sequence", 2, 1, "weight/blocks.0.ffn_norm.weight", (0, 1), False),
    ("pipeline 2 1f1b", 2, 1, "weight/embedding.tokens.weight", (0, 1), False),
]


@pytest.mark.parametrize(("name", "ranks", "culprit", "part", "blamed", "outvoted"), FLIPS)
def test_a_flipped_bit_is_found_in_every_kind_of_copy(
    name: str, ranks: int, culprit: int, part: str, blamed: tuple[int, ...], outvoted: bool
) -> None:
    keys = layout(name) | ({"train.global_batch": 6} if "3" in name else {})
    found = pool().run(flip, ranks, keys, culprit, part)
    assert found == [[None, Difference(blamed, outvoted, (part,))]] * ranks


def test_rounded_weights_are_compared_as_well_as_their_masters() -> None:
    found = pool().run(flip, 2, layout("replicate 2") | {"train.precision": "bf16"}, 1, "used/blocks.1.ffn.down.weight")
    assert found == [[None, Difference((0, 1), False, ("used/blocks.1.ffn.down.weight",))]] * 2


def wavering(rank: int, ranks: int, keys: dict[str, Any], culprit: int | None) -> list[int]:
    """One rank computes a little otherwise the second time."""
    engine = engine_of(rank, ranks, keys)
    calls = [0]

    def waver(module: Any, inputs: Any, output: Any) -> Any:
        calls[0] += 1
        return output * (1 + 1e-12) if calls[0] == 2 and rank == culprit else None

    next(m for name, m in engine.model.named_modules() if name == "blocks.0.ffn.up").register_forward_hook(waver)
    return repeat_step(engine, share(engine, batch_of(engine.config, 1)), 1, 1.0)


@pytest.mark.parametrize("name", ["replicate 2", "shard parameters"])
def test_a_rank_that_computes_otherwise_the_second_time_is_named(name: str) -> None:
    assert pool().run(wavering, 2, layout(name), 1) == [[1], [1]]
    assert pool().run(wavering, 2, layout(name), None) == [[], []]


SCRIPT = """
import json, math, os, signal, sys
import torch
from teratron.cli.main import main
from teratron.train import trainer
from teratron.train.engine import Engine

torch.set_num_threads(1)
trainer.measure_peak = lambda device, dtype: 1e11
plan, sys.argv = json.loads(sys.argv[1]), sys.argv[1:]
made, build, step = [], Engine.__init__, Engine.step
hit = os.environ["RANK"] == "1"

def planted_build(engine, *args, **more):
    build(engine, *args, **more)
    if hit and plan.get("nan"):
        weight = dict(engine.model.named_parameters())["blocks.0.ffn.up.weight"]
        weight.register_hook(lambda slope: slope * math.nan if made[-1] >= plan["nan"] else slope)

def planted_step(engine, batch, *, step: int, **more):
    made.append(step)
    if hit and len(made) == plan.get("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    if hit and step == plan.get("flip"):
        engine.flat.trained[0].master.view(torch.int32)[5] ^= 2**20
    tally, norm = original(engine, batch, step=step, **more)
    if step in plan.get("spikes", ()):
        tally.sums["next_token"].sum.mul_(100)
    return tally, norm

original = Engine.step
Engine.__init__, Engine.step = planted_build, planted_step
sys.exit(main())
"""
"""The command line with faults planted in its second rank."""


class Runs:
    """Two workers of the command line, on a text, with something planted."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.script = folder, folder / "planted.py"
        self.script.write_text(SCRIPT)
        self.text = write_text(folder / "text.txt")

    def train(self, name: str, plan: dict[str, Any], **keys: Any) -> int:
        keys = {"data__text": self.text, "train__eval_every": 0, "train__eval_batches": 1, "train__micro_batch": 0} | keys
        where = ["--run", str(self.folder / name), "--device=cpu"]
        return launch(2, [str(self.script), json.dumps(plan), "train", *options(**keys), *where])


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def test_nan_in_one_ranks_gradient_halts_the_run_and_names_it(runs: Runs, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert runs.train("run", {"nan": 3}) == 2
    told = capfd.readouterr().err
    assert "step 3: the gradient norm is nan; first not finite: the gradient of blocks.0.ffn.up.weight on rank 1, in the" in told
    assert [event["step"] for event in events(tmp_path / "run", "save")] == [2]
    assert [event["fault"] for event in events(tmp_path / "run", "bad_numbers")] == ["reproducible"]


def test_a_flipped_bit_of_a_replica_stops_the_run(runs: Runs, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert runs.train("run", {"flip": 4}, train__verify_every=2) == 2
    told = capfd.readouterr().err
    assert "are not the same since step 2: ranks 0, 1 differ, and which is wrong cannot be told; the same step computed twice is" in told
    assert [event["step"] for event in events(tmp_path / "run", "save")] == [2], "nothing corrupted was saved"
    (event,) = events(tmp_path / "run", "corruption")
    assert (event["step"], event["ranks"], event["since"]) == (4, [0, 1], 2)


def test_a_killed_run_goes_back_from_its_spikes_to_the_same_weights(runs: Runs, tmp_path: Path) -> None:
    """Killed on the way up again, before anything has been saved that knows of the spike."""
    keys = {"train__spike_zscore": 20, "train__spike_window": 8, "train__steps": 18, "checkpoint__every": 4}
    plan = {"spikes": [12, 13]}
    assert runs.train("whole", plan, **keys) == 0
    assert runs.train("killed", plan | {"kill": 14}, **keys) == 1  # the 12th has led back to step 8
    assert runs.train("killed", plan, **keys) == 0
    assert_same_state(tmp_path / "whole", tmp_path / "killed")
    checkpoint = newest_checkpoint(tmp_path / "killed", print)
    assert checkpoint is not None
    assert saved_state(checkpoint).left_out == (10, 11, 12, 13)
