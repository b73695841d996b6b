"""Checkpoints: save, load, verify; import from Hugging Face."""

from teratron.checkpoint.open import LoadedModel, open_model
from teratron.checkpoint.reader import Checkpoint, checkpoint_folders, newest_checkpoint, open_checkpoint
from teratron.checkpoint.training import TrainingState, load_training, save_training, saved_state

__all__ = [
    "Checkpoint",
    "LoadedModel",
    "TrainingState",
    "checkpoint_folders",
    "load_training",
    "newest_checkpoint",
    "open_checkpoint",
    "open_model",
    "save_training",
    "saved_state",
]
