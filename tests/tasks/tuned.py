"""A tiny encoder and a tiny decoder, barely pretrained, and what `teratron finetune` makes of them."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from teratron.cli.main import main
from teratron.config import Config, ModelConfig
from teratron.data.tokenizer import ByteTokenizer, load_tokenizer
from teratron.models import State
from teratron.models.join import Join
from teratron.tasks.finetune.coder import Coder
from teratron.train import Trainer

FILLER = ("a", "the", "of", "and", "was", "in", "to", "saw", "then", "there")
NAMES, PLACES = ("anna", "boris", "carla", "dmitri"), ("new york", "los angeles")
COLOURS, ANIMALS = ("red", "green", "blue", "white"), ("cat", "horse", "goat", "owl")
GOOD, BAD = ("splendid", "lovely", "fine"), ("dreadful", "dull", "poor")
TEXT = " ".join((*FILLER, *NAMES, *PLACES, *COLOURS, *ANIMALS, *GOOD, *BAD, "which", "colour", "animal", "?", ".")) + "\n"
SHAPE: dict[str, Any] = {
    "model.layers": 1,
    "model.hidden": 32,
    "model.heads": 2,
    "model.seq_length": 24,
    "model.init_std": 0.1,
    "optim.warmup_steps": 0,
    "train.steps": 1,
    "train.global_batch": 4,
    "train.eval_every": 0,
    "log.tensorboard": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "encoder": {"model.family": "encoder", "model.token_types": 2, "objective.name": "masked", "data.tokenizer": "wordpiece:200"},
    "gpt": {"data.tokenizer": "bpe:400"},
    "xlnet": {
        "model.family": "xlnet", "model.position": "transformer_xl", "model.recurrence": 12, "objective.name": "permuted",
        "data.tokenizer": "bpe:400",
    },
    "encoder_decoder": {"model.family": "encoder_decoder", "objective.name": "denoising", "data.tokenizer": "bpe:400"},
}  # fmt: skip


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="tuned-")


@functools.cache
def pretrained(family: str) -> Path:
    """A run of one step over all words of these tests."""
    home = Path(_folder().name)
    (home / "text.txt").write_text(TEXT * 40, "utf-8")
    Trainer(Config().override(SHAPE | FAMILIES[family] | {"data.text": str(home / "text.txt")}), home / family, echo=False).train()
    return home / family


def write(path: Path, rows: Sequence[Any]) -> Path:
    """Rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def finetune(task: str, folder: Path, family: str, train: Sequence[Any], test: Sequence[Any], *more: str) -> int:
    """The exit code of the command; the run is folder/run."""
    files = ["--data", write(folder / "train.jsonl", train), "--valid", write(folder / "test.jsonl", test), "--run", folder / "run"]
    keys = ["--log.tensorboard=false", "--optim.lr=1e-2", "--model.dropout=0", "--train.global_batch=16"]
    return main([str(word) for word in ["finetune", task, "--model", pretrained(family), *files, *keys, *more]])


def scores(folder: Path) -> dict[str, Any]:
    """What the command has judged."""
    found: dict[str, Any] = json.loads((folder / "run" / "scores.json").read_text("utf-8"))
    return found


def encoder(length: int = 24) -> Coder:
    """Of WordPiece, two kinds of segments."""
    return Coder(load_tokenizer(pretrained("encoder") / "tokenizer"), Config.load(pretrained("encoder") / "config.toml").model, length)


def decoder(length: int = 24) -> Coder:
    """Of bytes."""
    return Coder(ByteTokenizer(), ModelConfig(vocab_size=257), length)


def reading(objective: str, classes: int) -> Config:
    """That of a task which reads."""
    keys = {"objective.name": objective, "data.examples": "made here", "model.head": "classes", "model.classes": classes}
    return Config().override(keys)


class Reader(nn.Module):
    """A model that says of each token what a function of its inputs says: a class, or scores of each class."""

    def __init__(self, says: Callable[[State], Tensor], classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.says, self.classes, self.head = says, classes, self
        self.join = Join()

    def forward(self, inputs: State) -> State:
        return inputs

    def scores(self, state: State) -> Tensor:
        found = self.says(state)
        return found if found.dim() == 3 else functional.one_hot(found, self.classes).double()
