"""Open what a run learns from: prepare raw text on the way, find the tokenizer, lay out the samples."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from teratron.config import Config, UserError
from teratron.data.examples import Examples
from teratron.data.indexed import IndexedDataset
from teratron.data.layout import Source, open_sources, train_samples, valid_windows
from teratron.data.samples import KnownTokens, Samples
from teratron.data.special import Needs, SpecialTokens, reserved, special_tokens
from teratron.data.tokenizer import Tokenizer, load_tokenizer, save_template

Say = Callable[[str], None]
ANYTHING = Needs()
TRAINED = ("chars", "bpe", "wordpiece")
"""What `data.tokenizer` may say to have a tokenizer trained on data.text."""


@dataclass(frozen=True)
class TrainingData:
    """Everything of the data that a run needs."""

    special: SpecialTokens
    """The vocabulary, its end-of-document token, and the tokens that the objective needs."""
    train: Samples
    valid: Samples | None
    sample_tokens: float
    """Tokens of a training sample, on average."""
    train_tokens: int
    valid_tokens: int
    """Held-out tokens that are a target."""
    identity: dict[str, str]
    """What the data sets and the tokenizer are, by name: compared when a run goes on."""


def open_data(config: Config, run: Path, phases: Sequence[int], say: Say, needs: Needs = ANYTHING) -> TrainingData:
    """Open `data.*` of a config; raw text is prepared into RUN/data first, the tokenizer is kept in RUN/tokenizer.

    phases: steps of each phase of the sample order (contract C14). needs: of the objective; a tokenizer that is trained here reserves
    its tokens. Raises `UserError` for everything that does not fit.
    """
    data = config.data
    if data.examples:
        return open_examples(config, run)
    if not data.text and not data.train:
        raise UserError("no data: give raw text (--data.text FILE_OR_FOLDER) or prepared data sets (--data.train PREFIX)")
    sources, tokenizer = _open_sources(config, run, say, needs.roles)
    vocab_size = _vocab_size(config, tokenizer)
    special = special_tokens(tokenizer, needs.roles, vocab_size, config.objective.name)
    held_out = open_sources(data.valid) if data.valid else sources
    if data.valid:
        _check_fingerprints(held_out, tokenizer)
    _check_tokens({source.dataset.prefix: source.dataset for source in (*sources, *held_out)}.values(), tokenizer, vocab_size)
    valid, valid_tokens = valid_windows(config, held_out, "0,1" if data.valid else data.split, needs.length)
    if data.valid and valid is None:
        raise UserError(f"data.valid = {' '.join(data.valid)}: holds fewer than 2 tokens; give more, or leave it out and use data.split")
    train, train_tokens = train_samples(config, sources, "1,0" if data.valid else data.split, phases, needs.length)
    identity = {"data.text" if data.text else str(source.dataset.prefix): source.dataset.identity() for source in (*sources, *held_out)}
    if tokenizer is not None:
        identity["tokenizer"] = tokenizer.fingerprint
    known = KnownTokens(valid, vocab_size) if valid is not None else None
    return TrainingData(special, KnownTokens(train, vocab_size), known, config.model.seq_length, train_tokens, valid_tokens, identity)


def open_examples(config: Config, run: Path) -> TrainingData:
    """What `teratron finetune` has made; the tokenizer is kept in RUN/tokenizer."""
    folder, length = Path(config.data.examples), config.model.seq_length
    train = Examples.load(folder / "train.safetensors", length, config.train.seed)
    valid = Examples.load(folder / "valid.safetensors", length)
    kept = run / "tokenizer"
    tokenizer = load_tokenizer(kept if kept.is_dir() else folder / "tokenizer")
    if not kept.is_dir():
        save_tokenizer(tokenizer, kept)
    special = SpecialTokens(config.model.vocab_size, tokenizer.eod, {}, tokenizer)
    identity = {"train": train.identity(), "valid": valid.identity(), "tokenizer": tokenizer.fingerprint}
    return TrainingData(special, train, valid, train.tokens / train.size, train.tokens, valid.tokens, identity)


def _open_sources(config: Config, run: Path, say: Say, roles: Sequence[str]) -> tuple[list[Source], Tokenizer | None]:
    """The data sets to learn from, prepared when they are raw text, and the run's tokenizer if there is one."""
    try:
        _discard_leftovers(config, run, roles)
        kept = _kept_tokenizer(config, run)
        if config.data.text:
            tokenizer = kept or _text_tokenizer(config, run, say, reserved(roles))
            sources = [Source(_prepared_text(config, run, tokenizer, say), None)]
            _check_fingerprints(sources, tokenizer)
            return sources, tokenizer
        sources = open_sources(config.data.train)
        return sources, _set_tokenizer(config, run, sources, kept)
    except OSError as error:
        raise UserError(
            f"{run}: the data cannot be prepared here: {error.strerror or error}; free space or choose another folder"
        ) from None


def _is_run(run: Path) -> bool:
    """Whether the folder has become a run, which keeps the tokenizer and the data that it began with."""
    return (run / "config.toml").is_file()


def _discard_leftovers(config: Config, run: Path, roles: Sequence[str]) -> None:
    """Discard the tokenizer and data of a first attempt that failed, unless they were made from the same input."""
    if _is_run(run):
        return
    note, origin = run / ".origin.json", _origin(config, roles)
    if note.is_file() and note.read_text("utf-8") == origin:
        return
    branched = (run / "checkpoints").is_dir()
    if not note.is_file() and not branched and ((run / "tokenizer").exists() or (run / "data" / "text.idx").exists()):
        raise UserError(f"--run {run}: holds a tokenizer or data that no run made; choose another folder")
    if not branched:
        shutil.rmtree(run / "tokenizer", ignore_errors=True)
    (run / "data" / "text.idx").unlink(missing_ok=True)
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(origin, "utf-8")


def _origin(config: Config, roles: Sequence[str]) -> str:
    """What the tokenizer and the prepared text depend on: the keys, the roles, and each file's size and time of change."""
    data, files = config.data, []
    if data.text:
        from teratron.data.readers import find_files

        found = find_files([Path(item) for item in data.text])
        files = [(str(path), size, path.stat().st_mtime_ns) for path, size in zip(found.paths, found.sizes, strict=True)]
    return json.dumps([data.text, data.text_key, data.train, data.tokenizer, config.model.vocab_size, roles, files])


def _kept_tokenizer(config: Config, run: Path) -> Tokenizer | None:
    """The tokenizer that the run has already; one that was branched off takes no other."""
    folder, spec = run / "tokenizer", config.data.tokenizer
    if not folder.is_dir() and _is_run(run) and (config.data.text or Path(f"{config.data.train[0]}.tokenizer").is_dir()):
        raise UserError(f"{folder} is missing: copy it back from the newest folder in {run / 'checkpoints'}")
    if not folder.is_dir():
        return None
    tokenizer = load_tokenizer(folder)
    if spec and not _is_run(run) and spec.partition(":")[0] not in TRAINED and load_tokenizer(spec).fingerprint != tokenizer.fingerprint:
        raise UserError(f"data.tokenizer = {spec!r} is another tokenizer than the one that {run} began with: leave it out")
    return tokenizer


def _text_tokenizer(config: Config, run: Path, say: Say, special: Sequence[str]) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names, trained on the text when it says so, and saved in the run; special: what it reserves."""
    from teratron.data.bpe import train_bpe
    from teratron.data.tokenizer import train_chars
    from teratron.data.wordpiece import train_wordpiece

    learners = {"bpe": ("byte-level BPE", train_bpe), "wordpiece": ("WordPiece", train_wordpiece)}
    spec = config.data.tokenizer or "bpe"
    kind, colon, size = spec.partition(":")
    if kind not in TRAINED:
        tokenizer = load_tokenizer(spec)
    elif spec == "chars":
        tokenizer = _trained(train_chars, config)
    elif kind in learners and (size.isdecimal() or not colon):
        vocab_size, (name, learn) = int(size or config.model.vocab_size or 8192), learners[kind]
        say(f"training a {name} tokenizer of {vocab_size:,} tokens on data.text")
        tokenizer = _trained(lambda texts: learn(texts, vocab_size, special), config)
    else:
        raise UserError(f"data.tokenizer = {spec!r}: expected chars, bpe:SIZE or wordpiece:SIZE, such as bpe:8192")
    save_tokenizer(tokenizer, run / "tokenizer")
    return tokenizer


def _trained(train: Callable[[Iterable[str]], Tokenizer], config: Config) -> Tokenizer:
    """Train on data.text; when there is nothing to train on, the reason is the first thing that was rejected."""
    from teratron.data.readers import read_texts
    from teratron.data.records import Rejection

    rejected: list[Rejection] = []
    taken = 0

    def texts() -> Iterable[str]:
        nonlocal taken
        inputs = [Path(item) for item in config.data.text]
        for text in read_texts(inputs, config.data.text_key, lambda found: rejected.append(found) if not rejected else None):
            taken += len(text)
            yield text

    try:
        return train(texts())
    except UserError as error:
        if taken or not rejected:
            raise UserError(f"data.text = {' '.join(config.data.text)}, data.tokenizer = '{config.data.tokenizer}': {error}") from None
        raise UserError(f"data.text: no text to learn from: {rejected[0]}") from None


def _prepared_text(config: Config, run: Path, tokenizer: Tokenizer, say: Say) -> IndexedDataset:
    """The prepared data set of `data.text`, made once and kept in the run."""
    prefix = run / "data" / "text"
    if not Path(f"{prefix}.idx").is_file():
        from teratron.data.prepare import prepare

        data, inputs = config.data, [Path(item) for item in config.data.text]
        prefix.parent.mkdir(parents=True, exist_ok=True)
        has_eod = tokenizer.eod is not None
        summary = prepare(inputs, prefix, tokenizer, text_key=data.text_key, workers=data.workers, append_eod=has_eod, overwrite=True)
        say(str(summary))
    return IndexedDataset(prefix)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Save a tokenizer as a folder that appears whole or not at all."""
    partial = folder.with_name(".tokenizer.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokenizer.save(partial)
    save_template(tokenizer, partial)
    partial.rename(folder)


def _set_tokenizer(config: Config, run: Path, sources: list[Source], kept: Tokenizer | None) -> Tokenizer | None:
    """The tokenizer of prepared data: the run's, else `data.tokenizer`, else the one beside the first data set, else unknown."""
    spec = config.data.tokenizer
    if kept is None and spec.partition(":")[0] in TRAINED:
        raise UserError(
            f"data.tokenizer = {spec!r} is trained on raw text: with data.train give a tokenizer file, or none (--data.tokenizer=)"
        )
    beside = Path(f"{sources[0].dataset.prefix}.tokenizer")
    tokenizer = kept or (load_tokenizer(spec or beside) if spec or beside.is_dir() else None)
    _check_fingerprints(sources, tokenizer)
    if kept is None and tokenizer is not None:
        save_tokenizer(tokenizer, run / "tokenizer")
    return tokenizer


def _check_tokens(datasets: Iterable[IndexedDataset], tokenizer: Tokenizer | None, vocab_size: int) -> None:
    """Read every token of data sets without notes on who made them: one beyond the vocabulary would end the run midway."""
    for dataset in datasets:
        if tokenizer is not None and Path(f"{dataset.prefix}.json").is_file():
            continue
        if dataset.max_token() >= vocab_size:
            raise UserError(
                f"{dataset.prefix} holds token {dataset.max_token()}, the model has {vocab_size}: "
                "set model.vocab_size to the size of the tokenizer that made it"
            )


def _check_fingerprints(sources: Iterable[Source], tokenizer: Tokenizer | None) -> None:
    """Refuse a data set whose own notes say that another tokenizer made it."""
    for prefix in (source.dataset.prefix for source in sources):
        notes = Path(f"{prefix}.json")
        if tokenizer is None or not notes.is_file():
            continue
        try:
            made_by = json.loads(notes.read_text("utf-8"))["tokenizer"]["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{notes}: damaged: it should say which tokenizer made {prefix}; prepare it again, or remove this file"
            ) from None
        if made_by != tokenizer.fingerprint:
            raise UserError(f"{prefix} was prepared with another tokenizer than the run's: leave data.tokenizer out, or prepare it again")


def _vocab_size(config: Config, tokenizer: Tokenizer | None) -> int:
    size = config.model.vocab_size
    if tokenizer is None and size == 0:
        raise UserError(
            "model.vocab_size = 0 and the data set does not say which tokenizer made it: set data.tokenizer or model.vocab_size"
        )
    if tokenizer is not None and 0 < size < tokenizer.vocab_size:
        raise UserError(f"model.vocab_size = {size:,} is smaller than the tokenizer's {tokenizer.vocab_size:,}: raise it, or leave it out")
    return size or (tokenizer.vocab_size if tokenizer is not None else 0)
