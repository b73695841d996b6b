"""Contrastive training and contrastive search measured on real text, as SimCTG's paper does (Su et al. 2022), in miniature.

    python bench/contrastive.py --data FOLDER

A small model learns the text of FOLDER; then it is trained on twice, from the same weights and on the same batches, without and with the
contrastive term. Both continue held-out prefixes in three ways. With --run DIR what was trained there is not trained again.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from machine import add_line, facts

from teratron.checkpoint import LoadedModel, open_model
from teratron.config import Config, UserError
from teratron.generate import ContrastiveSearch, ContrastiveStream, Decoder, Sampling, TokenStream
from teratron.models import GPT
from teratron.tasks.degeneration import diversity, judge, repetition
from teratron.train import Trainer

PREFIX, NEW = 32, 128
"""Tokens of a prefix and of its continuation, as in the paper."""
BATCH = 50
"""Continuations made at the same time."""
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
Rows = list[list[int]]
"""Token ids."""
Ways = dict[str, Sampling | ContrastiveSearch]
"""Of choosing tokens, by name."""


@dataclass(frozen=True)
class Line:
    """One row of the table."""

    system: str
    rep_2: float
    rep_3: float
    rep_4: float
    diversity: float
    coherence: float
    generated_perplexity: float
    """Of the text generated, by the model without the contrastive term."""
    held_out_perplexity: float | None
    """Of the held-out text, by the model that generated; None = no model did."""


def train(texts: Sequence[Path], run: Path, first: int, then: int) -> dict[str, Trainer]:
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


def measure(trainers: dict[str, Trainer], prefixes: int, ways: Ways) -> Iterator[Line]:
    """A line for the held-out text itself, then one for each model and way of continuing it."""
    valid = trainers["mle"].data.valid
    if valid is None or valid.count is None or valid.count < prefixes:
        raise UserError(f"--prefixes {prefixes}: the held-out text has fewer windows; give more text, or fewer prefixes")
    windows = valid.rows(np.arange(prefixes))[:, : PREFIX + NEW].tolist()
    starts, ends = [row[:PREFIX] for row in windows], [row[PREFIX:] for row in windows]
    models = {name: open_model(trainer.run) for name, trainer in trainers.items()}
    yield line("the text itself", models["mle"], starts, ends, None)
    for name, trainer in trainers.items():
        perplexity = math.exp(trainer.evaluate())
        for way, sampling in ways.items():
            yield line(f"{name} {way}", models["mle"], starts, continued(models[name], starts, sampling), perplexity)


def continued(loaded: LoadedModel, prefixes: Rows, how: Sampling | ContrastiveSearch) -> Rows:
    """`NEW` tokens behind each prefix; the end of a document is a token like others."""
    rows: Rows = [[] for _ in prefixes]
    for first in range(0, len(prefixes), BATCH):
        starts = prefixes[first : first + BATCH]
        if isinstance(how, Sampling):
            stream = TokenStream(Decoder(loaded.model, starts, NEW), how, seeds=range(first, first + len(starts)))
        else:
            stream = ContrastiveStream(Decoder(loaded.model, starts, NEW), how)
        for step in stream:
            for row, token in step:
                rows[first + row].append(token)
    return rows


def decoder(loaded: LoadedModel) -> GPT:
    if not isinstance(loaded.model, GPT):
        raise UserError(f"{loaded.name}: model.family = {loaded.config.family}, expected gpt")
    return loaded.model


def line(system: str, judging: LoadedModel, prefixes: Rows, texts: Rows, perplexity: float | None) -> Line:
    """Repetition is counted in words, as the paper does."""
    if judging.tokenizer is None:
        raise UserError(f"{judging.name}: holds no tokenizer")
    words = [judging.tokenizer.decode(text).split() for text in texts]
    opinion = judge(decoder(judging), prefixes, texts)
    twos, threes, fours = (repetition(words, n) for n in (2, 3, 4))
    return Line(system, twos, threes, fours, diversity(words), opinion.coherence, opinion.perplexity, perplexity)


def shown(found: Line) -> str:
    """A row of the table."""
    repeated = "".join(f"{value:8.1f}" for value in (found.rep_2, found.rep_3, found.rep_4))
    held_out = f"{found.held_out_perplexity:14.2f}" if found.held_out_perplexity is not None else ""
    return f"{found.system:20}{repeated}{found.diversity:11.2f}{found.coherence:11.2f}{found.generated_perplexity:9.1f}{held_out}"


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
    parser.add_argument("--prefixes", type=int, default=100, help="held-out prefixes that are continued")
    parser.add_argument("--k", type=int, default=5, help="candidates of contrastive search")
    parser.add_argument("--alpha", type=float, default=0.6, help="weight of its penalty")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the measurement as a line of JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    search = ContrastiveSearch(args.k, args.alpha)
    ways: Ways = {"greedy": Sampling(temperature=0), "nucleus 0.95": Sampling(top_p=0.95), "contrastive": search}
    with tempfile.TemporaryDirectory() as scratch:
        lines = []
        trainers = train(texts_of(args.data), args.run or Path(scratch), *args.steps)
        print(f"{'':20}   rep-2   rep-3   rep-4  diversity  coherence  gen-ppl  held-out ppl")
        for found in measure(trainers, args.prefixes, ways):
            lines.append(found)
            print(shown(found), flush=True)
    if args.json:
        add_line(args.json, {**facts("cpu"), "lines": [asdict(found) for found in lines]})


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
