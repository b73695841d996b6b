"""The config of a run: typed sections, presets, TOML, overrides."""

from teratron.config.config import Config, frozen_changes, key_names, preset_names
from teratron.config.errors import UserError, nearest
from teratron.config.model import ModelConfig
from teratron.config.sections import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    ObjectiveConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "LogConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "ParallelConfig",
    "TrainConfig",
    "UserError",
    "frozen_changes",
    "key_names",
    "nearest",
    "preset_names",
]
