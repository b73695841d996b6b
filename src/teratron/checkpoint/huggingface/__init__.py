"""Hugging Face folders, both ways: each architecture is one description (`Architecture`) of its config.json and its tensors."""

from teratron.checkpoint.huggingface.reading import is_huggingface, open_huggingface
from teratron.checkpoint.huggingface.writing import write_huggingface

__all__ = ["is_huggingface", "open_huggingface", "write_huggingface"]
