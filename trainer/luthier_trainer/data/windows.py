"""Reads a data file window by window: a thousand rows or fewer at once, in memory, in the order of the file.

The readers, and so the rows and what is refused, are those of `filerows`. A window has types of its own: nobody knows
what the rest of the file holds. Windows that are skipped are read, and not converted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier_api.spec import Csv
from luthier_trainer.data.columnarrows import ArrowFile, ColumnarFile, ParquetFile
from luthier_trainer.data.columns import invalid
from luthier_trainer.data.csvrows import CsvFile
from luthier_trainer.data.decoding import Decoder
from luthier_trainer.data.filerows import TEXT_TYPES, Part, Table, TextFile
from luthier_trainer.data.jsonrows import JsonFile, Object, Survey
from luthier_trainer.data.load import Rows

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

Piece = tuple[int, Callable[[], Table]]
"""(number of rows, what converts them)"""


@dataclass(frozen=True)
class WindowedFile:
    """One data file on a volume."""

    path: Path
    format: str
    """The format whose reader reads it."""
    decoder: Decoder
    csv: Csv
    columns: tuple[str, ...]
    """The columns that the job needs. No others are read."""

    def windows(self, begin: int = 0) -> Iterator[Rows]:
        """Yield the rows from number `begin` on. Raises Failure at a row that cannot be read."""
        import numpy

        if self.path.stat().st_size == 0:
            raise invalid(f"{self.decoder.files}: {self.path} is empty")
        done = 0
        for count, convert in PIECES[self.format](self):
            if done + count > begin:
                table = convert()
                line_of = table.parts[0].line_of if table.parts else None
                rows = Rows.of(
                    replace(
                        table,
                        parts=(Part(self.path, done + count, line_of),),
                        rarest={name: done + row for name, row in table.rarest.items()},
                    ),
                    self.path.name,
                )
                rows = replace(rows, numbers=numpy.arange(done, done + count))
                yield rows if done >= begin else rows.select(numpy.arange(begin - done, count))
            done += count

    def counts(self) -> Iterator[int]:
        """Yield the number of rows of each window."""
        return (count for count, _ in PIECES[self.format](self))

    def _csv(self) -> Iterator[Piece]:
        file = CsvFile(self.path, self.decoder, self.csv)
        names = [name for name in file.header if name in self.columns] or file.header[:1]

        def convert(cells: Any) -> Table:
            import pyarrow

            columns = {name: pyarrow.array(column, pyarrow.string()) for name, column in zip(names, cells, strict=True)}
            header = tuple(file.header)
            return Table(_dataset(pyarrow.table(columns)), self._part(file), header, header, hint=file.hint)

        for count, cells in file.batches(names):
            yield count, partial(convert, cells)

    def _json(self) -> Iterator[Piece]:
        file = JsonFile(self.path, self.decoder)

        for rows in file.batches():
            yield len(rows), partial(self._json_table, file, rows)

    def _json_table(self, file: JsonFile, rows: list[Object]) -> Table:
        """Return a window with the types that fit it. Raises Failure if a text cannot be encoded."""
        survey, look = Survey(list(self.columns)), Survey(None)
        survey.add(rows)
        look.add(rows)
        try:
            data = _dataset(survey.table(rows))
        except UnicodeEncodeError as error:
            raise invalid(
                f"{self.decoder.files}: {self.path} has half a surrogate pair (such as \\ud83d alone) in a text:"
                f" {error}"
            ) from error
        return Table(
            data,
            self._part(file),
            tuple(survey.names),
            texts=tuple(name for name, types in look.types.items() if types == {str}),
            lists=tuple(name for name, types in look.types.items() if types == {list}),
            mixed=survey.mixed(),
            rarest=survey.rarest(),
        )

    def _text(self) -> Iterator[Piece]:
        file = TextFile(self.path, self.decoder)

        def convert(batch: dict[str, list[Any]]) -> Table:
            import pyarrow

            table = pyarrow.table(batch, schema=pyarrow.schema([("text", pyarrow.string())]))
            return Table(_dataset(table), self._part(file), ("text",), ("text",))

        for batch in file.batches():
            yield len(batch["text"]), partial(convert, batch)

    def _parquet(self) -> Iterator[Piece]:
        return self._columnar(ParquetFile(self.path, self.decoder.files))

    def _arrow(self) -> Iterator[Piece]:
        return self._columnar(ArrowFile(self.path, self.decoder.files))

    def _columnar(self, file: ColumnarFile) -> Iterator[Piece]:
        from datasets import Features, LargeList, List

        known = Features.from_arrow_schema(file.schema)
        names = [name for name in known if name in self.columns] or list(known)[:1]
        schema = Features({name: known[name] for name in names}).arrow_schema
        texts = tuple(name for name, feature in known.items() if getattr(feature, "dtype", None) in TEXT_TYPES)
        lists = tuple(name for name, feature in known.items() if isinstance(feature, List | LargeList))

        def convert(table: pyarrow.Table) -> Table:
            return Table(_dataset(table.cast(schema)), (), tuple(known), texts, lists=lists)

        for table in file.tables(names):
            if len(table):
                yield len(table), partial(convert, table)

    def _part(self, file: CsvFile | JsonFile | TextFile) -> tuple[Part]:
        return (Part(self.path, 0, file.line_of),)


def _dataset(table: pyarrow.Table) -> Dataset:
    from datasets import Dataset
    from datasets.table import InMemoryTable

    return Dataset(InMemoryTable(table))


PIECES: Mapping[str, Callable[[WindowedFile], Iterator[Piece]]] = {
    "arrow": WindowedFile._arrow,
    "csv": WindowedFile._csv,
    "json": WindowedFile._json,
    "parquet": WindowedFile._parquet,
    "text": WindowedFile._text,
}
