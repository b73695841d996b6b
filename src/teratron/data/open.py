"""Open what a run learns from: prepare raw text on the way, find the tokenizer, lay out the samples."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from teratron.config import Config, UserError
from teratron.data.indexed import IndexedDataset
from teratron.data.layout import EvaluationWindows, Source, open_sources, train_samples, valid_windows
from teratron.data.samples import Samples
from teratron.data.tokenizer import Tokenizer, load_tokenizer

Say = Callable[[str], None]


@dataclass(frozen=True)
class TrainingData:
    """Everything of the data that a run needs."""

    vocab_size: int
    """Token ids of the model."""
    eod: int | None
    """End-of-document id, when the tokenizer is known and has one."""
    train: Samples
    valid: EvaluationWindows | None
    train_tokens: int
    valid_tokens: int


def open_data(config: Config, run: Path, phases: Sequence[int], say: Say) -> TrainingData:
    """Open `data.*` of a config; raw text is prepared into RUN/data first, the tokenizer is kept in RUN/tokenizer.

    phases: steps of each phase of the sample order (contract C14). Raises `UserError` for everything that does not fit.
    """
    data = config.data
    if data.text:
        prefix = _prepare_text(config, run, say)
        sources, tokenizer = [Source(IndexedDataset(prefix), None)], load_tokenizer(run / "tokenizer")
    elif data.train:
        sources = open_sources(data.train)
        tokenizer = _known_tokenizer(config, run, sources)
    else:
        raise UserError("no data: give raw text (--data.text FILE_OR_FOLDER) or prepared data sets (--data.train PREFIX)")
    if data.valid:
        valid = valid_windows(config, open_sources(data.valid), "0,1")
        train, train_tokens = train_samples(config, sources, "1,0", phases)
    else:
        valid = valid_windows(config, sources, data.split)
        train, train_tokens = train_samples(config, sources, data.split, phases)
    valid_tokens = valid.target_tokens if valid is not None else 0
    return TrainingData(_vocab_size(config, tokenizer), tokenizer.eod if tokenizer else None, train, valid, train_tokens, valid_tokens)


def _prepare_text(config: Config, run: Path, say: Say) -> Path:
    """Tokenizer and prepared data set of `data.text`, made once and kept in the run."""
    from teratron.data.prepare import prepare

    prefix = run / "data" / "text"
    inputs = [Path(item) for item in config.data.text]
    for item in inputs:
        if not item.exists():
            raise UserError(f"data.text: {item} does not exist: give files or folders of text")
    tokenizer = _text_tokenizer(config, run, inputs, say)
    if not Path(f"{prefix}.idx").is_file():
        prefix.parent.mkdir(parents=True, exist_ok=True)
        summary = prepare(
            inputs, prefix, tokenizer, text_key=config.data.text_key, workers=config.data.workers, append_eod=tokenizer.eod is not None, overwrite=True
        )
        say(str(summary))
    return prefix


def _text_tokenizer(config: Config, run: Path, inputs: list[Path], say: Say) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names, trained on the text when it says so, and saved in the run."""
    folder = run / "tokenizer"
    if folder.is_dir():
        return load_tokenizer(folder)
    from teratron.data.bpe import train_bpe
    from teratron.data.readers import read_texts
    from teratron.data.tokenizer import train_chars

    kind, _, size = (config.data.tokenizer or "bpe").partition(":")
    if kind == "chars":
        tokenizer = train_chars(read_texts(inputs, config.data.text_key))
    elif kind == "bpe":
        if size and not size.isdigit():
            raise UserError(f"data.tokenizer = {config.data.tokenizer!r}: expected bpe:SIZE, such as bpe:8192")
        vocab_size = int(size or config.model.vocab_size or 8192)
        say(f"training a byte-level BPE tokenizer of {vocab_size:,} tokens on data.text")
        tokenizer = train_bpe(read_texts(inputs, config.data.text_key), vocab_size)
    else:
        tokenizer = load_tokenizer(config.data.tokenizer)
    _save_tokenizer(tokenizer, folder)
    return tokenizer


def _save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    partial = folder.with_name(".tokenizer.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokenizer.save(partial)
    partial.rename(folder)


def _known_tokenizer(config: Config, run: Path, sources: list[Source]) -> Tokenizer | None:
    """The tokenizer of prepared data: `data.tokenizer`, else the one kept beside the data set, else unknown."""
    folder = run / "tokenizer"
    if folder.is_dir():
        return load_tokenizer(folder)
    spec = config.data.tokenizer
    if spec.partition(":")[0] in ("chars", "bpe"):
        raise UserError(f"data.tokenizer = {spec!r} is trained on raw text: with data.train give a tokenizer file, or leave it out")
    beside = Path(f"{sources[0].dataset.prefix}.tokenizer")
    if not spec and not beside.is_dir():
        return None
    tokenizer = load_tokenizer(spec or beside)
    for source in sources:
        _check_fingerprint(source.dataset.prefix, tokenizer)
    _save_tokenizer(tokenizer, folder)
    return tokenizer


def _check_fingerprint(prefix: Path, tokenizer: Tokenizer) -> None:
    """Refuse a data set whose own notes say that another tokenizer made it."""
    notes = Path(f"{prefix}.json")
    if not notes.is_file():
        return
    made_by = json.loads(notes.read_text("utf-8")).get("tokenizer", {}).get("fingerprint")
    if made_by and made_by != tokenizer.fingerprint:
        raise UserError(f"{prefix} was prepared with another tokenizer than data.tokenizer: leave data.tokenizer out, or prepare the text again")


def _vocab_size(config: Config, tokenizer: Tokenizer | None) -> int:
    size = config.model.vocab_size
    if tokenizer is None:
        if size == 0:
            raise UserError("model.vocab_size = 0 and the data set does not say which tokenizer made it: set data.tokenizer or model.vocab_size")
        return size
    if size and size < tokenizer.vocab_size:
        raise UserError(f"model.vocab_size = {size:,} is smaller than the tokenizer's {tokenizer.vocab_size:,}: raise it, or leave it out")
    return size or tokenizer.vocab_size
