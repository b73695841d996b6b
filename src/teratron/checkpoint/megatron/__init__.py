"""NVIDIA Megatron-LM: its checkpoints in both directions, and its arguments."""

from teratron.checkpoint.megatron.opened import is_megatron, open_megatron

__all__ = ["is_megatron", "open_megatron"]
