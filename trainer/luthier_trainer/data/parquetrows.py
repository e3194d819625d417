"""Reads columns of Parquet files.

Types that `datasets` does not support (string_view, dictionaries) are converted into types that hold the same values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from luthier_api.exitcodes import ExitCode
from luthier_trainer.runtime.classify import FORBIDDEN_ERRNOS, STORAGE_ERRNOS, os_error
from luthier_trainer.runtime.failure import Failure

if TYPE_CHECKING:
    import pyarrow

AT_ONCE = 1000  # rows of a batch, as in `datasets`
METADATA = b"huggingface"  # under this key, `datasets` stores which columns are images, and the names of classes


@dataclass(frozen=True)
class ParquetFile:
    """One Parquet file. `field` is the path in the spec, for messages."""

    path: Path
    field: str

    @cached_property
    def schema(self) -> pyarrow.Schema:
        """Return all columns, in types that `datasets` supports. Raises Failure if the file cannot be read."""
        import pyarrow
        import pyarrow.parquet

        with self._refusing():
            schema = pyarrow.parquet.read_schema(self.path)
        metadata = {key: value for key, value in (schema.metadata or {}).items() if key == METADATA}
        return pyarrow.schema([pyarrow.field(f.name, plain(f.type)) for f in schema], metadata=metadata)

    def tables(self, columns: list[str]) -> Iterator[pyarrow.Table]:
        """Yield batches of `columns`, in this order. Raises Failure if the file cannot be read."""
        import pyarrow
        import pyarrow.parquet

        types = pyarrow.schema([self.schema.field(name) for name in columns])
        with self._refusing():
            for batch in pyarrow.parquet.ParquetFile(self.path).iter_batches(AT_ONCE, columns=columns):
                yield pyarrow.Table.from_batches([batch]).select(columns).cast(types)

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
                ExitCode.INVALID_DATASET, f"{self.field}: {self.path} cannot be read as parquet: {text}"
            ) from error


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
