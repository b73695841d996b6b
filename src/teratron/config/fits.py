"""Which objective learns which family of models."""

from __future__ import annotations

from teratron.config.errors import UserError

FITS = {"next_token": ("gpt",)}
"""The families that each objective fits."""


def check_fit(objective: str, family: str) -> None:
    """Raise `UserError` for an objective that does not learn this family of models."""
    if family in FITS[objective]:
        return
    others = [name for name, families in FITS.items() if family in families]
    instead = f", or objective.name {' or '.join(others)}" if others else ""
    raise UserError(
        f"objective.name = {objective} does not fit model.family = {family}: choose model.family {' or '.join(FITS[objective])}{instead}"
    )
