"""What the tests of training share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _assumed_peak(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the machine's peak takes a third of a second a run; `measured` in a test's arguments keeps it."""
    if "measured" not in request.fixturenames:
        monkeypatch.setattr("teratron.train.trainer.measure_peak", lambda device, dtype: 1e11)


@pytest.fixture
def measured() -> None:
    """Ask for the real measurement of the machine."""
