"""Indexed datasets: Megatron's PREFIX.bin (token ids) and PREFIX.idx (where each sequence lies), written, read and merged."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from teratron.config import UserError, nearest

MAGIC = b"MMIDIDX\0\0"
VERSION = 1
HEADER_BYTES = 34
DTYPE_CODES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""The format's integer types. Its codes 6 and 7 are floats, which are never token ids."""
CHUNK = 1 << 20
"""Elements handled at once where a whole array would not fit in memory."""
EDGE = 1 << 20
"""Bytes at each end of a file that its identity reads."""
REMEDY = "copy it again, or prepare it again with `teratron data prepare`"


def smallest_dtype(vocab_size: int) -> np.dtype:
    """The token type that Megatron's preprocessing picks: 16 bits below 65,500 ids, else 32 bits."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def named(prefix: Path) -> Path:
    """The prefix itself; raises `UserError` for one that is only a folder, such as `.`, `..` or `/`, to which no suffix can be added."""
    if prefix.name in ("", ".."):
        raise UserError(f"{prefix}: a folder, not the name of a data set: expected a PREFIX, such as {prefix / 'text'}")
    return prefix


class IndexedDataset:
    """A prepared dataset, memory-mapped; everything that can be wrong with its two files is checked when it is opened.

    Attributes: `tokens` [total_tokens] of `dtype`; `lengths` int32 [S] and `starts` int64 [S], both in tokens, of its S sequences;
    `documents` int64 [D]: document d is the sequences documents[d] up to documents[d + 1].
    Raises `UserError` for a prefix without a name, and when a file is missing, cut short or contradicts the other.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = named(_strip_suffix(prefix))
        index, binary = _file(self.prefix, ".idx"), _file(self.prefix, ".bin")
        for path in (index, binary):
            if not path.is_file():
                raise _missing(self.prefix, path)
        try:
            self._read_index(index)
            self._map_tokens(binary)
        except OSError as error:
            raise UserError(f"{self.prefix}: cannot be read: {error.strerror or error}: check the files and their permissions") from None

    def _read_index(self, path: Path) -> None:
        size = path.stat().st_size
        with path.open("rb") as file:
            self.dtype, sequences, bounds = _read_header(path, file.read(HEADER_BYTES), size)
            self.lengths = np.fromfile(file, "<i4", sequences)
            pointers = np.fromfile(file, "<i8", sequences)
            self.documents = np.fromfile(file, "<i8", bounds)
        if self.lengths.min() < 0:
            raise _corrupt(path, f"a sequence of {self.lengths.min()} tokens", "no negative length")
        self.starts = np.zeros(sequences, np.int64)
        np.cumsum(self.lengths[:-1], dtype=np.int64, out=self.starts[1:])
        wrong = np.flatnonzero(pointers != self.starts * self.dtype.itemsize)
        if wrong.size:
            found, expected = pointers[wrong[0]], self.starts[wrong[0]] * self.dtype.itemsize
            raise _corrupt(path, f"sequence {wrong[0]} at byte {found}", f"byte {expected}, the sum of the lengths before it")
        if self.documents[0] != 0 or self.documents[-1] != sequences or np.any(np.diff(self.documents) < 0):
            raise _corrupt(path, "document bounds out of order", f"ascending from 0 to {sequences}")

    def _map_tokens(self, path: Path) -> None:
        found, expected = path.stat().st_size, self.total_tokens * self.dtype.itemsize
        if found < expected:
            raise UserError(f"{path} holds {found} bytes, {self.prefix}.idx promises {expected}: it was cut short; {REMEDY}")
        if found > expected:
            raise UserError(f"{path} holds {found} bytes, {self.prefix}.idx promises {expected}: they are not of one dataset; {REMEDY}")
        if not expected:
            raise UserError(f"{self.prefix}: holds no tokens: prepare it again from files with text")
        self.tokens: np.memmap = np.memmap(path, self.dtype, "r")

    @property
    def document_count(self) -> int:
        return len(self.documents) - 1

    @property
    def total_tokens(self) -> int:
        return int(self.starts[-1]) + int(self.lengths[-1])

    def sequence(self, i: int) -> np.ndarray:
        """The token ids of sequence i, a view of the file."""
        return self.tokens[self.starts[i] : self.starts[i] + self.lengths[i]]

    def max_token(self) -> int:
        """The largest token id: reads the whole file, once."""
        return self._max_token

    def identity(self) -> str:
        """What tells it from other data at little cost: its tokens, and a digest of both files' sizes, first and last MiB."""
        digest = hashlib.sha256()
        for path in (_file(self.prefix, ".idx"), _file(self.prefix, ".bin")):
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                digest.update(size.to_bytes(8, "little"))
                for start in (0, max(0, size - EDGE)):
                    file.seek(start)
                    digest.update(file.read(EDGE))
        return f"{self.total_tokens:,} tokens ({digest.hexdigest()[:16]})"

    @functools.cached_property
    def _max_token(self) -> int:
        return max(int(self.tokens[at : at + CHUNK].max()) for at in range(0, self.total_tokens, CHUNK))


class IndexedWriter:
    """Writes a dataset document by document; the two files get their names only when `finish` is called, the .idx last.

    As a context manager it finishes at the end of the block, or removes the partial files if the block raises.
    Memory: 4 bytes a sequence and 8 a document, whatever the number of tokens.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype | type) -> None:
        self.prefix = named(_strip_suffix(prefix))
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._lengths = array("i")
        self._documents = array("q", [0])
        self._partial = _file(self.prefix, ".bin.partial")
        with _reporting(self._partial):
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = self._partial.open("wb", buffering=1 << 20)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.finish()
        else:
            self.abort()

    def add_document(self, tokens: np.ndarray, lengths: Sequence[int] | None = None) -> None:
        """Append one document: token ids [T], and the lengths of its sequences when it has several (their sum is T)."""
        lengths = [len(tokens)] if lengths is None else lengths
        if sum(lengths) != len(tokens):
            raise ValueError(f"sequence lengths sum to {sum(lengths)}, the document has {len(tokens)} tokens")
        if tokens.dtype != self.dtype:
            tokens = self._converted(tokens)
        with _reporting(self._partial):
            self._file.write(np.ascontiguousarray(tokens).data)
        self._lengths.extend(lengths)
        self._documents.append(len(self._lengths))

    def add_dataset(self, dataset: IndexedDataset) -> None:
        """Append all documents of another dataset, which must have the same token type."""
        if dataset.dtype != self.dtype:
            raise UserError(
                f"{dataset.prefix}: its tokens are {dataset.dtype.name}, those before it {self.dtype.name}: "
                "merge only datasets prepared with the same tokenizer"
            )
        with _reporting(self._partial), _file(dataset.prefix, ".bin").open("rb") as source:
            shutil.copyfileobj(source, self._file, 1 << 20)
        shift = len(self._lengths)
        self._lengths.frombytes(dataset.lengths.tobytes())
        self._documents.frombytes((dataset.documents[1:] + shift).tobytes())

    def finish(self) -> None:
        """Make the dataset whole on disk. Raises `UserError`, and leaves nothing behind, when there is no token in it."""
        if not np.frombuffer(self._lengths, np.int32).any():
            self.abort()
            raise UserError(f"{self.prefix}: no documents to write: the input holds no text")
        index = _file(self.prefix, ".idx")
        index_partial = _file(self.prefix, ".idx.partial")
        try:
            with _reporting(self._partial):
                _sync_and_close(self._file)
            with _reporting(index_partial), index_partial.open("wb") as file:
                self._write_index(file)
                _sync_and_close(file)
            with _reporting(index):
                # An .idx of a former dataset must not stand beside the new .bin, not even for a moment.
                index.unlink(missing_ok=True)
                self._partial.replace(_file(self.prefix, ".bin"))
                index_partial.replace(index)
                _sync_folder(index.parent)
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Remove the partial files; a former dataset of this name stays as it is."""
        with contextlib.suppress(OSError):
            self._file.close()  # a full disk refuses the last buffered bytes; the file is removed anyway
        self._partial.unlink(missing_ok=True)
        _file(self.prefix, ".idx.partial").unlink(missing_ok=True)

    def _converted(self, tokens: np.ndarray) -> np.ndarray:
        limits = np.iinfo(self.dtype)
        if len(tokens) and not (limits.min <= tokens.min() and tokens.max() <= limits.max):
            raise UserError(
                f"{self.prefix}: token ids {tokens.min()} to {tokens.max()} do not fit {self.dtype.name}: "
                "the tokenizer gives ids beyond its vocabulary size; use a whole tokenizer file"
            )
        return tokens.astype(self.dtype)

    def _write_index(self, file: BinaryIO) -> None:
        code = next(code for code, name in DTYPE_CODES.items() if np.dtype(name) == self.dtype)
        sequences, bounds = len(self._lengths), len(self._documents)
        file.write(MAGIC + VERSION.to_bytes(8, "little") + bytes([code]) + sequences.to_bytes(8, "little") + bounds.to_bytes(8, "little"))
        lengths = np.frombuffer(self._lengths, np.int32)
        file.write(lengths.astype("<i4", copy=False).data)
        position = 0
        for at in range(0, sequences, CHUNK):
            ends = position + np.cumsum(lengths[at : at + CHUNK], dtype="<i8") * self.dtype.itemsize
            file.write(np.concatenate(([position], ends[:-1])).astype("<i8").data)
            position = int(ends[-1])
        file.write(np.frombuffer(self._documents, np.int64).astype("<i8", copy=False).data)


def merge(prefixes: Sequence[str | Path], output: str | Path) -> None:
    """Concatenate datasets into one, as Megatron's merge tool does: the same bytes as if all documents were written at once."""
    if not prefixes:
        raise UserError(f"{output}: nothing to merge: name at least one prepared dataset")
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    with IndexedWriter(output, datasets[0].dtype) as writer:
        for dataset in datasets:
            writer.add_dataset(dataset)


def _read_header(path: Path, header: bytes, size: int) -> tuple[np.dtype, int, int]:
    """The token type, S and D of an .idx file of `size` bytes, once its first bytes and its size agree."""
    if header[:9] != MAGIC:
        raise _corrupt(path, f"{size} bytes that begin with {header[:9]!r}", f"an indexed dataset, which begins with {MAGIC!r}")
    if size < HEADER_BYTES:
        raise _corrupt(path, f"{size} bytes", f"at least a header of {HEADER_BYTES}")
    version, code = int.from_bytes(header[9:17], "little"), header[17]
    sequences, bounds = int.from_bytes(header[18:26], "little"), int.from_bytes(header[26:34], "little")
    if version != VERSION:
        raise _corrupt(path, f"format version {version}", f"version {VERSION}")
    if code not in DTYPE_CODES:
        raise _corrupt(path, f"dtype code {code}", f"an integer type, one of {', '.join(map(str, DTYPE_CODES))}")
    expected = HEADER_BYTES + 12 * sequences + 8 * bounds
    # Multimodal datasets end with one mode byte a sequence, which nothing in the file announces.
    if size not in (expected, expected + sequences):
        raise _corrupt(path, f"{size} bytes", f"{expected} for {sequences} sequences and {bounds} document bounds")
    if sequences < 1 or bounds < 2:
        raise UserError(f"{path}: holds no documents: prepare it again from files with text")
    return np.dtype(DTYPE_CODES[code]), sequences, bounds


def _strip_suffix(prefix: str | Path) -> Path:
    """The prefix, also where one of the two files was named."""
    path = Path(prefix)
    return path.with_name(path.name.removesuffix(".bin").removesuffix(".idx")) if path.suffix in (".bin", ".idx") else path


def _file(prefix: Path, suffix: str) -> Path:
    # Not Path.with_suffix, which would cut the end of a dotted name such as `wiki-v1.2`.
    return prefix.with_name(prefix.name + suffix)


def _missing(prefix: Path, path: Path) -> UserError:
    other = _file(prefix, ".bin" if path.suffix == ".idx" else ".idx")
    if other.is_file():
        return UserError(f"{path}: missing beside {other.name}: the preparation or the copy was interrupted; {REMEDY}")
    if prefix.exists():
        return UserError(f"{prefix}: is not a prepared dataset: give raw text as data.text, or prepare it with `teratron data prepare`")
    known = sorted(item.name.removesuffix(".idx") for item in prefix.parent.glob("*.idx"))
    hint = nearest(prefix.name, known) or (f"; {prefix.parent} holds {', '.join(known[:3])}" if known else "")
    return UserError(f"{prefix}: no prepared dataset of that name (no {path.name}){hint}; make one with `teratron data prepare`")


def _corrupt(path: Path, found: str, expected: str) -> UserError:
    return UserError(f"{path}: not a whole index: found {found}, expected {expected}; {REMEDY}")


@contextlib.contextmanager
def _reporting(path: Path) -> Iterator[None]:
    """Turn an operating system's refusal, such as a full disk, into a sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}: free some space or choose another place") from None


def _sync_and_close(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
