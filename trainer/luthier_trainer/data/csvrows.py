"""Reads rows of CSV files with Python's csv module in strict mode.

A row that does not fit the header is refused; cells are never moved or joined without notice. Every cell is text, as it
is written: "007", "NA" and "1e5" are not converted. A file whose cells are separated by tabs has no quoting unless the
spec asks for it, because quotation marks in such files are mostly part of the text.
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
# Characters in a cell; csv's own limit is 131,072. After a quotation mark that is never closed, this much is read.
CELL_LIMIT = 1 << 28
SEPARATORS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}
SHOWN = 60  # characters of a cell in a message
ESCAPED_QUOTE = '\\"'
ESCAPE = re.compile(r"\\(.?)", re.DOTALL)  # a backslash and what follows it


class Mistake(Exception):
    """A row, counted from 0, that does not fit the header or cannot be read."""

    def __init__(self, row: int, what: str, cells: list[str] | None = None) -> None:
        super().__init__(what)
        self.row, self.what, self.cells = row, what, cells


@dataclass(frozen=True)
class Dialect:
    """How cells are separated and quoted. `quoting` is a value of `spec.dataset.csv.quoting`."""

    separator: str
    quoting: str

    def reader(self, lines: Iterator[str]) -> Any:
        """Return a csv.reader in strict mode."""
        csv.field_size_limit(CELL_LIMIT)
        if self.quoting == "none":
            return csv.reader(lines, delimiter=self.separator, quoting=csv.QUOTE_NONE, quotechar=None, strict=True)
        if self.quoting == "backslash":
            escaped = (ESCAPE.sub(_keep_backslash, line) if "\\" in line else line for line in lines)
            # `doublequote` stays on, because csv is not strict without it.
            return csv.reader(escaped, delimiter=self.separator, escapechar="\\", strict=True)
        return csv.reader(lines, delimiter=self.separator, strict=True)


def _keep_backslash(escape: re.Match[str]) -> str:
    """Return an escape with its backslash doubled, unless it escapes a quotation mark or a backslash.

    csv removes every backslash, but one that escapes neither of them is part of the text.
    """
    return escape[0] if escape[1] in ('"', "\\") else "\\" + escape[0]


@dataclass
class Counts:
    """What is counted while a file is read, for the notices at its end."""

    rows: int = 0
    several_lines: int = 0
    """Rows that span several lines."""
    first_several: int = 0
    """The first such row, counted from 0."""
    blank_lines: int = 0
    quoted: int = 0
    """Cells that begin and end with a quotation mark although the dialect has no quoting."""


@dataclass(frozen=True)
class CsvFile:
    """One CSV file. `decoder` holds the paths in the spec that error messages name."""

    path: Path
    decoder: decoding.Decoder
    settings: Csv
    regular: dict[Dialect, bool] = field(default_factory=dict)
    """Dialect → whether Arrow reads the same rows as csv."""

    @cached_property
    def dialect(self) -> Dialect:
        """Return the dialect that the spec names, or the one that fits the file.

        Raises Failure if two dialects are possible and give different rows.
        """
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
        """Return the names of the columns, from the first line that is not blank. Raises Failure if there is none."""
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
        """Return what to do if the header looks as if the cells had another separator; empty otherwise."""
        likely = next((name for name, character in SEPARATORS.items() if character in self.header[0]), None)
        if len(self.header) > 1 or likely is None:
            return ""
        return (
            f"The only column is called {self.header[0]!r}. If its cells are separated by {likely}, set"
            f" {self.decoder.dataset}.csv.separator to {likely}"
        )

    def batches(self, columns: list[str]) -> Iterator[tuple[int, Any]]:
        """Yield batches as (number of rows, the cells of each of `columns`).

        Raises Failure at the first row that does not fit the header.
        """
        for name in columns:
            if (times := self.header.count(name)) > 1:
                raise self._refusal(f'{self.path} has {times} columns that are called "{name}". Rename all but one')
        read = yield from self._regularly(columns)
        if read is not None:
            yield from self._strictly(columns, read)

    def _regularly(self, columns: list[str]) -> Generator[tuple[int, Any], None, int | None]:
        """Yield the batches that Arrow reads in the same way as csv.

        Returns None if these are all rows of the file, otherwise how many rows they have.
        """
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
        """Return whether Arrow reads the same rows as csv with this dialect. The answer is cached."""
        if dialect not in self.regular:
            plain = dialect.quoting != "backslash" and self.decoder.is_plain(self.path)
            self.regular[dialect] = plain and csvregular.is_regular(
                self.path, dialect.separator, dialect.quoting == "double"
            )
        return self.regular[dialect]

    def _strictly(self, columns: list[str], done: int) -> Iterator[tuple[int, list[list[str]]]]:
        """Yield batches that csv reads, from row `done` on. Raises Failure with the line of a mistake."""
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
        """Return the line, from 1, on which a row begins. The file is read again up to this row."""
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
        """Open the file as a csv.reader."""
        with self.decoder.open(self.path, newline="") as file:
            yield dialect.reader(decoding.lines(file, self.path.name, self.decoder.files))

    def _rows(self, dialect: Dialect, counts: Counts) -> Iterator[list[list[str]]]:
        """Yield batches of complete rows. Raises Mistake at the first row that does not fit."""
        with self._records(dialect) as reader:
            width = len(next(filter(None, reader), []))
            while True:
                line, batch = reader.line_num, list[list[str]]()
                try:
                    batch.extend(itertools.islice(reader, AT_ONCE))  # rows before an error stay in the list
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
        """Return whether a quotation mark follows a backslash anywhere in the file."""
        with self.decoder.open(self.path, newline="") as file:
            # Bytes are searched twice as fast as text. In UTF-16 and UTF-32, bytes of other characters may look like
            # these two, so the decoded text is searched instead.
            found = any(ESCAPED_QUOTE.encode() in chunk for chunk in _overlapping(file.buffer.read))
            if not file.encoding.startswith(("utf-16", "utf-32")):
                return found
        with self.decoder.open(self.path, newline="") as file:
            return any(ESCAPED_QUOTE in chunk for chunk in _overlapping(file.read))

    def _judged(self, double: Dialect, backslash: Dialect) -> Dialect:
        """Return which of two ways of writing a quotation mark inside a quoted cell the file uses.

        This is the one with which the whole file can be read. Raises Failure if both are possible and give different
        rows.
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
        """Return whether quotation marks are doubled inside a cell. Those after backslashes are removed first.

        An empty cell, which is two quotation marks between separators, does not count.
        """
        separator = re.escape(dialect.separator)
        doubled = re.compile(f'[^{separator}]""|""[^{separator}\\r\\n]')
        with self.decoder.open(self.path, newline="") as file:
            return any('""' in line and doubled.search(ESCAPE.sub("", line)) for line in file)

    def _attempt(self, dialect: Dialect) -> bytes | None:
        """Return a digest of all rows, or None if the file cannot be read with this dialect."""
        digest = hashlib.blake2b()
        try:
            for row in self._flat(dialect):
                digest.update("\x1f".join(row).encode("utf-8", "surrogatepass") + b"\x1e")
        except Mistake:
            return None
        return digest.digest()

    def _flat(self, dialect: Dialect) -> Iterator[list[str]]:
        """Yield the rows one by one. Raises Mistake."""
        for batch in self._rows(dialect, Counts()):
            yield from batch

    def _refused(self, mistake: Mistake) -> Failure:
        """Return the Failure for a row that does not fit the header.

        For a row with too many fields, it shows both ways in which other programs read such a row without notice.
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
        """Give notice of rows and cells that may not have been read as they were meant."""
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
    """Return the batch without blank lines, and count the rows that span several lines.

    Raises Mistake at the first row whose number of fields is not `width`.
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
    """Return whether a line is blank and therefore not a row. In a file of one column, blanks are a cell."""
    return not row or (len(row) == 1 < width and not row[0].strip())


def _overlapping(read: Callable[[int], Any]) -> Iterator[Any]:
    """Yield chunks that each begin with the last character of the one before, to find pairs of characters."""
    before = read(0)
    while chunk := read(decoding.CHUNK):
        yield before + chunk
        before = chunk[-1:]


def _explained(error: str) -> str:
    """Return what is wrong and what to do, for an error message of csv."""
    if "expected after" in error:
        return (
            "a cell that begins with a quotation mark has more text after its closing one. Inside such a cell, write"
            ' each quotation mark twice (""); where quotation marks are ordinary characters, set csv.quoting to none'
        )
    if "unexpected end" in error or "field larger" in error:
        return (
            "a cell that begins with a quotation mark never ends. Close it; where quotation marks are ordinary"
            " characters, set csv.quoting to none"
        )
    return error


def _cells(row: dict[str, str] | list[str]) -> str:
    """Return cells for a message: text="...", label="..."."""
    named = row.items() if isinstance(row, dict) else [("", cell) for cell in row]
    return ", ".join(
        f'{name}{"=" if name else ""}"{cell[:SHOWN]}{"..." if len(cell) > SHOWN else ""}"' for name, cell in named
    )
