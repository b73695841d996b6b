"""Any place on any mesh without its processes: for tests of what a rank holds, not of what it sends."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from teratron.parallel.mesh import Mesh


def place(monkeypatch: pytest.MonkeyPatch, rank: int, **sizes: int) -> Mesh:
    """The mesh as one rank sees it; for the rest of the test, groups can be made and asked, not used."""
    monkeypatch.setattr(dist, "new_group", lambda ranks, timeout: None)
    return Mesh(sizes, rank)
