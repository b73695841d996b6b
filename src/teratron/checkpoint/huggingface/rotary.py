"""Rotary positions in a `config.json`: `rope_theta` and `rope_scaling` as older files have them, or `rope_parameters`."""

from __future__ import annotations

import json
from typing import Any

from teratron.checkpoint.huggingface.settings import Both, Ours, Settings
from teratron.config import ModelConfig, UserError

_KEYS = {
    "linear": {"factor": "rope_factor"},
    "llama3": {
        "factor": "rope_factor", "original_max_position_embeddings": "rope_original", "low_freq_factor": "rope_slow",
        "high_freq_factor": "rope_fast",
    },
    "yarn": {
        "factor": "rope_factor", "original_max_position_embeddings": "rope_original", "beta_slow": "rope_slow", "beta_fast": "rope_fast",
        "attention_factor": "rope_sharpness",
    },
}  # fmt: skip
"""Their keys of each kind of scaling, and ours."""
_ALWAYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "truncate"}


def rope(theta: float = 10000.0, share: str = "") -> Both:
    """The setting; theta: their default base; share: their key of the share of features that is rotated, where there is one."""

    def read(settings: Settings) -> Ours:
        found = settings.get("rotary_emb_base" if share else "rope_theta", theta)
        ours: Ours = {}
        for key in ("rope_scaling", "rope_parameters"):
            said = settings.get(key, {})
            if not isinstance(said, dict):
                raise _refused(key, said)
            ours |= scaling(key, said) if said else {}
            found = said.get("rope_theta", found)
            if said.get("partial_rotary_factor", 1) != 1 and not share:
                raise _refused(key, said)
            if share:
                ours["rope_share"] = said.get("partial_rotary_factor", ours.get("rope_share", settings.get(share, 0.25)))
        return {**ours, "rope_theta": found}

    def write(config: ModelConfig) -> dict[str, Any]:
        said = {"rope_theta": config.rope_theta, "rope_scaling": written_scaling(config)}
        return said | ({share: config.rope_share, "rotary_emb_base": config.rope_theta} if share else {})

    return Both(read, write)


def scaling(key: str, said: dict[str, Any]) -> Ours:
    """The keys of a scaling of theirs. Raises `UserError` for one that is not known."""
    kind = said.get("rope_type", said.get("type", "default"))
    if kind == "default":
        return {}
    known = _KEYS.get(kind, {})
    other = [name for name, value in said.items() if name not in known and name not in _ALWAYS and value is not None]
    if not known or other or said.get("truncate", True) is not True:
        raise _refused(key, said)
    return {"rope_scaling": kind} | {ours: said[theirs] for theirs, ours in known.items() if said.get(theirs) is not None}


def _refused(key: str, said: Any) -> UserError:
    kinds = ", ".join(_KEYS)
    return UserError(f"'{key}' = {json.dumps(said)} is not supported, expected null, or type default, {kinds} without further keys")


def written_scaling(config: ModelConfig) -> dict[str, Any] | None:
    """The way back; None = no scaling of theirs."""
    if config.rope_scaling not in _KEYS:
        return None
    kind, usual = config.rope_scaling, {"rope_fast": 32.0, "rope_slow": 1.0, "rope_sharpness": 0.0} if config.rope_scaling == "yarn" else {}
    values = {ours: config.fast_turns if ours == "rope_fast" else getattr(config, ours) for ours in _KEYS[kind].values()}
    return {"rope_type": kind} | {theirs: values[ours] for theirs, ours in _KEYS[kind].items() if values[ours] != usual.get(ours)}
