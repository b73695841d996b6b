"""Command-line keys: every form of a value, and every way to get one wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teratron.config import Config, UserError
from teratron.config.arguments import parse_overrides, split_overrides


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", {}),
        ("--model.layers 3", {"model.layers": "3"}),
        ("--model.layers=3", {"model.layers": "3"}),
        ("--model.tie-embeddings false", {"model.tie_embeddings": "false"}),
        ("--model.bias --optim.lr 1", {"model.bias": True, "optim.lr": "1"}),
        ("--model.bias TRUE", {"model.bias": "TRUE"}),
        ("--model.bias=no", {"model.bias": "no"}),
        ("--no-model.bias", {"model.bias": False}),
        ("--model.no-bias", {"model.bias": False}),
        ("--no-model.tie-embeddings", {"model.tie_embeddings": False}),
        ("--optim.lr -1e-3", {"optim.lr": "-1e-3"}),
        ("--data.split=a=b", {"data.split": "a=b"}),
        ("--data.text a b -c --model.layers 2", {"data.text": ("a", "b", "-c"), "model.layers": "2"}),
        ("--data.text=a", {"data.text": ("a",)}),
        ("--data.valid=", {"data.valid": ()}),
        ("--model.layers 2 --model.layers 2", {"model.layers": "2"}),
    ],
)
def test_forms_of_a_value(line: str, expected: dict[str, object]) -> None:
    assert parse_overrides(line.split()) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--model.layers", "--model.layers has no value: expected integer"),
        ("--model.layers --optim.lr 1", "--model.layers has no value: expected integer"),
        ("--data.text", "--data.text has no value: expected list of text; --data.text= empties it"),
        ("--model.layer 3", "unknown key '--model.layer' (did you mean 'model.layers'?)"),
        ("--modle.layers=3", "unknown key '--modle.layers' (did you mean 'model.layers'?)"),
        ("--no-model.bia", "unknown key '--no-model.bia' (did you mean 'model.bias'?)"),
        ("--no-model.layers", "--no-model.layers: model.layers is integer, not true|false; type --model.layers VALUE"),
        ("--no-model.bias=true", "--no-model.bias takes no value"),
        ("--model.layers 3 4", "unexpected argument '4'"),
        ("--model.bias 1", "unexpected argument '1'"),
        ("gpt2-124m", "unexpected argument 'gpt2-124m': expected --section.key value"),
        ("--layers 3", "unexpected argument '--layers'"),
        ("--model.layers 2 --model.layers 3", "--model.layers is given twice, as '2' and '3': keep one"),
    ],
)
def test_mistakes_are_one_line(line: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_overrides(line.split())
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_keys_are_taken_out_and_the_rest_keeps_its_order() -> None:
    line = "gpt2-124m --model.layers 2 --run out.d --train.compile --nproc 2 --data.text a b --device cpu -- --model.layers x"
    overrides, rest = split_overrides(line.split())
    assert overrides == {"model.layers": "2", "train.compile": True, "data.text": ("a", "b")}
    assert rest == ["gpt2-124m", "--run", "out.d", "--nproc", "2", "--device", "cpu", "--", "--model.layers", "x"]


def test_a_boolean_leaves_the_positional_after_it() -> None:
    assert split_overrides(["--train.compile", "gpt2-124m"]) == ({"train.compile": True}, ["gpt2-124m"])


@given(st.integers(1, 10**9), st.floats(0, 1e9), st.booleans(), st.lists(st.text("ab /.é-", min_size=1).map("x".__add__), min_size=1))
def test_typed_values_reach_the_config(layers: int, lr: float, bias: bool, text: list[str]) -> None:
    spaced = ["--model.layers", str(layers), "--optim.lr", repr(lr), "--data.text", *text, "--model.bias" if bias else "--no-model.bias"]
    config = Config().override(parse_overrides(spaced))
    assert (config.model.layers, config.optim.lr, config.model.bias, config.data.text) == (layers, lr, bias, tuple(text))
