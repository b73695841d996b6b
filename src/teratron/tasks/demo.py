"""The demo: the main job, small, on this machine, on text that every machine has: the source of Python's standard library.

Tokenizer, data sets, pretraining for a few minutes, evaluation beside a bigram model, completions, report. Each stage is kept
in the demo's folder, so an interrupted demo goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import math
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
from teratron.data.prepare import prepare
from teratron.data.tokenizer import Tokenizer, load_tokenizer
from teratron.generate import generate
from teratron.models import build_model, initialise
from teratron.objectives import build_objective
from teratron.optim import AdamW
from teratron.tasks.bigram import bigram_loss
from teratron.train import Result, Trainer
from teratron.train.device import DTYPES, choose_device, measure_peak, synchronize
from teratron.train.metrics import duration
from teratron.train.report import write_report
from teratron.train.step import train_step

VOCAB_SIZE = 4096
HELD_OUT_SHARE = 0.03
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
PROMPTS = ("def read_", "import os\n\nclass ", '    """Return the ', "for name in ", "if not isinstance(")
Say = Callable[[str], None]


def demo(folder: Path, minutes: float = 3.0, device: str = "auto", say: Say = print) -> Result:
    """Run or continue the demo in `folder`, training for about `minutes`; returns how training ended."""
    started = time.perf_counter()
    train_files, valid_files = split_files(library_files())
    say(f"[1/6] corpus: {len(train_files):,} files of Python's standard library, and {len(valid_files):,} held out")
    tokenizer = _tokenizer(folder / "data" / "tokenizer", train_files, say)
    prefixes = [_dataset(folder / "data" / name, files, tokenizer, say) for name, files in (("train", train_files), ("valid", valid_files))]
    config = _config(folder, prefixes, minutes, device, say)
    say(f"[5/6] pretraining {config.train.steps:,} steps (Ctrl-C saves; `teratron demo` then goes on)")
    trainer = Trainer(config, folder, device=device)
    result = trainer.train()
    if result.interrupted:
        say(f"stopped at step {result.step:,}; run the same command again to go on")
        return result
    valid_loss = result.valid_loss if math.isfinite(result.valid_loss) else trainer.evaluate()
    _finish(folder, prefixes, tokenizer, valid_loss, say)
    say(f"\ndone in {duration(time.perf_counter() - started)}. Try next:")
    for command in next_commands(folder):
        say(f"  {command}")
    return result


def next_commands(run: Path) -> list[str]:
    """The three commands to try after the demo."""
    return [
        f"teratron generate {run} 'def main(' --temperature 0.7",
        "teratron train shakespeare-char --data.text YOUR_TEXT.txt --run runs/mine",
        f"open {run / 'report.html'}   # loss curve, throughput, samples, config",
    ]


def library_files() -> list[Path]:
    """The Python files of the running interpreter's standard library, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in root.rglob("*.py") if not SKIPPED_FOLDERS & set(p.relative_to(root).parts) and _is_text(p))
    if len(files) < 100:
        raise UserError(f"{root}: {len(files)} Python files found, expected hundreds: this Python comes without its standard library's source")
    return files


def _is_text(path: Path) -> bool:
    try:
        return bool(path.read_text("utf-8").strip())
    except (UnicodeDecodeError, OSError):
        return False


def split_files(files: list[Path]) -> tuple[list[Path], list[Path]]:
    """Training and held-out files, chosen by a hash of each name: the same on every machine with these files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    held_out = [p for p in files if hashlib.blake2b(p.relative_to(root).as_posix().encode()).digest()[0] < 256 * HELD_OUT_SHARE]
    return [p for p in files if p not in set(held_out)], held_out


def _tokenizer(folder: Path, files: list[Path], say: Say) -> Tokenizer:
    if not folder.is_dir():
        begun = time.perf_counter()
        save_tokenizer(train_bpe((file.read_text("utf-8") for file in files), VOCAB_SIZE), folder)
        say(f"[2/6] tokenizer: byte-level BPE of {VOCAB_SIZE:,} tokens, trained in {duration(time.perf_counter() - begun)}")
    return load_tokenizer(folder)


def _dataset(prefix: Path, files: list[Path], tokenizer: Tokenizer, say: Say) -> Path:
    if not Path(f"{prefix}.idx").is_file():
        prefix.parent.mkdir(parents=True, exist_ok=True)
        say(f"[3/6] {prepare(files, prefix, tokenizer, overwrite=True)}")
    return prefix


def _config(run: Path, prefixes: list[Path], minutes: float, device: str, say: Say) -> Config:
    """The run's config: as saved, or sized so that training takes about `minutes` here."""
    if (run / "config.toml").is_file():
        return Config.load(run)
    place = choose_device(device)
    bf16, fp32 = (measure_peak(place, DTYPES[name]) for name in ("bf16", "fp32"))
    keys: dict[str, Any] = {"data.train": (str(prefixes[0]),), "data.valid": (str(prefixes[1]),)}
    keys |= {"train.precision": "bf16" if bf16 > 1.5 * fp32 else "fp32"}
    config = Config().override(keys | (LARGE if place.type == "cuda" else SMALL))
    seconds = _step_seconds(config, place)
    tokens = config.train.global_batch * config.model.seq_length
    epochs = IndexedDataset(prefixes[0]).total_tokens * 8 // tokens
    steps = max(60, min(int(minutes * 60 / seconds), epochs) // 10 * 10)
    say(f"[4/6] calibrated: {seconds * 1000:.0f} ms a step of {tokens:,} tokens in {config.train.precision}: {steps:,} steps")
    schedule = {"train.steps": steps, "optim.warmup_steps": steps // 20, "train.eval_every": max(steps // 5, 1), "checkpoint.every": max(steps // 10, 1)}
    return config.override(schedule)


MODERN = {
    "model.norm": "rmsnorm",
    "model.activation": "swiglu",
    "model.position": "rope",
    "model.qk_norm": True,
    "model.bias": False,
    "model.vocab_size": VOCAB_SIZE,
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


def _step_seconds(config: Config, device: torch.device) -> float:
    """The median time of a training step of this config here."""
    model = build_model(config.model, device=device, dtype=DTYPES[config.train.precision])
    initialise(model, 0)
    optimizer, objective = AdamW(model, config.optim), build_objective(config.objective)
    shape = (config.train.global_batch, config.model.seq_length)
    tokens = torch.randint(VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(0)).to(device)
    positions = torch.arange(shape[1], device=device).expand(shape)
    sample = torch.arange(shape[0], device=device)
    batch = {"tokens": tokens, "targets": tokens, "positions": positions, "weights": torch.ones(shape, device=device), "sample": sample}
    times = []
    for step in range(1, 9):
        begun = time.perf_counter()
        train_step(model, objective, optimizer, batch, step=step, seed=0, micro_batch=0, lr=1e-4)
        synchronize(device)
        times.append(time.perf_counter() - begun)
    return float(np.median(times[2:]))


def _finish(run: Path, prefixes: list[Path], tokenizer: Tokenizer, valid_loss: float, say: Say) -> None:
    """Compare with the bigram model, complete prompts, write the report; events go to the run's metrics."""
    train, held_out = (np.asarray(IndexedDataset(prefix).tokens) for prefix in prefixes)
    bigram = bigram_loss(train, held_out, tokenizer.vocab_size)
    say(
        f"[6/6] held-out perplexity {math.exp(valid_loss):.1f}; a bigram model of the same text has {math.exp(bigram):.1f} "
        f"({math.exp(bigram - valid_loss):.1f} times higher)"
    )
    events: list[dict[str, Any]] = [{"event": "baseline", "name": "bigram", "loss": bigram, "perplexity": math.exp(bigram)}]
    step = Config.load(run).train.steps
    texts = generate(run, list(PROMPTS), max_new_tokens=60, temperature=0.6, top_p=0.95, seed=1)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        say(f"\n--- {prompt!r}\n{prompt}{text}")
        events.append({"event": "sample", "step": step, "prompt": prompt, "text": text})
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)
    write_report(run)
