"""Tokenizers of the `tokenizers` package: tokenizer.json, GPT-2's vocab.json with merges.txt, BERT's vocab.txt."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teratron.config import UserError
from teratron.data.cuts import CutRule
from teratron.data.tokenizer import END_OF_TEXT, check_ids, choose_eod, digest, spelled_bytes

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Engine

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LATER = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTTABLE_SPLITS = (GPT2_SPLIT, _LATER % "{1,3}", _LATER % "")
"""Regular expressions (GPT-2; GPT-4 and Llama 3; Qwen) that the cut rule `word` was derived for."""
MOST_IDS = 1 << 24
"""The package writes a tokenizer out through every id up to the largest: one far off fills memory until the process is aborted."""
EOD_GUESSES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "[SEP]")


class HuggingFaceTokenizer:
    """A tokenizer of the `tokenizers` package.

    Truncation and padding that a file asks for are switched off: no text is ever silently shortened. Special tokens are not
    recognised in text, so that no document can end itself.
    """

    chat_template = ""

    def __init__(self, engine: Engine, eod: str = "", configured_eod: str = "") -> None:
        engine.no_truncation()
        engine.no_padding()
        engine.encode_special_tokens = True
        self._engine = engine
        self._definition: dict[str, Any] = json.loads(engine.to_str())
        vocab = engine.get_vocab(with_added_tokens=True)
        self.kind: str = self._definition["model"]["type"].lower()
        self.vocab_size = max(vocab.values()) + 1
        first = "[SEP]" if self.kind == "wordpiece" else END_OF_TEXT
        marked = [token for token in vocab if token[:1] in "<["]
        self.eod = choose_eod(self.token_id, eod, (configured_eod, first, *EOD_GUESSES), marked)
        self.bos = self._prepended()
        self.cut_rule = _cut_rule(self._definition)

    def _prepended(self) -> int | None:
        """The id that the post-processor puts first."""
        plain, full = (self._engine.encode("a", add_special_tokens=special).ids for special in (False, True))
        return full[0] if len(full) > len(plain) and full[: len(plain)] != plain else None

    @functools.cached_property
    def fingerprint(self) -> str:
        return digest(_meaning(self._definition))

    def encode(self, text: str) -> list[int]:
        # The `fast` call leaves out offsets, which nobody asks for: a quarter faster.
        return self._engine.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [item.ids for item in self._engine.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        check_ids(ids, self.vocab_size)
        return self._engine.decode(list(ids), skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        return self._engine.token_to_id(token)

    def pieces(self) -> list[str]:
        if (self._definition["decoder"] or {}).get("type") == "ByteLevel":
            return self._engine.decode_batch([[number] for number in range(self.vocab_size)], skip_special_tokens=False)
        return [(self._engine.id_to_token(number) or "").replace("\u2581", " ") for number in range(self.vocab_size)]

    def token_bytes(self) -> list[bytes | None]:
        decoder = self._definition["decoder"] or {}
        steps = decoder.get("decoders", [decoder])
        kinds = {step.get("type") for step in steps}
        spelled = kinds & {"ByteLevel", "Metaspace"} or any(step.get("pattern") == {"String": "\u2581"} for step in steps)
        if not spelled:
            raise UserError(f"the tokens of this {self.kind} tokenizer stand for different text in different places: use a byte-level BPE")
        added = {token["id"]: None if token["special"] else token["content"].encode() for token in self._definition["added_tokens"]}
        alphabet = {character: number for number, character in enumerate(byte_alphabet())}
        found: list[bytes | None] = []
        for number in range(self.vocab_size):
            piece = self._engine.id_to_token(number)
            if piece is None or number in added:
                found.append(added.get(number))
            elif "ByteLevel" in kinds:
                found.append(bytes(alphabet[character] for character in piece))
            else:
                found.append(spelled_bytes(piece, "ByteFallback" in kinds))
        return found

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self._engine.to_str(pretty=True) + "\n", "utf-8")
        if self.eod is not None:
            config = {"eos_token": self._engine.id_to_token(self.eod), "tokenizer_class": "PreTrainedTokenizerFast"}
            (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", "utf-8")

    def __reduce__(self) -> tuple[Any, ...]:
        # The engine's own pickling forgets `encode_special_tokens`.
        eod = "" if self.eod is None else self._engine.id_to_token(self.eod)
        return _restore, (self._engine.to_str(), eod)


def byte_alphabet() -> list[str]:
    """The character that stands for each byte in byte-level BPE: itself where it is printed, else one from U+0100 on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(number if number in printed else next(others)) for number in range(256)]


def _restore(definition: str, eod: str) -> HuggingFaceTokenizer:
    from tokenizers import Tokenizer as Engine

    return HuggingFaceTokenizer(Engine.from_str(definition), eod)


def load_json(file: Path, eod: str) -> HuggingFaceTokenizer:
    """A tokenizer.json, or a vocab.json that has its merges.txt beside it."""
    from tokenizers import Tokenizer as Engine

    content = _read_json(file)
    if all(isinstance(value, int) for value in content.values()):
        return _load_vocab_and_merges(file, file.with_name(file.name.removesuffix("vocab.json") + "merges.txt"), eod)
    try:
        engine = Engine.from_str(file.read_text("utf-8"))
    except Exception as error:  # the package raises bare Exception
        raise UserError(f"tokenizer {file}: not a tokenizer.json that the `tokenizers` package can read ({error}); copy it again") from None
    return _made(engine, file, eod)


def load_merges(file: Path, eod: str) -> HuggingFaceTokenizer:
    """A merges.txt that has its vocab.json beside it."""
    return _load_vocab_and_merges(file.with_name(file.name.removesuffix("merges.txt") + "vocab.json"), file, eod)


def load_wordpiece(file: Path, eod: str) -> HuggingFaceTokenizer:
    """A BERT vocab.txt, one piece a line; text is lower-cased unless some piece holds a capital."""
    from tokenizers import Tokenizer as Engine
    from tokenizers import models

    try:
        pieces = file.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"tokenizer {file}: not UTF-8 text at byte {error.start}; copy it again") from None
    vocab = {piece.strip(): number for number, piece in enumerate(pieces)}
    if "[UNK]" not in vocab:
        raise UserError(f"tokenizer {file}: no [UNK] among its {len(pieces)} lines: expected a BERT vocab.txt, one piece a line")
    cased = any(piece != piece.lower() for piece in vocab if not piece.startswith("["))
    return _made(wordpiece(Engine(models.WordPiece(vocab, unk_token="[UNK]")), cased), file, eod)


def _load_vocab_and_merges(vocab: Path, merges: Path, eod: str) -> HuggingFaceTokenizer:
    """GPT-2's two files (Radford et al. 2019): byte-level BPE."""
    from tokenizers import models

    for path in (vocab, merges):
        if not path.is_file():
            raise UserError(f"tokenizer {path}: missing: a vocab.json and its merges.txt belong together; copy both")
    try:
        model = models.BPE.from_file(str(vocab), str(merges))
    except Exception as error:  # the package raises bare Exception
        raise UserError(f"tokenizer {vocab} with {merges.name}: do not fit together or are damaged ({error}); copy both again") from None
    return _made(byte_level(model), vocab, eod)


def byte_level(model: Any) -> Engine:
    """A BPE model with GPT-2's splitting into words and its alphabet of bytes."""
    from tokenizers import Tokenizer as Engine
    from tokenizers import decoders, pre_tokenizers

    engine = Engine(model)
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    return engine


def wordpiece(engine: Engine, cased: bool) -> Engine:
    """An engine with BERT's splitting into words; without case, and then without accents, unless `cased`."""
    from tokenizers import decoders, normalizers, pre_tokenizers

    engine.normalizer = normalizers.BertNormalizer(lowercase=not cased)
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    engine.decoder = decoders.WordPiece()
    return engine


def _made(engine: Engine, file: Path, eod: str) -> HuggingFaceTokenizer:
    if not engine.get_vocab_size():
        raise UserError(f"tokenizer {file}: its vocabulary is empty; copy it again")
    largest = max(engine.get_vocab(with_added_tokens=True).values())
    if largest >= MOST_IDS:
        raise UserError(f"tokenizer {file}: token id {largest}, expected ids below {MOST_IDS}: the file is damaged; copy it again")
    return HuggingFaceTokenizer(engine, eod, configured_eod(file.with_name("tokenizer_config.json")))


def configured_eod(config: Path) -> str:
    """The `eos_token` of a tokenizer_config.json, where there is one."""
    token = _read_json(config).get("eos_token") if config.is_file() else None
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"tokenizer {file}: not JSON ({error}); copy it again") from None
    if not isinstance(content, dict) or not content:
        raise UserError(f"tokenizer {file}: expected a JSON object with a `model`, or a vocabulary of tokens and ids")
    return content


def _meaning(definition: dict[str, Any]) -> dict[str, Any]:
    """The parts of a tokenizer.json that map text to ids, however the file was written."""
    model = dict(definition["model"])
    if "merges" in model:
        model["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    added = [[token["content"], token["id"]] for token in definition["added_tokens"]]
    return {"model": model, "normalizer": definition["normalizer"], "pre_tokenizer": definition["pre_tokenizer"], "added": added}


def _cut_rule(definition: dict[str, Any]) -> CutRule:
    """Where text may be cut: known families only, and no added token that takes part in ordinary text."""
    normalizer, splitter, model = definition["normalizer"], definition["pre_tokenizer"] or {}, definition["model"]
    if any(not token["special"] for token in definition["added_tokens"]) or model.get("dropout"):
        return "never"
    if model["type"] == "WordPiece" and splitter.get("type") == "BertPreTokenizer" and (normalizer or {}).get("type") == "BertNormalizer":
        return "blank"
    if model["type"] == "BPE" and (normalizer or {"type": "NFC"})["type"] == "NFC" and _splits_words(splitter):
        return "word"
    return "never"


def _splits_words(splitter: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer is byte-level and splits as `CUTTABLE_SPLITS` do."""
    steps = splitter.get("pretokenizers", [splitter])
    *before, level = steps
    if level.get("type") != "ByteLevel" or level["add_prefix_space"]:
        return False
    if not before:
        return bool(level.get("use_regex", True))
    pattern = before[0].get("pattern", {}).get("Regex") if before[0].get("type") == "Split" else None
    return len(before) == 1 and not level["use_regex"] and pattern in CUTTABLE_SPLITS and before[0]["behavior"] == "Isolated"
