"""From a task's files to a folder from which `teratron train` learns: examples, their tokenizer, the task, and the run's config."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from teratron.checkpoint.exchange import open_weights
from teratron.checkpoint.source import Weights
from teratron.config import Config, ModelConfig, UserError
from teratron.data.examples import Example, longest, write_examples
from teratron.data.open import save_tokenizer
from teratron.data.order import permute
from teratron.data.tokenizer import Tokenizer, load_tokenizer
from teratron.tasks.finetune import TASKS
from teratron.tasks.finetune.coder import Coder
from teratron.tasks.finetune.rows import Row, Table, find_columns, read_table
from teratron.tasks.finetune.task import Options, Task

TASK_FILE, EXAMPLES = "task.json", "examples"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """What `teratron finetune` is asked for."""

    task: str
    model: Path
    data: tuple[Path, ...]
    valid: tuple[Path, ...] = ()
    test: tuple[Path, ...] = ()
    tokenizer: str | None = None
    """File, folder or `bytes`; None = the one beside the model."""
    columns: Mapping[str, str] = field(default_factory=dict)
    epochs: float = 3.0
    options: Options = field(default_factory=lambda: Options(0))
    """Length 0 = what the examples need, at most what the model has; the seed is that of the overrides."""
    layer_decay: float = 1.0
    freeze: int = 0
    """Blocks, from the first, that do not learn, and with them the embeddings."""
    scratch: bool = False
    """Draw the weights, and use the model's shape and tokenizer alone."""
    seeds: int = 1
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        return int(self.overrides.get("train.seed", 1234))


@dataclass(frozen=True)
class Prepared:
    """A folder that is ready to be learned from."""

    config: Config
    file: Path
    """That config, for `teratron train`."""
    task: Task
    tables: dict[str, Table]
    """train, valid and test."""


def prepare(job: Job, run: Path, say: Say) -> Prepared:
    """Read, check and encode everything, and write RUN/examples and RUN/task.json; tells what was read. Done again it makes the same.

    Raises `UserError` for data, a model or keys that do not fit.
    """
    kind, source = TASKS[job.task], open_weights(job.model)
    tokenizer = _tokenizer(job, source)
    begun = _described(job, tokenizer)
    _check_begun(run, begun)
    if source.config.family not in kind.families:
        raise UserError(
            f"--model {job.model}: {job.task} is for model.family {' or '.join(kind.families)}, this is {source.config.family}: "
            f"choose another model, or another task"
        )
    tables = read_tables(job, kind)
    task = kind(_options(job, source))
    task.learn(tables["train"].rows)
    for name in ("train", "valid", "test"):
        task.check(tables[name].rows, tables[name].name)
    coder = Coder(tokenizer, source.config, task.options.length)
    examples = {}
    for name in ("train", "valid"):
        examples[name] = task.examples(tables[name].rows, coder)
        notes = "; ".join([*tables[name].notes, *task.notes()])
        say(f"{name}: {tables[name].name}: {len(tables[name].rows):,} rows, {len(examples[name]):,} examples; {notes}")
    config = _config(job, task, source, examples, run)
    examples = task.referred(examples, None if job.scratch else source, config)
    folder = run / EXAMPLES
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in examples.items():
        write_examples(folder / f"{name}.safetensors", found)
    if not (folder / "tokenizer").is_dir():
        save_tokenizer(tokenizer, folder / "tokenizer")
    (folder / "config.toml").write_text(config.to_toml(), "utf-8")
    content = {"task": task.name, "options": asdict(task.options), "facts": task.facts, "begun": begun}
    (run / TASK_FILE).write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    return Prepared(config, folder / "config.toml", task, tables)


def _described(job: Job, tokenizer: Tokenizer) -> dict[str, Any]:
    """What decides the examples of a job and what of the model learns from them, for comparison."""
    found: dict[str, Any] = {"task": job.task, "model": str(job.model.absolute())}
    found |= {name: [str(path.absolute()) for path in getattr(job, name)] for name in ("data", "valid")}
    found |= {name: getattr(job, name) for name in ("scratch", "freeze", "layer_decay")}
    options = asdict(job.options) | {"seed": job.seed}
    del options["beams"]  # they concern what is predicted
    return found | {"columns": dict(job.columns), "tokenizer": tokenizer.fingerprint} | options


def _check_begun(run: Path, wanted: Mapping[str, Any]) -> None:
    """Raise `UserError` where a folder holds another fine-tuning, whose examples would be lost."""
    try:
        found = json.loads((run / TASK_FILE).read_text("utf-8"))["begun"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    for name, value in wanted.items():
        if found.get(name) != value:
            raise UserError(f"--run {run} holds a fine-tuning with {name} = {found.get(name)}, now {value}: choose another folder")


def _options(job: Job, source: Weights) -> Options:
    """Those of the job with the length that the model has. Raises `UserError` for one that the task or the model does not have."""
    given, positions = job.options, source.config.positions
    for option in fields(Options):
        value = getattr(given, option.name)
        users = [name for name, kind in TASKS.items() if option.name in kind.takes]
        if users and job.task not in users and value != option.default:
            raise UserError(f"--{option.name.replace('_', '-')} {value} concerns {' and '.join(users)}, not {job.task}: leave it out")
    if given.length < 0 or given.length > positions:
        raise UserError(f"--length {given.length}: expected 1 to {positions}, the positions of the model, or 0 for what the examples need")
    length = given.length or positions
    if given.stride > length // 2:
        raise UserError(
            f"--stride {given.stride}: pieces of at most {length} tokens share at most half of them: choose at most {length // 2}"
        )
    return replace(given, length=length, seed=job.seed)


def read_tables(job: Job, kind: type[Task]) -> dict[str, Table]:
    """The rows to learn from, to hold out and to test with. Without --valid every tenth row, by the seed, is held out."""
    found = {"train": job.data, "valid": job.valid, "test": job.test}
    tables = {name: _table(paths, kind, job.columns) for name, paths in found.items() if paths}
    if "valid" not in tables:
        whole = tables["train"]
        if len(whole.rows) < 10:
            raise UserError(f"--data {whole.name}: {len(whole.rows)} rows are too few to hold some out: give --valid FILE")
        order = permute(np.arange(len(whole.rows)), len(whole.rows), job.seed)
        cut = len(whole.rows) // 10
        held, rest = (sorted(order[part].tolist()) for part in (slice(cut), slice(cut, None)))
        tables["train"] = Table(whole.name, [whole.rows[number] for number in rest], whole.notes)
        tables["valid"] = Table(f"a tenth of {whole.name}", [whole.rows[number] for number in held], whole.notes)
    tables.setdefault("test", tables["valid"])
    return tables


def _table(paths: Sequence[Path], kind: type[Task], named: Mapping[str, str]) -> Table:
    return kind.read(find_columns(read_table(paths, kind.parallel_text), kind.columns, named, kind.optional))


def _tokenizer(job: Job, source: Weights) -> Tokenizer:
    found = load_tokenizer(job.tokenizer) if job.tokenizer else source.tokenizer
    if found is None:
        raise UserError(f"--model {source.name}: has no tokenizer beside it: give the model's own with --tokenizer FILE_OR_FOLDER")
    if found.vocab_size > source.config.vocab_size:
        raise UserError(
            f"--model {source.name}: its tokenizer has {found.vocab_size:,} tokens, its weights {source.config.vocab_size:,}: "
            "the tokenizer belongs to another model: give the right one with --tokenizer FILE_OR_FOLDER"
        )
    return found


def _config(job: Job, task: Task, source: Weights, examples: Mapping[str, Sequence[Example]], run: Path) -> Config:
    """The run's config: what the task asks for, then what is usual in fine-tuning, then what the user says."""
    model, begun = source.config, source.run_config().objective
    count, most = len(examples["train"]), max(map(longest, examples.values()))
    batch = int(job.overrides.get("train.global_batch", min(task.usual_batch, max(1, count // 8))))
    steps = max(1, math.ceil(job.epochs * count / batch))
    keys: dict[str, Any] = {f"model.{part.name}": getattr(model, part.name) for part in fields(model)}
    keys |= {f"objective.{part.name}": getattr(begun, part.name) for part in fields(begun)}
    keys |= {"model.seq_length": max(most, model.window), "model.max_positions": model.positions, "model.dropout": 0.1}
    keys |= {"model.head": "language", "model.classes": 0, "model.class_bias": True}
    keys |= {"model.attention_dropout": 0.0, "model.predict_tokens": 1, "model.recurrence": 0}
    keys |= {"objective.name": task.objective, "objective.sentence": "none", "data.examples": str(run / EXAMPLES)}
    keys |= {"optim.lr": usual_lr(model.hidden, bool(job.overrides.get("model.adapter_rank", model.adapter_rank)))}
    keys |= {"optim.schedule": "linear", "optim.warmup_steps": max(1, steps // 10), "optim.weight_decay": 0.01, "optim.beta2": 0.98}
    keys |= {"train.steps": steps, "train.global_batch": batch, "train.eval_every": max(1, math.ceil(count / batch))}
    keys |= {"train.patience": 3, "checkpoint.keep": 1, "checkpoint.every": 0}
    keys |= {"train.init": "" if job.scratch else str(job.model)}
    keys |= task.keys()
    if keys["model.head"] != "language":
        keys |= {"model.head_transform": False}
    groups = _groups(job, model)
    return Config().override(keys | ({"optim.groups": groups} if groups else {}) | dict(job.overrides))


def usual_lr(hidden: int, adapters: bool) -> float:
    """A learning rate that suits fine-tuning: 5e-5 at width 768, by the inverse of the width; adapters learn ten times as fast."""
    return float(f"{min(5e-5 * 768 / hidden, 1e-3) * (10 if adapters else 1):.1e}")


def _groups(job: Job, model: ModelConfig) -> tuple[str, ...]:
    """Frozen blocks, and learning rates that fall from the last block to the first (Howard and Ruder 2018)."""
    embeddings, *blocks = _depths(model)
    if not 0 <= job.freeze <= len(blocks):
        raise UserError(f"--freeze {job.freeze}: expected 0 to {len(blocks)}, the blocks of the model")
    if not 0 < job.layer_decay <= 1:
        raise UserError(f"--layer-decay {job.layer_decay:g}: expected a factor above 0, at most 1, such as 0.9")
    below = enumerate(reversed((embeddings, *blocks)), 1) if job.layer_decay != 1 else ()
    rates = [f"{pattern}: lr={job.layer_decay**depth:.6g}" for depth, patterns in below for pattern in patterns]
    frozen = (embeddings, *blocks[: job.freeze]) if job.freeze else ()
    return (*rates, *(f"{pattern}: frozen" for patterns in frozen for pattern in patterns))


def _depths(model: ModelConfig) -> list[tuple[str, ...]]:
    """Patterns of the parts at each depth: the embeddings, then each block; the decoder's blocks stand on the encoder's."""
    if model.family != "encoder_decoder":
        return [("embedding.*",), *((f"blocks.{layer}.*",) for layer in range(model.layers))]
    encoder, (first, *others) = ([(f"{stack}.{layer}.*",) for layer in range(model.layers)] for stack in ("encoder", "decoder"))
    return [("embedding.*", "bridge.embedding.*"), *encoder, ("bridge.norm.*", *first), *others]


def load_task(folder: Path) -> Task:
    """The task of a run. Raises `UserError` for a folder that `teratron finetune` has not made."""
    try:
        content = json.loads((folder / TASK_FILE).read_text("utf-8"))
        return TASKS[content["task"]](Options(**content["options"]), content["facts"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder / TASK_FILE}: says no task: give a run of `teratron finetune`") from None


def run_tokenizer(run: Path) -> Tokenizer:
    """That of a run of `teratron finetune`."""
    return load_tokenizer(run / EXAMPLES / "tokenizer")


__all__ = ["Job", "Prepared", "Row", "load_task", "prepare", "read_tables"]
