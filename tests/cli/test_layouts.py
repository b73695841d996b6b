"""Pipelines, context ranks and experts through the command line: in float32 every layout gives the losses of a single process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import losses, options, write_text

from teratron.cli.main import main
from teratron.parallel.schedules import SCHEDULES

pytestmark = pytest.mark.xdist_group("ranks")

TOLERANCE = 1e-4
"""Of float32 (contract C1)."""
STEPS = 50
MOE = ["--model.experts=4", "--model.expert_ffn=64", "--model.z_loss=1e-3"]
LAYOUTS: dict[str, tuple[int, str, list[str]]] = {
    # processes, layout, model
    **{schedule: (2, f"--parallel.pipeline=2 --parallel.schedule={schedule} --train.micro_batch=2", []) for schedule in SCHEDULES},
    "ring": (2, "--parallel.context=2 --parallel.context_method=ring", []),
    "all_to_all": (2, "--parallel.context=2 --parallel.context_method=all_to_all", []),
    "expert": (2, "--parallel.expert=2", MOE),
    "pipeline x tensor": (4, "--parallel.pipeline=2 --train.micro_batch=2 --parallel.tensor=2", []),
    "pipeline x parameters": (4, "--parallel.pipeline=2 --train.micro_batch=2 --parallel.shard=parameters", []),
    "zbv x sequence": (
        4,
        "--parallel.pipeline=2 --parallel.schedule=zbv --train.micro_batch=2 --parallel.tensor=2 --parallel.sequence",
        [],
    ),
    "pipeline x ring": (4, "--parallel.pipeline=2 --train.micro_batch=2 --parallel.context=2", []),
    "all_to_all x gradients": (4, "--parallel.context=2 --parallel.context_method=all_to_all --parallel.shard=gradients", []),
    "expert x sequence": (4, "--parallel.expert=2 --parallel.tensor=2 --parallel.sequence --parallel.shard=optimizer", MOE),
    "expert x pipeline": (4, "--parallel.expert=2 --parallel.pipeline=2 --parallel.schedule=dualpipev --train.micro_batch=2", MOE),
    "expert x ring": (4, "--parallel.expert=4 --parallel.context=2 --parallel.shard=parameters", MOE),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


Trained = Callable[[list[str], list[str]], dict[int, float]]


@pytest.mark.parametrize(
    ("processes", "layout", "model"),
    [
        (4, "--parallel.pipeline=2 --parallel.context=2", []),
        (
            2,
            "--parallel.expert=2 --parallel.tensor=2 --parallel.sequence",
            ["--model.experts=4", "--model.capacity=0.9", "--model.z_loss=0.01"],
        ),
    ],
    ids=["pipeline x context", "expert x sequence"],
)
def test_a_few_tiny_steps_are_those_of_one_process(text: Path, tmp_path: Path, processes: int, layout: str, model: list[str]) -> None:
    keys = options(data__text=text, model__layers=2, model__seq_length=7, train__steps=3, optim__eps=1e-6)
    for name, more in (("alone", []), ("cut", [f"--nproc={processes}", *layout.split()])):
        assert main(["train", *keys, *model, "--run", str(tmp_path / name), "--device=cpu", *more]) == 0
    assert list(losses(tmp_path / "cut")) == [1, 2, 3]
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "alone"), rel=TOLERANCE)


@pytest.fixture(scope="module")
def plays(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Train the preset on Shakespeare's plays; a run that is there already is not repeated. Returns the losses."""
    folder, made = tmp_path_factory.mktemp("plays"), dict[str, dict[int, float]]()
    source = shared / "data" / "tinyshakespeare" / "input.txt"
    fixed = ["--data.text", str(source), "--train.eval_every=0", "--train.eval_batches=1", "--log.tensorboard=false"]
    fixed += [f"--train.steps={STEPS}", "--model.dropout=0.1", "--optim.warmup_steps=10", "--device=cpu"]

    def train(model: list[str], layout: list[str]) -> dict[int, float]:
        name = " ".join([*model, *layout])
        if name not in made:
            run = folder / str(len(made))
            assert main(["train", "shakespeare-char", *fixed, *model, *layout, "--run", str(run)]) == 0
            made[name] = losses(run)
        return made[name]

    return train


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_fifty_steps_of_shakespeare_are_those_of_one_process(plays: Trained, name: str, record_property: Callable[..., None]) -> None:
    processes, layout, model = LAYOUTS[name]
    found, expected = plays(model, [f"--nproc={processes}", *layout.split()]), plays(model, [])
    record_property("largest difference", max(abs(found[step] / expected[step] - 1) for step in expected))
    assert len(found) == STEPS
    assert found == pytest.approx(expected, rel=TOLERANCE)
