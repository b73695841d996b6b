"""Config: overrides with types and suggestions, TOML there and back, checks, immutability, what may change on resume."""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teratron.config import Config, UserError, frozen_changes, key_names, nearest
from teratron.config.config import flatten, key_kinds
from teratron.config.keys import field_docs

RELATED = (
    "model.",
    "train.global_batch",
    "train.micro_batch",
    "train.batch_",
    "train.recompute",
    "train.memory_budget",
    "train.steps",
    "optim.warmup_steps",
    "optim.schedule",
    "optim.decay_",
    "optim.weight_decay_start",
    "optim.clip",
    "optim.min_lr",
    "optim.eps",
    "optim.groups",
    "optim.name",
    "optim.masters",
    "train.fp8_",
    "optim.trust_m",
    "optim.initial_loss_scale",
    "optim.min_loss_scale",
    "model.norm_eps",
    "checkpoint.failures_per_day",
    "train.spike",
    "data.text",
    "data.valid",
    "data.examples",
    "train.patience",
    "train.eval_tasks",
    "objective.",
)
"""Keys that are checked against another: a random config draws them together, or keeps their default."""


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a key's type; floats lie where every number key is legal."""
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    if typing.get_origin(kind) is Literal:
        return st.sampled_from(typing.get_args(kind))
    if typing.get_origin(kind) is typing.Union:
        return st.one_of(*map(values_of, typing.get_args(kind)))
    if kind == tuple[str, ...]:
        return st.lists(text.filter(bool), max_size=3).map(tuple)
    return {
        bool: st.booleans(),
        int: st.integers(1, 2**53),
        float: st.floats(0, 1, exclude_max=True),
        str: text,
    }[kind]


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Legal configs in which any key may differ from its default."""
    alone = {name: values_of(kind) for name, kind in key_kinds().items() if not name.startswith(RELATED)}
    values = draw(st.fixed_dictionaries({}, optional=alone))
    kv_heads, group, features = (draw(st.integers(1, 8)) for _ in range(3))
    values |= {"model.kv_heads": kv_heads, "model.heads": kv_heads * group, "model.hidden": kv_heads * group * features * 2}
    values |= {"model.dropout": draw(values_of(float)), "model.bias": draw(st.booleans()), "train.micro_batch": group}
    values |= {"train.global_batch": group * features, "optim.min_lr": values.get("optim.lr", 3e-4) * draw(st.floats(0, 1))}
    return Config().override(values)


@given(configs())
@settings(max_examples=60, deadline=None)
def test_toml_round_trip(config: Config) -> None:
    assert Config().override(flatten(tomllib.loads(config.to_toml()), "test")) == config


@given(configs())
@settings(max_examples=30, deadline=None)
def test_text_overrides_rebuild_any_config(config: Config) -> None:
    as_text = {name: value if isinstance(value, tuple) else str(value) for name, value in config.items()}
    assert Config().override(as_text) == config


@pytest.mark.parametrize(
    ("key", "given", "value"),
    [
        ("model.layers", "3", 3),
        ("model.layers", "1e3", 1000),
        ("model.layers", 4.0, 4),
        ("optim.lr", "1e-3", 1e-3),
        ("optim.lr", 1, 1.0),
        ("model.bias", "False", False),
        ("model.bias", True, True),
        ("model.norm", "rmsnorm", "rmsnorm"),
        ("data.text", "a.txt", ("a.txt",)),
        ("data.train", [0.3, "a", 1, "b"], ("0.3", "a", "1", "b")),
        ("data.valid", "", ()),
    ],
)
def test_override_converts_to_the_keys_type(key: str, given: object, value: object) -> None:
    found = dict(Config().override({key: given}).items())[key]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("key", "given", "expected"),
    [
        ("model.layers", "two", "integer"),
        ("model.layers", 2.5, "integer"),
        ("model.layers", True, "integer"),
        ("model.layers", "1e400", "integer"),
        ("model.layers", "0", "at least 1"),
        ("optim.lr", "fast", "number"),
        ("optim.lr", "nan", "number"),
        ("optim.lr", "inf", "number"),
        ("optim.lr", [1e-3], "number"),
        ("optim.beta1", "1.0", "from 0 to below 1"),
        ("model.bias", "yes", "true|false"),
        ("model.bias", 1, "true|false"),
        ("model.norm", "batchnorm", "one of layernorm, rmsnorm"),
        ("data.split", 90, "text"),
        ("data.split", "bad \udcff name", "text"),
        ("data.text", ["bad \udcff name"], "text"),
        ("data.text", 3, "list of text"),
        ("data.text", [[1, 2]], "list of text"),
        ("data.text", [{"a": 3}], "list of text"),
        ("data.text", ["a.txt", ""], "list of text"),
    ],
)
def test_wrong_value_is_refused_with_what_was_expected(key: str, given: object, expected: str) -> None:
    with pytest.raises(UserError) as error:
        Config().override({key: given})
    assert str(error.value).startswith(f"{key} = ")
    assert str(error.value).endswith(f"expected {expected}")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("model.layer", "model.layers"),
        ("train.layers", "model.layers"),
        ("modle.hidden", "model.hidden"),
        ("global_batch", "train.global_batch"),
    ],
)
def test_unknown_key_is_refused_with_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(UserError) as error:
        Config().override({wrong: "1"})
    assert str(error.value).startswith(f"unknown key '{wrong}'")
    assert f"did you mean '{right}'?" in str(error.value)


def test_nothing_near_means_no_suggestion() -> None:
    assert nearest("zzzzzz", ["model.layers", "optim.lr"]) == ""


def test_of_equally_near_names_the_first_is_suggested() -> None:
    assert nearest("choise", ["choice", "choose"]) == " (did you mean 'choice'?)"
    assert nearest("choise", ["choose", "choice"]) == " (did you mean 'choose'?)"


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"model.hidden": 100, "model.heads": 12}, ["model.hidden = 100", "model.heads = 12", "model.head_dim"]),
        ({"model.kv_heads": 5}, ["model.heads = 12", "model.kv_heads = 5"]),
        ({"model.position": "rope", "model.head_dim": 3}, ["model.head_dim = 3", "even"]),
        ({"model.max_positions": 512}, ["model.seq_length = 1024", "model.max_positions = 512"]),
        ({"train.memory_budget": 2, "train.recompute": "full"}, ["train.memory_budget = 2", "train.recompute", "full"]),
        ({"train.recompute_every": 2}, ["train.recompute_every = 2", "train.recompute = none", "--train.recompute full"]),
        ({"train.global_batch": 10, "train.micro_batch": 4}, ["train.global_batch = 10", "train.micro_batch = 4"]),
        ({"optim.min_lr": 1.0}, ["optim.min_lr = 1.0", "optim.lr = 0.0003"]),
        (
            {"optim.min_loss_scale": 4096, "optim.initial_loss_scale": 2},
            ["optim.min_loss_scale = 4096.0", "optim.initial_loss_scale = 2.0"],
        ),
        ({"model.family": "encoder"}, ["model.family = encoder", "objective.name = next_token"]),
        ({"optim.warmup_steps": 2000}, ["optim.warmup_steps = 2000", "train.steps = 1000"]),
        ({"optim.name": "schedule_free"}, ["optim.schedule = cosine", "--optim.schedule constant"]),
        (
            {"optim.name": "schedule_free", "optim.schedule": "constant", "optim.masters": "bf16", "train.precision": "bf16"},
            ["optim.masters = bf16"],
        ),
        ({"optim.masters": "bf16"}, ["optim.masters = bf16", "train.precision = fp32"]),
        ({"train.fp8_scaling": "row"}, ["train.fp8_scaling", "train.precision = fp32"]),
        ({"train.fp8_except": "first", "train.precision": "bf16"}, ["train.fp8_except", "train.precision = bf16"]),
        ({"model.mup_base": 64, "optim.name": "muon"}, ["model.mup_base = 64", "optim.name = muon"]),
        ({"model.mup_base_head": 64}, ["model.mup_base_head = 64", "model.mup_base"]),
        ({"optim.warmup_steps": 50, "optim.decay_steps": 40}, ["optim.decay_steps = 40", "optim.warmup_steps = 50"]),
        ({"optim.schedule": "wsd", "optim.warmup_steps": 50, "optim.decay_steps": 960}, ["optim.decay_steps = 960", "train.steps"]),
        ({"optim.schedule": "wsd", "optim.warmup_steps": "30%", "optim.decay_steps": "71%"}, ["optim.decay_steps = 71%", "= 30%"]),
        ({"optim.warmup_steps": "40M tokens"}, ["optim.warmup_steps = 40M tokens", "train.steps = 1000"]),
        ({"optim.warmup_steps": "5 percent"}, ["optim.warmup_steps = '5 percent'", "'5%'", "tokens"]),
        ({"optim.decay_steps": "101%"}, ["optim.decay_steps = '101%'"]),
        ({"optim.decay_shape": "sqrt"}, ["optim.decay_shape = sqrt", "optim.schedule = cosine"]),
        ({"optim.weight_decay_start": 0.2}, ["optim.weight_decay_start = 0.2", "optim.weight_decay_ramp = none"]),
        ({"optim.clip_by": "value", "optim.clip": 0}, ["optim.clip_by = value", "optim.clip = 0"]),
        ({"optim.clip_by": "adaptive"}, ["optim.clip_by = adaptive", "optim.clip = 1.0"]),
        ({"train.batch_tokens": 5000}, ["train.batch_tokens = 5000", "model.seq_length = 1024", "4096 or 5120"]),
        ({"train.batch_tokens": 5120, "train.micro_batch": 2}, ["global batch of 5 sequences", "train.micro_batch = 2"]),
        (
            {"train.batch_schedule": "0:16, 100:24"},
            ["train.batch_schedule = '0:16, 100:24'", "train.global_batch = 32", "--train.global_batch 24"],
        ),
        ({"train.batch_schedule": "0:18, 100:32", "train.micro_batch": 4}, ["global batch of 18 sequences", "train.micro_batch = 4"]),
        ({"train.batch_schedule": "10:16, 100:32"}, ["ascending steps from 0"]),
        ({"train.batch_schedule": "0:16:1"}, ["'0:16:1'", "STEP:SIZE"]),
        ({"train.batch_schedule": "8 10 1000"}, ["'8 10 1000'", "32 from 8 in steps of 10"]),
        ({"train.batch_schedule": "8 8"}, ["'8 8'", "START INCREMENT LENGTH"]),
        ({"train.batch_schedule": "8 8 many"}, ["'8 8 many'", "START INCREMENT LENGTH"]),
        ({"data.text": "a", "data.train": "b"}, ["data.text", "data.train"]),
        ({"data.text": "a", "data.valid": "b"}, ["data.valid", "data.train"]),
    ],
)
def test_keys_that_contradict_each_other_are_both_named(values: dict[str, object], named: list[str]) -> None:
    with pytest.raises(UserError) as error:
        Config().override(values)
    assert all(part in str(error.value) for part in named)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = [", "not a readable TOML file"),
        ("[model]\nlayers = 2\nlayers = 3\n", "not a readable TOML file"),
        ("layers = 3\n", "unknown section 'layers'"),
        ("[[model]]\nlayers = 3\n", "section 'model' must be a table: expected a line [model]"),
        ("model = " + "[" * 5000, "not a readable TOML file"),
        ("[model]\nlayers = " + "9" * 6000, "not a readable TOML file"),
        ("[optimizer]\nlr = 1\n", "unknown section 'optimizer' (did you mean 'optim'?)"),
        ("[model]\nlayer = 3\n", "unknown key 'model.layer' (did you mean 'model.layers'?)"),
        ("[model]\nlayers = 'many'\n", "model.layers = 'many': expected integer"),
        ("[model.layers]\nfirst = 1\n", "expected integer"),
        ("[model]\nhidden = 7\n", "model.hidden = 7 is not divisible by model.heads = 12"),
    ],
)
def test_bad_toml_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        Config.load(path)
    assert message in str(error.value)
    if "divisible" not in message:
        assert str(path) in str(error.value)


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[model]\nlayers = 3\n", "utf-8-sig")
    assert Config.load(path).model.layers == 3


def test_unreadable_files_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "absent.toml", tmp_path / "binary.toml", tmp_path):
        with pytest.raises(UserError, match=str(path)):
            Config.load(path)


def test_config_is_immutable_and_override_leaves_the_original() -> None:
    config = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model = config.model  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.layers = 2  # type: ignore[misc]
    assert config.override({"model.layers": 2}) != config == Config()
    assert hash(config) == hash(Config())


def test_sections_check_themselves_when_made_in_python() -> None:
    with pytest.raises(UserError, match=r"model\.layers = 0: expected at least 1"):
        dataclasses.replace(Config().model, layers=0)


def test_frozen_changes_names_what_a_resumed_run_may_not_change() -> None:
    old = Config()
    free = {"train.steps": 2000, "log.every": 1, "checkpoint.keep": 5, "train.micro_batch": 8, "data.workers": 2, "train.eval_every": 7}
    free |= {"parallel.tensor": 4, "parallel.shard": "gradients", "parallel.sequence": True, "train.recompute": "full"}
    assert frozen_changes(old, old.override(free)) == []
    frozen = {"model.layers": 3, "train.seed": 1, "train.global_batch": 8, "data.split": "1,1", "optim.lr": 1.0, "train.precision": "bf16"}
    frozen |= {"objective.label_smoothing": 0.1, "optim.loss_scale": 8.0}
    changes = frozen_changes(old, old.override(frozen | free | {"train.micro_batch": 4}))
    assert {name for name, _, _ in changes} == set(frozen)
    assert ("model.layers", 12, 3) in changes


def test_every_key_has_a_meaning() -> None:
    sections = {field.name: type(getattr(Config(), field.name)) for field in dataclasses.fields(Config)}
    documented = [f"{name}.{leaf}" for name, section in sections.items() for leaf in field_docs(section)]
    assert documented == key_names()
    assert all(section.section == name for name, section in sections.items())
