"""Tokenizers: lossless, deterministic, found on disk, the same after saving; cuts do not change tokens."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Engine

from teratron.config import UserError
from teratron.data.bpe import train_bpe
from teratron.data.cuts import CutRule, NoCut, cut_stream, last_cut, pieces
from teratron.data.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, load_tokenizer, train_chars

CORPUS = [
    "def main():\n    print('Hello, wörld!')\n\n\nclass A:\n    pass\n",
    "The quick brown fox, the lazy dog: 12345 67 and 8.\n" * 5,
    "日本語。\n中文、\n",
]
TRICKY = st.text(st.sampled_from(list("aZé9 \n\n\r\t.,/'s\u00a0\u2028\u0301日。\x1c\x85İ#<|>")), max_size=60)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(CORPUS, 400)


def wordpiece_folder(folder: Path) -> Path:
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789.,:!'()日本語"]
    pieces_ = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "fox", *letters, *("##" + letter for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(pieces_) + "\n", "utf-8")
    return folder


def same(a: Tokenizer, b: Tokenizer) -> bool:
    names = ("kind", "vocab_size", "eod", "bos", "cut_rule", "fingerprint")
    text = "The fox, wörld 12\n  x"
    return all(getattr(a, name) == getattr(b, name) for name in names) and a.encode(text) == b.encode(text)


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=200))
def test_bpe_and_bytes_are_lossless(bpe: Tokenizer, text: str) -> None:
    for tokenizer in (bpe, ByteTokenizer()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.encode_batch([text, "x"]) == [ids, tokenizer.encode("x")]


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_bpe_is_lossless_on_every_language(bpe: Tokenizer, shared: Path, every: int) -> None:
    with zipfile.ZipFile(shared / "data/udhr2_multilingual/udhr2.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".txt")]
        assert len(names) > 380
        names = names[::every]
        texts = [archive.read(name).decode("utf-8") for name in names]
    wrong = [name for name, text in zip(names, texts, strict=True) if bpe.decode(bpe.encode(text)) != text]
    assert wrong == []


def test_training_is_deterministic_and_learns(bpe: Tokenizer) -> None:
    again = train_bpe(iter(CORPUS), 400)
    assert again.fingerprint == bpe.fingerprint
    assert bpe.eod == bpe.token_id("<|endoftext|>") == 0
    assert 257 < bpe.vocab_size <= 400
    assert len(bpe.encode(CORPUS[1])) < len(CORPUS[1].encode()) / 3


def test_smallest_bpe_is_the_bytes() -> None:
    tokenizer = train_bpe(["ab"], 257)
    assert tokenizer.vocab_size == 257
    assert len(tokenizer.encode("aé")) == 3
    with pytest.raises(UserError, match="at least 257"):
        train_bpe(["ab"], 256)
    for size in (2**24 + 1, 2**70):
        with pytest.raises(UserError, match="at most 16,777,216"):
            train_bpe(["ab"], size)
    with pytest.raises(UserError, match="holds no text"):
        train_bpe(["", ""], 300)


@pytest.mark.parametrize("spelled", ["<|endoftext|>", "a<|endoftext|>b", "[SEP]", "</s>"])
def test_text_cannot_end_a_document(bpe: Tokenizer, tmp_path: Path, spelled: str) -> None:
    for tokenizer in (bpe, pickle.loads(pickle.dumps(bpe)), load_tokenizer(wordpiece_folder(tmp_path)), ByteTokenizer()):
        assert tokenizer.eod not in tokenizer.encode(spelled)


@pytest.mark.parametrize("make", ["bytes", "chars", "chars with eod", "bpe", "wordpiece"])
def test_saved_and_pickled_tokenizers_are_the_same(bpe: Tokenizer, tmp_path: Path, make: str) -> None:
    made = {
        "bytes": lambda: ByteTokenizer("\n"),
        "chars": lambda: train_chars(["The fox, wörld 12\n  x"]),
        "chars with eod": lambda: CharTokenizer("The fox,wörld12\n", "\n"),
        "bpe": lambda: bpe,
        "wordpiece": lambda: load_tokenizer(wordpiece_folder(tmp_path), "[CLS]"),
    }[make]()
    made.save(tmp_path / "saved")
    assert same(made, load_tokenizer(tmp_path / "saved"))
    assert same(made, pickle.loads(pickle.dumps(made)))


def test_real_files_load_and_agree_with_their_makers(shared: Path, tmp_path: Path) -> None:
    data = shared / "data"
    gpt2 = load_tokenizer(data / "tok_gpt2_bert")
    assert (gpt2.kind, gpt2.vocab_size, gpt2.eod, gpt2.encode("Hello world")) == ("bpe", 50257, 50256, [15496, 995])
    assert same(gpt2, load_tokenizer(data / "tok_gpt2_bert/gpt2-merges.txt"))
    converted = load_tokenizer(data / "tok_hf_json/gpt2.json")
    sample = " ".join(CORPUS) + " it's  1,000\n\n\t'll"
    assert converted.encode(sample) == gpt2.encode(sample) == Engine.from_file(str(data / "tok_hf_json/gpt2.json")).encode(sample).ids
    bert = load_tokenizer(data / "tok_gpt2_bert/bert-vocab.txt")
    assert (bert.kind, bert.vocab_size, bert.eod, bert.encode("Hello world")) == ("wordpiece", 30522, 102, [7592, 2088])
    assert load_tokenizer(data / "megatron_binidx_bigscience").vocab_size == 5000
    assert load_tokenizer(data / "tok_hf_json/torchtitan_small").eod == 2003  # from its tokenizer_config.json
    gpt2.save(tmp_path / "gpt2")
    assert same(gpt2, load_tokenizer(tmp_path / "gpt2"))


def test_sentencepiece(shared: Path, tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    file = shared / "data/tok_sentencepiece/tokenizer.model.v1"
    tokenizer = load_tokenizer(file)
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.bos, tokenizer.eod, tokenizer.cut_rule) == (
        "sentencepiece",
        32000,
        1,
        2,
        "never",
    )
    assert tokenizer.encode("Hello </s> wörld") == sentencepiece.SentencePieceProcessor(model_file=str(file)).encode("Hello </s> wörld")
    assert tokenizer.decode(tokenizer.encode("Hello  wörld")) == "Hello  wörld"
    tokenizer.save(tmp_path)
    assert same(tokenizer, load_tokenizer(tmp_path))
    assert same(tokenizer, pickle.loads(pickle.dumps(tokenizer)))


def test_bert_wordpiece_equals_transformers(shared: Path) -> None:
    transformers = pytest.importorskip("transformers")
    file = shared / "data/tok_gpt2_bert/bert-vocab.txt"
    theirs = transformers.BertTokenizer(str(file))
    text = "The Café's naïve übung — 日本語 don't, 1,234.5\n\tx"
    assert load_tokenizer(file).encode(text) == theirs.encode(text, add_special_tokens=False)


def test_gpt2_equals_transformers_on_real_text(shared: Path) -> None:
    folder = shared / "data/tok_gpt2_bert"
    theirs = pytest.importorskip("transformers").GPT2Tokenizer(str(folder / "gpt2-vocab.json"), str(folder / "gpt2-merges.txt"))
    text = (shared / "data/wikitext2/valid.txt").read_text("utf-8")[:20_000]
    assert load_tokenizer(folder).encode(text) == theirs.encode(text)


def test_characters() -> None:
    tokenizer = train_chars(["hello ", "wörld\n"])
    assert tokenizer.decode(range(tokenizer.vocab_size)) == "".join(sorted(set("hello wörld\n")))
    assert tokenizer.decode(tokenizer.encode("hold")) == "hold"
    assert tokenizer.eod is None
    for text in ("helloz", "hello\U0001f600"):
        with pytest.raises(UserError, match=f"character '{text[5]}' .* position 5"):
            tokenizer.encode(text)
    with pytest.raises(UserError, match="empty"):
        train_chars([""])


def test_eod_can_be_chosen_and_a_wrong_one_is_refused_with_the_nearest(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    assert load_tokenizer(tmp_path, eod="the").eod == bpe.token_id("the")
    with pytest.raises(UserError, match=r"'<endoftext>' is not in .*did you mean '<\|endoftext\|>'"):
        load_tokenizer(tmp_path, eod="<endoftext>")


def test_ids_of_another_tokenizer_are_refused(bpe: Tokenizer) -> None:
    for tokenizer in (bpe, ByteTokenizer(), CharTokenizer("ab")):
        for bad in (tokenizer.vocab_size, -1):
            with pytest.raises(UserError, match=f"token id {bad} is outside"):
                tokenizer.decode([0, bad])


def test_truncation_and_padding_of_a_file_are_ignored(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    engine = Engine.from_file(str(tmp_path / "tokenizer.json"))
    engine.enable_truncation(2)
    engine.enable_padding(length=50)
    engine.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode(CORPUS[0]) == bpe.encode(CORPUS[0])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "not JSON"),
        ("tokenizer.json", "[1]", "expected a JSON object"),
        ("tokenizer.json", '{"model": {"type": "Nonsense"}}', "not a tokenizer.json"),
        ("vocab.json", '{"a": 0}', "merges.txt: missing"),
        ("vocab.txt", "just\nwords\n", r"no \[UNK\]"),
        ("tokenizer.model", "not a model", "not a SentencePiece model"),
        ("chars.json", '{"kind": "chars"}', "damaged"),
        ("bytes.json", "7", "damaged"),
        ("readme.md", "hello", "not a known kind"),
    ],
)
def test_damaged_files_are_refused_in_one_sentence(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path / name)


def test_what_is_accepted_is_listed(tmp_path: Path) -> None:
    for spec in (tmp_path, tmp_path / "missing.json", "byte"):
        with pytest.raises(UserError, match=r"accepted: `bytes`, a tokenizer\.json"):
            load_tokenizer(spec)
    for name in ("a.model", "b.model"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="several"):
        load_tokenizer(tmp_path)


@settings(max_examples=400, deadline=None)
@given(text=TRICKY)
def test_cuts_do_not_change_tokens(bpe: Tokenizer, later: Tokenizer, text: str) -> None:
    for tokenizer in (bpe, later, ByteTokenizer()):
        whole = tokenizer.encode(text)
        for size in (1, 3, 10):
            parts = list(pieces(text, tokenizer.cut_rule, size))
            assert "".join(parts) == text
            assert [i for part in parts for i in tokenizer.encode(part)] == whole


@settings(max_examples=200, deadline=None)
@given(text=TRICKY)
def test_cuts_do_not_change_wordpieces(bert: Tokenizer, text: str) -> None:
    assert [i for part in pieces(text, bert.cut_rule, 2) for i in bert.encode(part)] == bert.encode(text)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(wordpiece_folder(tmp_path_factory.mktemp("bert")))


@pytest.fixture(scope="module")
def later(bpe: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The same merges under GPT-4's splitting and NFC, as Llama 3 and Qwen have it."""
    from teratron.data.tok_huggingface import CUTTABLE_SPLITS

    folder = tmp_path_factory.mktemp("later")
    bpe.save(folder)
    definition = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    split = {"type": "Split", "pattern": {"Regex": CUTTABLE_SPLITS[1]}, "behavior": "Isolated", "invert": False}
    level = definition["pre_tokenizer"] | {"use_regex": False}
    definition |= {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}, "normalizer": {"type": "NFC"}}
    (folder / "tokenizer.json").write_text(json.dumps(definition), "utf-8")
    return load_tokenizer(folder)


def test_only_known_splitting_is_cut(bpe: Tokenizer, later: Tokenizer, bert: Tokenizer, tmp_path: Path) -> None:
    assert (bpe.cut_rule, later.cut_rule, bert.cut_rule) == ("word", "word", "blank")
    bpe.save(tmp_path)
    definition = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    prefixed = {"pre_tokenizer": definition["pre_tokenizer"] | {"add_prefix_space": True}}
    joined = {"added_tokens": [*definition["added_tokens"], definition["added_tokens"][0] | {"id": 1, "content": "a b", "special": False}]}
    for change in (prefixed, joined, {"pre_tokenizer": None}, {"normalizer": {"type": "NFKC"}}):
        (tmp_path / "tokenizer.json").write_text(json.dumps(definition | change), "utf-8")
        assert load_tokenizer(tmp_path).cut_rule == "never", change


@pytest.mark.parametrize(("rule", "text", "cut"), [("word", "ab cd", 2), ("word", "a\nb", 2), ("word", "a  b", 1), ("word", "a\n\nb", 0)])
def test_last_cut(rule: CutRule, text: str, cut: int) -> None:
    assert last_cut(text, rule) == cut


def test_uncuttable_stretch_is_noticed() -> None:
    blocks = ["x" * 10] * 10
    assert list(cut_stream([*blocks, " y"], "word", 20)) == ["x" * 100, " y"]
    with pytest.raises(NoCut):
        list(cut_stream(blocks, "word", 20, limit=50))
