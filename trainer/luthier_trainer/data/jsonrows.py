"""Reads rows of JSON files: one object a line, or one list of objects.

Values keep their JSON types; dates stay text. A column whose values are all text, all numbers, or all true or false has
that type. Any other column is kept as JSON text, together with a description of its values (`Survey.mixed`). Only the
columns that a job needs are surveyed, so that no other column can stop the job.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from luthier_api.exitcodes import ExitCode
from luthier_trainer.data import decoding
from luthier_trainer.runtime.failure import Failure

if TYPE_CHECKING:
    import pyarrow

AT_ONCE = 1000  # rows of a batch, as in `datasets`
KINDS = {str: "text", bool: "true or false", int: "numbers", float: "numbers", list: "lists", dict: "objects"}
EXACT = 2**53  # float64 holds all whole numbers up to here exactly
SPACE = re.compile(r"\s*")

Object = dict[str, Any]


class Widened(Exception):
    """A batch does not fit the types of the batches before it."""


def _object(pairs: list[tuple[str, Any]]) -> Object:
    """Return the object with these keys and values.

    Raises ValueError if a key occurs twice: json would keep the last value without notice.
    """
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f'an object has the key "{twice}" more than once. Remove all but one')
    return made


DECODE = json.JSONDecoder(object_pairs_hook=_object).decode


@dataclass(frozen=True)
class JsonFile:
    """One JSON file. `decoder` holds the paths in the spec that error messages name."""

    path: Path
    decoder: decoding.Decoder

    def batches(self) -> Iterator[list[Object]]:
        """Yield batches of rows. Raises Failure at the first row that is not an object."""
        done = 0
        for rows in self._lines_at_once():
            if rows is None:
                yield from self._slowly(done)
                return
            yield rows
            done += len(rows)

    def _lines_at_once(self) -> Iterator[list[Object] | None]:
        """Yield batches of lines that each hold one object; None, as the last item, if a line does not.

        This is twice as fast as decoding value by value.
        """
        with self.decoder.open(self.path) as file:
            lines = decoding.lines(file, self.path.name, self.decoder.files)
            while batch := list(itertools.islice(lines, AT_ONCE)):
                try:
                    rows = [DECODE(line) for line in batch if not line.isspace()]
                except (ValueError, RecursionError):
                    rows = [None]
                if not set(map(type, rows)) <= {dict}:
                    yield None
                    return
                if rows:
                    yield rows

    def _slowly(self, done: int) -> Iterator[list[Object]]:
        """Yield batches of any file, value by value, from row `done` on.

        Raises Failure, with the line of the mistake, at a row that is not an object.
        """
        values = itertools.islice(self._values(), done, None)
        while batch := list(itertools.islice(values, AT_ONCE)):
            wrong = next((i for i, (value, _) in enumerate(batch) if not isinstance(value, dict)), None)
            if wrong is not None:
                value, line = batch[wrong]
                kind = KINDS.get(type(value), "null")
                raise self._refusal(
                    f"row {done + wrong}, counted from 0 (line {line}), is no object but of kind: {kind}. Each row is"
                    ' an object, such as {"text": "..."}'
                )
            yield [value for value, _ in batch]
            done += len(batch)

    def line_of(self, row: int) -> int:
        """Return the line, from 1, on which a row begins. The file is read again up to this row."""
        return next(line for _, line in itertools.islice(self._values(), row, None))

    def _values(self) -> Iterator[tuple[Any, int]]:
        """Yield (value, line on which it begins). Raises Failure at a mistake."""
        with self.decoder.open(self.path) as file:
            begin, first = 1, ""
            for line in file:
                first = line.lstrip(decoding.BOM + " \t\r\n")
                if first:
                    break
                begin += 1
            if first.startswith("["):
                yield from self._listed(first, begin, file)
            else:
                rest = decoding.lines(file, self.path.name, self.decoder.files)
                yield from self._lines(itertools.chain([first], rest), begin)

    def _lines(self, lines: Iterator[str], begin: int) -> Iterator[tuple[Any, int]]:
        """Yield the rows of a file with one JSON object a line. Raises Failure with the line of a mistake."""
        for number, line in enumerate(lines, begin):
            if line.strip():
                try:
                    yield DECODE(line.rstrip()), number
                except (ValueError, RecursionError) as error:
                    raise self._broken(error, number) from error

    def _listed(self, text: str, line: int, file: TextIO) -> Iterator[tuple[Any, int]]:
        """Yield the elements of a list, of which only a part is in memory at once.

        `text` is the first line, which begins with the bracket, and `line` its number. Raises Failure with the line of
        a mistake.
        """
        decoder = json.JSONDecoder(object_pairs_hook=_object)
        position, opened = 1, True  # `opened`: a value may follow, without a comma before it
        text += file.read(decoding.CHUNK)
        while True:
            start = SPACE.match(text, position).end()  # type: ignore[union-attr]
            line += text.count("\n", position, start)
            position = start
            if position == len(text):
                more = file.read(decoding.CHUNK)
                if not more:
                    raise self._refusal(f"the list that begins the file has no end. {self._whole()}")
                text, position = more, 0
                continue
            if text[position] == "]":
                rest = text[position + 1 :] + file.read(decoding.CHUNK)
                if rest.strip():
                    raise self._refusal(
                        f"line {line}: something follows the end of the list. {self._whole()}; if each line is a"
                        ' conversation, write {"messages": [...]}'
                    )
                return
            if not opened:
                if text[position] != ",":
                    raise self._refusal(f"line {line}: a comma is missing between two rows. {self._whole()}")
                position, opened = position + 1, True
                continue
            try:
                value, end = decoder.raw_decode(text, position)
            except ValueError as error:
                more = file.read(max(decoding.CHUNK, len(text)))
                if not more:
                    raise self._broken(error, line) from error
                text, position = text[position:] + more, 0
                continue
            if end == len(text) and (more := file.read(decoding.CHUNK)):  # the rest of a number may follow
                text, position = text[position:] + more, 0
                continue
            yield value, line
            line += text.count("\n", position, end)
            position, opened = end, False

    def _broken(self, error: Exception, line: int) -> Failure:
        """Return the Failure for a value that begins on `line` and cannot be decoded."""
        if isinstance(error, json.JSONDecodeError):
            line += error.lineno - 1 if error.lineno > 1 else 0
            return self._refusal(f"line {line}, column {error.colno}: {error.msg}. {self._whole()}")
        return self._refusal(f"line {line}: {error}")

    def _whole(self) -> str:
        return "Write one object a line, or one list of objects"

    def _refusal(self, what: str) -> Failure:
        return Failure(ExitCode.INVALID_DATASET, f"{self.decoder.files}: {self.path} cannot be read as json: {what}")


@dataclass
class Survey:
    """The columns of a file, and the types of their values. `columns` are those to survey; None for all."""

    columns: list[str] | None
    names: dict[str, None] = field(default_factory=dict)
    """All columns, in the order in which they appear."""
    types: dict[str, set[type]] = field(default_factory=dict)
    kinds: dict[str, Counter[str]] = field(default_factory=dict)
    """Column → kind of value → in how many rows."""
    first: dict[tuple[str, str], int] = field(default_factory=dict)
    """(column, kind) → the first row that has it, counted from 0 over all files."""
    inexact: set[str] = field(default_factory=set)
    """Columns of numbers that neither int64 nor float64 holds exactly."""
    rows: int = 0

    def add(self, rows: list[Object]) -> None:
        """Add the columns and values of a batch to the survey."""
        for keys in dict.fromkeys(map(tuple, rows)):
            self.names.update(dict.fromkeys(keys))
        for name in self.wanted():
            values = [row.get(name) for row in rows]
            for i, value in enumerate(values, self.rows):
                if value is not None:
                    self._count(name, value, i)
            types = self.types.get(name, set())
            limit = EXACT if float in types else 2**63 - 1
            if types and types <= {int, float} and any(isinstance(v, int) and abs(v) > limit for v in values):
                self.inexact.add(name)
        self.rows += len(rows)

    def _count(self, name: str, value: Any, row: int) -> None:
        kind = KINDS[type(value)]
        self.types.setdefault(name, set()).add(type(value))
        self.kinds.setdefault(name, Counter())[kind] += 1
        self.first.setdefault((name, kind), row)

    def wanted(self) -> list[str]:
        """Return those columns to read that exist. There is at least one, because it also gives the number of rows."""
        return [name for name in self.names if self.columns is None or name in self.columns] or list(self.names)[:1]

    def table(self, rows: list[Object]) -> pyarrow.Table:
        """Return a batch as a table of the types found so far. Raises Widened if it does not fit them."""
        import pyarrow

        if any(key not in self.names for keys in set(map(tuple, rows)) for key in keys):
            raise Widened
        columns = {}
        for name in self.wanted():
            values = [row.get(name) for row in rows]
            if not set(map(type, values)) <= self.types.get(name, set()) | {type(None)}:
                raise Widened
            if self.is_json(name):
                values = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
            try:
                columns[name] = pyarrow.array(values, self.arrow_type(name))
            except (OverflowError, pyarrow.ArrowInvalid) as error:  # a whole number that is too large for the type
                raise Widened from error
        return pyarrow.table(columns)

    def is_json(self, name: str) -> bool:
        """Return whether the column is kept as JSON text."""
        types = self.types.get(name, set())
        return name in self.inexact or not (types <= {int, float} or types in ({str}, {bool}))

    def arrow_type(self, name: str) -> pyarrow.DataType:
        """Return the type of the column in Arrow: string, bool, int64 or float64."""
        import pyarrow

        types = self.types.get(name, set())
        if not types or self.is_json(name) or types == {str}:
            return pyarrow.string()
        if types == {bool}:
            return pyarrow.bool_()
        return pyarrow.float64() if float in types else pyarrow.int64()

    def mixed(self) -> dict[str, str]:
        """Return column → what it holds, for the columns that are kept as JSON text."""
        return {name: self._holds(name) for name in self.wanted() if self.is_json(name)}

    def _holds(self, name: str) -> str:
        kinds = self.kinds[name].most_common()
        return " and ".join(f"{kind} in {count} rows" for kind, count in kinds) if len(kinds) > 1 else kinds[0][0]

    def rarest(self) -> dict[str, int]:
        """Return column → the first row of the rarest kind, for columns with several kinds of values."""
        return {
            name: self.first[name, kinds.most_common()[-1][0]] for name, kinds in self.kinds.items() if len(kinds) > 1
        }
