"""SentencePiece models (Kudo and Richardson 2018), as Llama, Mistral and T5 use them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from teratron.config import UserError
from teratron.data.cuts import CutRule
from teratron.data.tokenizer import check_ids, choose_eod, spelled_bytes


class SentencePieceTokenizer:
    """A SentencePiece model, kept as the bytes of its file; never cut, because its pieces may reach over spaces."""

    kind = "sentencepiece"
    cut_rule: CutRule = "never"
    chat_template = ""

    def __init__(self, model: bytes, eod: str = "") -> None:
        from sentencepiece import SentencePieceProcessor

        self._model = model
        self._engine: Any = SentencePieceProcessor(model_proto=model)
        self.vocab_size = int(self._engine.vocab_size())
        own = self._engine.eos_id()
        marked = [piece for piece in map(self._engine.id_to_piece, range(self.vocab_size)) if piece[:1] in "<["]
        guesses = [self._engine.id_to_piece(own)] if own >= 0 else ["</s>", "<eos>"]
        self.eod = choose_eod(self.token_id, eod, guesses, marked)
        self.bos: int | None = self._engine.bos_id() if self._engine.bos_id() >= 0 else None
        self.fingerprint = hashlib.sha256(model).hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(self._engine.encode(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(ids) for ids in self._engine.encode(list(texts))]

    def decode(self, ids: Sequence[int]) -> str:
        check_ids(ids, self.vocab_size)
        return str(self._engine.decode(list(ids)))

    def token_id(self, token: str) -> int | None:
        found = self._engine.piece_to_id(token)
        return found if self._engine.id_to_piece(found) == token else None

    def pieces(self) -> list[str]:
        return [self._engine.id_to_piece(number).replace("\u2581", " ") for number in range(self.vocab_size)]

    def scores(self) -> list[float]:
        """The score of each id's piece, by which the model chooses."""
        return [float(self._engine.get_score(number)) for number in range(self.vocab_size)]

    def token_bytes(self) -> list[bytes | None]:
        engine = self._engine
        special = [engine.is_control(number) or engine.is_unknown(number) for number in range(self.vocab_size)]
        return [None if none else spelled_bytes(engine.id_to_piece(number), True) for number, none in enumerate(special)]

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.model").write_bytes(self._model)
        if self.eod is not None:
            config = {"eos_token": self._engine.id_to_piece(self.eod)}
            (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False) + "\n", "utf-8")

    def __reduce__(self) -> tuple[Any, ...]:
        return SentencePieceTokenizer, (self._model, "" if self.eod is None else self._engine.id_to_piece(self.eod))


def load_sentencepiece(file: Path, eod: str) -> SentencePieceTokenizer:
    """A SentencePiece model file; the `eos_token` of a tokenizer_config.json beside it goes before the model's own."""
    try:
        import sentencepiece  # noqa: F401
    except ImportError:
        raise UserError(f"tokenizer {file}: needs the sentencepiece package: pip install sentencepiece") from None
    from teratron.data.tok_huggingface import configured_eod

    model = file.read_bytes()
    try:
        plain = SentencePieceTokenizer(model)
    except (RuntimeError, TypeError, ValueError):
        raise UserError(f"tokenizer {file}: not a SentencePiece model, or a damaged one; copy it again") from None
    configured = configured_eod(file.with_name("tokenizer_config.json"))
    wanted = eod or (configured if configured and plain.token_id(configured) is not None else "")
    return SentencePieceTokenizer(model, wanted) if wanted else plain
