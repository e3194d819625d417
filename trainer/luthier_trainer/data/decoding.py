"""Opens data files as text: decompressed, decoded, and without byte order marks.

The encoding is the one that the spec names, the one of a byte order mark, or UTF-8. Bytes that cannot be decoded are
refused with their position, so that no character is replaced or lost without notice.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from luthier_api.exitcodes import ExitCode
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice

BOM = "\ufeff"
BOMS = (  # UTF-32 first, because its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)
FAMILIES = {"utf-8-sig": {"utf-8"}, "utf-16": {"utf-16-le", "utf-16-be"}, "utf-32": {"utf-32-le", "utf-32-be"}}
FOREIGN = {
    b"PK\x03\x04": "is a zip archive, as workbooks of Excel are; save the workbook as CSV, or unpack the archive",
    b"\xd0\xcf\x11\xe0": "is a workbook or a document of an old Office; save it as CSV or as text",
    b"%PDF-": "is a PDF; write its text into a file of text, or of JSON lines",
    b"PAR1": "is a Parquet file; set {dataset}.format to parquet",
    b"ARROW1": "is an Arrow file; set {dataset}.format to arrow",
    b"\x89PNG": "is an image; name its folder, and set {dataset}.format to imagefolder",
    b"\xff\xd8\xff": "is an image; name its folder, and set {dataset}.format to imagefolder",
}
"""First bytes of files that are no text → what they are, and what to do."""
HEAD_BYTES = 4096  # read to find the encoding
CHUNK = 1 << 20  # bytes or characters that are read at once


def _zstd(path: Path) -> BinaryIO:
    """Open a file that is compressed with zstd."""
    import pyarrow

    # pyarrow's reader raises an error for a truncated file, which python-zstandard's reader does not.
    return pyarrow.input_stream(str(path), compression="zstd")


COMPRESSIONS: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"\x28\xb5\x2f\xfd": _zstd,
    # The whole signature of bzip2, because a text may begin with "BZh".
    **{b"BZh%d1AY&SY" % level: bz2.open for level in range(1, 10)},
}


@dataclass(frozen=True)
class Decoder:
    """Opens data files.

    `dataset` and `files` are paths in the spec, for error messages: for example spec.dataset, and spec.dataset.files or
    spec.dataset.evalFiles.
    """

    encoding: str | None
    """The encoding that the spec names, if any."""
    dataset: str
    files: str

    @contextmanager
    def open(self, path: Path, newline: str | None = None) -> Iterator[TextIO]:
        """Open the file as text.

        Raises Failure, also while the text is read, if the file is not text in its encoding or is truncated.
        """
        try:
            encoding = self._encoding_of(path)
            with (
                open_bytes(path) as raw,
                io.TextIOWrapper(raw, encoding=encoding, errors="strict", newline=newline) as text,
            ):
                yield text
        except UnicodeDecodeError as error:
            raise self._undecodable(path, encoding) from error
        except (EOFError, gzip.BadGzipFile, lzma.LZMAError) as error:
            raise self._damaged(path, error) from error
        except OSError as error:
            if error.errno is not None:
                raise  # an error of the volume or its permissions, not of the data
            raise self._damaged(path, error) from error

    def is_plain(self, path: Path) -> bool:
        """Return whether the file's bytes are uncompressed UTF-8, with or without a byte order mark."""
        with path.open("rb") as file:
            head = file.read(16)
        return not any(head.startswith(magic) for magic in COMPRESSIONS) and self._encoding_of(path) in (
            "utf-8",
            "utf-8-sig",
        )

    def _encoding_of(self, path: Path) -> str:
        """Return the encoding of a file, from its first bytes. Raises Failure if they contradict `dataset.encoding`."""
        with open_bytes(path) as file:
            head = file.read(HEAD_BYTES)
        named = _codec(self.encoding, f"{self.dataset}.encoding") if self.encoding else None
        for magic, what in FOREIGN.items():
            if head.startswith(magic):
                raise self._refusal(f"{path} {what.format(dataset=self.dataset)}")
        found = next((name for mark, name in BOMS if head.startswith(mark)), None)
        if found is None:
            if named is None and b"\0" in head:
                raise self._refusal(
                    f"{path} holds NUL bytes (the first at position {head.index(0)}), as UTF-16 without a byte order"
                    f" mark does. Set {self.dataset}.encoding, for example to utf-16-le, or convert the file to UTF-8"
                )
            return named or "utf-8"
        if named and named != found and named not in FAMILIES[found]:
            raise self._refusal(
                f"{path} begins with the byte order mark of {found.removesuffix('-sig').upper()}, but"
                f" {self.dataset}.encoding is {self.encoding}. Remove encoding, or the mark"
            )
        if found != "utf-8-sig" and not named:
            notice(f"{self.files}: {path.name} is read as {found.upper()}, by its byte order mark")
        return found

    def _undecodable(self, path: Path, encoding: str) -> Failure:
        """Return the Failure for a file that cannot be decoded, with the position of the first such byte."""
        position, line, byte = bad_byte(path, encoding)
        name = encoding.removesuffix("-sig").upper()
        what = f"{path} is not {name}: byte 0x{byte:02x} at position {position} (line {line}) is not valid"
        if self.encoding:
            return self._refusal(
                f"{what}. Set {self.dataset}.encoding to the encoding that the file was written in, or convert the file"
                " to UTF-8"
            )
        character = bytes([byte]).decode("cp1252", errors="replace")
        return self._refusal(
            f"{what}. Set {self.dataset}.encoding to the encoding that the file was written in, such as cp1252, where"
            f' that byte is "{character}", or convert the file to UTF-8'
        )

    def _damaged(self, path: Path, error: Exception) -> Failure:
        return self._refusal(
            f"{path} cannot be decompressed: {' '.join(str(error).split())[:200]}. It may have been cut short: copy it"
            " again"
        )

    def _refusal(self, what: str) -> Failure:
        return Failure(ExitCode.INVALID_DATASET, f"{self.files}: {what}")


def lines(file: Iterable[str], name: str, files: str) -> Iterator[str]:
    """Yield the lines of `file`, without a byte order mark at the beginning of a line.

    Such marks are found where two files were joined; they are removed with a notice.
    """
    removed = 0
    for line in file:
        if line[0] == BOM:
            removed += 1
            line = line.lstrip(BOM)
        yield line
    if removed:
        notice(
            f"{files}: {name} has byte order marks at the beginning of {removed} lines, as joined files do; they are"
            " removed"
        )


def open_bytes(path: Path) -> Any:
    """Open the file's bytes, decompressed if its first bytes are those of a compressed file.

    The name of the file does not matter.
    """
    with path.open("rb") as file:
        head = file.read(16)
    opened = next((opener for magic, opener in COMPRESSIONS.items() if head.startswith(magic)), None)
    return opened(path) if opened else path.open("rb")


def bad_byte(path: Path, encoding: str) -> tuple[int, int, int]:
    """Return (position from 0, line from 1, value) of the first byte that `encoding` cannot decode.

    The position is in the decompressed content. Raises AssertionError if there is no such byte.
    """
    decoder = codecs.getincrementaldecoder(encoding)()
    position, line = 0, 1
    with open_bytes(path) as file:
        while True:
            chunk = file.read(CHUNK)
            pending = decoder.getstate()[0]  # bytes of an incomplete character at the end of the chunk before
            try:
                line += decoder.decode(chunk, final=not chunk).count("\n")
            except UnicodeDecodeError as error:
                data = pending + chunk
                line += data[: error.start].decode(encoding, errors="ignore").count("\n")
                return position - len(pending) + error.start, line, data[error.start]
            position += len(chunk)
            if not chunk:
                raise AssertionError(f"{path} can be decoded as {encoding}")


def _codec(name: str, field: str) -> str:
    """Return Python's name of the codec for `dataset.encoding`. Raises Failure if it is not a text encoding."""
    try:
        info = codecs.lookup(name)
        "".encode(name)  # refuses codecs that are not encodings of text, such as base64
    except LookupError as error:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: Python has no text encoding {name!r}; write one such as utf-8, cp1252 or utf-16-le",
        ) from error
    return "utf-8" if info.name == "utf-8-sig" else info.name
