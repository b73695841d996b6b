"""Data: text -> tokens -> indexed files -> samples -> batches."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """`load_tokenizer` on first use: preparation workers import this package and must start fast."""
    if name == "load_tokenizer":
        from teratron.data.tokenizer import load_tokenizer

        return load_tokenizer
    raise AttributeError(f"module 'teratron.data' has no attribute '{name}'")
