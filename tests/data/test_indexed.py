"""Indexed datasets: Megatron's bytes exactly; nothing damaged opens; nothing interrupted looks whole."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import numpy as np
import pytest

from teratron.config import UserError
from teratron.data.indexed import IndexedDataset, IndexedWriter, merge, smallest_dtype

LENGTHS = [5, 3, 8, 1, 7, 12, 2, 9, 4, 6]
"""The spec's test vector: ten documents of these lengths, tokens 0 to 56, int32."""


def write(prefix: Path, lengths: list[int] = LENGTHS, dtype: str = "i4", first: int = 0) -> Path:
    tokens = np.arange(first, first + sum(lengths))
    with IndexedWriter(prefix, np.dtype(dtype)) as writer:
        for part in np.split(tokens, np.cumsum(lengths)[:-1]):
            writer.add_document(part)
    return prefix


def both(prefix: Path) -> tuple[bytes, bytes]:
    return prefix.with_name(prefix.name + ".bin").read_bytes(), prefix.with_name(prefix.name + ".idx").read_bytes()


def test_writes_the_bytes_of_megatrons_writer(tmp_path: Path) -> None:
    tokens, index = both(write(tmp_path / "set"))
    assert len(index) == 242
    assert hashlib.md5(index).hexdigest() == "16aa810363209fe6e959a8f8bd69bb20"
    assert hashlib.md5(tokens).hexdigest() == "1f8060d06e52b4989e37f82844a606b0"


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "i4", "i8", "u2"])
def test_reads_what_it_wrote(tmp_path: Path, dtype: str) -> None:
    dataset = IndexedDataset(write(tmp_path / "set", dtype=dtype))
    assert dataset.dtype == np.dtype(dtype)
    assert (dataset.document_count, dataset.total_tokens, dataset.max_token()) == (10, 57, 56)
    assert dataset.tokens.tolist() == list(range(57))
    assert dataset.lengths.tolist() == LENGTHS
    assert dataset.starts.tolist() == np.cumsum([0, *LENGTHS[:-1]]).tolist()
    assert dataset.sequence(2).tolist() == list(range(8, 16))


def test_documents_may_have_any_number_of_sequences(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "set", np.uint16) as writer:
        writer.add_document(np.arange(5), [2, 3])
        writer.add_document(np.arange(0), [])
        writer.add_document(np.arange(4))
        with pytest.raises(ValueError, match="sum to 3"):
            writer.add_document(np.arange(4), [1, 2])
    dataset = IndexedDataset(tmp_path / "set")
    assert dataset.documents.tolist() == [0, 2, 2, 3]
    assert dataset.lengths.tolist() == [2, 3, 4]


def test_token_type_follows_megatrons_limit() -> None:
    assert smallest_dtype(65499) == np.uint16
    assert smallest_dtype(65500) == np.int32


def test_name_may_be_one_of_the_files_and_may_have_dots(tmp_path: Path) -> None:
    write(tmp_path / "wiki-v1.2")
    for name in ("wiki-v1.2", "wiki-v1.2.bin", "wiki-v1.2.idx"):
        assert IndexedDataset(tmp_path / name).total_tokens == 57


def test_merge_equals_writing_all_at_once(tmp_path: Path) -> None:
    write(tmp_path / "a", LENGTHS[:4])
    write(tmp_path / "b", LENGTHS[4:], first=sum(LENGTHS[:4]))
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    assert both(tmp_path / "merged") == both(write(tmp_path / "whole"))


def test_merge_refuses_different_token_types(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b", dtype="u2")
    with pytest.raises(UserError, match="uint16, those before it int32"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    assert not list(tmp_path.glob("merged*"))


def test_an_interrupted_write_leaves_the_former_dataset_and_no_rest(tmp_path: Path) -> None:
    before = both(write(tmp_path / "set"))

    def interrupted() -> None:
        with IndexedWriter(tmp_path / "set", np.int32) as writer:
            writer.add_document(np.arange(1000))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert both(tmp_path / "set") == before
    assert len(list(tmp_path.iterdir())) == 2


def test_a_write_killed_at_any_moment_never_looks_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop before each rename, as a power cut would (no clean-up): the old dataset or a refusal, never a mixture."""
    for survived in range(2):
        folder = tmp_path / str(survived)
        write(folder / "set")
        renames = iter(range(survived))

        def rename(path: Path, target: Path, renames=renames, real=Path.replace) -> Path:  # type: ignore[no-untyped-def]
            if next(renames, None) is None:
                raise SystemExit
            return real(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", rename)
            patch.setattr(IndexedWriter, "abort", lambda self: None)
            writer = IndexedWriter(folder / "set", np.int32)
            writer.add_document(np.arange(57)[::-1], LENGTHS)
            with pytest.raises(SystemExit):
                writer.finish()
        with pytest.raises(UserError, match=r"set\.idx: missing beside set\.bin"):
            IndexedDataset(folder / "set")


def test_no_text_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    for documents in ([], [np.arange(0)]):
        writer = IndexedWriter(tmp_path / "set", np.uint16)
        for document in documents:
            writer.add_document(document)
        with pytest.raises(UserError, match="no documents to write"):
            writer.finish()
        assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"set\.bin\.partial: cannot be written: No space left on device"):
        write(tmp_path / "set")
    assert not list(tmp_path.iterdir())


def test_token_ids_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="0 to 65536 do not fit uint16"), IndexedWriter(tmp_path / "set", np.uint16) as writer:
        writer.add_document(np.array([0, 65536]))


def patched(content: bytes, at: int, value: int, width: int = 8) -> bytes:
    return content[:at] + value.to_bytes(width, "little", signed=True) + content[at + width :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda idx: b"", "0 bytes that begin with b''"),
        (lambda idx: b"GARBAGE" + idx[7:], "begin with b'GARBAGE"),
        (lambda idx: idx[:20], "20 bytes, expected at least a header"),
        (lambda idx: idx[:-1], "241 bytes, expected 242"),
        (lambda idx: idx + b"\0", "243 bytes, expected 242"),
        (lambda idx: patched(idx, 9, 2), "format version 2, expected version 1"),
        (lambda idx: patched(idx, 17, 6, 1), "dtype code 6"),
        (lambda idx: patched(idx, 18, 2**50), "242 bytes, expected"),
        (lambda idx: patched(idx, 34, -5, 4), "-5 tokens"),
        (lambda idx: patched(idx, 34 + 40 + 16, 33), "sequence 2 at byte 33, expected byte 32"),
        (lambda idx: patched(idx, 34 + 120 + 8, 7), "document bounds out of order"),
        (lambda idx: patched(idx, 34 + 120 + 80, 9), "document bounds out of order"),
        (lambda idx: patched(patched(idx[:34], 18, 0), 26, 0), "no documents"),
    ],
)
def test_damaged_index_is_refused_with_what_was_found(tmp_path: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    path = write(tmp_path / "set").with_name("set.idx")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError) as error:
        IndexedDataset(tmp_path / "set")
    assert message in str(error.value)
    assert "set.idx" in str(error.value)
    assert "prepare it again" in str(error.value)
    assert "\n" not in str(error.value)


def test_trailing_modes_of_a_multimodal_index_are_accepted(tmp_path: Path) -> None:
    path = write(tmp_path / "set").with_name("set.idx")
    path.write_bytes(path.read_bytes() + bytes(10))
    assert IndexedDataset(tmp_path / "set").total_tokens == 57


@pytest.mark.parametrize(("size", "message"), [(200, "200 bytes, .*promises 228: it was cut short"), (232, "not of one dataset")])
def test_bin_of_another_size_is_refused(tmp_path: Path, size: int, message: str) -> None:
    path = write(tmp_path / "set").with_name("set.bin")
    path.write_bytes(path.read_bytes().ljust(size, b"\0")[:size])
    with pytest.raises(UserError, match=message):
        IndexedDataset(tmp_path / "set")


@pytest.mark.parametrize("prefix", ["", ".", "/", "..", "data/.."])
def test_a_prefix_without_a_name_is_refused(prefix: str) -> None:
    with pytest.raises(UserError, match="not the name of a data set"):
        IndexedDataset(prefix)
    with pytest.raises(UserError, match="not the name of a data set"):
        IndexedWriter(prefix, np.uint16)


def test_missing_files_name_what_is_there(tmp_path: Path) -> None:
    write(tmp_path / "wikipedia")
    with pytest.raises(UserError, match="did you mean 'wikipedia'"):
        IndexedDataset(tmp_path / "wikipedai")
    with pytest.raises(UserError, match="holds wikipedia;"):
        IndexedDataset(tmp_path / "q")
    with pytest.raises(UserError, match="no prepared dataset"):
        IndexedDataset(tmp_path / "nowhere" / "set")
    (tmp_path / "book.txt").write_text("raw")
    with pytest.raises(UserError, match=r"data\.text"):
        IndexedDataset(tmp_path / "book.txt")
    (tmp_path / "wikipedia.bin").unlink()
    with pytest.raises(UserError, match=r"wikipedia\.bin: missing beside wikipedia\.idx"):
        IndexedDataset(tmp_path / "wikipedia")


def test_real_file_is_read_and_written_again_byte_for_byte(shared: Path, tmp_path: Path) -> None:
    prefix = shared / "data/megatron_binidx_bigscience/meg-gpt2-openwebtext_text_document"
    dataset = IndexedDataset(prefix)
    assert (dataset.document_count, dataset.total_tokens, dataset.dtype) == (1000, 1_361_845, np.uint16)
    with IndexedWriter(tmp_path / "copy", dataset.dtype) as writer:
        for i in range(dataset.document_count):
            writer.add_document(dataset.sequence(i))
    assert both(tmp_path / "copy") == both(prefix)
    merge([prefix, tmp_path / "copy"], tmp_path / "double")
    assert IndexedDataset(tmp_path / "double").document_count == 2000
