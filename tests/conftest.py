"""What all tests share: the folder of real data sets, when it is there."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A test is right or wrong however busy the machine is.
settings.register_profile("no clocks", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
settings.load_profile("no clocks")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of specs and real data beside the checkout; tests that need it skip where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("no ../shared/data beside this checkout: real-data tests are skipped")
    return folder
