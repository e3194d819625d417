"""Regular CSV files, which Arrow reads ten times as fast as Python's csv module, and to the same rows.

Arrow forgives what csv refuses: text after a closing quotation mark, a quotation mark that is never closed. So
`is_regular` looks at every quotation mark first: the odd ones open a cell, the even ones close it, and two side by side
are one inside a cell. A file where that does not hold, or that needs a judgement of any other kind (`csvrows`), is left
to csv.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

from luthier_trainer.data import decoding

if TYPE_CHECKING:
    import numpy
    import pyarrow

CHUNK = 1 << 18  # bytes that are looked at at once: they fit a core's cache
BLOCK = 1 << 22  # bytes that Arrow reads at once: a row that is longer is left to csv
QUOTE, BACKSLASH, CR, LF = b'"\\\r\n'
MARK = decoding.BOMS[-1][0]  # that of UTF-8


def is_regular(path: Path, separator: str, quoted: bool) -> bool:
    """Whether quotation marks stand where they open or close cells only, no cell holds a line break, and no byte order
    mark is inside.

    Without `quoted`: whether there are no quotation marks at all. For files that are UTF-8 and not compressed.
    """
    import numpy

    data = numpy.memmap(path, dtype=numpy.uint8, mode="r")
    begin = len(MARK) if bytes(data[: len(MARK)]) == MARK else 0
    before = 0  # quotation marks up to here
    for start in range(begin, len(data), CHUNK):
        # One byte before the chunk and two after it; beyond the file, line feeds.
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
    """Whether each quotation mark opens or closes a cell, or is next to another one; none stands after a backslash."""
    import numpy

    opening = (numpy.arange(len(quotes)) + before) % 2 == 0
    left, right = around[quotes - 1], around[quotes + 1]
    opens = (left == separator) | (left == LF) | (left == QUOTE)
    closes = (right == separator) | (right == LF) | (right == CR) | (right == QUOTE)
    return bool(numpy.where(opening, opens, closes).all() and not (left == BACKSLASH).any())


def _has_mark(around: numpy.ndarray, size: int) -> bool:
    return bool(
        (
            (around[1 : size + 1] == MARK[0]) & (around[2 : size + 2] == MARK[1]) & (around[3 : size + 3] == MARK[2])
        ).any()
    )


def _has_lone_return(around: numpy.ndarray, size: int) -> bool:
    return bool(((around[1 : size + 1] == CR) & (around[2 : size + 2] != LF)).any())


def batches(path: Path, separator: str, quoted: bool, columns: list[str]) -> Generator[pyarrow.RecordBatch, None, bool]:
    """Batches of `columns` of a regular file. Returns whether these are all: a row of another width, which Arrow
    refuses, ends them early.
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
