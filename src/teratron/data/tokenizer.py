"""Text to token ids and back: what every tokenizer offers, how one is found on disk, and the two that need no training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from teratron.config import UserError, nearest
from teratron.data.cuts import CutRule

END_OF_TEXT = "<|endoftext|>"
TEMPLATE_FILE = "chat_template.jinja"
ACCEPTED = (
    "`bytes`, a tokenizer.json, vocab.json with merges.txt, a BERT vocab.txt, a SentencePiece .model, a chars.json, "
    "or a folder that holds one of them"
)


class Tokenizer(Protocol):
    """Text to ids and back. Text is only text: a special token spelled out in it is encoded as ordinary characters."""

    kind: str
    """bytes, chars, bpe, wordpiece, unigram, wordlevel or sentencepiece."""
    vocab_size: int
    """Largest id + 1."""
    eod: int | None
    """Id that ends a document."""
    bos: int | None
    """Id that the tokenizer's own rules put before a text; None when they put none. `encode` never adds it."""
    cut_rule: CutRule
    """Where a long text may be cut without changing its tokens."""
    chat_template: str
    """How conversations are written for it, in Jinja, as transformers keeps it; empty = unknown. It is carried along, not used here."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of what maps text to ids; the choice of `eod` is not part of it."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text, no special tokens added."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts, each as `encode` gives them; may use all cores."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens spelled out. Raises `UserError` for an id outside the vocabulary."""
        ...

    def token_id(self, token: str) -> int | None:
        """Id of one token as the vocabulary spells it, or None."""
        ...

    def pieces(self) -> list[str]:
        """The text of each id alone, its spaces kept, bytes that are no text as U+FFFD; in WordPiece `##` goes on with a word."""
        ...

    def token_bytes(self) -> list[bytes | None]:
        """What each id adds to the UTF-8 text that it is in; None for special tokens, which add none.

        Raises `UserError` for a tokenizer whose ids stand for different text in different places.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write the files that `load_tokenizer(folder)` reads back to an equal tokenizer."""
        ...


def load_tokenizer(spec: str | Path, eod: str = "") -> Tokenizer:
    """The tokenizer that a word, file or folder names.

    Accepted: `bytes`; a tokenizer.json (any file of the `tokenizers` package); vocab.json with merges.txt beside it (also
    NAME-vocab.json with NAME-merges.txt); a BERT vocab.txt (also NAME-vocab.txt); a SentencePiece *.model (also
    tokenizer.model.v1); chars.json; or a folder with one of them, looked for in this order.

    The end-of-document token is `eod` when given, else the `eos_token` of a tokenizer_config.json in the same folder, else
    the model's own (SentencePiece), else [SEP] (WordPiece), else the first known of <|endoftext|>, <|end_of_text|>, </s>,
    <eos>, [EOS], [SEP]; else none.

    Raises `UserError` for an unknown or damaged file, and for an `eod` that is not in the vocabulary.
    """
    if str(spec) == "bytes":
        return ByteTokenizer(eod)
    path = Path(spec)
    file = _find(path) if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"tokenizer '{spec}': no such file or folder; accepted: {ACCEPTED}")
    try:
        tokenizer = _loader(file)(file, eod)
        tokenizer.chat_template = _template_beside(file)
    except OSError as error:
        raise UserError(f"tokenizer {file}: cannot be read: {error.strerror or error}") from None
    return tokenizer


def _template_beside(file: Path) -> str:
    """The chat template in a file of its own, or in tokenizer_config.json; of several the one that is called default."""
    own, config = file.with_name(TEMPLATE_FILE), file.with_name("tokenizer_config.json")
    try:
        if own.is_file():
            return own.read_text("utf-8")
        said = json.loads(config.read_bytes()).get("chat_template") if config.is_file() else None
        found = {one["name"]: one["template"] for one in said}.get("default") if isinstance(said, list) else said
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"tokenizer {file}: its chat template cannot be read ({error!r}): copy {own.name} and {config.name} again"
        ) from None
    return found if isinstance(found, str) else ""


def save_template(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer's chat template, where it has one, as `load_tokenizer` and transformers read it."""
    if tokenizer.chat_template:
        (folder / TEMPLATE_FILE).write_text(tokenizer.chat_template, "utf-8")


_PATTERNS = (
    "tokenizer.json",
    "chars.json",
    "bytes.json",
    "vocab.json",
    "*-vocab.json",
    "vocab.txt",
    "*-vocab.txt",
    "tokenizer.model",
    "*.model",
    "*.model.v*",
)


def find_tokenizer(folder: Path) -> Path | None:
    """The tokenizer's main file in a folder, or None."""
    for pattern in _PATTERNS:
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise UserError(f"tokenizer folder {folder}: holds several ({names}); name one of these files")
        if found:
            return found[0]
    return None


def _find(folder: Path) -> Path:
    found = find_tokenizer(folder)
    if found is None:
        raise UserError(f"tokenizer folder {folder}: holds no tokenizer file; accepted: {ACCEPTED}")
    return found


def _loader(file: Path) -> Callable[[Path, str], Tokenizer]:
    """The function that reads this kind of file."""
    name = file.name
    if name in ("chars.json", "bytes.json"):
        return _load_simple
    if name.endswith(".model") or ".model.v" in name:
        from teratron.data.tok_sentencepiece import load_sentencepiece

        return load_sentencepiece
    from teratron.data import tok_huggingface

    if name.endswith(".json"):
        return tok_huggingface.load_json
    if name.endswith("merges.txt"):
        return tok_huggingface.load_merges
    if name.endswith("vocab.txt"):
        return tok_huggingface.load_wordpiece
    raise UserError(f"tokenizer {file}: not a known kind of tokenizer file; accepted: {ACCEPTED}")


def _load_simple(file: Path, eod: str) -> Tokenizer:
    try:
        content = json.loads(file.read_text("utf-8"))
        eod = eod or content.get("eod", "")
        return ByteTokenizer(eod) if content["kind"] == "bytes" else CharTokenizer(content["characters"], eod)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f'tokenizer {file}: damaged: expected {{"kind": "chars", "characters": "..."}} or {{"kind": "bytes"}}; make it again'
        ) from None


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, and <|endoftext|> as 256: no training, no unknown text, any language."""

    kind = "bytes"
    vocab_size = 257
    bos: int | None = None
    cut_rule: CutRule = "anywhere"
    chat_template = ""

    def __init__(self, eod: str = "") -> None:
        self.eod = choose_eod(self.token_id, eod, [END_OF_TEXT], [END_OF_TEXT])
        self.fingerprint = digest({"kind": self.kind})

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        check_ids(ids, self.vocab_size)
        end = END_OF_TEXT.encode()
        return b"".join(end if i == 256 else bytes((i,)) for i in ids).decode("utf-8", errors="replace")

    def token_id(self, token: str) -> int | None:
        data = token.encode("utf-8")
        return 256 if token == END_OF_TEXT else data[0] if len(data) == 1 else None

    def pieces(self) -> list[str]:
        return [self.decode([number]) for number in range(self.vocab_size)]

    def token_bytes(self) -> list[bytes | None]:
        return [*(bytes((number,)) for number in range(256)), None]

    def save(self, folder: Path) -> None:
        _save(folder, "bytes.json", {"kind": self.kind, "eod": "" if self.eod is None else self.decode([self.eod])})


class CharTokenizer:
    """One id for each character of a given alphabet, and no other; no end-of-document token unless a character is chosen."""

    kind = "chars"
    bos: int | None = None
    cut_rule: CutRule = "anywhere"
    chat_template = ""

    def __init__(self, characters: str, eod: str = "") -> None:
        if len(set(characters)) != len(characters) or not characters:
            raise ValueError("the alphabet must be a non-empty text without repeated characters")
        self.characters = characters
        self.vocab_size = len(characters)
        codes = np.frombuffer(characters.encode("utf-32-le"), np.uint32)
        self._ids = np.full(int(codes.max()) + 1, -1, np.int32)
        self._ids[codes] = np.arange(self.vocab_size)
        self.eod = choose_eod(self.token_id, eod, [], characters)
        self.fingerprint = digest({"kind": self.kind, "characters": characters})

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Raises `UserError` that names the first character outside the alphabet."""
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        known = codes < len(self._ids)
        ids = self._ids[np.where(known, codes, 0)]
        bad = np.flatnonzero(~known | (ids < 0))
        if bad.size:
            where = int(bad[0])
            raise UserError(
                f"character {text[where]!r} (U+{ord(text[where]):04X}) at position {where} is not among the tokenizer's {self.vocab_size}"
                " characters: train the tokenizer on text that holds it, or use `bytes` or a BPE"
            )
        return list(ids.tolist())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        check_ids(ids, self.vocab_size)
        return "".join(self.characters[i] for i in ids)

    def token_id(self, token: str) -> int | None:
        place = self.characters.find(token) if len(token) == 1 else -1
        return place if place >= 0 else None

    def pieces(self) -> list[str]:
        return list(self.characters)

    def token_bytes(self) -> list[bytes | None]:
        return [None if number == self.eod else character.encode() for number, character in enumerate(self.characters)]

    def save(self, folder: Path) -> None:
        chosen = "" if self.eod is None else self.characters[self.eod]
        _save(folder, "chars.json", {"kind": self.kind, "characters": self.characters, "eod": chosen})


def train_chars(texts: Iterable[str]) -> Tokenizer:
    """Every character of the texts, sorted, as nanoGPT's character-level recipe numbers them. Raises `UserError` without any."""
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    if not characters:
        raise UserError("tokenizer chars: the training text is empty: give text that holds at least one character")
    return CharTokenizer("".join(sorted(characters)))


def choose_eod(token_id: Callable[[str], int | None], wanted: str, guesses: Iterable[str], known: Iterable[str]) -> int | None:
    """The id of the wanted token, or of the first guess that there is, or None; `known` serves for the suggestion."""
    if wanted:
        chosen = token_id(wanted)
        if chosen is None:
            raise UserError(f"end-of-document token '{wanted}' is not in the tokenizer's vocabulary{nearest(wanted, known)}")
        return chosen
    return next((found for guess in guesses if (found := token_id(guess)) is not None), None)


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Refuse ids that no token has."""
    if len(ids) and (min(ids) < 0 or max(ids) >= vocab_size):
        bad = next(i for i in ids if not 0 <= i < vocab_size)
        raise UserError(f"token id {bad} is outside the tokenizer's {vocab_size} ids: the ids come from another tokenizer")


def spelled_bytes(piece: str, fallback: bool) -> bytes:
    """The bytes of SentencePiece's spelling: U+2581 is a space, and with `fallback` <0xNN> a byte."""
    if fallback and len(piece) == 6 and piece.startswith("<0x"):
        return bytes((int(piece[3:5], 16),))
    return piece.replace("\u2581", " ").encode()


def digest(definition: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(definition, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def _save(folder: Path, name: str, content: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content, ensure_ascii=False) + "\n", "utf-8")
