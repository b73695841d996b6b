"""A run of Megatron-LM goes on here: weights in master precision and Adam's moments become a checkpoint, arguments its config."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from teratron.checkpoint.manifest import whole
from teratron.checkpoint.megatron.arguments import Given, model_keys
from teratron.checkpoint.megatron.opened import Opened, Pieces, entries_of, in_todays_order, open_iteration
from teratron.checkpoint.megatron.ranks import RankFile, chunks_of, flat_tensors, join_ranks
from teratron.checkpoint.megatron.rows import canonical
from teratron.checkpoint.megatron.torch_files import Stored
from teratron.checkpoint.megatron.training import run_keys
from teratron.checkpoint.training import TrainingState, save_training
from teratron.config import Config, UserError
from teratron.parallel.boxes import Piece

_MOMENTS = {"exp_avg": "moment1", "exp_avg_sq": "moment2"}
"""What Adam's states are called there and here."""
_MASTERS = "fp32_param"


def write_run(source: Path, run: Path, settled: Callable[[Config], Config]) -> Path:
    """Write a run whose only checkpoint is the state of a run of Megatron-LM; returns the checkpoint.

    All of the state is in memory at once.

    Args: settled: what a run makes of its config before it begins, such as absolute paths. Raises `UserError` for an optimizer that is
    not Adam, for one whose state is not stored by parameter (the distributed optimizer's buffers, but for
    `--dist-ckpt-optim-fully-reshardable`), and where `run` is not empty.
    """
    if run.exists() and (run.is_file() or any(run.iterdir())):
        raise UserError(f"{run}: exists: choose another folder for the run")
    opened = open_iteration(source)
    model = opened.config()
    states = _states(opened)
    given = Given(opened.args, opened.kind)
    config = Config().override({f"model.{name}": value for name, value in model_keys(given).items()} | run_keys(given))
    config = settled(config.override({"model.vocab_size": model.vocab_size}))
    if config.optim.name != "adamw":
        raise UserError(f"{opened.folder}: --optimizer = {given['optimizer']}, of which no state is read: expected adam")
    if opened.step > config.train.steps:
        raise UserError(f"{opened.folder}: stands at step {opened.step}, beyond --train-iters = {config.train.steps}: is it another run's?")
    kinds: dict[str, Pieces] = {"weight": states.pop(_MASTERS, opened.model)}
    kinds |= {_MOMENTS[name]: pieces for name, pieces in states.items()}
    pieces = [
        Piece(f"{kind}/{entry.name}", tuple(entry.shape), (whole(entry.shape),), entry.values().float().reshape(-1))
        for kind, tensors in kinds.items()
        for entry in entries_of(opened, model, tensors, whole=False)
    ]
    tokens = config.batches.until(opened.step) * config.model.seq_length
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.toml").write_text(config.to_toml(), "utf-8")
    own = next((folder for item in config.data.train if (folder := Path(f"{item}.tokenizer")).is_dir()), None)
    if own is not None:
        shutil.copytree(own, run / "tokenizer")
    state = TrainingState(opened.step, tokens, phases=(config.train.steps,))
    return save_training(run, config, pieces, state, [run / "tokenizer"] if own else [])


def _states(opened: Opened) -> dict[str, Pieces]:
    """The optimizer's tensors by kind, each by canonical names; masters only where it keeps them."""
    if opened.files:
        found = _of_ranks(opened)
    else:
        found = {kind: {} for kind in (*_MOMENTS, _MASTERS)}
        for name, pieces in opened.state.items():
            kind, _, rest = name.partition(".")
            if kind in found:
                found[kind][rest] = pieces
    missing = [kind for kind in _MOMENTS if not found[kind]]
    if missing:
        raise UserError(
            f"{opened.folder}: holds no {missing[0]} by parameter, as a distributed optimizer writes only with "
            "--dist-ckpt-optim-fully-reshardable: save it so, or take the weights alone with teratron convert"
        )
    return {kind: pieces for kind, pieces in found.items() if pieces}


def _of_ranks(opened: Opened) -> dict[str, Any]:
    """The states in files of the format `torch`, whose parameters have numbers in place of names."""
    if len(chunks_of(opened.files[0])) > 1:
        raise UserError(f"{opened.folder}: the optimizer of a virtual pipeline is not read: take the weights alone with teratron convert")
    named = {file.path: _named(file) for file in opened.files}
    experts = int(opened.args.get("num_experts") or 0)
    kinds = {kind for states in named.values() for kind in states} | set(_MOMENTS)
    joined = {kind: join_ranks(opened.files, lambda file, _, kind=kind: named[file.path].get(kind, {}), experts) for kind in kinds}  # type: ignore[misc]
    return {kind: in_todays_order(found, opened.args, opened.content) for kind, found in joined.items()}


def _named(file: RankFile) -> dict[str, dict[str, Stored]]:
    """A rank's states by kind and parameter: groups hold parameters in the order of the model's."""
    optimizer = file.content.get("optimizer")
    outer = optimizer if isinstance(optimizer, dict) else {}
    inner = outer.get("optimizer", outer)
    if not isinstance(inner, dict) or "param_groups" not in inner:
        return {}
    weights = dict(flat_tensors(file.content["model"]))
    masters = outer.get("fp32_from_fp16_params", ())
    states: dict[str, dict[str, Stored]] = {kind: {} for kind in _MOMENTS}
    for number, group in enumerate(inner["param_groups"]):
        names = [name for name in weights if _belongs(name, weights[name], group)]
        if len(names) != len(group["params"]):
            raise UserError(
                f"{file.path}: group {number} of the optimizer has {len(group['params'])} parameters, the model {len(names)} such"
            )
        for place, (name, index) in enumerate(zip(names, group["params"], strict=True)):
            for kind, stored in _checked(file, name, weights[name], inner["state"].get(index, {})):
                states[kind][name] = stored
            if number < len(masters) and len(masters[number]) == len(names):
                states.setdefault(_MASTERS, {})[name] = masters[number][place]
    return states


def _belongs(name: str, weight: Stored, group: Mapping[str, Any]) -> bool:
    """Whether a parameter is in a group: those of biases and norms are not decayed, those of experts are apart."""
    decays = len(weight.shape) > 1 and not name.endswith(".bias")
    expert = ".experts." in canonical(name)
    return decays == (group.get("wd_mult", group.get("weight_decay", 0)) != 0) and expert == bool(group.get("is_expert_parallel", False))


def _checked(file: RankFile, name: str, weight: Stored, state: Mapping[str, Any]) -> Iterator[tuple[str, Stored]]:
    for kind in _MOMENTS:
        found = state.get(kind)
        if not isinstance(found, Stored) or found.shape != weight.shape:
            shape = list(found.shape) if isinstance(found, Stored) else "nothing"
            raise UserError(f"{file.path}: {kind} of {name} has shape {shape}, expected {list(weight.shape)}: another order of parameters?")
        yield kind, found
