"""Reads the rows of files of one format into an Arrow file, which is mapped into memory.

The files may be of any size. Only the columns that are needed are read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_api.spec import Csv
from luthier_trainer.data import advice, decoding
from luthier_trainer.data.columnarrows import ArrowFile, ColumnarFile, ParquetFile
from luthier_trainer.data.csvrows import CsvFile
from luthier_trainer.data.jsonrows import JsonFile, Survey, Widened
from luthier_trainer.data.webdataset import Archive, Layout
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

AT_ONCE = 1000  # rows of a batch, as in `datasets`
CHARACTERS_AT_ONCE = 1 << 24  # of a document; one batch of Arrow's strings holds at most 2 GiB
TEXT_TYPES = ("string", "large_string")  # as `datasets` names them


@dataclass(frozen=True)
class Part:
    """The rows of one file, and how to find the line on which each of them begins."""

    path: Path
    rows: int
    line_of: Callable[[int], int] | None = None
    lines: Callable[[], Iterator[int]] | None = None
    """Of text files: the line, from 1, of each row."""
    key_of: Callable[[int], str] | None = None
    """Of archives: the sample of each row."""


@dataclass(frozen=True)
class Table:
    """The rows of several files, one file after the other."""

    data: Dataset
    parts: tuple[Part, ...]
    names: tuple[str, ...]
    """All columns of the files, also those that were not read."""
    texts: tuple[str, ...]
    """Columns that hold text, as far as the first rows show."""
    images: tuple[str, ...] = ()
    """Columns that hold images."""
    lists: tuple[str, ...] = ()
    """Columns that hold lists of objects, as conversations are, as far as the first rows show."""
    mixed: Mapping[str, str] = field(default_factory=dict)
    """Column → what it holds, if that is not only text, only numbers, or only true and false. Its cells are JSON text.
    """
    rarest: Mapping[str, int] = field(default_factory=dict)
    """Column with several kinds of values → the first row of the rarest kind."""
    hint: str = ""
    """What to do if a column is missing."""


@dataclass(frozen=True)
class Files:
    """Files of one format that a field of the spec names."""

    paths: list[Path]
    decoder: decoding.Decoder
    csv: Csv
    columns: tuple[str, ...]
    """The columns that the job needs. Each must be in all of the files or in none."""
    others: bool
    """Whether the other columns are also read."""
    target: Path
    """Folder for the Arrow file."""

    def read(self, kind: str, documents: bool) -> Table:
        """Return all rows of files of the format `kind`.

        With `documents`, the rows of text files keep their line breaks. Raises Failure if a file cannot be read.
        """
        for path in self.paths:
            if path.stat().st_size == 0:
                raise self._refusal(f"{path} is empty")
        return READERS[kind](self, documents)

    def _csv(self, documents: bool) -> Table:
        import pyarrow

        files = [CsvFile(path, self.decoder, self.csv) for path in self.paths]
        names = self._names((file.path, file.header) for file in files)
        wanted = self._wanted(names)
        schema = pyarrow.schema([(name, pyarrow.string()) for name in wanted])
        sink = Sink(self._arrow_file("csv"), schema)
        for file in files:
            there = [name for name in wanted if name in file.header]
            for rows, cells in file.batches(there):
                columns = dict(zip(there, cells, strict=True))
                sink.write(pyarrow.table({name: columns.get(name, [None] * rows) for name in wanted}, schema=schema))
            sink.end_part()
        parts = tuple(Part(file.path, rows, file.line_of) for file, rows in zip(files, sink.parts, strict=True))
        return Table(sink.close(), parts, names, names, hint=files[0].hint)

    def _json(self, documents: bool) -> Table:
        files = [JsonFile(path, self.decoder) for path in self.paths]
        survey = Survey(None if self.others else list(self.columns))
        look = Survey(None)
        try:
            sink = self._json_tables(files, survey, look, first=True)
        except Widened:
            # The types of the first batch do not fit the whole file: survey all rows first, then read them again.
            survey = Survey(survey.columns)
            for file in files:
                for rows in file.batches():
                    survey.add(rows)
            sink = self._json_tables(files, survey, look, first=False)
        parts = tuple(Part(file.path, rows, file.line_of) for file, rows in zip(files, sink.parts, strict=True))
        texts = tuple(name for name, types in look.types.items() if types == {str})
        head = next(files[0].batches(), [])
        return Table(
            sink.close(),
            parts,
            tuple(survey.names),
            texts,
            lists=advice.lists_of_objects(head),
            mixed=survey.mixed(),
            rarest=survey.rarest(),
            hint=advice.of_objects(head),
        )

    def _json_tables(self, files: list[JsonFile], survey: Survey, look: Survey, first: bool) -> Sink:
        """Write all rows, and return the file that they are in, still open.

        With `first`, the types of the columns are those of the first batch. Raises Widened if a row does not fit them,
        or Failure if a text cannot be encoded.
        """
        sink = Sink(self._arrow_file("json"))
        for file in files:
            for rows in file.batches():
                if not look.rows:
                    look.add(rows)
                if first and not survey.rows:
                    survey.add(rows)
                    if survey.mixed():
                        raise Widened
                try:
                    sink.write(survey.table(rows))
                except UnicodeEncodeError as error:
                    raise self._refusal(
                        f"{file.path} has half a surrogate pair (such as \\ud83d alone) in a text: {error}"
                    ) from error
            sink.end_part()
        return sink

    def _parquet(self, documents: bool) -> Table:
        return self._columnar([ParquetFile(path, self.decoder.files) for path in self.paths])

    def _arrow(self, documents: bool) -> Table:
        return self._columnar([ArrowFile(path, self.decoder.files) for path in self.paths])

    def _columnar(self, files: Sequence[ColumnarFile]) -> Table:
        import pyarrow
        from datasets import Features, Image

        names = self._names((file.path, file.schema.names) for file in files)
        known = {file.path: Features.from_arrow_schema(file.schema) for file in files}
        features = Features(
            {name: known[file.path][name] for name, file in self._typed_by(files, self._wanted(names)).items()}
        )
        sink = Sink(self._arrow_file(files[0].format), features.arrow_schema)
        for file in files:
            there = [name for name in features if name in file.schema.names]
            for table in file.tables(there):
                for name in set(features) - set(there):
                    table = table.append_column(name, pyarrow.nulls(len(table), features.arrow_schema.field(name).type))
                sink.write(table.select(list(features)).cast(features.arrow_schema))
            sink.end_part()
        parts = tuple(Part(file.path, rows) for file, rows in zip(files, sink.parts, strict=True))
        texts = tuple(
            name for name, feature in known[files[0].path].items() if getattr(feature, "dtype", None) in TEXT_TYPES
        )
        images = tuple(name for name, feature in known[files[0].path].items() if isinstance(feature, Image))
        lists = tuple(name for name, feature in known[files[0].path].items() if holds_objects(feature))
        return Table(sink.close(), parts, names, texts, images, lists)

    def _typed_by(self, files: Sequence[ColumnarFile], wanted: list[str]) -> dict[str, ColumnarFile]:
        """Return the columns to read, each with a file that has its type.

        A column that the job does not need is left out if files have different types for it. Raises Failure for such a
        column if the job needs it.
        """
        import pyarrow

        found: dict[str, ColumnarFile] = {}
        for name in wanted:
            having = [file for file in files if name in file.schema.names]
            filled = [file for file in having if not pyarrow.types.is_null(file.schema.field(name).type)] or having
            kind = filled[0].schema.field(name).type
            other = next((file for file in filled if file.schema.field(name).type != kind), None)
            if other is None:
                found[name] = filled[0]
                continue
            what = (
                f'column "{name}" of {other.path} holds {other.schema.field(name).type}, and in {filled[0].path.name}'
                f" {kind}"
            )
            if name in self.columns:
                raise self._refusal(f"{what}. Write it with the same type in all files")
            notice(f"{self.decoder.files}: {what}; it is left out")
        return found

    def _text(self, documents: bool) -> Table:
        import pyarrow

        schema = pyarrow.schema([("text", pyarrow.string())] + ([("ends", pyarrow.bool_())] if documents else []))
        sink = Sink(self._arrow_file("text"), schema)
        files = [TextFile(path, self.decoder) for path in self.paths]
        for file in files:
            for columns in file.documents() if documents else file.batches():
                sink.write(pyarrow.table(columns, schema=schema))
            sink.end_part()
        counted = zip(files, sink.parts, strict=True)
        parts = tuple(
            Part(file.path, rows) if documents else Part(file.path, rows, file.line_of, file.lines)
            for file, rows in counted
        )
        return Table(sink.close(), parts, ("text",), ("text",))

    def _webdataset(self, documents: bool) -> Table:
        """Return the rows of archives. Raises Failure if one cannot be read, or if its rows were to be prompts."""
        import pyarrow
        from datasets import Image

        if self.others:
            raise self._refusal(
                "archives of WebDataset are read by FineTuneJobs only. Write the prompts into a file of JSON lines"
            )
        archives = [Archive(path, self.decoder.files) for path in self.paths]
        layout = Layout(archives, self.columns)
        layout.check()
        survey, head = Survey(None), list[dict[str, Any]]()
        for archive in archives:
            for rows, _ in layout.batches(archive, images=False):
                survey.add(rows)
                head = head or rows
        survey.columns = list(self.columns)
        names = tuple(dict.fromkeys((*layout.sources, *survey.names)))
        pictures = [name for name in layout.images if name in self.columns]
        sink = Sink(self._arrow_file("webdataset"))
        for archive in archives:
            for rows, images in layout.batches(archive, images=True):
                table = survey.table(rows) if survey.names else pyarrow.table({})
                cells = dict(zip(table.column_names, table.columns, strict=True))
                stored = {name: pyarrow.array(values, Image().pa_type) for name, values in images.items()}
                found = cells | stored
                # A table without columns has no rows.
                sink.write(pyarrow.table(found or {names[0]: pyarrow.nulls(len(rows))}))
            sink.end_part()
        parts = tuple(
            Part(archive.path, rows, key_of=archive.key_of) for archive, rows in zip(archives, sink.parts, strict=True)
        )
        data = sink.close()
        for name in pictures:
            data = data.cast_column(name, Image())
        return Table(
            data,
            parts,
            names,
            tuple(dict.fromkeys((*layout.texts, *(name for name, types in survey.types.items() if types == {str})))),
            layout.images,
            advice.lists_of_objects(head),
            survey.mixed(),
            survey.rarest(),
        )

    def _names(self, headers: Iterable[tuple[Path, list[str]]]) -> tuple[str, ...]:
        """Return the names of the columns of all files.

        Raises Failure, which names the file, if a column that the job needs is only in some of the files.
        """
        found = [(path, list(names)) for path, names in headers]
        for column in self.columns:
            having = [path for path, names in found if column in names]
            for path, names in found:
                if having and column not in names:
                    raise self._refusal(
                        f'{path} has no column "{column}" (columns: {", ".join(names)}), and {having[0].name} has one'
                    )
        return tuple(dict.fromkeys(name for _, names in found for name in names))

    def _wanted(self, names: tuple[str, ...]) -> list[str]:
        """Return the columns to read. There is at least one, because it also gives the number of rows."""
        return [name for name in names if name in self.columns or (self.others and name)] or [*names[:1]]

    def _arrow_file(self, kind: str) -> Path:
        """Return the path of the Arrow file for these files and columns."""
        self.target.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(repr((kind, self.paths, self.columns)).encode()).hexdigest()
        return self.target / f"rows-{digest[:16]}.arrow"

    def _refusal(self, what: str) -> Failure:
        return Failure(ExitCode.INVALID_DATASET, f"{self.decoder.files}: {what}")


READERS: Mapping[str, Callable[[Files, bool], Table]] = {
    "arrow": Files._arrow,
    "csv": Files._csv,
    "json": Files._json,
    "parquet": Files._parquet,
    "text": Files._text,
    "webdataset": Files._webdataset,
}


@dataclass(frozen=True)
class TextFile:
    """A text file, whose rows are its lines, or the lines of one document."""

    path: Path
    decoder: decoding.Decoder

    def batches(self) -> Iterator[dict[str, list[Any]]]:
        """Yield batches of the lines that are not blank, without their line breaks.

        Blank lines before the last row are counted in a notice.
        """
        batch: list[str] = []
        rows = last = 0
        for number, line in self._rows():
            rows, last = rows + 1, number
            batch.append(line.removesuffix("\n"))
            if len(batch) == AT_ONCE:
                yield {"text": batch}
                batch = []
        if batch:
            yield {"text": batch}
        if last > rows:
            notice(f"{self.decoder.files}: {last - rows} blank lines of {self.path.name} are left out, and are no rows")

    def documents(self) -> Iterator[dict[str, list[Any]]]:
        """Yield batches of all lines, with their line breaks; `ends` is true on the last line of the file.

        A line of more than `decoding.CHUNK` characters comes in pieces.
        """
        with self.decoder.open(self.path) as file:
            lines = decoding.lines(iter(lambda: file.readline(decoding.CHUNK), ""), self.path.name, self.decoder.files)
            batch: list[str] = []
            characters = 0
            for line in lines:
                if len(batch) == AT_ONCE or characters >= CHARACTERS_AT_ONCE:
                    yield {"text": batch, "ends": [False] * len(batch)}
                    batch, characters = [], 0
                batch.append(line)
                characters += len(line)
            if batch:
                yield {"text": batch, "ends": [False] * (len(batch) - 1) + [True]}

    def line_of(self, row: int) -> int:
        """Return the line, from 1, of a row. The file is read again up to this row."""
        return next(number for i, (number, _) in enumerate(self._rows()) if i == row)

    def lines(self) -> Iterator[int]:
        """Yield the line, from 1, of each row."""
        return (number for number, _ in self._rows())

    def _rows(self) -> Iterator[tuple[int, str]]:
        """Yield (line from 1, text) of the lines that are not blank."""
        with self.decoder.open(self.path) as file:
            for number, line in enumerate(decoding.lines(file, self.path.name, self.decoder.files), 1):
                if line.strip():
                    yield number, line


def holds_objects(feature: Any) -> bool:
    """Return whether a feature of `datasets` is a list of objects, as conversations are."""
    from datasets import LargeList, List

    return isinstance(feature, List | LargeList) and isinstance(feature.feature, dict)


class Sink:
    """Writes tables into an Arrow file, which appears under its name only when it is complete."""

    def __init__(self, path: Path, schema: pyarrow.Schema | None = None) -> None:
        self.path, self.schema = path, schema
        self.parts: list[int] = []
        self._rows = 0
        self._file: Any = None
        self._writer: Any = None

    def write(self, table: pyarrow.Table) -> None:
        """Append a table. The first table decides the schema if none was given."""
        self._open(self.schema or table.schema)
        self._writer.write_table(table)
        self._rows += len(table)

    def end_part(self) -> None:
        """Record how many rows were written since the last part."""
        self.parts.append(self._rows - sum(self.parts))

    def close(self) -> Dataset:
        """Complete the file and return its rows, mapped into memory."""
        import pyarrow
        from datasets import Dataset

        self._open(self.schema or pyarrow.schema([]))
        self._writer.close()
        self._file.close()
        os.replace(self._partial, self.path)
        return Dataset.from_file(str(self.path))

    @property
    def _partial(self) -> Path:
        return self.path.with_suffix(".partial")

    def _open(self, schema: pyarrow.Schema) -> None:
        import pyarrow

        if self._writer is None:
            # Start a new file: an abandoned writer may still have buffered bytes of the old one, which must not be
            # written into this one.
            self._partial.unlink(missing_ok=True)
            self._file = self._partial.open("wb")
            self._writer = pyarrow.ipc.new_stream(self._file, schema)
