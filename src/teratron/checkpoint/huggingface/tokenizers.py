"""Tokenizers as `AutoTokenizer` loads them: tokenizer.json or tokenizer.model, and what tokenizer_config.json says of special tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from teratron.checkpoint.format import write_synced
from teratron.checkpoint.source import Weights
from teratron.config import UserError
from teratron.data.special import find_role
from teratron.data.tokenizer import CharTokenizer, Tokenizer, save_template

_ROLES = {"cls_token": "cls", "sep_token": "sep", "mask_token": "mask", "pad_token": "pad", "unk_token": "unknown"}


def write_tokenizer(tokenizer: Tokenizer, folder: Path, length: int) -> None:
    """Write a tokenizer's files; length: tokens of the longest text."""
    tokenizer.save(folder)
    save_template(tokenizer, folder)
    if tokenizer.kind in ("bytes", "chars"):
        for name in ("bytes.json", "chars.json"):
            (folder / name).unlink(missing_ok=True)
        engine = _of_characters(tokenizer) if isinstance(tokenizer, CharTokenizer) else _of_bytes(tokenizer)
        write_synced(folder / "tokenizer.json", (engine.to_str(pretty=True) + "\n").encode())
    ids = {key: find_role(tokenizer, role) for key, role in _ROLES.items()} | {"bos_token": tokenizer.bos, "eos_token": tokenizer.eod}
    pieces = tokenizer.pieces()
    said = {key: pieces[number] for key, number in ids.items() if number is not None}
    kind = "LlamaTokenizer" if tokenizer.kind == "sentencepiece" else "PreTrainedTokenizerFast"
    content = {**said, "tokenizer_class": kind, "model_max_length": length, "clean_up_tokenization_spaces": False}
    write_synced(folder / "tokenizer_config.json", (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def _of_bytes(tokenizer: Tokenizer) -> Any:
    """Bytes as their own byte-level BPE without merges."""
    from tokenizers import AddedToken, models

    from teratron.data.tok_huggingface import byte_alphabet, byte_level

    engine = byte_level(models.BPE({character: number for number, character in enumerate(byte_alphabet())}, []))
    engine.add_special_tokens([AddedToken(tokenizer.decode([256]), special=True)])
    return engine


def _of_characters(tokenizer: CharTokenizer) -> Any:
    """Characters as words of one character."""
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Engine

    first = tokenizer.characters[0]  # the package wants a token for what is unknown
    engine = Engine(models.WordLevel({character: number for number, character in enumerate(tokenizer.characters)}, unk_token=first))
    engine.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    engine.decoder = decoders.Fuse()
    return engine


def special_ids(weights: Weights) -> dict[str, Any]:
    """The ids of special tokens, as config.json has them. Raises `UserError` for RoBERTa with another padding token than its own."""
    tokenizer, config = weights.tokenizer, weights.config
    if tokenizer is None:
        return {}
    pad = find_role(tokenizer, "pad")
    if config.position_offset == 2 and config.family == "encoder" and pad != 1:
        raise UserError(
            f"{weights.name}: its padding token is {pad}, and RoBERTa, which gives token 1 no position, has 1: train a tokenizer whose "
            "token 1 is <pad>, or write it with --to weights"
        )
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eod, "pad_token_id": pad}
    if config.family == "encoder_decoder":
        ids |= {"decoder_start_token_id": pad, "eos_token_id": find_role(tokenizer, "sep") or tokenizer.eod}
    return {key: number for key, number in ids.items() if number is not None}
