"""`python bench/generate.py`: tokens/s and time to the first token, beside `transformers` generate with its cache, in the same run."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import add_line, facts
from rich.console import Console
from rich.table import Table

from teratron.checkpoint import open_model
from teratron.config import UserError
from teratron.generate import CompiledDecoder, Decoder, Sampling, SpeculativeStream, TextGuesser, TokenStream
from teratron.parallel.device import DTYPES

SHAPE = {"n_layer": 6, "n_embd": 384, "n_head": 6, "n_positions": 256, "vocab_size": 256}
"""Workload B of `train.py`."""
PROMPT = 32
"""Tokens of a prompt."""
GUESSED = 8
"""Tokens that look-up guesses at a time, in both projects."""
MODES = {"greedy": Sampling(temperature=0), "sampled": Sampling(top_k=50, top_p=0.95)}
Rows = list[list[int]]
Way = Callable[[Rows, int, Sampling], Rows]
"""From prompts, a number of new tokens and how these are chosen, to the new tokens."""


@dataclass
class Lane:
    """Seconds that a contender took, round after round."""

    first: list[float] = field(default_factory=list)
    """For the prompts and one token of each."""
    all: list[float] = field(default_factory=list)
    """For all new tokens."""


def main() -> int:
    args = _parse()
    torch.set_num_threads(args.threads)
    try:
        with _folder(args.model) as folder:
            ways = contenders(folder, args.precision, args.contenders.split(","))
            results = {
                (batch, mode): race(ways, batch, MODES[mode], args.new, args.rounds)
                for batch in map(int, args.batches.split(","))
                for mode in args.modes.split(",")
            }
    except UserError as error:
        print(f"bench/generate.py: error: {error}", file=sys.stderr)
        return 2
    Console().print(table(results, args.new, f"{args.precision}, {args.threads} threads"))
    if args.json:
        setting = {"precision": args.precision, "threads": args.threads, "new": args.new, "results": record(results, args.new)}
        add_line(args.json, {**facts("cpu"), **setting})
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder (default: random weights of GPT-2's kind, workload B's shape)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--contenders", default="plain,compiled,transformers", help=f"of {', '.join(ALL)} (default: %(default)s)")
    parser.add_argument("--batches", default="1,16", help="prompts at the same time (default: %(default)s)")
    parser.add_argument("--modes", default="greedy,sampled", help="greedy, sampled or both (default: both)")
    parser.add_argument("--new", type=int, default=64, help="new tokens of each prompt (default: 64)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; medians are over them (default: 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the result to this file as one JSON line")
    return parser.parse_args()


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory() as folder:
        write_random(Path(folder), SHAPE)
        yield Path(folder)


def write_random(folder: Path, shape: Mapping[str, int]) -> None:
    """Random weights large enough that greedy tokens do not hang on rounding."""
    import transformers

    torch.manual_seed(0)
    values: dict[str, Any] = {**shape, "initializer_range": 0.05, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    config = transformers.GPT2Config(**values)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)


def contenders(folder: Path, precision: str, names: Sequence[str]) -> dict[str, Way]:
    """Ways to generate from one folder, by name. Raises `UserError` for a name that is none."""
    for name in names:
        if name not in ALL:
            raise UserError(f"--contenders {name}: expected some of {', '.join(ALL)}")
    ours: Any = open_model(folder, dtype=DTYPES[precision]).model.eval()
    theirs = _theirs(folder, precision) if any(name.startswith("transformers") for name in names) else None
    return {name: ALL[name](theirs if name.startswith("transformers") else ours) for name in names}


def _theirs(folder: Path, precision: str) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[precision]).eval()


def _plain(model: Any) -> Way:
    return lambda prompts, new, how: _rows(TokenStream(Decoder(model, prompts, new), how))


def _compiled(model: Any) -> Way:
    return lambda prompts, new, how: _rows(TokenStream(CompiledDecoder(model, prompts, new), how))


def _look_up(model: Any) -> Way:
    def way(prompts: Rows, new: int, how: Sampling) -> Rows:
        decoder = Decoder(model, prompts, new, rewinds=True)
        return _rows(SpeculativeStream(decoder, TextGuesser(len(prompts)), GUESSED, how))

    return way


def _rows(stream: TokenStream) -> Rows:
    rows: Rows = [[] for _ in stream.rows]
    for step in stream:
        for row, token in step:
            rows[row].append(token)
    return rows


def _generate(model: Any, **options: Any) -> Way:
    """`transformers`' own generation, with the cache and the options that its users give."""

    def way(prompts: Rows, new: int, how: Sampling) -> Rows:
        ids = torch.tensor(prompts)
        drawn = {"temperature": how.temperature, "top_k": how.top_k, "top_p": how.top_p} if how.temperature else {}
        count = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": how.temperature > 0}
        made = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **count, **drawn, **options)
        rows: Rows = made[:, ids.shape[1] :].tolist()
        return rows

    return way


def _generate_compiled(model: Any) -> Way:
    import transformers

    config: Any = transformers.CompileConfig(fullgraph=False, mode="default", dynamic=False)
    config._compile_all_devices = True  # by itself it compiles on CUDA only
    return _generate(model, cache_implementation="static", compile_config=config)


ALL: dict[str, Callable[[Any], Way]] = {
    "plain": _plain,
    "compiled": _compiled,
    "lookup": _look_up,
    "transformers": _generate,
    "transformers-compiled": _generate_compiled,
    "transformers-lookup": lambda model: _generate(model, prompt_lookup_num_tokens=GUESSED),
}


def race(ways: Mapping[str, Way], batch: int, how: Sampling, new: int, rounds: int) -> dict[str, Lane]:
    """Check that greedy tokens are the same, then time everyone in turn.

    Raises `UserError` where they are not.
    """
    generator = torch.Generator().manual_seed(batch)
    prompts = torch.randint(256, (batch, PROMPT), generator=generator).tolist()
    found = {name: way(prompts, new, how) for name, way in ways.items()}  # whatever is compiled is compiled here
    right = next(iter(found.values()))
    for name, rows in found.items():
        if how.temperature == 0 and rows != right:
            raise UserError(f"{name} continues a prompt in another way than {next(iter(found))}: not the same computation")
    lanes = {name: Lane() for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            for count, seconds in ((1, lanes[name].first), (new, lanes[name].all)):
                begun = time.perf_counter()
                way(prompts, count, how)
                seconds.append(time.perf_counter() - begun)
    return lanes


Results = Mapping[tuple[int, str], Mapping[str, Lane]]


def record(results: Results, new: int) -> list[dict[str, Any]]:
    """Plain numbers. `first_is`: how many times as fast as each the first contender is, the median of the rounds' ratios."""
    lines = []
    for (batch, mode), lanes in results.items():
        best = next(iter(lanes.values())).all
        for name, lane in lanes.items():
            ratio = median(theirs / own for own, theirs in zip(best, lane.all, strict=True))
            speed = {"tokens_per_second": batch * new / median(lane.all), "first_token": median(lane.first), "first_is": ratio}
            lines.append({"batch": batch, "mode": mode, "contender": name, **speed, "seconds": lane.all})
    return lines


def table(results: Results, new: int, setting: str) -> Table:
    """A row for each contender, batch and mode."""
    grid = Table(title=f"Generation: {new} new tokens behind {PROMPT}", caption=f"{setting}; medians of rounds in turn")
    for heading in ("batch", "mode", "contender"):
        grid.add_column(heading)
    for heading in ("tokens/s", "first token, ms", "the first one is"):
        grid.add_column(heading, justify="right")
    for line in record(results, new):
        numbers = f"{line['tokens_per_second']:,.0f}", f"{line['first_token'] * 1e3:,.1f}", f"{line['first_is']:.2f} x"
        grid.add_row(str(line["batch"]), line["mode"], line["contender"], *numbers)
    return grid


if __name__ == "__main__":
    sys.exit(main())
