"""Rows of CSV files, by Python's csv module in strict mode: what does not fit the header is refused, never moved or
joined without notice.

Every cell is text, as it is written: "007", "NA" and "1e5" stay what they are. A file whose cells are separated by tabs
has no quoting unless the spec asks for it, because quotation marks in such files are mostly part of the text.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

from luthier_api.exitcodes import ExitCode
from luthier_api.spec import Csv
from luthier_trainer.data import csvregular, decoding
from luthier_trainer.data.files import suffix_of
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice

AT_ONCE = 1000  # rows of a batch, as in `datasets`
# Characters; csv's own limit is 131,072. A quotation mark that is never closed reads up to this much
CELL_LIMIT = 1 << 28
SEPARATORS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}
SHOWN = 60  # characters of a cell in a message
ESCAPED_QUOTE = '\\"'
ESCAPE = re.compile(r"\\(.?)", re.DOTALL)  # a backslash and what follows it


class Mistake(Exception):
    """A row, counted from 0, that does not fit."""

    def __init__(self, row: int, what: str, cells: list[str] | None = None) -> None:
        super().__init__(what)
        self.row, self.what, self.cells = row, what, cells


@dataclass(frozen=True)
class Dialect:
    separator: str
    quoting: str

    def reader(self, lines: Iterator[str]) -> Any:
        """A csv.reader in strict mode."""
        csv.field_size_limit(CELL_LIMIT)
        if self.quoting == "none":
            return csv.reader(lines, delimiter=self.separator, quoting=csv.QUOTE_NONE, quotechar=None, strict=True)
        if self.quoting == "backslash":
            escaped = (ESCAPE.sub(_keep_backslash, line) if "\\" in line else line for line in lines)
            # Without doublequote, csv would not be strict
            return csv.reader(escaped, delimiter=self.separator, escapechar="\\", strict=True)
        return csv.reader(lines, delimiter=self.separator, strict=True)


def _keep_backslash(escape: re.Match[str]) -> str:
    """csv drops every backslash; one that escapes neither a quotation mark nor a backslash is part of the text."""
    return escape[0] if escape[1] in ('"', "\\") else "\\" + escape[0]


@dataclass
class Counts:
    """What is noticed while a file is read."""

    rows: int = 0
    several_lines: int = 0
    """Rows that span several lines."""
    first_several: int = 0
    """The first of them."""
    blank_lines: int = 0
    quoted: int = 0
    """Cells that begin and end with a quotation mark although there is no quoting."""


@dataclass(frozen=True)
class CsvFile:
    """One file. Mistakes are refused with the paths of fields that `decoder` knows."""

    path: Path
    decoder: decoding.Decoder
    settings: Csv
    regular: dict[Dialect, bool] = field(default_factory=dict)
    """Dialect → whether Arrow reads the same rows."""

    @cached_property
    def dialect(self) -> Dialect:
        """As the spec says, or as fits the file. Raises Failure where two readings are possible."""
        name = self.settings.separator or ("tab" if suffix_of(self.path) == ".tsv" else "comma")
        separator = SEPARATORS[name]
        if self.settings.quoting:
            return Dialect(separator, self.settings.quoting)
        if separator == "\t":
            return Dialect(separator, "none")
        double = Dialect(separator, "double")
        if self._is_regular(double) or not self._has_escaped_quotes():
            return double
        return self._judged(double, Dialect(separator, "backslash"))

    @cached_property
    def header(self) -> list[str]:
        """Names of the columns, from the first line that is not blank. Raises Failure."""
        with self._records(self.dialect) as reader:
            try:
                names = next(filter(None, reader), None)
            except csv.Error as error:
                raise self._refusal(
                    f"{self.path}: the header (line {reader.line_num}) cannot be read as csv: {_explained(str(error))}"
                ) from error
        if names is None:
            raise self._refusal(f"{self.path} is empty")
        return names

    @cached_property
    def hint(self) -> str:
        """What to do where the header looks as if another character separated the cells; empty where it does not."""
        likely = next((name for name, character in SEPARATORS.items() if character in self.header[0]), None)
        if len(self.header) > 1 or likely is None:
            return ""
        return (
            f"The only column is called {self.header[0]!r}. If its cells are separated by {likely}, set"
            f" {self.decoder.dataset}.csv.separator to {likely}"
        )

    def batches(self, columns: list[str]) -> Iterator[tuple[int, Any]]:
        """Batches as (number of rows, the cells of each of `columns`). Raises Failure at the first row that does not
        fit the header.
        """
        for name in columns:
            if (times := self.header.count(name)) > 1:
                raise self._refusal(f'{self.path} has {times} columns that are called "{name}". Rename all but one')
        read = yield from self._regularly(columns)
        if read is not None:
            yield from self._strictly(columns, read)

    def _regularly(self, columns: list[str]) -> Generator[tuple[int, Any], None, int | None]:
        """Batches that Arrow reads as csv does. Returns how many rows they have; None when these are all."""
        read = 0
        # In a file of one column, a blank line may be a row, which Arrow does not count.
        if len(self.header) == 1 or len(set(self.header)) < len(self.header) or not self._is_regular(self.dialect):
            return read
        arrow = csvregular.batches(self.path, self.dialect.separator, self.dialect.quoting == "double", columns)
        while True:
            try:
                batch = next(arrow)
            except StopIteration as end:
                return None if end.value else read
            yield len(batch), batch.columns
            read += len(batch)

    def _is_regular(self, dialect: Dialect) -> bool:
        if dialect not in self.regular:
            plain = dialect.quoting != "backslash" and self.decoder.is_plain(self.path)
            self.regular[dialect] = plain and csvregular.is_regular(
                self.path, dialect.separator, dialect.quoting == "double"
            )
        return self.regular[dialect]

    def _strictly(self, columns: list[str], done: int) -> Iterator[tuple[int, list[list[str]]]]:
        """The same by csv, from row `done` on. Raises Failure with the line of a mistake."""
        cells = [itemgetter(self.header.index(name)) for name in columns]
        counts = Counts()
        try:
            for rows in self._rows(self.dialect, counts):
                rest = rows[max(done - (counts.rows - len(rows)), 0) :]
                if rest:
                    yield len(rest), [list(map(cell, rest)) for cell in cells]
        except Mistake as mistake:
            raise self._refused(mistake) from mistake
        self._tell(counts)

    def line_of(self, row: int) -> int:
        """The line, from 1, on which a row begins; found by reading the file again up to it."""
        with self._records(self.dialect) as reader:
            width = len(next(filter(None, reader)))
            before, found = reader.line_num, -1
            with suppress(csv.Error):  # the row itself may be what cannot be read
                for record in reader:
                    found += not _blank(record, width)
                    if found == row:
                        break
                    before = reader.line_num
        return before + 1

    @contextmanager
    def _records(self, dialect: Dialect) -> Iterator[Any]:
        with self.decoder.open(self.path, newline="") as file:
            yield dialect.reader(decoding.lines(file, self.path.name, self.decoder.files))

    def _rows(self, dialect: Dialect, counts: Counts) -> Iterator[list[list[str]]]:
        """Batches of whole rows. Raises Mistake."""
        with self._records(dialect) as reader:
            width = len(next(filter(None, reader), []))
            while True:
                line, batch = reader.line_num, list[list[str]]()
                try:
                    batch.extend(itertools.islice(reader, AT_ONCE))  # what was read before an error stays in the list
                except csv.Error as error:
                    good = sum(not _blank(row, width) for row in batch)
                    raise Mistake(counts.rows + good, f"cannot be read as csv: {_explained(str(error))}") from error
                if not batch:
                    return
                if set(map(len, batch)) != {width} or reader.line_num - line != len(batch):
                    batch = _whole(batch, width, counts)
                if dialect.quoting == "none":
                    counts.quoted += sum(len(cell) > 1 and cell[0] == cell[-1] == '"' for row in batch for cell in row)
                counts.rows += len(batch)
                yield batch

    def _has_escaped_quotes(self) -> bool:
        with self.decoder.open(self.path, newline="") as file:
            # Bytes are searched twice as fast as text. In UTF-16 and UTF-32, other bytes may look like these two: then
            # the text decides.
            found = any(ESCAPED_QUOTE.encode() in chunk for chunk in _overlapping(file.buffer.read))
            if not file.encoding.startswith(("utf-16", "utf-32")):
                return found
        with self.decoder.open(self.path, newline="") as file:
            return any(ESCAPED_QUOTE in chunk for chunk in _overlapping(file.read))

    def _judged(self, double: Dialect, backslash: Dialect) -> Dialect:
        """Which of two ways to write a quotation mark inside a quoted cell the file uses: the one that reads it whole.
        Raises Failure if both are possible and give other rows.
        """
        if self._has_doubled_quotes(backslash):
            return double
        readings = {dialect: self._attempt(dialect) for dialect in (double, backslash)}
        if readings[backslash] is None or readings[double] == readings[backslash]:
            return double
        if readings[double] is None:
            notice(
                f"{self.decoder.dataset}.csv.quoting: the quotation marks in the cells of {self.path.name} stand after"
                f" backslashes ({ESCAPED_QUOTE}), and are read so, as with quoting: backslash"
            )
            return backslash
        row, one, other = next(
            (i, one, other)
            for i, (one, other) in enumerate(zip(self._flat(double), self._flat(backslash), strict=False))
            if one != other
        )
        raise self._refusal(
            f"{self.path} can be read in two ways: row {row}, counted from 0, is {_cells(one)} with quotation marks"
            f" that are doubled, and {_cells(other)} with quotation marks after backslashes. Set"
            f" {self.decoder.dataset}.csv.quoting to double or backslash"
        )

    def _has_doubled_quotes(self, dialect: Dialect) -> bool:
        """Whether quotation marks stand side by side, other than as an empty cell, where those after backslashes are
        left out.
        """
        separator = re.escape(dialect.separator)
        doubled = re.compile(f'[^{separator}]""|""[^{separator}\\r\\n]')
        with self.decoder.open(self.path, newline="") as file:
            return any('""' in line and doubled.search(ESCAPE.sub("", line)) for line in file)

    def _attempt(self, dialect: Dialect) -> bytes | None:
        """A digest of all rows; None where the file cannot be read so."""
        digest = hashlib.blake2b()
        try:
            for row in self._flat(dialect):
                digest.update("\x1f".join(row).encode("utf-8", "surrogatepass") + b"\x1e")
        except Mistake:
            return None
        return digest.digest()

    def _flat(self, dialect: Dialect) -> Iterator[list[str]]:
        for batch in self._rows(dialect, Counts()):
            yield from batch

    def _refused(self, mistake: Mistake) -> Failure:
        """With both readings where there are more fields than columns, because other programs choose one of them
        without notice.
        """
        place = f"row {mistake.row}, counted from 0 (line {self.line_of(mistake.row)} of {self.path})"
        if mistake.cells is None:
            return self._refusal(f"{place} {mistake.what}")
        names, cells, separator = self.header, mistake.cells, self.dialect.separator
        what = f"{place} has {len(cells)} fields, and the header has {len(names)} ({', '.join(names)})"
        if self.hint:
            return self._refusal(f"{what}. {self.hint}")
        if len(cells) < len(names):
            return self._refusal(f"{what}. A line break in a cell needs quotation marks around the cell")
        more = len(cells) - len(names)
        index = _cells(dict(zip(names, cells[more:], strict=True)))
        joined = _cells(dict(zip(names, [separator.join(cells[: more + 1]), *cells[more + 1 :]], strict=True)))
        return self._refusal(
            f"{what}. With the first as an index, as pandas has it, it would be {index}; with the first ones joined,"
            f" {joined}. Put quotation marks around cells that hold {separator!r}, or name every column in the header"
        )

    def _tell(self, counts: Counts) -> None:
        name = self.path.name
        if counts.several_lines:
            notice(
                f"{self.decoder.files}: {counts.several_lines} of {counts.rows} rows of {name} span several lines (the"
                f" first: row {counts.first_several}, counted from 0, line {self.line_of(counts.first_several)}). If"
                f" quotation marks are ordinary characters there, set {self.decoder.dataset}.csv.quoting to none"
            )
        if counts.quoted:
            notice(
                f"{self.decoder.dataset}.csv.quoting: {counts.quoted} cells of {name} begin and end with a quotation"
                " mark, which are read as part of the text. If they only enclose it, set quoting to double"
            )
        if counts.blank_lines and len(self.header) == 1:
            notice(f"{self.decoder.files}: {counts.blank_lines} blank lines of {name} are left out, and are no rows")

    def _refusal(self, what: str) -> Failure:
        return Failure(ExitCode.INVALID_DATASET, f"{self.decoder.files}: {what}")


def _whole(batch: list[list[str]], width: int, counts: Counts) -> list[list[str]]:
    """The batch without blank lines; rows of several lines are counted. Raises Mistake at the first row of another
    width.
    """
    rows = [row for row in batch if not _blank(row, width)]
    counts.blank_lines += len(batch) - len(rows)
    for i, row in enumerate(rows, counts.rows):
        if len(row) != width:
            raise Mistake(i, f"has {len(row)} fields", row)
        if any("\n" in cell or "\r" in cell for cell in row):
            counts.first_several = counts.first_several if counts.several_lines else i
            counts.several_lines += 1
    return rows


def _blank(row: list[str], width: int) -> bool:
    """Whether a line holds nothing. In a file of one column, blanks are a cell."""
    return not row or (len(row) == 1 < width and not row[0].strip())


def _overlapping(read: Callable[[int], Any]) -> Iterator[Any]:
    """Chunks, each with the last character of the one before: for what has two characters."""
    before = read(0)
    while chunk := read(decoding.CHUNK):
        yield before + chunk
        before = chunk[-1:]


def _explained(error: str) -> str:
    if "expected after" in error:
        return (
            "a cell that begins with a quotation mark goes on after its second one. Inside such a cell, write each"
            ' quotation mark twice (""); where quotation marks are ordinary characters, set csv.quoting to none'
        )
    if "unexpected end" in error or "field larger" in error:
        return (
            "a cell that begins with a quotation mark never ends. Close it; where quotation marks are ordinary"
            " characters, set csv.quoting to none"
        )
    return error


def _cells(row: dict[str, str] | list[str]) -> str:
    """Cells for a message: text="...", label="..."."""
    named = row.items() if isinstance(row, dict) else [("", cell) for cell in row]
    return ", ".join(
        f'{name}{"=" if name else ""}"{cell[:SHOWN]}{"..." if len(cell) > SHOWN else ""}"' for name, cell in named
    )
