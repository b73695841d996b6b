"""Preparation: the same bytes for any number of workers, nothing lost silently, nothing half-written left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from teratron.cli.main import main
from teratron.config import UserError
from teratron.data import prepare as prepare_module
from teratron.data import readers
from teratron.data.bpe import train_bpe
from teratron.data.indexed import IndexedDataset, IndexedWriter
from teratron.data.pool import ordered_map
from teratron.data.prepare import Progress, prepare
from teratron.data.readers import Meter, Reading, find_files, read_records
from teratron.data.records import Malformed, Record, text_of
from teratron.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, train_chars

SENTENCE = "def f(x):\n    return 'naïve' + x  # 日本語\n\n\n"


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe([SENTENCE * 3], 300)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Files of several kinds, some malformed, some empty, one large."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    lines = [json.dumps({"text": SENTENCE * (n % 7)}) for n in range(60)]
    lines[20] = '{"body": "other key"}'
    lines[40] = '{"text": "cut'
    (folder / "a.jsonl").write_text("\n".join(lines))
    (folder / "b.py").write_text(SENTENCE)
    (folder / "c.txt").write_bytes(b"\xff\xfe")
    (folder / "d.txt").write_text(SENTENCE * 2000)
    (folder / "e.dat").write_text("unknown extension")
    return folder


def outputs(prefix: Path) -> dict[str, bytes]:
    """Every file of a data set by its name without the prefix, with its bytes."""
    files = [path for path in prefix.parent.rglob("*") if path.is_file()]
    return {str(path.relative_to(prefix.parent)).removeprefix(prefix.name): path.read_bytes() for path in files}


def documents(folder: Path) -> Iterator[str]:
    for item in read_records(find_files([folder]), Reading(), Meter()):
        if isinstance(item, Record):
            try:
                yield text_of(item, "text")
            except Malformed:
                continue


def test_every_document_is_there_with_its_end(corpus: Path, tmp_path: Path, bpe: Tokenizer) -> None:
    summary = prepare([corpus], tmp_path / "out/data", bpe, workers=1)
    dataset = IndexedDataset(tmp_path / "out/data")
    expected = [[*bpe.encode(text), bpe.eod] for text in documents(corpus) if text]
    assert [dataset.sequence(i).tolist() for i in range(len(dataset.lengths))] == expected
    assert summary.documents == dataset.document_count == len(expected)
    assert (summary.tokens, summary.dtype) == (dataset.total_tokens, "uint16")
    assert (summary.empty, summary.skipped) == (9, 1)
    assert summary.rejected == {"no key 'text'": 1, "not JSON": 1, "not UTF-8": 1}
    assert "3 rejected" in str(summary)


def test_the_data_set_says_what_it_is(corpus: Path, tmp_path: Path, bpe: Tokenizer) -> None:
    prefix = tmp_path / "out/data"
    summary = prepare([corpus], prefix, bpe, workers=1)
    notes = json.loads(Path(f"{prefix}.json").read_text())
    assert notes["tokenizer"] == {"kind": "bpe", "fingerprint": bpe.fingerprint, "vocab_size": bpe.vocab_size, "eod": 0, "bos": None}
    assert (notes["documents"], notes["tokens"], notes["append_eod"]) == (summary.documents, summary.tokens, True)
    assert notes["sources"][0]["files"] == 4
    assert load_tokenizer(Path(f"{prefix}.tokenizer")).fingerprint == bpe.fingerprint


def test_what_was_rejected_is_located_and_kept_verbatim(corpus: Path, tmp_path: Path, bpe: Tokenizer) -> None:
    prefix = tmp_path / "out/data"
    prepare([corpus], prefix, bpe, workers=1)
    notes = [json.loads(line) for line in Path(f"{prefix}.rejected.jsonl").read_text().splitlines()]
    kept = Path(f"{prefix}.rejected.txt").read_bytes()
    assert [(Path(note["file"]).name, note["line"]) for note in notes] == [("a.jsonl", 21), ("a.jsonl", 41), ("c.txt", None)]
    lines = (corpus / "a.jsonl").read_bytes().splitlines(keepends=True)
    originals = [lines[20], lines[40], b"\xff\xfe"]
    assert [kept[note["kept_at"] : note["kept_at"] + note["kept_bytes"]] for note in notes] == originals
    assert notes[1]["offset"] == sum(map(len, lines[:40])) + lines[40].index(b'"cut')


def test_any_number_of_workers_writes_the_same_bytes(corpus: Path, tmp_path: Path, bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "BATCH", 3000)
    monkeypatch.setattr(readers, "SMALL", 10_000)
    made = []
    for workers in (1, 2, 3):
        prepare([corpus], tmp_path / str(workers) / "data", bpe, workers=workers)
        made.append(outputs(tmp_path / str(workers) / "data"))
    assert made[0] == made[1] == made[2]
    assert {".bin", ".idx", ".json", ".rejected.jsonl", ".rejected.txt", ".tokenizer/tokenizer.json"} <= set(made[0])


@pytest.mark.parametrize("make", ["bpe", "bytes", "chars"])
def test_a_large_file_has_the_tokens_of_the_whole(tmp_path: Path, bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch, make: str) -> None:
    monkeypatch.setattr(readers, "SMALL", 1000)
    text = SENTENCE * (1_500_000 // len(SENTENCE))
    (tmp_path / "a.txt").write_text(text)
    tokenizer = {"bpe": bpe, "bytes": ByteTokenizer(), "chars": train_chars([SENTENCE])}[make]
    prepare([tmp_path / "a.txt"], tmp_path / "data", tokenizer, workers=1, append_eod=tokenizer.eod is not None)
    dataset = IndexedDataset(tmp_path / "data")
    expected = tokenizer.encode(text) + ([tokenizer.eod] if tokenizer.eod is not None else [])
    assert dataset.document_count == 1
    assert np.array_equal(dataset.tokens, expected)


def test_progress_ends_at_the_whole(corpus: Path, tmp_path: Path, bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "BATCH", 3000)
    seen: list[Progress] = []
    summary = prepare([corpus], tmp_path / "data", bpe, workers=1, progress=seen.append)
    assert len(seen) > 3
    assert [at.bytes_read for at in seen] == sorted(at.bytes_read for at in seen)
    assert seen[-1].documents == summary.documents
    assert seen[-1].bytes_read == seen[-1].bytes_total == summary.bytes_read


def test_strict_stops_at_the_first_malformed_item(corpus: Path, tmp_path: Path, bpe: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl, line 21, byte \d+: no key 'text'"):
        prepare([corpus], tmp_path / "out/data", bpe, workers=1, strict=True)
    assert outputs(tmp_path / "out/data") == {}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "no documents: the 1 files hold no text"),
        ("a.jsonl", b"\n\n", "no documents: the 1 files hold no text"),
        ("a.txt", b"\0\1", "no documents: 1 rejected, the first: .*a.txt, byte 0: binary"),
        ("a.unknown", b"text", "no file with a known extension"),
    ],
)
def test_no_documents_is_an_error_with_the_reason(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare([folder], tmp_path / "out/data", ByteTokenizer())
    assert outputs(tmp_path / "out/data") == {}


def test_a_data_set_is_replaced_only_on_demand_and_only_by_a_whole_one(corpus: Path, tmp_path: Path, bpe: Tokenizer) -> None:
    prefix = tmp_path / "out/data"
    prepare([corpus], prefix, bpe, workers=1)
    before = outputs(prefix)
    with pytest.raises(UserError, match="--overwrite"):
        prepare([corpus], prefix, bpe)
    with pytest.raises(UserError, match="line 21"):
        prepare([corpus], prefix, bpe, overwrite=True, strict=True)
    assert outputs(prefix) == before
    prepare([corpus / "b.py"], prefix, ByteTokenizer(), overwrite=True)
    assert set(outputs(prefix)) == {".bin", ".idx", ".json", ".tokenizer/bytes.json"}
    assert IndexedDataset(prefix).document_count == 1


def test_two_cannot_write_the_same_data_set(corpus: Path, tmp_path: Path, bpe: Tokenizer) -> None:
    refused: list[UserError] = []

    def second(at: Progress) -> None:
        with pytest.raises(UserError, match="another process is preparing") as caught:
            prepare([corpus], tmp_path / "data", bpe, workers=1)
        refused.append(caught.value)

    prepare([corpus], tmp_path / "data", bpe, workers=1, progress=second)
    assert refused


def test_an_unwritable_place_is_refused(corpus: Path, tmp_path: Path, bpe: Tokenizer) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        prepare([corpus], tmp_path / "file/data", bpe)


@pytest.mark.parametrize("prefix", ["", ".", "/", ".."])
def test_a_prefix_without_a_name_is_refused(corpus: Path, bpe: Tokenizer, prefix: str) -> None:
    with pytest.raises(UserError, match="not the name of a data set"):
        prepare([corpus], Path(prefix), bpe)


@pytest.mark.parametrize("size", [float("inf"), float("nan"), 0, -1, 1e30])
def test_an_impossible_document_size_is_refused(corpus: Path, tmp_path: Path, bpe: Tokenizer, size: float) -> None:
    with pytest.raises(UserError, match=f"--max-document-mb {size}: expected more than 0".replace("+", "[+]")):
        prepare([corpus], tmp_path / "data", bpe, max_document_mb=size)


def test_names_that_are_not_utf8_are_read_and_noted(tmp_path: Path) -> None:
    good, bad = (Path(os.fsdecode(os.fsencode(tmp_path) + name)) for name in (b"/caf\xe9.txt", b"/\xff.jsonl"))
    good.write_text("text")
    bad.write_text('{"text": 1}\n{"\\ud800": 1}\n')
    prepare([good, bad], tmp_path / "out", ByteTokenizer(), workers=1)
    notes = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert [source["path"] for source in notes["sources"]] == [str(good), str(bad)]
    rejected = [json.loads(line) for line in (tmp_path / "out.rejected.jsonl").read_text("utf-8").splitlines()]
    assert [note["file"] for note in rejected] == [str(bad)] * 2


def test_too_little_disk_is_refused_at_once(corpus: Path, tmp_path: Path, bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match=r"0\.00 GB are free .* at least"):
        prepare([corpus], tmp_path / "out/data", bpe)
    assert outputs(tmp_path / "out/data") == {}


def test_a_full_disk_leaves_nothing(corpus: Path, tmp_path: Path, bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(UserError, match="No space left on device: free some space"):
        prepare([corpus], tmp_path / "out/data", bpe, workers=1)
    assert outputs(tmp_path / "out/data") == {}


def test_a_full_disk_while_tokens_are_written_leaves_nothing(tmp_path: Path, bpe: Tokenizer) -> None:
    """A real refusal of the operating system: a limit on the size of files, in a process of its own."""
    (tmp_path / "a.txt").write_text(SENTENCE * 20_000)
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n" + RUN
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.txt"), str(tmp_path / "out/data")], capture_output=True, text=True)
    assert done.returncode == 2
    assert "cannot be written: File too large" in done.stderr
    assert outputs(tmp_path / "out/data") == {}


def test_end_of_document_must_exist(corpus: Path, tmp_path: Path) -> None:
    tokenizer = train_chars([SENTENCE])
    with pytest.raises(UserError, match="no end-of-document token: name one with --eod"):
        prepare([corpus], tmp_path / "data", tokenizer)


def test_a_character_outside_the_alphabet_is_located(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcX")
    with pytest.raises(UserError, match=r"a\.txt: character 'X'"):
        prepare([tmp_path / "a.txt"], tmp_path / "data", train_chars(["abc"]), append_eod=False)


RUN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background, and nobody hears it
from teratron.cli.main import main
from teratron.data import prepare
prepare.BATCH = 100_000
show = prepare.Progress.__init__
def announce(self, *args):
    show(self, *args)
    print("at work", flush=True)
prepare.Progress.__init__ = announce
if __name__ == "__main__":
    sys.exit(main(["data", "prepare", sys.argv[1], "--tokenizer", "bytes", "--output", sys.argv[2], "--workers", "2"]))
"""


@pytest.fixture
def at_work(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has begun to write a data set, with workers, and has much left to do."""
    (tmp_path / "a.jsonl").write_text((json.dumps({"text": SENTENCE * 50}) + "\n") * 60_000)
    (tmp_path / "run.py").write_text(RUN)
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "a.jsonl"), str(tmp_path / "out/data")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    yield process
    process.kill()
    process.communicate()


def test_ctrl_c_leaves_nothing(at_work: subprocess.Popen[str], tmp_path: Path) -> None:
    # To the whole process group, as a terminal does.
    os.killpg(at_work.pid, signal.SIGINT)
    _, errors = at_work.communicate(timeout=120)
    assert (at_work.returncode, errors) == (130, "teratron: interrupted\n")
    assert list((tmp_path / "out").iterdir()) == []


def test_termination_leaves_nothing(at_work: subprocess.Popen[str], tmp_path: Path) -> None:
    at_work.terminate()
    _, errors = at_work.communicate(timeout=120)
    assert (at_work.returncode, errors) == (128 + signal.SIGTERM, "")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_killed_process_leaves_nothing_that_looks_whole_and_no_worker(at_work: subprocess.Popen[str], tmp_path: Path) -> None:
    at_work.kill()
    # The workers hold the other end of its output: it ends only when they have.
    at_work.communicate(timeout=120)
    assert not (tmp_path / "out/data.idx").exists()
    with pytest.raises(UserError, match="no prepared dataset"):
        IndexedDataset(tmp_path / "out/data")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    prepare([tmp_path / "a.jsonl"], tmp_path / "out/data", ByteTokenizer())
    assert sorted(outputs(tmp_path / "out/data")) == [".bin", ".idx", ".json", ".tokenizer/bytes.json"]


def fail_at_seven(number: int) -> int:
    if number == 7:
        raise UserError("seven")
    return number * number


def die(number: int) -> int:
    os._exit(number)


def test_ordered_map_keeps_order_and_raises_what_a_worker_raises() -> None:
    assert list(ordered_map(fail_at_seven, range(7), 2)) == [n * n for n in range(7)]
    with pytest.raises(UserError, match="seven"):
        list(ordered_map(fail_at_seven, range(100), 2))
    with pytest.raises(UserError, match=r"a worker process died \(exit code 5\)"):
        list(ordered_map(die, [5] * 100, 2))


def test_a_script_without_a_guard_ends_with_a_hint_however_much_its_workers_are_told(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from functools import partial\n"
        "from teratron.data.pool import ordered_map\n"
        "print(list(ordered_map(partial(max, b'x' * 2_000_000), [b'y'] * 4, 2)))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "UserError: a worker process died" in done.stderr


def test_ordered_map_takes_no_more_than_a_few_items_ahead() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(10, 1000):
            taken.append(number)
            yield number

    results = ordered_map(fail_at_seven, items(), 2)
    assert next(results) == 100
    assert len(taken) <= 6
    results.close()


def test_the_same_bytes_as_a_plain_writer(tmp_path: Path, shared: Path) -> None:
    """Real documents, written once document by document and once by preparation."""
    source = shared / "data/c4_sample/c4_demo.jsonl"
    tokenizer = load_tokenizer(shared / "data/megatron_binidx_bigscience")
    prepare([source], tmp_path / "data", tokenizer)
    with IndexedWriter(tmp_path / "plain", np.uint16) as writer:
        for line in source.read_text("utf-8").splitlines():
            writer.add_document(np.array([*tokenizer.encode(json.loads(line)["text"]), tokenizer.eod], np.uint16))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"data{suffix}").read_bytes() == (tmp_path / f"plain{suffix}").read_bytes()


def test_the_command_line_from_text_to_tokens(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, prefix = str(tmp_path / "tok.json"), str(tmp_path / "out/data")
    assert main(["tokenizer", "train", str(corpus), "--vocab-size", "280", "--output", tokenizer]) == 0
    assert "3 malformed items left out" in capsys.readouterr().out
    assert main(["data", "prepare", str(corpus), "--tokenizer", tokenizer, "--output", prefix]) == 0
    assert "3 rejected" in capsys.readouterr().out
    assert main(["data", "inspect", prefix]) == 0
    shown = capsys.readouterr().out
    assert repr(SENTENCE)[1:30] in shown
    assert main(["tokenizer", "show", tokenizer, "return x"]) == 0
    assert "vocab_size   280" in capsys.readouterr().out
    assert main(["data", "prepare", str(corpus), "--tokenizer", tokenizer, "--output", prefix]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_tokenizer_from_nothing_but_malformed_input_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.bin").write_bytes(b"abc\0def")
    assert main(["tokenizer", "train", str(tmp_path / "a.bin"), "--vocab-size", "300", "--output", str(tmp_path / "t.json")]) == 2
    error = capsys.readouterr().err
    assert "holds no text" in error
    assert "a.bin, byte 3: binary: a NUL byte" in error
