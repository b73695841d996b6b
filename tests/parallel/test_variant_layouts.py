"""Law 1 for variants of positions, attention and blocks: each on every layout against the single process, in float64 to 1e-9."""

from __future__ import annotations

from typing import Any

import pytest
from cases import Keys, assert_layout_invisible, layout

pytestmark = pytest.mark.xdist_group("ranks")

ROPE: Keys = {"model.position": "rope", "model.norm": "rmsnorm", "model.bias": False, "model.activation": "swiglu"}
ALIBI: Keys = {"model.position": "alibi", "model.kv_heads": 2}
CAPPED: Keys = ROPE | {
    "model.attention_cap": 1.5, "model.output_cap": 2.0, "model.norm_place": "sandwich", "model.scale_embeddings": True,
    "model.norm_less_one": True, "model.qkv_bias": True,
}  # fmt: skip
PARALLEL: Keys = {"model.block": "parallel", "model.position": "sinusoidal"}
ONE_NORM: Keys = ROPE | {"model.block": "parallel_one_norm", "model.rope_share": 0.5, "model.tie_embeddings": False}
SANDWICH: Keys = {
    "model.norm_place": "sandwich", "model.position": "sinusoidal", "model.output_cap": 1.0, "model.tie_embeddings": False,
    "model.norm_less_one": True, "model.logit_scale": 0.3,
}  # fmt: skip
LATENT: Keys = ROPE | {"model.latent": 6, "model.latent_query": 10, "model.rope_dim": 4, "model.value_dim": 3}
LATENT_BIASED: Keys = {"model.position": "rope", "model.latent": 6, "model.rope_dim": 4, "model.attention_cap": 2.0, "model.bias": True}
EXPERTS: Keys = {"model.experts": 4, "model.expert_ffn": 12, "model.init_std": 0.5}
GROUPS: Keys = LATENT | EXPERTS | {
    "model.router": "sigmoid", "model.router_balance": "bias", "model.bias_rate": 0.01, "model.router_groups": 2,
    "model.normalise_gates": True, "model.shared_experts": 1,
}  # fmt: skip
WINDOWED: Keys = ALIBI | {"model.seq_length": 128, "model.window": 7, "model.attention_cap": 1.0, "train.global_batch": 2}
NEAR: Keys = ROPE | {
    "model.seq_length": 128,
    "model.window": 7,
    "model.global_every": 2,
    "model.window_theta": 30.0,
    "train.global_batch": 2,
}
PACKED, PLAIN, ODD, LONG = (True,), (False,), (False, 7), (True, 120)


def case(ranks: int, name: str, keys: Keys, shape: tuple[Any, ...], slow: bool = True) -> Any:
    return pytest.param(ranks, name, keys, shape, id=f"{name}, {keys}", marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(
    ("ranks", "name", "keys", "shape"),
    [
        case(2, "tensor 2 x sequence", LATENT, ODD, slow=False),
        case(2, "context 2 ring", CAPPED | ALIBI, PACKED, slow=False),
        case(2, "context 2 all_to_all", LATENT_BIASED | {"model.attention_dropout": 0.3}, PACKED, slow=False),
        case(2, "tensor 2", CAPPED | ALIBI | {"model.attention_dropout": 0.3}, PLAIN, slow=False),
        case(2, "tensor 2 x sequence", SANDWICH, ODD, slow=False),
        case(2, "pipeline 2", ONE_NORM | {"train.recompute": "full"}, PLAIN, slow=False),
        case(4, "pipeline 2 x tensor 2 x sequence", GROUPS | {"train.micro_batch": 4}, PLAIN, slow=False),
        *(
            case(2, name, keys, shape)
            for keys in (ALIBI, CAPPED, PARALLEL, ONE_NORM, SANDWICH, LATENT, LATENT_BIASED, GROUPS)
            for name, shape in (
                ("tensor 2", PACKED),
                ("tensor 2 x sequence", PACKED),
                ("pipeline 2 zb-h1", ODD),
                ("context 2 ring", ODD),
                ("context 2 all_to_all", PLAIN),
                ("shard parameters", PLAIN),
            )
        ),
        *(case(2, name, keys, LONG) for keys in (WINDOWED, NEAR) for name in ("tensor 2", "context 2 ring", "context 2 all_to_all")),
        case(4, "context 2 ring x tensor 2", LATENT | {"train.recompute": "selective"}, PACKED),
        case(4, "context 4 ring", CAPPED | ALIBI, PLAIN),
        case(8, "pipeline 2 x context 2 ring x tensor 2 x sequence", GROUPS | {"train.micro_batch": 4}, PACKED),
    ],
)
def test_variants_are_the_same_on_any_layout(ranks: int, name: str, keys: Keys, shape: tuple[Any, ...]) -> None:
    assert_layout_invisible(ranks, keys | layout(name), *shape)
