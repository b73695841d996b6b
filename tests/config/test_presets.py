"""The presets load, round trip through TOML, and say where they come from."""

from __future__ import annotations

from importlib import resources

import pytest

from teratron.config import Config, UserError, preset_names

PROMISED = {
    "gpt2-124m",
    "megatron-355m",
    "megatron-2.5b",
    "megatron-8.3b",
    "gpt3-175b",
    "gpt-1t",
    "llama3-8b",
    "llama3-70b",
    "shakespeare-char",
    "xlnet-tiny",
    "xlnet-base",
    "xlnet-large",
    "mtp-tiny",
}


def test_promised_presets_exist() -> None:
    assert set(preset_names()) >= PROMISED


@pytest.mark.parametrize("name", preset_names())
def test_preset_loads_and_names_its_source(name: str) -> None:
    config = Config.load(name)
    assert config == Config.preset(name) != Config()
    text = (resources.files("teratron.config") / "presets" / f"{name}.toml").read_text("utf-8")
    assert text.startswith("# "), "the first line says what the preset is; the config reference shows it"


@pytest.mark.parametrize("name", preset_names())
def test_preset_round_trips(name: str, tmp_path) -> None:
    config = Config.preset(name)
    (tmp_path / "config.toml").write_text(config.to_toml(), "utf-8")
    assert Config.load(tmp_path / "config.toml") == config
    assert Config.load(tmp_path) == config, "a run directory stands for the config in it"


def test_shakespeare_is_nanogpts_cpu_recipe() -> None:
    config = Config.preset("shakespeare-char")
    model, optim, train = config.model, config.optim, config.train
    assert (model.layers, model.heads, model.hidden, model.seq_length, model.bias, model.dropout) == (4, 4, 128, 64, False, 0.0)
    assert (optim.lr, optim.min_lr, optim.warmup_steps, optim.schedule) == (1e-3, 1e-4, 100, "cosine")
    assert (optim.beta2, optim.weight_decay, optim.clip) == (0.99, 0.1, 1.0)
    assert (train.steps, train.global_batch, config.data.tokenizer, config.data.split) == (2000, 12, "chars", "90,10")


def test_unknown_preset_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no preset or file 'gpt2-125m' \(did you mean 'gpt2-124m'\?\); presets: "):
        Config.load("gpt2-125m")
