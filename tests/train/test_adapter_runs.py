"""A run with adapters: begins where its base stands, moves nothing else, and computes the same when it is opened and merged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import state, tiny, write_text

from teratron.checkpoint import open_model, open_weights
from teratron.cli.main import main
from teratron.models.adapters import SUFFIXES
from teratron.train.trainer import Trainer


def test_adapters_are_learnt_on_a_base_and_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = tiny(write_text(tmp_path / "text.txt"), train__precision="fp64", model__dropout=0.0, optim__lr=3e-2)
    base = Trainer(plain, tmp_path / "base", device="cpu", echo=False)
    base.train()
    keys = {"train.init": str(tmp_path / "base"), "model.adapter_rank": 2, "model.adapter_dora": True}
    run = Trainer(plain.override(keys), tmp_path / "run", device="cpu")
    assert "new: blocks.0.attention.q.lora_a, blocks.0.attention.q.lora_b, blocks.0.attention.q.magnitude and" in capsys.readouterr().out
    begun = run.evaluate()
    assert begun == pytest.approx(base.evaluate(), rel=1e-12)
    run.train()
    assert run.evaluate() < begun
    learnt, before = state(tmp_path / "run"), state(tmp_path / "base")
    frozen = [name for name in learnt if name.startswith("weight/") and not name.endswith(SUFFIXES)]
    assert [name for name in frozen if not torch.equal(learnt[name], before[name])] == []

    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "merged.safetensors")]) == 0
    assert open_weights(tmp_path / "merged.safetensors").config.adapter_rank == 0
    tokens = torch.arange(8)[None]
    inputs = {"tokens": tokens, "positions": tokens}
    alone, merged = (open_model(tmp_path / name, dtype=torch.float64).model for name in ("run", "merged.safetensors"))
    torch.testing.assert_close(merged(inputs)["hidden"], alone(inputs)["hidden"], rtol=0, atol=1e-12)
