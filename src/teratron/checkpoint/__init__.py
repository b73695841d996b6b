"""Checkpoints: save, load, verify; import from Hugging Face."""

from teratron.checkpoint.open import LoadedModel, find_checkpoint, open_model
from teratron.checkpoint.reader import Checkpoint, checkpoint_folders, newest_checkpoint, open_checkpoint
from teratron.checkpoint.training import TrainingState, load_training, save_training, saved_state
from teratron.checkpoint.upcycle import upcycle
from teratron.checkpoint.weights import read_weights, weights_for, write_weights

__all__ = [
    "Checkpoint",
    "LoadedModel",
    "TrainingState",
    "checkpoint_folders",
    "find_checkpoint",
    "load_training",
    "newest_checkpoint",
    "open_checkpoint",
    "open_model",
    "read_weights",
    "save_training",
    "saved_state",
    "upcycle",
    "weights_for",
    "write_weights",
]
