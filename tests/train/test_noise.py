"""The gradient noise scale: known noise is found, whatever the batches, and a run measures it by its samples alone."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from teratron import Config, Trainer
from teratron.config import UserError
from teratron.train.noise import Noise, check_noise, part_of, separate


@pytest.mark.parametrize(("part", "whole"), [(2, 8), (1, 32), (16, 64)])
def test_known_noise_is_found(part: int, whole: int) -> None:
    """Gradients of sequences are a true one and independent noise: over 4,000 draws the estimate is the truth to within 4 errors."""
    draw = torch.Generator().manual_seed(1)
    truth = torch.linspace(-1, 1, 20, dtype=torch.float64)
    spread = torch.linspace(0.5, 2, 20, dtype=torch.float64)
    each = truth + spread * torch.randn(4000, whole, 20, generator=draw, dtype=torch.float64)
    small, large = (each[:, :count].mean(1).square().sum(1) for count in (part, whole))
    found = [separate(a, b, part, whole) for a, b in zip(small.tolist(), large.tolist(), strict=True)]
    for values, expected in (
        ([one.signal for one in found], float(truth.square().sum())),
        ([one.variance for one in found], float(spread.square().sum())),
    ):
        mean, error = torch.tensor(values).double().mean(), torch.tensor(values).double().std() / math.sqrt(len(found))
        assert abs(float(mean) - expected) < 4 * float(error)


def test_smoothing_keeps_a_constant_and_forgets() -> None:
    noise = Noise(2.0, 6.0)
    assert noise.critical_batch == 3.0
    assert noise.smoothed(noise).critical_batch == pytest.approx(3.0)
    later = noise
    for _ in range(100):
        later = Noise(1.0, 8.0).smoothed(later)
    assert later.critical_batch == pytest.approx(8.0, rel=1e-3)
    assert math.isnan(Noise(-1.0, 6.0).critical_batch)


def test_batches_that_cannot_be_measured_are_refused() -> None:
    config = Config().override({"log.noise_scale": 10, "train.global_batch": 4, "train.batch_schedule": "0:1, 10:4"})
    with pytest.raises(UserError, match=r"log\.noise_scale = 10 .* the global batch is 1"):
        check_noise(config, 1)
    experts = Config().override({"log.noise_scale": 10, "train.global_batch": 8, "model.experts": 4})
    check_noise(experts, 2)
    with pytest.raises(UserError, match=r"2 of 8 sequences .* 4 data ranks"):
        check_noise(experts, 4)
    assert [part_of(size) for size in (2, 8, 33)] == [1, 2, 8]


KEYS = {
    "model.layers": 1,
    "model.hidden": 16,
    "model.heads": 2,
    "model.seq_length": 16,
    "data.tokenizer": "bytes",
    "train.steps": 6,
    "train.global_batch": 8,
    "train.batch_schedule": "0:4, 3:8",
    "train.eval_every": 0,
    "checkpoint.every": 3,
    "checkpoint.keep": 0,
    "optim.lr": 1e-2,
    "optim.weight_decay_ramp": "linear",
    "log.noise_scale": 2,
    "log.norms": 3,
    "log.tensorboard": False,
}


def events(run: Path, kind: str) -> list[dict[str, object]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    dropped = ("time", "seconds", "tokens_per_second", "mfu", "data", "communication")
    return [{name: value for name, value in line.items() if name not in dropped} for line in lines if line["event"] == kind]


def test_growing_batches_measured_and_resumed(tmp_path: Path) -> None:
    """Samples come without gap or repeat, and a run that is interrupted measures and learns what one that is not does, bit for bit."""
    (tmp_path / "text.txt").write_text("".join(f"{number} is not {number * 7}, it is more. " for number in range(400)))
    config = Config().override({**KEYS, "data.text": str(tmp_path / "text.txt")})
    whole = Trainer(config, tmp_path / "whole", device="cpu", echo=False)
    samples = [whole.batch(step)["sample"].tolist() for step in range(1, 7)]
    assert samples[2:4] == [[8, 9, 10, 11], [12, 13, 14, 15, 16, 17, 18, 19]]
    assert [number for numbers in samples for number in numbers] == list(range(36))
    whole.train()
    Trainer(config.override({"train.steps": 6, "train.stop_after": 1e-6}), tmp_path / "cut", device="cpu", echo=False).train()
    Trainer(config, tmp_path / "cut", device="cpu", echo=False).train()
    assert [event["tokens"] for event in events(tmp_path / "whole", "step")] == [16 * count for count in (4, 8, 12, 20, 28, 36)]
    for kind in ("step", "noise", "norms"):
        assert events(tmp_path / "cut", kind) == events(tmp_path / "whole", kind)
    noise, norms = events(tmp_path / "whole", "noise"), events(tmp_path / "whole", "norms")
    assert [(event["step"], event["batch"]) for event in noise] == [(2, 4), (4, 8), (6, 8)]
    assert [event["step"] for event in norms] == [3, 6]
    assert events(tmp_path / "whole", "step")[-1]["weight_decay"] == 0.1
    page = (tmp_path / "whole" / "report.html").read_text()
    assert "Noise scale" in page
    assert page.count("blocks.0.attention.q.weight, step ") == 2, "a tooltip for each measurement"
