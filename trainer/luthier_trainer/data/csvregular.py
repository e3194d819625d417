"""Reads regular CSV files with Arrow, ten times as fast as Python's csv module and to the same rows.

Arrow accepts what csv refuses: text after a closing quotation mark, and a quotation mark that is never closed.
`is_regular` therefore checks every quotation mark first: odd ones must open a cell, even ones must close it, and two
side by side are one quotation mark inside a cell. Files for which this does not hold, or that need any other decision
(see `csvrows`), are read by csv.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

from luthier_trainer.data import decoding

if TYPE_CHECKING:
    import numpy
    import pyarrow

CHUNK = 1 << 18  # bytes that are checked at once: they fit into the cache of a core
BLOCK = 1 << 22  # bytes that Arrow reads at once: a file with a longer row is read by csv
QUOTE, BACKSLASH, CR, LF = b'"\\\r\n'
MARK = decoding.BOMS[-1][0]  # the byte order mark of UTF-8


def is_regular(path: Path, separator: str, quoted: bool) -> bool:
    """Return whether the file has no syntax that Arrow and csv read differently.

    Quotation marks must only open or close cells, no cell may hold a line break, and there must be no carriage return
    without a line feed and no byte order mark inside the file. Without `quoted`, there must be no quotation marks at
    all. The file must be UTF-8 and not compressed.
    """
    import numpy

    data = numpy.memmap(path, dtype=numpy.uint8, mode="r")
    begin = len(MARK) if bytes(data[: len(MARK)]) == MARK else 0
    before = 0  # quotation marks before the chunk
    for start in range(begin, len(data), CHUNK):
        # The chunk with one byte before it and two after it; line feeds stand for bytes outside of the file.
        around = numpy.full(CHUNK + 3, LF, numpy.uint8)
        first, last = max(start - 1, begin), min(start + CHUNK + 2, len(data))
        offset = first - (start - 1)
        around[offset : offset + last - first] = data[first:last]
        size = min(CHUNK, len(data) - start)
        quotes = numpy.flatnonzero(around[1 : size + 1] == QUOTE) + 1
        if not quoted and len(quotes):
            return False
        if (
            _has_mark(around, size)
            or _has_lone_return(around, size)
            or not _in_place(around, quotes, before, ord(separator))
        ):
            return False
        feeds = numpy.flatnonzero(around[1 : size + 1] == LF) + 1
        if ((numpy.searchsorted(quotes, feeds) + before) % 2).any():
            return False  # a line break inside a cell
        before += len(quotes)
    return before % 2 == 0


def _in_place(around: numpy.ndarray, quotes: numpy.ndarray, before: int, separator: int) -> bool:
    """Return whether each quotation mark opens or closes a cell, or is next to another one, and none follows a
    backslash.

    `around` is uint8 of shape (CHUNK + 3,), `quotes` are the positions of quotation marks in it, and `before` is the
    number of quotation marks before the chunk.
    """
    import numpy

    # Counted from 0 over the whole file, even ones open a cell.
    opening = (numpy.arange(len(quotes)) + before) % 2 == 0
    left, right = around[quotes - 1], around[quotes + 1]
    opens = (left == separator) | (left == LF) | (left == QUOTE)
    closes = (right == separator) | (right == LF) | (right == CR) | (right == QUOTE)
    return bool(numpy.where(opening, opens, closes).all() and not (left == BACKSLASH).any())


def _has_mark(around: numpy.ndarray, size: int) -> bool:
    """Return whether the chunk in `around[1 : size + 1]` holds a byte order mark of UTF-8."""
    return bool(
        (
            (around[1 : size + 1] == MARK[0]) & (around[2 : size + 2] == MARK[1]) & (around[3 : size + 3] == MARK[2])
        ).any()
    )


def _has_lone_return(around: numpy.ndarray, size: int) -> bool:
    """Return whether the chunk in `around[1 : size + 1]` holds a carriage return without a line feed after it."""
    return bool(((around[1 : size + 1] == CR) & (around[2 : size + 2] != LF)).any())


def batches(path: Path, separator: str, quoted: bool, columns: list[str]) -> Generator[pyarrow.RecordBatch, None, bool]:
    """Yield batches of `columns` of a regular file. Returns whether these are all rows.

    Arrow refuses a row with another number of cells, which ends the batches early.
    """
    import pyarrow.csv

    try:
        yield from pyarrow.csv.open_csv(
            path,
            pyarrow.csv.ReadOptions(use_threads=False, block_size=BLOCK),
            pyarrow.csv.ParseOptions(delimiter=separator, quote_char='"' if quoted else False),
            pyarrow.csv.ConvertOptions(
                include_columns=columns,
                column_types=dict.fromkeys(columns, pyarrow.string()),
                strings_can_be_null=False,
            ),
        )
    except pyarrow.ArrowException:
        return False
    return True
