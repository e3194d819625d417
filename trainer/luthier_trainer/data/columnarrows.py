"""Reads columns of Parquet and Arrow files.

Types that `datasets` does not support (string_view, dictionaries) are converted into types that hold the same values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from luthier_api.exitcodes import ExitCode
from luthier_api.formats import DatasetFormat
from luthier_trainer.runtime.classify import FORBIDDEN_ERRNOS, STORAGE_ERRNOS, os_error
from luthier_trainer.runtime.failure import Failure

if TYPE_CHECKING:
    import pyarrow

AT_ONCE = 1000  # rows of a batch, as in `datasets`
MAGIC = b"ARROW1"  # the first bytes of an Arrow file with a footer
METADATA = b"huggingface"  # under this key, `datasets` stores which columns are images, and the names of classes


@dataclass(frozen=True)
class ColumnarFile(ABC):
    """A file that is stored by columns. `field` is the path in the spec, for messages."""

    format: ClassVar[DatasetFormat]
    path: Path
    field: str

    @cached_property
    def schema(self) -> pyarrow.Schema:
        """Return all columns, in types that `datasets` supports. Raises Failure if the file cannot be read."""
        import pyarrow

        with self._refusing():
            schema = self._schema()
        metadata = {key: value for key, value in (schema.metadata or {}).items() if key == METADATA}
        return pyarrow.schema([pyarrow.field(f.name, plain(f.type)) for f in schema], metadata=metadata)

    def tables(self, columns: list[str]) -> Iterator[pyarrow.Table]:
        """Yield batches of `columns`, in this order. Raises Failure if the file cannot be read."""
        import pyarrow

        types = pyarrow.schema([self.schema.field(name) for name in columns])
        with self._refusing():
            for batch in self._batches(columns):
                yield pyarrow.Table.from_batches([batch]).select(columns).cast(types)

    @abstractmethod
    def _schema(self) -> pyarrow.Schema:
        """Return all columns, in the types of the file."""

    @abstractmethod
    def _batches(self, columns: list[str]) -> Iterator[pyarrow.RecordBatch]:
        """Yield the rows, with these columns at least."""

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Convert an error of pyarrow about the file's content into a Failure. Raises Failure."""
        import pyarrow

        try:
            yield
        except (OSError, pyarrow.ArrowException) as error:
            if os_error(error, STORAGE_ERRNOS | FORBIDDEN_ERRNOS):
                raise  # an error of the volume or its permissions, not of the data
            text = " ".join(str(error).split())[:300]
            raise Failure(
                ExitCode.INVALID_DATASET, f"{self.field}: {self.path} cannot be read as {self.format}: {text}"
            ) from error


class ParquetFile(ColumnarFile):
    """One Parquet file."""

    format = "parquet"

    def _schema(self) -> pyarrow.Schema:
        import pyarrow.parquet

        return pyarrow.parquet.read_schema(self.path)

    def _batches(self, columns: list[str]) -> Iterator[pyarrow.RecordBatch]:
        import pyarrow.parquet

        return pyarrow.parquet.ParquetFile(self.path).iter_batches(AT_ONCE, columns=columns)


class ArrowFile(ColumnarFile):
    """One Arrow file: a stream, as `datasets` writes it, or a file with a footer (Feather)."""

    format = "arrow"

    def _schema(self) -> pyarrow.Schema:
        with self._open() as reader:
            return reader.schema

    def _batches(self, columns: list[str]) -> Iterator[pyarrow.RecordBatch]:
        import pyarrow

        with self._open() as reader:
            if isinstance(reader, pyarrow.ipc.RecordBatchFileReader):
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                batches = iter(reader)
            for batch in batches:
                chosen = batch.select(columns)
                yield from (chosen.slice(start, AT_ONCE) for start in range(0, len(chosen), AT_ONCE))

    @contextmanager
    def _open(self) -> Iterator[pyarrow.RecordBatchStreamReader | pyarrow.RecordBatchFileReader]:
        """Open the file, mapped into memory."""
        import pyarrow

        with pyarrow.memory_map(str(self.path)) as file:
            has_footer = file.read(len(MAGIC)) == MAGIC
            file.seek(0)
            yield pyarrow.ipc.open_file(file) if has_footer else pyarrow.ipc.open_stream(file)


def plain(kind: pyarrow.DataType) -> pyarrow.DataType:
    """Return the type that holds the same values, without views and dictionaries, also inside lists and structs."""
    import pyarrow
    from pyarrow import types

    if types.is_dictionary(kind):
        return plain(kind.value_type)
    if types.is_string_view(kind):
        return pyarrow.large_string()
    if types.is_binary_view(kind):
        return pyarrow.large_binary()
    if types.is_struct(kind):
        return pyarrow.struct([pyarrow.field(f.name, plain(f.type)) for f in kind])
    if types.is_large_list(kind):
        return pyarrow.large_list(plain(kind.value_type))
    return pyarrow.list_(plain(kind.value_type)) if types.is_list(kind) else kind
