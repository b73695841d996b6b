"""The demo: the main job, small, on this machine, on text that every machine has: the source of Python's standard library.

Tokenizer, data sets, pretraining for a few minutes, evaluation beside a bigram model, completions, report. Each stage is kept
in the demo's folder, so an interrupted demo goes on where it was, and a finished one only shows its results again.
"""

from __future__ import annotations

import hashlib
import math
import os
import shlex
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from teratron.config import Config, UserError
from teratron.data.bpe import train_bpe
from teratron.data.indexed import IndexedDataset
from teratron.data.open import save_tokenizer
from teratron.data.output import writing
from teratron.data.prepare import prepare
from teratron.data.tokenizer import Tokenizer, load_tokenizer
from teratron.generate import generate
from teratron.parallel.device import DTYPES, choose_device
from teratron.parallel.mesh import Mesh
from teratron.tasks.bigram import bigram_loss
from teratron.train import Result, Trainer
from teratron.train.commands import program
from teratron.train.device import measure_peak, synchronize
from teratron.train.engine import Engine
from teratron.train.history import History, read_history
from teratron.train.metrics import Metrics, duration
from teratron.train.report import write_report

MINUTES = 3.0
VOCAB_SIZE = 4096
HELD_OUT_SHARE = 0.03
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
PROMPTS = ("def read", "import os\n\n\nclass", '    """Return the', "for name in", "if not isinstance(")
OWN_TEXTS = ("pydoc_data/topics.py", "LICENSE.txt", "argparse.py")
"""Files of the standard library to try training on one's own text with; the first that is there. Distributions leave some out."""
Say = Callable[[str], None]

MODERN = {
    "model.norm": "rmsnorm",
    "model.activation": "swiglu",
    "model.position": "rope",
    "model.qk_norm": True,
    "model.bias": False,
}
SMALL = MODERN | {
    "model.layers": 4,
    "model.hidden": 256,
    "model.heads": 4,
    "model.ffn": 768,
    "model.seq_length": 128,
    "model.init_std": 0.05,
    "train.global_batch": 8,
    "optim.lr": 3e-3,
    "optim.beta2": 0.98,
}
"""About 4 million parameters: what two CPU cores teach something in three minutes."""
LARGE = MODERN | {
    "model.layers": 8,
    "model.hidden": 512,
    "model.heads": 8,
    "model.ffn": 1536,
    "model.seq_length": 512,
    "model.dropout": 0.1,
    "train.global_batch": 32,
    "optim.lr": 1e-3,
}
"""About 29 million parameters for a GPU, which goes over the library's text several times."""


def demo(folder: Path, minutes: float | None = None, device: str = "auto", say: Say = print) -> Result:
    """Run the demo in `folder`, or go on with the one there; returns how training ended.

    minutes: about how long a new demo trains; None = MINUTES. Raises `UserError` for a folder that holds another run, and
    whatever `Trainer` raises.
    """
    if minutes is not None and not 0 < minutes < math.inf:
        raise UserError(f"--minutes {minutes}: expected a number above 0, such as {MINUTES:g}")
    choose_device(device)  # refused here rather than after the preparation
    started = time.perf_counter()
    prefixes = [folder / "data" / name for name in ("train", "valid")]
    config = _continued(folder, prefixes, minutes, say) or _prepared(folder, prefixes, minutes or MINUTES, device, say)
    trainer = Trainer(config, folder, device=device)
    result = trainer.train()
    if result.interrupted:
        say(f"stopped at step {result.step:,}; run the same command again to go on")
        return result
    _finish(trainer, prefixes, device, say)
    say(f"\ndone in {duration(time.perf_counter() - started)}; report: {folder / 'report.html'}\ntry next:")
    for command in next_commands(folder, trainer.config.train.steps):
        say(f"  {command}")
    return result


def next_commands(folder: Path, steps: int) -> list[str]:
    """Three command lines to try after a demo of so many steps, which run as they are."""
    text = next(path for name in OWN_TEXTS if (path := library_root() / name).is_file())
    lines = [
        ["generate", folder, "def main(", "--temperature", 0.7],
        ["train", "shakespeare-char", "--data.text", text, "--train.steps", 500, "--run", folder.parent / "mine"],
        ["train", "--run", folder, "--train.steps", 2 * steps],
    ]
    return [f"{program()} {shlex.join(map(str, line))}" for line in lines]


def library_root() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def library_files() -> list[Path]:
    """The Python files of the standard library, without its tests."""
    root = library_root()
    files = sorted(p for p in root.rglob("*.py") if not SKIPPED_FOLDERS & set(p.relative_to(root).parts) and _is_text(p))
    if len(files) < 100:
        raise UserError(
            f"{root}: {len(files)} Python files found, expected hundreds: this Python comes without its standard library's source; "
            "use one from python.org or your distribution"
        )
    return files


def _is_text(path: Path) -> bool:
    try:
        return bool(path.read_text("utf-8").strip())
    except (UnicodeDecodeError, OSError):
        return False


def split_files(files: list[Path]) -> tuple[list[Path], list[Path]]:
    """Training and held-out files, chosen by a hash of each name: the same on every machine with these files."""
    root = library_root()
    held_out = [p for p in files if hashlib.blake2b(p.relative_to(root).as_posix().encode()).digest()[0] < 256 * HELD_OUT_SHARE]
    return [p for p in files if p not in set(held_out)], held_out


def _continued(folder: Path, prefixes: list[Path], minutes: float | None, say: Say) -> Config | None:
    """The config of the demo that the folder holds; None when it holds no run yet."""
    if not (folder / "config.toml").is_file():
        return None
    config = Config.load(folder)
    if config.data.train != (os.path.abspath(prefixes[0]),):
        raise UserError(f"--output {folder}: holds another run, or a demo that was moved here; choose a new folder")
    say(f"continuing with {config.train.steps:,} steps" + ("; --minutes counts only for a new folder" if minutes is not None else ""))
    return config


def _prepared(folder: Path, prefixes: list[Path], minutes: float, device: str, say: Say) -> Config:
    """Make what training needs, as far as it is not there yet, and size the run for this machine."""
    parts = split_files(library_files())
    say(f"[1/6] corpus: {len(parts[0]):,} files of Python's standard library, and {len(parts[1]):,} held out")
    tokenizer = _tokenizer(folder / "data" / "tokenizer", parts[0], say)
    for prefix, files in zip(prefixes, parts, strict=True):
        if not prefix.with_suffix(".idx").is_file():
            say(f"[3/6] {prepare(files, prefix, tokenizer, overwrite=True)}")
    config = _sized(prefixes, tokenizer.vocab_size, minutes, choose_device(device), say)
    say(f"[5/6] pretraining {config.train.steps:,} steps (Ctrl-C saves; the same command then goes on)")
    return config


def _tokenizer(folder: Path, files: list[Path], say: Say) -> Tokenizer:
    if not folder.is_dir():
        begun = time.perf_counter()
        tokenizer = train_bpe((file.read_text("utf-8") for file in files), VOCAB_SIZE)
        with writing(folder):
            save_tokenizer(tokenizer, folder)
        say(f"[2/6] tokenizer: byte-level BPE of {tokenizer.vocab_size:,} tokens, trained in {duration(time.perf_counter() - begun)}")
    return load_tokenizer(folder)


def _sized(prefixes: list[Path], vocab_size: int, minutes: float, device: torch.device, say: Say) -> Config:
    """A config whose training takes about `minutes` here, but goes over the text at most 8 times."""
    bf16, fp32 = (measure_peak(device, DTYPES[name]) for name in ("bf16", "fp32"))
    keys: dict[str, Any] = {"data.train": (str(prefixes[0]),), "data.valid": (str(prefixes[1]),), "model.vocab_size": vocab_size}
    keys |= {"train.precision": "bf16" if bf16 > 1.5 * fp32 else "fp32"}
    config = Config().override(keys | (LARGE if device.type == "cuda" else SMALL))
    seconds = _step_seconds(config, device)
    tokens = config.largest_batch * config.model.seq_length
    epochs = IndexedDataset(prefixes[0]).total_tokens * 8 // tokens
    steps = max(60, min(int(minutes * 60 / seconds), epochs) // 10 * 10)
    say(f"[4/6] calibrated: {seconds * 1000:.0f} ms a step of {tokens:,} tokens in {config.train.precision}: {steps:,} steps")
    keys = {"train.steps": steps, "optim.warmup_steps": steps // 20, "train.eval_every": steps // 5, "checkpoint.every": steps // 10}
    return config.override(keys)


def _step_seconds(config: Config, device: torch.device) -> float:
    """The median time of a training step of this config here."""
    engine = Engine(config, Mesh(), device)
    engine.optimizer.initialise(0)
    shape = (config.largest_batch, config.model.seq_length)
    tokens = torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)
    positions = torch.arange(shape[1], device=device).expand(shape)
    sample = torch.arange(shape[0], device=device)
    batch = {"tokens": tokens, "targets": tokens, "positions": positions, "weights": torch.ones(shape, device=device), "sample": sample}
    times = []
    for step in range(1, 9):
        begun = time.perf_counter()
        engine.step(batch, step=step, number=step, lr=1e-4)
        synchronize(device)
        times.append(time.perf_counter() - begun)
    return float(np.median(times[2:]))


def _finish(trainer: Trainer, prefixes: list[Path], device: str, say: Say) -> None:
    """Compare with the bigram model, complete prompts, write the report; what the run's metrics hold already is not made again."""
    folder, step = trainer.run, trainer.config.train.steps
    history = read_history(folder / "metrics.jsonl")
    known = [float(event["loss"]) for event in history.of_kind("eval") if event["step"] == step and event["loss"] is not None]
    perplexity = math.exp(min(known[0] if known else trainer.evaluate(), 700.0))
    with Metrics(folder, tensorboard=False) as metrics:
        bigram = math.exp(_bigram(history, prefixes, trainer.data.special.vocab_size, metrics))
        times = f"{bigram / perplexity:.1f} times that"
        say(f"[6/6] held-out perplexity {perplexity:.1f}; a bigram model of the same text has {bigram:.1f}, {times}")
        for prompt, text in _samples(history, folder, step, device, metrics):
            say(f"\n--- {prompt!r}\n{prompt}{text}")
    write_report(folder)


def _bigram(history: History, prefixes: list[Path], vocab_size: int, metrics: Metrics) -> float:
    """The bigram model's held-out loss, which is noted once a run."""
    known = [float(event["loss"]) for event in history.of_kind("baseline")]
    if known:
        return known[0]
    train, held_out = (np.asarray(IndexedDataset(prefix).tokens) for prefix in prefixes)
    loss = bigram_loss(train, held_out, vocab_size)
    metrics.write("baseline", name="bigram", loss=loss, perplexity=math.exp(loss))
    return loss


def _samples(history: History, folder: Path, step: int, device: str, metrics: Metrics) -> list[tuple[str, str]]:
    """The prompts and their continuations by the model of this step, which are noted once."""
    known = [(str(event["prompt"]), str(event["text"])) for event in history.of_kind("sample") if event["step"] == step]
    if len(known) >= len(PROMPTS):
        return known
    texts = generate(folder, list(PROMPTS), max_new_tokens=60, temperature=0.6, top_p=0.95, seed=1, device=device)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        metrics.write("sample", step=step, prompt=prompt, text=text)
    return list(zip(PROMPTS, texts, strict=True))
