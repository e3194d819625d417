"""Finds the files of a dataset on the Hub (CSV, JSON, text, WebDataset): which a split has, and how they are written.

They are read in the same way as files of a volume (`filerows`), so that the same bytes give the same rows. `datasets`
finds the files, by the dataset's card and the names in the repository. It also reads the datasets that need other
settings, and all other formats.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_api.spec import Csv
from luthier_trainer.data.csvrows import SEPARATORS
from luthier_trainer.data.filerows import Table
from luthier_trainer.data.files import FORMAT_OF_SUFFIX, READ_AS, suffix_of
from luthier_trainer.runtime.failure import Failure

if TYPE_CHECKING:
    from datasets import DatasetBuilder, Features

READ_HERE = {"csv", "json", "text", "webdataset"}  # formats that `filerows` reads
# Settings of a builder that are applied by `filerows`, or that do not change the rows. If any other setting is used,
# `datasets` reads the files.
HANDLED = {
    "name",
    "version",
    "data_dir",
    "data_files",
    "description",
    "features",
    "sep",
    "delimiter",
    "quoting",
    "encoding",
    "chunksize",
    "block_size",
    "use_threads",
}
QUOTING = {0: None, 3: "none"}  # value of csv.QUOTE_MINIMAL and csv.QUOTE_NONE → quoting in the spec


@dataclass(frozen=True)
class HubFiles:
    """The files of a dataset at a commit."""

    kind: str
    splits: dict[str, list[str]]
    """Split → paths in the repository."""
    csv: Csv
    encoding: str | None
    features: Features | None
    """The types that the card gives to columns."""

    def typed(self, table: Table, field: str) -> Table:
        """Return the rows with the types that the card names. Raises Failure if values do not have these types."""
        from datasets import Features

        if self.features is None:
            return table
        types = {
            name: feature
            for name, feature in self.features.items()
            if name in table.data.column_names and name not in table.mixed
        }
        kept = {name: feature for name, feature in table.data.features.items() if name not in types}
        try:
            data = table.data.cast(Features({name: types.get(name) or kept[name] for name in table.data.column_names}))
        except Exception as error:  # each type fails in its own way
            text = " ".join(str(error).split())[:300]
            raise Failure(
                ExitCode.INVALID_DATASET,
                f"{field}: the rows do not have the types that the dataset's card names: {text}",
            ) from error
        return dataclasses.replace(table, data=data)


def plain_files(builder: DatasetBuilder, repository: str, formats: Collection[str] = READ_HERE) -> HubFiles | None:
    """Return the files of the dataset if they can be read by `filerows`; None if `datasets` must read them.

    `repository` is the name of the dataset, such as OWNER/NAME. `formats` are those that are read here.
    """
    config: Any = builder.config
    kind = type(builder).__module__.rpartition(".")[2]
    if (
        not type(builder).__module__.startswith("datasets.packaged_modules.")
        or kind not in formats
        or not config.data_files
    ):
        return None
    usual = type(config)()
    if any(
        getattr(config, f.name) != getattr(usual, f.name) for f in dataclasses.fields(config) if f.name not in HANDLED
    ):
        return None
    separator = next((name for name, character in SEPARATORS.items() if character == getattr(config, "sep", ",")), None)
    if separator is None or getattr(config, "quoting", 0) not in QUOTING:
        return None
    splits = {str(split): [_path(file, repository) for file in files] for split, files in config.data_files.items()}
    if any(
        READ_AS.get(FORMAT_OF_SUFFIX.get(suffix_of(PurePosixPath(path)), "")) != kind
        for paths in splits.values()
        for path in paths
    ):
        return None
    encoding = getattr(config, "encoding", None)
    csv = Csv.model_validate({"separator": separator, "quoting": QUOTING[getattr(config, "quoting", 0)]})
    return HubFiles(
        kind, splits, csv, encoding if encoding != getattr(usual, "encoding", None) else None, builder.info.features
    )


def _path(file: str, repository: str) -> str:
    """Return PATH of hf://datasets/OWNER/NAME@COMMIT/PATH.

    Returns an empty string if it is not a file of this repository, or is inside an archive.
    """
    prefix = f"hf://datasets/{repository}@"
    if "::" in file or not file.startswith(prefix):
        return ""
    return file[len(prefix) :].partition("/")[2]
