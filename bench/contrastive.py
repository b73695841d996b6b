"""Contrastive training and contrastive search measured on real text, as SimCTG's paper does (Su et al. 2022), in miniature.

    python bench/contrastive.py --data FOLDER

A small model learns the text of FOLDER; then it is trained on twice, from the same weights and on the same batches, without and with the
contrastive term. Both continue held-out prefixes in three ways. What was trained already is not trained again where --run says so.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from teratron.config import Config, UserError
from teratron.train import Trainer

PREFIX, NEW = 32, 128
"""Tokens of a prefix and of its continuation, as in the paper."""
MODEL = {
    "model.layers": 4,
    "model.hidden": 128,
    "model.heads": 4,
    "model.seq_length": 192,
    "model.position": "rope",
    "model.bias": False,
    "model.init_std": 0.05,
    "data.tokenizer": "bpe:2048",
    "data.split": "95,5",
    "optim.lr": 3e-3,
    "optim.warmup_steps": 30,
    "optim.schedule": "wsd",
    "train.global_batch": 16,
    "train.eval_every": 0,
    "checkpoint.every": 50,
    "log.tensorboard": False,
}


def train(texts: list[Path], run: Path, first: int, then: int) -> dict[str, Trainer]:
    """`first` steps in RUN/base, then as many as `then` in RUN/mle and RUN/simctg; the trainers of those two."""
    keys = MODEL | {"data.text": tuple(map(str, texts)), "optim.decay_steps": 1, "train.steps": first}
    Trainer(Config().override(keys), run / "base").train()
    keys |= {"optim.decay_steps": then, "train.steps": first + then}
    found = {}
    for name, weight in {"mle": 0.0, "simctg": 1.0}.items():
        config = Config().override(keys | {"objective.contrastive": weight})
        found[name] = Trainer(config, run / "base", fork_to=run / name)
        found[name].train()
    return found


def texts_of(folder: Path) -> list[Path]:
    """The text files of a folder, without a note of where they are from."""
    found = sorted(path for path in folder.glob("*.txt") if path.stem != "PROVENANCE")
    if not found:
        raise UserError(f"--data {folder}: holds no .txt file; give a folder of texts")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of .txt files")
    parser.add_argument("--run", type=Path, help="folder that keeps the runs (default: a temporary one)")
    parser.add_argument("--steps", type=int, nargs=2, default=(320, 120), help="of the first training, and of the two that follow")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        train(texts_of(args.data), args.run or Path(scratch), *args.steps)


if __name__ == "__main__":
    main()
