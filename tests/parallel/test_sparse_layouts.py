"""Law 1 for sparse attention: every pattern on every layout, in sequences long enough that it is computed tile by tile."""

from __future__ import annotations

from typing import Any

import pytest
from cases import Keys, assert_layout_invisible, config_of, layout

from teratron.models.patterns import pattern_of
from teratron.models.sight import Sight

pytestmark = pytest.mark.xdist_group("ranks")

LENGTH = 120
BASE: Keys = {"model.seq_length": 128, "model.kv_heads": 2, "train.global_batch": 2, "train.micro_batch": 1, "model.position": "rope"}
WINDOW: Keys = BASE | {"model.window": 7, "model.global_every": 2}
SINKS: Keys = BASE | {"model.window": 9, "model.dilation": 2, "model.global_tokens": 3, "model.attention_dropout": 0.3}
STRIDED: Keys = BASE | {"model.window": 8, "model.pattern": "strided", "model.attention_dropout": 0.3}
FIXED: Keys = BASE | {"model.window": 16, "model.pattern": "fixed", "model.summary": 2}
ENCODER: Keys = BASE | {"model.family": "encoder", "model.window": 6, "model.global_tokens": 2}
T5: Keys = BASE | {"model.family": "encoder_decoder", "model.layers": 1, "model.window": 6}
PACKED, WHOLE, ODD = (True, LENGTH), (False, LENGTH), (False, LENGTH - 3)


def case(ranks: int, name: str, keys: Keys, shape: tuple[Any, ...], slow: bool = True) -> Any:
    return pytest.param(ranks, name, keys, shape, id=f"{name}, {keys}", marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(
    ("ranks", "name", "keys", "shape"),
    [
        case(2, "context 2 ring", STRIDED, PACKED, slow=False),
        case(2, "context 2 all_to_all", SINKS, ODD, slow=False),
        case(2, "tensor 2", FIXED, WHOLE, slow=False),
        case(2, "pipeline 2", WINDOW | {"train.recompute": "selective"}, PACKED, slow=False),
        *(case(2, "context 2 ring", keys, shape) for keys in (WINDOW, SINKS, FIXED, ENCODER, T5) for shape in (ODD, PACKED)),
        *(case(2, "context 2 all_to_all", keys, PACKED) for keys in (WINDOW, STRIDED, FIXED, ENCODER, T5)),
        *(case(2, "tensor 2 x sequence", keys, ODD) for keys in (WINDOW, SINKS, STRIDED, ENCODER, T5)),
        *(case(2, "pipeline 2", keys, WHOLE) for keys in (SINKS, STRIDED, FIXED, ENCODER)),
        case(4, "context 4 ring", SINKS, WHOLE),
        case(4, "context 2 ring x tensor 2", STRIDED | {"train.recompute": "full"}, ODD),
    ],
)
def test_sparse_attention_is_the_same_on_any_layout(ranks: int, name: str, keys: Keys, shape: tuple[Any, ...]) -> None:
    assert_layout_invisible(ranks, keys | layout(name), *shape)


@pytest.mark.parametrize("keys", [WINDOW, SINKS, STRIDED, FIXED, ENCODER, T5], ids=str)
def test_these_are_computed_tile_by_tile(keys: Keys) -> None:
    model = config_of(keys).model
    for causal in (True, False):
        assert Sight(causal, pattern_of(model)).tiles(LENGTH, LENGTH, 128)
