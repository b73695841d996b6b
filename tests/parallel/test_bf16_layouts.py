"""bfloat16 weights without masters are rounded alike on every sharding of the data ranks, bit for bit."""

from __future__ import annotations

import pytest
import torch
from cases import Keys, layout, outcome, train
from pool import pool

pytestmark = pytest.mark.xdist_group("ranks")

KEYS: Keys = {"train.precision": "bf16", "optim.masters": "bf16", "optim.moments": "bf16", "model.layers": 1}


def test_no_sharding_changes_a_bit() -> None:
    found = {shard: outcome(pool().run(train, 2, KEYS | layout(shard))) for shard in ("", "shard optimizer", "shard parameters")}
    plain = found.pop("")
    assert {values.dtype for values in plain.state.values()} == {torch.bfloat16}
    for other in found.values():
        assert other.losses == plain.losses
        assert [name for name, values in other.state.items() if not torch.equal(values, plain.state[name])] == []
