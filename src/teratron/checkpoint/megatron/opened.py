"""Open a checkpoint of Megatron-LM: which folder, which format, which model; its tensors become our parts when they are asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teratron.checkpoint.megatron.arguments import Given, Kind, check_expressible, model_keys
from teratron.checkpoint.megatron.distributed import is_distributed, read_distributed
from teratron.checkpoint.megatron.ranks import RankFile, arguments_of, interleaved, join_ranks, of_model, rank_folders, read_ranks
from teratron.checkpoint.megatron.rows import Row, canonical, rows_of
from teratron.checkpoint.megatron.torch_files import Stored
from teratron.checkpoint.source import Weights
from teratron.checkpoint.stream import Entry
from teratron.config import ModelConfig, UserError
from teratron.models import build_model, parts_of

TRACKER = "latest_checkpointed_iteration.txt"
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_SPARE = re.compile(
    r".*(_extra_state(/.*)?|rotary_pos_emb\..*|inv_freq|masked_bias|attention\.bias|local_tokens_per_expert|_amax_history)$"
    r"|word_embeddings_for_head\.weight|(rng_state|rerun_state_machine_state|common_state)(/.*)?"
)
"""What belongs to no part: caches, scales of float8, states of random generators, copies of the table of tokens on the last stage."""

Pieces = Mapping[str, Sequence[Stored]]
"""Tensors by canonical name, each as the shares of all tensor ranks."""


@dataclass(frozen=True)
class Opened:
    """A checkpoint of Megatron-LM, of which only what describes it has been read."""

    folder: Path
    """The folder of one iteration."""
    args: Mapping[str, Any] = field(repr=False)
    kind: Kind
    step: int
    model: Pieces = field(repr=False)
    content: Mapping[str, Any] = field(repr=False)
    """What the first rank's file, or what is common to all, holds beside the weights."""
    files: tuple[RankFile, ...] = field(default=(), repr=False)
    """Of the format `torch`."""
    state: Pieces = field(default_factory=dict, repr=False)
    """Of the optimizer, by `STATE.NAME`, in the format `torch_dist`."""

    def config(self) -> ModelConfig:
        """The model; raises `UserError` that names what cannot be expressed."""
        try:
            keys = model_keys(Given(self.args, self.kind))
            keys.setdefault("vocab_size", sum(piece.shape[0] for piece in self.model.get("embedding.word_embeddings.weight", ())))
            config = ModelConfig(**keys)
            check_expressible(config)
        except UserError as error:
            raise UserError(f"{self.folder}: {error}") from None
        return config


def is_megatron(folder: Path) -> bool:
    """Whether a folder is a checkpoint of Megatron-LM, or holds those of a run."""
    return folder.is_dir() and ((folder / TRACKER).is_file() or bool(rank_folders(folder)) or is_distributed(folder))


def open_megatron(folder: Path) -> Weights:
    """The weights of the newest iteration of a run of Megatron-LM, or of one iteration, in the format `torch` or `torch_dist`.

    Raises `UserError` for models that cannot be expressed, and for missing, surplus, damaged or mis-shaped tensors.
    """
    opened = open_iteration(folder)
    config = opened.config()
    return Weights(
        config, entries_of(opened, config, opened.model, whole=True), None, f"{opened.folder} (step {opened.step:,})", None, opened.step
    )


def open_iteration(folder: Path) -> Opened:
    """The same before its model is looked at."""
    place = _iteration(folder)
    if is_distributed(place):
        return _open_distributed(place)
    if not rank_folders(place):
        raise UserError(f"{place}: holds neither mp_rank_* nor metadata.json, expected a checkpoint of format torch or torch_dist")
    args, files = read_ranks(place)
    content = files[0].content
    found = join_ranks(files, of_model, int(args.get("num_experts") or 0))
    kind = _kind(place, found)
    return Opened(place, args, kind, _step(place, content), in_todays_order(found, args, content), content, tuple(files))


def _open_distributed(place: Path) -> Opened:
    common, tensors = read_distributed(place)
    args = arguments_of(common, str(place))
    state, model = {}, {}
    for name, stored in tensors.items():
        of_optimizer = re.match(r"(?:chained_\d+\.)?optimizer\.(?:state\.)?(.*)", name)
        if of_optimizer:
            kind, _, rest = of_optimizer[1].partition(".")
            state[f"{kind}.{canonical(rest)}"] = [stored]
        else:
            model[canonical(name)] = [stored]
    model = _halves_joined(model)
    return Opened(place, args, _kind(place, model), _step(place, common), model, common, (), _halves_joined(state))


def _halves_joined(tensors: dict[str, list[Stored]]) -> dict[str, list[Stored]]:
    """Gated matrices that are stored as two."""
    for name in [name for name in tensors if name.endswith(".linear_fc1.weight_w")]:
        gate, up = tensors.pop(name)[0], tensors.pop(name[:-1] + "v")[0]
        shape = (gate.shape[0] + up.shape[0], *gate.shape[1:])
        tensors[name[:-2]] = [Stored(gate.dtype, shape, lambda gate=gate, up=up: torch.cat((gate.values(), up.values())))]  # type: ignore[misc]
    return tensors


def _iteration(folder: Path) -> Path:
    tracker = folder / TRACKER
    if not tracker.is_file():
        return folder
    text = tracker.read_text("utf-8", "replace").strip()
    if text != "release" and not text.isdigit():
        raise UserError(
            f"{tracker}: found {text[:40]!r}, expected a number of steps or 'release': write the one of the folder that you mean"
        )
    name = "release" if text == "release" else f"iter_{int(text):07d}"
    if not (folder / name).is_dir():
        raise UserError(f"{tracker}: says {text}, but {name} is not in the folder: copy it, or give another iteration's folder")
    return folder / name


def _step(place: Path, content: Mapping[str, Any]) -> int:
    named = re.fullmatch(r"iter_(\d+)", place.name)
    iteration = content.get("iteration")
    return iteration if isinstance(iteration, int) else int(named[1]) if named else 0


def _kind(place: Path, names: Mapping[str, Any]) -> Kind:
    """Which family the tensors are of."""
    if any("inter_attention." in name or "cross_attention." in name for name in names):
        raise UserError(f"{place}: has an encoder and a decoder (T5), which is not exchanged: expected a GPT or a BERT")
    return "bert" if any(name.startswith(("lm_head.", "binary_head.", "embedding.tokentype_embeddings.")) for name in names) else "gpt"


def in_todays_order(tensors: dict[str, list[Stored]], args: Mapping[str, Any], content: Mapping[str, Any]) -> Pieces:
    """With queries, keys and values in today's order."""
    version, given = float(content.get("checkpoint_version") or 0), Given(args)
    if version >= 2:
        return tensors
    head = given["kv_channels"] or given.number("hidden_size") // given.number("num_attention_heads")
    return {name: [interleaved(name, piece, version, head) for piece in pieces] for name, pieces in tensors.items()}


def entries_of(opened: Opened, config: ModelConfig, tensors: Pieces, whole: bool) -> list[Entry]:
    """Every part of a model, read lazily. whole: refuse tensors that belong to no part."""
    rows, shapes = list(rows_of(config)), {part.name: part.shape for part in parts_of(build_model(config, device="meta"))}
    for row in rows:
        _check(opened.folder, row, tensors.get(row.name, ()), shapes, config)
    known = {row.name for row in rows} | ({"output_layer.weight"} if config.tie_embeddings else set())
    spare = [name for name in tensors if name not in known and not _SPARE.fullmatch(name)]
    if spare and whole:
        more = f" (and {len(spare) - 1} more)" if len(spare) > 1 else ""
        raise UserError(f"{opened.folder}: holds {spare[0]}{more}, which args do not describe: another architecture?")
    holders: dict[str, list[Row]] = {}
    for row in rows:
        for part in row.parts:
            holders.setdefault(part, []).append(row)
    return [_entry(name, shape, holders[name], tensors, config) for name, shape in shapes.items()]


def _check(folder: Path, row: Row, pieces: Sequence[Stored], shapes: Mapping[str, tuple[int, ...]], config: ModelConfig) -> None:
    """Refuse a tensor that is missing, of the wrong shape or quantised."""
    if not pieces:
        raise UserError(f"{folder}: {row.name} is missing from the weights, args describe it: copy the folder again")
    vocab = sum(piece.shape[0] for piece in pieces) if row.kind == "table" else 0
    if row.kind == "table" and vocab < config.vocab_size:
        raise UserError(f"{folder}: {row.name} has {vocab:,} rows, args say --vocab-size = {config.vocab_size:,}: another tokenizer?")
    ours = [shapes[part] if row.expert is None else shapes[part][1:] for part in row.parts]
    expected = list(row.shape(ours, vocab))
    found = list(pieces[0].shape)
    if row.cut is not None and len(found) > row.cut:
        found[row.cut] = sum(piece.shape[row.cut] for piece in pieces)
    if found != expected:
        raise UserError(f"{folder}: {row.name} has shape {found}, expected {expected} from args: another architecture?")
    wrong = next((piece.dtype for piece in pieces if piece.dtype not in FLOATS), None)
    if wrong is not None:
        raise UserError(f"{folder}: {row.name} holds {wrong}, expected float64|float32|bfloat16|float16: save it without quantisation")


def _entry(name: str, shape: tuple[int, ...], rows: Sequence[Row], tensors: Pieces, config: ModelConfig) -> Entry:
    def values() -> Tensor:
        found = [row.unpack(row.join([piece.values() for piece in tensors[row.name]]), name, config) for row in rows]
        return found[0] if rows[0].expert is None else torch.stack(found)

    return Entry(name, tensors[rows[0].name][0].dtype, shape, values)
