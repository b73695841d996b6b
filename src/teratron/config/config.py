"""One run, one config: the sections together, read from presets, TOML files, key-value overrides, and written back."""

from __future__ import annotations

import dataclasses
import functools
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

from teratron.config.batches import Batches, plan_batches
from teratron.config.errors import UserError, nearest
from teratron.config.fits import check_fit
from teratron.config.keys import coerce, kind_of
from teratron.config.lengths import Clock, parse_length
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

FREE_ON_RESUME = (
    "log.",
    "parallel.",
    "checkpoint.",
    "train.steps",
    "train.stop_after",
    "train.eval_every",
    "train.eval_batches",
    "train.patience",
    "train.eval_tasks",
    "train.eval_tasks_every",
    "train.eval_tasks_limit",
    "train.micro_batch",
    "train.recompute",
    "train.recompute_every",
    "train.memory_budget",
    "train.compile",
    "train.on_bad_numbers",
    "train.verify_every",
    "data.workers",
)
"""What may differ when a run goes on (contract C13); everything else decides the numbers."""


@dataclass(frozen=True)
class Config:
    """Everything that decides a run; immutable, passed explicitly."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        check_fit(self)
        self._check_precision()
        self._check_mup()
        if self.model.global_tokens and self.data.isolate_documents:
            raise UserError(
                f"model.global_tokens = {self.model.global_tokens} are the first of a sample, of which with data.isolate_documents = true "
                "only the first document sees them: leave one out"
            )
        self._check_predicted()
        if self.train.spike_zscore and (self.checkpoint.every == 0 or self.checkpoint.keep == 1):
            name = "every" if self.checkpoint.every == 0 else "keep"
            raise UserError(
                f"train.spike_zscore = {self.train.spike_zscore} goes back to an earlier checkpoint, of which checkpoint.{name} = "
                f"{getattr(self.checkpoint, name)} leaves none: raise checkpoint.{name}, or leave train.spike_zscore out"
            )
        self._check_batches()
        self._check_schedule()
        self._check_clipping()

    def _check_batches(self) -> None:
        micro, plain = self.train.micro_batch, not self.train.batch_tokens and not self.train.batch_schedule
        for size in self.batches.sizes:
            if micro and size % micro:
                name = f"train.global_batch = {size}" if plain else f"a global batch of {size} sequences"
                raise UserError(f"{name} is not divisible by train.micro_batch = {micro}: choose a divisor of the global batch")

    def _check_schedule(self) -> None:
        optim, steps = self.optim, self.train.steps
        warmup, decay = (parse_length(value, "") for value in (optim.warmup_steps, optim.decay_steps))
        risen = self.clock.after(warmup)
        if optim.schedule != "constant" and risen > self.clock.now(steps):
            run = f"the {self.clock.tokens(steps):,} tokens of train.steps" if warmup.unit == "tokens" else "train.steps"
            raise UserError(f"optim.warmup_steps = {optim.warmup_steps} exceeds {run} = {steps}: lower the first")
        if optim.schedule in ("cosine", "linear") and decay.amount and self.clock.after(decay) < risen:
            raise UserError(
                f"optim.decay_steps = {optim.decay_steps} ends before optim.warmup_steps = {optim.warmup_steps}: raise the first"
            )
        if optim.schedule == "wsd" and decay.amount and self.clock.before_end(decay) < risen:
            raise UserError(
                f"optim.decay_steps = {optim.decay_steps} and optim.warmup_steps = {optim.warmup_steps} overlap "
                f"in train.steps = {steps}: lower one"
            )

    def _check_clipping(self) -> None:
        bound, by = self.optim.clip, self.optim.clip_by
        if by != "norm" and bound == 0:
            raise UserError(f"optim.clip_by = {by} with optim.clip = 0 clips nothing: set optim.clip, or leave optim.clip_by out")
        if by == "adaptive" and bound >= 1:
            raise UserError(
                f"optim.clip = {bound} with optim.clip_by = adaptive lets a gradient be as large as its weights, which is no bound: "
                "expected below 1, such as 0.01"
            )

    @functools.cached_property
    def batches(self) -> Batches:
        """How many sequences each step takes."""
        return plan_batches(self.train.global_batch, self.train.batch_tokens, self.train.batch_schedule, self.model.seq_length)

    @property
    def largest_batch(self) -> int:
        """Sequences of the largest step."""
        return self.batches.sizes[-1]

    @functools.cached_property
    def clock(self) -> Clock:
        """What the schedules of `optim.*` go by."""
        return Clock(self.optim.clock, self.train.steps, self.model.seq_length, self.batches)

    def _check_precision(self) -> None:
        train, optim = self.train, self.optim
        if optim.masters == "bf16" and train.precision not in ("bf16", "fp8"):
            raise UserError(
                f"optim.masters = bf16 leaves weights to bfloat16 alone, train.precision = {train.precision}: set --train.precision bf16 "
                "or fp8, or leave optim.masters out"
            )
        if train.precision != "fp8" and (train.fp8_except or train.fp8_scaling != "tensor"):
            name = "fp8_except" if train.fp8_except else "fp8_scaling"
            raise UserError(
                f"train.{name} concerns float8, but train.precision = {train.precision}: set --train.precision fp8, or leave it out"
            )

    def _check_predicted(self) -> None:
        ahead, family, objective = self.model.predict_tokens, self.model.family, self.objective
        if ahead > 1 and (family != "gpt" or objective.name != "next_token"):
            raise UserError(
                f"model.predict_tokens = {ahead} goes with model.family = gpt and objective.name = next_token, not with {family} and "
                f"{objective.name}: leave it out"
            )
        if ahead == 1 and objective.ahead_weight != 1:
            raise UserError(
                f"objective.ahead_weight = {objective.ahead_weight} weighs tokens after the next, but model.predict_tokens = 1: raise the "
                "second, or leave the first out"
            )

    def _check_mup(self) -> None:
        optim = self.optim
        if self.model.mup_base and optim.name not in ("adamw", "adam", "schedule_free"):
            raise UserError(
                f"model.mup_base = {self.model.mup_base} scales Adam's learning rates, optim.name = {optim.name}: choose adamw, adam or "
                "schedule_free, or leave model.mup_base out"
            )

    @staticmethod
    def preset(name: str) -> Config:
        """A preset by name, such as `gpt2-124m` or `shakespeare-char`."""
        if name not in preset_names():
            raise UserError(f"no preset or file '{name}'{nearest(name, preset_names())}; presets: {', '.join(preset_names())}")
        text = (resources.files("teratron.config") / "presets" / f"{name}.toml").read_text("utf-8")
        return Config().override(flatten(tomllib.loads(text), name))

    @staticmethod
    def load(source: str | Path) -> Config:
        """A preset's name or a TOML file."""
        path = Path(source)
        if path.is_dir():
            path = path / "config.toml"
        if path.suffix != ".toml" and not path.is_file():
            return Config.preset(str(source))
        try:
            tree = tomllib.loads(path.read_text("utf-8-sig"))
        except FileNotFoundError:
            raise UserError(f"{path}: no such config file; give a TOML file or a preset: {', '.join(preset_names())}") from None
        except (ValueError, RecursionError, OSError) as error:
            raise UserError(f"{path}: not a readable TOML file: {error}") from None
        return Config().override(flatten(tree, str(path)), str(path))

    def override(self, values: Mapping[str, Any], origin: str = "") -> Config:
        """A new config with `section.key` values replaced; text is converted to each key's type.

        Raises `UserError` with the nearest right name for an unknown key, and the expected type for a wrong value.
        """
        changes: dict[str, dict[str, Any]] = {}
        where = f"{origin}: " if origin else ""
        for name, value in values.items():
            if name not in key_kinds():
                raise UserError(f"{where}unknown key '{name}'{nearest(name, key_kinds())}")
            section, leaf = name.split(".")
            changes.setdefault(section, {})[leaf] = coerce(value, key_kinds()[name], f"{where}{name}")
        sections = {section: dataclasses.replace(getattr(self, section), **leaves) for section, leaves in changes.items()}
        return dataclasses.replace(self, **sections)

    def items(self) -> Iterator[tuple[str, Any]]:
        """Every (`section.key`, value) in order."""
        for section in dataclasses.fields(self):
            part = getattr(self, section.name)
            for leaf in dataclasses.fields(part):
                yield f"{section.name}.{leaf.name}", getattr(part, leaf.name)

    def describe(self) -> str:
        """The whole config in one line a section, for a screen."""
        sections: dict[str, list[str]] = {}
        for name, value in self.items():
            section, leaf = name.split(".")
            sections.setdefault(section, []).append(f"{leaf}={_toml_value(value)}")
        return "\n".join(f"{section:<10}  {' '.join(leaves)}" for section, leaves in sections.items())

    def to_toml(self) -> str:
        """The whole config as TOML text, which `Config.load` reads back to an equal object."""
        lines: list[str] = []
        for name, value in self.items():
            section, leaf = name.split(".")
            if f"[{section}]" not in lines:
                lines += ["", f"[{section}]"]
            lines.append(f"{leaf} = {_toml_value(value)}")
        return "\n".join(lines[1:]) + "\n"


def preset_names() -> list[str]:
    """The presets that come with the package."""
    folder = resources.files("teratron.config") / "presets"
    return sorted(item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml"))


def key_names() -> list[str]:
    """Every `section.key`."""
    return list(key_kinds())


@functools.cache
def key_kinds() -> Mapping[str, Any]:
    """Every `section.key` and its declared type, in order."""
    default = Config()
    owners = {name: type(getattr(default, name.partition(".")[0])) for name, _ in default.items()}
    return MappingProxyType({name: kind_of(owner, name.partition(".")[2]) for name, owner in owners.items()})


def flatten(tree: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """TOML tables to `section.key` names."""
    sections = [field.name for field in dataclasses.fields(Config)]
    flat: dict[str, Any] = {}
    for section, table in tree.items():
        if section in sections and not isinstance(table, dict):
            raise UserError(f"{origin}: section '{section}' must be a table: expected a line [{section}], and its keys below")
        if section not in sections:
            raise UserError(f"{origin}: unknown section '{section}'{nearest(section, sections)}; sections: {', '.join(sections)}")
        flat |= {f"{section}.{leaf}": value for leaf, value in table.items()}
    return flat


def frozen_changes(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """The keys with both values that differ although a run that goes on may not change them (contract C13)."""
    then = dict(old.items())
    free = {name for name in then if name in FREE_ON_RESUME or f"{name.partition('.')[0]}." in FREE_ON_RESUME}
    return [(name, then[name], value) for name, value in new.items() if value != then[name] and name not in free]


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'
    return repr(value)
