"""Checkpoints: save, load, verify; import from Hugging Face."""

from teratron.checkpoint.exchange import Weights, open_weights
from teratron.checkpoint.open import LoadedModel, open_model
from teratron.checkpoint.reader import Checkpoint, checkpoint_folders, find_checkpoint, newest_checkpoint, open_checkpoint
from teratron.checkpoint.training import TrainingState, load_training, save_training, saved_state
from teratron.checkpoint.upcycle import upcycle
from teratron.checkpoint.weights import weights_for
from teratron.checkpoint.weights_file import open_weights_file, write_weights

__all__ = [
    "Checkpoint",
    "LoadedModel",
    "TrainingState",
    "Weights",
    "checkpoint_folders",
    "find_checkpoint",
    "load_training",
    "newest_checkpoint",
    "open_checkpoint",
    "open_model",
    "open_weights",
    "open_weights_file",
    "save_training",
    "saved_state",
    "upcycle",
    "weights_for",
    "write_weights",
]
