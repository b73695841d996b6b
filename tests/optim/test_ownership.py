"""Matrices are dealt so that work is even."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from teratron.optim.ownership import deal


@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.integers(1, 9))
def test_no_rank_has_more_than_a_matrix_above_another(costs: list[int], ranks: int) -> None:
    owner = deal(dict(enumerate(map(float, costs))), ranks)
    assert owner.keys() == set(range(len(costs)))
    loads = [sum(costs[slot] for slot, rank in owner.items() if rank == each) for each in range(ranks)]
    assert sum(loads) == sum(costs)
    assert max(loads) - min(loads) <= max(costs)
