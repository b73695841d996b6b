"""Readers: every kind of file gives its documents in order; whatever is malformed is located, and the rest is read."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from teratron.config import UserError
from teratron.data import readers
from teratron.data.readers import Meter, Reading, find_files, read_records, read_texts
from teratron.data.records import Malformed, Record, Rejection, reject, text_of

TEXTS = ["first", "zweites ü", "", "日本\nfour"]


def jsonl(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({"id": n, key: text}) + "\n" for n, text in enumerate(texts)).encode()


def read(path: Path, reading: Reading | None = None) -> tuple[list[str], list[Rejection]]:
    """The documents of one file and its malformed items, as preparation and its workers see them together."""
    reading = reading or Reading()
    texts, rejections, long = [], [], ""
    for item in read_records(find_files([path]), reading, Meter()):
        if isinstance(item, Rejection):
            rejections.append(item)
            continue
        try:
            long += text_of(item, reading.text_key)
        except Malformed as error:
            rejections.append(reject(item, error))
            continue
        if item.part != "more":
            texts.append(long)
            long = ""
    return texts, rejections


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_all_formats_of_lines_give_the_same_documents(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    data = jsonl(TEXTS)
    write(tmp_path / "a.jsonl", data.rstrip(b"\n"))
    write(tmp_path / "a.jsonl.gz", gzip.compress(data[:40]) + gzip.compress(data[40:]))
    write(tmp_path / "a.jsonl.zst", zstandard.compress(data[:40]) + zstandard.compress(data[40:]))
    parquet.write_table(arrow.table({"n": [1, 2, 3, 4], "text": TEXTS}), tmp_path / "a.parquet", row_group_size=3)
    parquet.write_table(arrow.table({"text": arrow.array(TEXTS).dictionary_encode()}), tmp_path / "b.parquet")
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "b.parquet"):
        assert read(tmp_path / name) == (TEXTS, []), name


def test_a_text_file_is_one_document_whatever_its_line_ends(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.odd", b"\xef\xbb\xbfa\r\nb\n\n\xc3\xbc")) == (["a\r\nb\n\nü"], [])
    assert read(write(tmp_path / "empty.txt", b"")) == ([""], [])


def test_a_large_text_file_comes_in_pieces_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "SMALL", 1000)
    text = "\ufeff" + "Wörter und\nZeilen 日本 " * 100_000
    path = write(tmp_path / "a.txt", text.encode())
    meter = Meter()
    items = list(read_records(find_files([path]), Reading(), meter))
    assert [item.part for item in items if isinstance(item, Record)] == ["more"] * (len(items) - 1) + ["end"]
    assert len(items) > 1
    assert "".join(str(item.data) for item in items if isinstance(item, Record)) == text[1:]
    assert meter.position == path.stat().st_size


@pytest.mark.parametrize("small", [1, 1 << 22])
@pytest.mark.parametrize(
    ("content", "reason", "offset"),
    [
        (b"good text \xff bad", "not UTF-8: byte 0xff", 10),
        (b"cut short \xe6\x97", "not UTF-8: byte 0xe6", 10),
        (b"x" * (1 << 20) + b"\xe6\x97" + b"y" * 9, "not UTF-8: byte 0xe6", 1 << 20),
        (b"x" * ((1 << 20) - 1) + b"\xe6\x97" + b"y" * 9, "not UTF-8: byte 0xe6", (1 << 20) - 1),
        (b"x " * (1 << 19) + b"x\0", "binary: a NUL byte", (1 << 20) + 1),
        (b"\x1f\x8b\x08\0", "compressed", 0),
    ],
)
def test_bad_text_files_are_rejected_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: int, content: bytes, reason: str, offset: int
) -> None:
    monkeypatch.setattr(readers, "SMALL", small)
    texts, rejections = read(write(tmp_path / "a.txt", content))
    assert texts == []
    assert [(r.line, r.offset) for r in rejections] == [(0, offset)]
    assert rejections[0].reason.startswith(reason)
    assert content.startswith(rejections[0].raw)


@pytest.mark.parametrize(
    ("line", "reason", "at"),
    [
        (b'{"text": "ab', "not JSON: Unterminated", 9),
        ('{"text": "ü" x}'.encode(), "not JSON: Expecting ','", 14),
        (b"[1, 2]", "not an object: a JSON list", 0),
        (b'{"content": "a", "id": 3}', "no key 'text': the keys are content, id", 0),
        (b'{"text": null}', "not text: the key 'text' holds a null", 0),
        (b'{"text": ["a"]}', "not text: the key 'text' holds a list", 0),
        (b'{"text": "a\xff"}', "not UTF-8: byte 0xff", 11),
        (b'{"text": "\\ud800"}', "not Unicode", 0),
        (b"[" * 100_000, "not JSON", 0),
        (b'{"text": 1' + b"0" * 5000 + b"}", "not JSON", 0),
        (b"\0\0", "not JSON", 0),
    ],
)
def test_a_bad_line_is_located_and_the_others_are_read(tmp_path: Path, line: bytes, reason: str, at: int) -> None:
    good = jsonl(["one"])
    texts, rejections = read(write(tmp_path / "a.jsonl", good + line + b"\n" + good))
    assert texts == ["one", "one"]
    assert [(r.line, r.offset, r.raw) for r in rejections] == [(2, len(good) + at, line + b"\n")]
    assert rejections[0].reason.startswith(reason)


def test_a_line_beyond_the_limit_is_passed_over(tmp_path: Path) -> None:
    fits = jsonl(["x" * 80])
    limit = len(fits) - 1
    path = write(tmp_path / "a.jsonl", fits + jsonl(["y" * 81]) + jsonl(["z"]) + jsonl(["e" * 5_000_000]).rstrip(b"\n"))
    texts, rejections = read(path, Reading(limit=limit))
    assert texts == ["x" * 80, "z"]
    assert [(r.line, r.kind, r.offset) for r in rejections] == [
        (2, "too long", len(fits)),
        (4, "too long", path.stat().st_size - 5_000_021),
    ]
    assert len(rejections[1].raw) == limit + 1


def test_a_text_without_a_place_to_cut_is_refused_beyond_the_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"x" * (5 << 20))
    assert read(path, Reading(limit=6 << 20))[1] == []
    assert [r.kind for r in read(path, Reading(limit=4 << 20))[1]] == ["too long"]
    assert read(path, Reading(limit=4 << 20, rule="anywhere"))[1] == []


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut short", "changed", "not compressed"])
def test_a_damaged_compressed_file_keeps_what_came_before(tmp_path: Path, suffix: str, damage: str) -> None:
    zstandard = pytest.importorskip("zstandard")
    data = jsonl([os.urandom(40).hex() for _ in range(4000)])
    whole = gzip.compress(data) if suffix == ".gz" else zstandard.ZstdCompressor(write_checksum=True).compress(data)
    middle = len(whole) // 2
    damaged = {"cut short": whole[:middle], "changed": whole[:middle] + b"\xff" * 2000 + whole[middle + 2000 :], "not compressed": data}[
        damage
    ]
    texts, rejections = read(write(tmp_path / f"a.jsonl{suffix}", damaged))
    assert [r.kind for r in rejections if r.kind.startswith("damaged")] == ["damaged gzip" if suffix == ".gz" else "damaged zstd"]
    assert rejections[-1].line == len(texts) + len(rejections)
    assert len(texts) < 4000
    before = min(len(texts), 1000)  # the damage is at the middle; a checksum tells of it later
    assert texts[:before] == [json.loads(line)["text"] for line in data.splitlines()][:before]


def test_bad_parquet(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    content = arrow.array([b"ok", b"\xff no", None, b"z" * 100], arrow.binary())
    table = arrow.table({"text": arrow.Array.from_buffers(arrow.string(), 4, content.buffers()), "n": [1, 2, 3, 4]})
    path = tmp_path / "a.parquet"
    parquet.write_table(table, path)
    texts, rejections = read(path, Reading(limit=50))
    assert texts == ["ok"]
    assert sorted((r.line, r.kind, r.offset) for r in rejections) == [(2, "not UTF-8", None), (3, "not text", None), (4, "too long", None)]
    assert "the columns are text, n" in read(path, Reading("body"))[1][0].reason
    assert "holds int64" in read(path, Reading("n"))[1][0].reason
    assert read(write(path, path.read_bytes()[:-20]))[1][0].kind == "damaged parquet"


def test_a_damaged_row_group_does_not_cost_the_others(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    texts = [os.urandom(50).hex() for _ in range(300)]
    parquet.write_table(arrow.table({"text": texts}), path, row_group_size=100, use_dictionary=False, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    start = parquet.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data[start : start + 30] = b"\xff" * 30
    found, rejections = read(write(path, bytes(data)))
    assert found == texts[:100] + texts[200:]
    assert [(r.line, r.kind) for r in rejections] == [(101, "damaged parquet")]


def test_folders_are_walked_in_order_and_the_unknown_is_counted(tmp_path: Path) -> None:
    for name in ("b/z.py", "b/a.txt", "a.md", "c.bin", ".hidden.txt", ".git/x.txt", "old.rejected.jsonl", "B.TXT"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    files = find_files([tmp_path, tmp_path / "c.bin"])
    assert [str(path.relative_to(tmp_path)) for path in files.paths] == ["B.TXT", "a.md", "b/a.txt", "b/z.py", "c.bin"]
    assert files.skipped == 4
    assert files.sources == [{"path": str(tmp_path), "files": 4, "bytes": 4}, {"path": str(tmp_path / "c.bin"), "files": 1, "bytes": 1}]


def test_what_cannot_be_an_input_is_refused(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").touch()
    with pytest.raises(UserError, match=r"corpsu.txt: no such file or folder \(did you mean '.*corpus.txt'"):
        find_files([tmp_path / "corpsu.txt"])
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "old.txt").symlink_to("gone.txt")
    for name in ("loop", "old.txt"):
        with pytest.raises(UserError, match=f"{name}: a link that leads nowhere: "):
            find_files([tmp_path / name])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="neither a file nor a folder"):
        find_files([tmp_path / "pipe"])
    with pytest.raises(UserError, match="no input"):
        find_files([])


def test_texts_for_training_leave_out_and_report_what_is_malformed(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", jsonl(["one"]) + b"nonsense\n")
    write(tmp_path / "b.txt", b"two")
    write(tmp_path / "c.txt", b"\xff")
    rejections: list[Rejection] = []
    assert list(read_texts([tmp_path], on_rejection=rejections.append)) == ["one", "two"]
    assert [rejection.kind for rejection in rejections] == ["not JSON", "not UTF-8"]
