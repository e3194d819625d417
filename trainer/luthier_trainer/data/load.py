"""Loads rows from files or from the Hub, by split. The content of the columns is checked in `columns`.

Text files have one row a line, without empty lines. With packing, text must be read as it was written: then each line
keeps its line break, empty lines stay, and a column `ends` marks the last line of each file.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from luthier_api.exitcodes import ExitCode
from luthier_api.run import Origin
from luthier_api.spec import Csv, DatasetSource
from luthier_api.stores import Store
from luthier_trainer.data import remote
from luthier_trainer.data.decoding import Decoder
from luthier_trainer.data.filerows import TEXT_TYPES, Files, Part, Table, holds_objects
from luthier_trainer.data.files import READ_AS, TEXTUAL, ImageFolder, find_files, format_of, image_folder
from luthier_trainer.data.hubrows import plain_files
from luthier_trainer.data.stores import Fetched, fetched, is_in_a_store
from luthier_trainer.models.hub import hub_api, patiently
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice
from luthier_trainer.workspace import provenance

if TYPE_CHECKING:
    import numpy
    from datasets import Dataset

    from luthier_trainer.data.forms import Form

FILES_SPLIT = "train"
FILE_NAME = "file_name"  # the column of metadata that names an image, as in `datasets`
UNKNOWN_SPLIT = re.compile(r"Unknown split .*?one of \[(.*?)\]")  # an error message of `datasets`


@dataclass(frozen=True)
class Rows:
    """Rows, and where they come from, for messages."""

    data: Dataset
    origin: str
    revision: str | None = None
    documents: bool = False
    """Whether the rows are lines of text files, with line breaks and the column `ends`."""
    origins: tuple[Origin, ...] = ()
    """The files, if the rows do not come from the Hub."""
    parts: tuple[Part, ...] = ()
    """The rows of each file before any were left out, if known."""
    numbers: numpy.ndarray | None = None
    """int64 of shape (rows,): the number that each row had before any were left out. None: they are 0, 1, 2, ..."""
    names: tuple[str, ...] = ()
    """All columns, including those that were not read."""
    texts: tuple[str, ...] = ()
    """Columns that hold text."""
    images: tuple[str, ...] = ()
    """Columns that hold images."""
    lists: tuple[str, ...] = ()
    """Columns that hold lists of objects, as far as the first rows show."""
    mixed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Column → what it holds, if it holds lists, objects, or values of several kinds. Its cells are JSON text."""
    rarest: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Column with values of several kinds → number of the first row of the rarest kind."""
    hint: str = ""
    """What to do if a column is missing, if the files give a hint."""

    form: Form | None = None
    """How the task reads the rows, if it knows several forms."""

    @classmethod
    def of(cls, table: Table, origin: str) -> Rows:
        """Return the rows of a table."""
        return cls(
            table.data,
            origin,
            parts=table.parts,
            names=table.names,
            texts=table.texts,
            images=table.images,
            lists=table.lists,
            mixed=table.mixed,
            rarest=table.rarest,
            hint=table.hint,
        )

    def select(self, indices: numpy.ndarray) -> Rows:
        """Return the rows at these positions, an int64 array."""
        numbers = indices if self.numbers is None else self.numbers[indices]
        return replace(self, data=self.data.select(indices), numbers=numbers)

    def file_of(self, index: int) -> Path | None:
        """Return the file that holds the row at a position; None if it is not known."""
        number = index if self.numbers is None else int(self.numbers[index])
        for part in self.parts:
            if number < part.rows:
                return part.path
            number -= part.rows
        return None

    def place(self, index: int) -> str:
        """Return how a message names the row at a position: row 8, counted from 0 (line 10 of train.csv)."""
        return self.place_of(index if self.numbers is None else int(self.numbers[index]))

    def place_of(self, number: int) -> str:
        """Return the same for the number that a row had before any rows were left out."""
        begin = 0
        for part in self.parts:
            if number < begin + part.rows:
                row = number - begin
                where = ""
                if part.line_of:
                    where = f"line {part.line_of(row)} of "
                elif part.key_of:
                    where = f'sample "{part.key_of(row)}" of '
                elif len(self.parts) > 1:
                    where = f"row {row} of "
                return f"row {number}, counted from 0 ({where}{part.path.name})"
            begin += part.rows
        return f"row {number}, counted from 0"


@dataclass(frozen=True)
class Loader:
    """Loads the rows that a dataset field of a spec names."""

    source: DatasetSource
    field: str
    """The path of the dataset in the spec, for messages."""
    cache: Path
    columns: tuple[str, ...] = ()
    """Columns that the job needs. If there are several files, each must have them."""
    others: bool = True
    """Whether the other columns are also read."""
    documents: bool = False
    """Whether text files keep their line breaks."""
    tables: dict[tuple[Path, ...], Table] = dataclasses.field(default_factory=dict)
    """Files → their rows. Slices of the same files are cut from the same rows."""
    stores: Sequence[Store] = ()
    """How addresses of object stores are read."""
    downloads: dict[str, list[Fetched]] = dataclasses.field(default_factory=dict)
    """Address → what was downloaded."""

    def split(self, instruction: str, field: str) -> Rows:
        """Return the rows of a split, or of slices of it (train[:80%]). Raises Failure if they cannot be read."""
        return (
            self._files(self.source.files, "files", instruction, field)
            if self.source.files
            else self._hub(instruction, field)
        )

    def files(self, files: list[str], field: str) -> Rows:
        """Return all rows of other files of the same format. Raises Failure if they cannot be read."""
        return self._files(files, field, FILES_SPLIT, field)

    def _files(self, files: list[str], name: str, instruction: str, field: str) -> Rows:
        """Return the rows that `instruction` names in `files`, which the field `name` of the dataset lists."""
        where = f"{self.field}.{name}"
        image_folders = self.source.format == "imagefolder"
        downloads = self._downloaded(files, where)
        addresses = {file.path: file.address for some in downloads.values() for file in some}
        paths = find_files(
            files, where, image_folders, {name: [file.path for file in some] for name, some in downloads.items()}
        )
        kind = self.source.format or format_of(paths, where)
        self.check_settings(kind, paths[0].name)
        origin = paths[0].name if len(paths) == 1 else f"{len(paths)} files ({paths[0].name}, ...)"
        table = (
            self._images(paths, where)
            if image_folders
            else self._read(kind, paths, where, self.source.csv or Csv(), self.source.encoding, self.documents)
        )
        rows = replace(
            Rows.of(table, origin),
            documents=self.documents and kind == "text",
            origins=tuple(_origin(path, where, addresses) for path in paths),
        )
        return cut(rows, instruction, [FILES_SPLIT], f"{self.field}.{field}")

    def _downloaded(self, files: list[str], where: str) -> dict[str, list[Fetched]]:
        """Return each of `files` that is an address → what was downloaded. Raises Failure."""
        for i, name in enumerate(files):
            if not remote.is_remote(name) or name in self.downloads:
                continue
            if self.source.format == "imagefolder":
                raise Failure(
                    ExitCode.INVALID_SPEC,
                    f"{where}: folders of images are read from volumes only, and not from addresses",
                )
            field = f"{where}[{i}]"
            if is_in_a_store(name):
                self.downloads[name] = fetched(name, field, self.cache, self.stores)
            else:
                path = remote.downloaded(name, self.cache, field)
                self.downloads[name] = [Fetched(path, remote.without_query(name))]
        return {name: self.downloads[name] for name in files if name in self.downloads}

    def check_settings(self, kind: str, name: str) -> None:
        """Raise Failure if the spec has settings for another format than `kind`, which `name` is read as."""
        if self.source.csv is not None and kind != "csv":
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{self.field}.csv: belongs to files of the format csv, and {name} is read as {kind}. Remove csv",
            )
        if self.source.encoding is not None and kind not in TEXTUAL:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{self.field}.encoding: {kind} is no format of text, and has no encoding. Remove encoding",
            )

    def _read(
        self, kind: str, paths: list[Path], where: str, csv: Csv, encoding: str | None, documents: bool = False
    ) -> Table:
        """Return the rows of files, which are read only once."""
        key = tuple(paths)
        if key not in self.tables:
            files = Files(
                paths, Decoder(encoding, self.field, where), csv, self.columns, self.others, self.cache / "rows"
            )
            self.tables[key] = files.read(READ_AS[kind], documents)
        return self.tables[key]

    def _images(self, paths: list[Path], where: str) -> Table:
        """Return the rows of folders of images: columns `image` and `label`, or those of the metadata.

        The folders are not read by `datasets`, because it has its own rules for which folders are classes, and does not
        report which files it leaves out.
        """
        from datasets import Dataset, Features, Image, Value

        folders = [image_folder(path, where) for path in paths]
        if any(folder.tables for folder in folders):
            return self._described(folders, where)
        images = [image for folder in folders for image in folder.images]
        columns = {
            "image": [str(image.absolute()) for image in images],
            "label": [name for folder in folders for name in folder.classes(where)],
        }
        return _as_table(Dataset.from_dict(columns, features=Features({"image": Image(), "label": Value("string")})))

    def _described(self, folders: list[ImageFolder], where: str) -> Table:
        """Return the rows of tables beside images, with a column `image` in place of `file_name`.

        Raises Failure if the column `file_name` is missing, or names an image that does not exist.
        """
        from datasets import Image

        tables = [path for folder in folders for path in folder.tables]
        images = {os.path.normpath(image): image for folder in folders for image in folder.images}
        needed = (FILE_NAME, *(column for column in self.columns if column != "image"))
        files = Files(tables, Decoder(None, self.field, where), Csv(), needed, self.others, self.cache / "rows")
        table = files.read(format_of(tables, where), False)
        rows = Rows(table.data, f"{len(tables)} tables" if len(tables) > 1 else tables[0].name, parts=table.parts)
        if FILE_NAME not in table.names or FILE_NAME not in table.texts or FILE_NAME in table.mixed:
            raise Failure(
                ExitCode.INVALID_DATASET,
                f'{where}: {rows.origin} has no column "{FILE_NAME}" of text, which names the image of a row (columns:'
                f" {', '.join(table.names)})",
            )
        found: list[str] = []
        for part in table.parts:
            for name in table.data[len(found) : len(found) + part.rows][FILE_NAME]:
                path = os.path.normpath(part.path.parent / (name or ""))
                if path not in images:
                    what = f'{part.path.parent} has no image "{name}"' if name else "no image is named"
                    raise Failure(
                        ExitCode.INVALID_DATASET,
                        f"{where}: {rows.place(len(found))}: {what}. Correct {FILE_NAME}, or add the image",
                    )
                found.append(str(images[path].absolute()))
        if without := len(images) - len({*found}):
            notice(f"{where}: {without} images are in no row of the metadata, and are left out")
        data = table.data.remove_columns("image") if "image" in table.data.column_names else table.data
        # A table without columns has no rows, so `image` is added before `file_name` is removed.
        data = data.add_column("image", found).remove_columns(FILE_NAME).cast_column("image", Image())
        names = ("image", *(name for name in table.names if name not in (FILE_NAME, "image")))
        texts = tuple(name for name in table.texts if name in names and name != "image")
        return replace(table, data=data, names=names, texts=texts, images=("image",))

    def _hub(self, instruction: str, field: str) -> Rows:
        """Return the rows that `instruction` names in a dataset on the Hub."""
        name, api = str(self.source.id), hub_api()
        what = f"dataset {name}"
        info = patiently(lambda: api.dataset_info(name, revision=self.source.revision), f"{self.field}.id", what)
        base = instruction.partition("[")[0]
        table = patiently(lambda: self._hub_table(name, info.sha, base, field), f"{self.field}.id", what)
        rows = replace(Rows.of(table, f"{name}, split {base}"), revision=info.sha)
        return cut(rows, instruction, [base], f"{self.field}.{field}", name)

    def _hub_table(self, name: str, commit: str, split: str, field: str) -> Table:
        """Return a whole split. CSV, JSON and text files and archives are read by `filerows`, all others by `datasets`.

        Raises Failure if there is no such split, or if its files do not fit each other.
        """
        from datasets import DownloadConfig, load_dataset_builder

        token = hub_api().token or None
        download = DownloadConfig(cache_dir=self.cache / "downloads", token=token, max_retries=1)
        try:
            builder = load_dataset_builder(
                name,
                self.source.name,
                revision=commit,
                cache_dir=str(self.cache),
                token=token,
                download_config=download,
            )
            files = plain_files(builder, name)
            if files is None:
                self.check_settings(type(builder).__module__.rpartition(".")[2], name)
                builder.download_and_prepare(download_config=download)
                return _as_table(builder.as_dataset(split=split))
        except ValueError as error:
            raise self._unfit(error, split, field) from error
        self.check_settings(files.kind, name)
        if split not in files.splits:
            raise no_split(split, list(files.splits), f"{self.field}.{field}")
        paths = [
            Path(
                hub_api().hf_hub_download(
                    name, path, repo_type="dataset", revision=commit, cache_dir=self.cache / "hub"
                )
            )
            for path in files.splits[split]
        ]
        csv = (
            files.csv
            if self.source.csv is None
            else files.csv.model_copy(update=self.source.csv.model_dump(exclude_none=True))
        )
        table = self._read(files.kind, paths, f"{self.field}.id", csv, self.source.encoding or files.encoding)
        return files.typed(table, f"{self.field}.id")

    def _unfit(self, error: ValueError, split: str, field: str) -> Failure:
        """Return the Failure for an error of `datasets`: an unknown split or configuration, or unreadable files."""
        text = " ".join(str(error).split())
        if unknown := UNKNOWN_SPLIT.search(text):
            return no_split(split, re.findall(r"\w+", unknown[1]), f"{self.field}.{field}")
        if "BuilderConfig" in text or "Config name is missing" in text:
            return Failure(ExitCode.INVALID_SPEC, f"{self.field}.name: {text[:1500]}")
        return Failure(
            ExitCode.INVALID_DATASET, f"{self.field}.id: {self.source.id} cannot be read: {first_cause(error)}"
        )


def _origin(path: Path, where: str, addresses: Mapping[Path, str]) -> Origin:
    """Return the provenance of a data file; of a downloaded one, with its address."""
    return provenance.of_data(path, where).model_copy(update={"path": addresses.get(path, str(path))})


def cut(rows: Rows, instruction: str, splits: list[str], field: str, origin: str | None = None) -> Rows:
    """Return the rows that `instruction` names, for example train[:80%] or train[:10]+train[50:].

    Raises Failure if these are no rows.
    """
    import numpy

    if not len(rows.data):
        raise Failure(ExitCode.INVALID_DATASET, f"{field.rpartition('.')[0]}: {origin or rows.origin} has no rows")
    found = ranges(rows.data, instruction, splits, field)
    if found == [(0, len(rows.data))] and len(rows.data):
        return rows
    indices = numpy.concatenate([numpy.arange(start, end, dtype=numpy.int64) for start, end in found])
    if not len(indices):
        raise Failure(
            ExitCode.INVALID_DATASET,
            f"{field}: {instruction} of {origin or rows.origin} is empty: it has {len(rows.data)} rows",
        )
    return rows.select(indices)


def ranges(data: Dataset, instruction: str, splits: list[str], field: str) -> list[tuple[int, int]]:
    """Return the row numbers (from, to) that `instruction` names in a split of `data`; `to` is not included.

    Raises Failure if it is not an instruction, or names a split that does not exist.
    """
    from datasets import ReadInstruction

    try:
        parsed = ReadInstruction.from_spec(instruction).to_absolute({split: len(data) for split in splits})
    except ValueError as error:
        if UNKNOWN_SPLIT.search(str(error)):
            raise no_split(instruction.partition("[")[0], splits, field) from None
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: {instruction!r} is not a split; write train, train[:80%] or train[100:200]",
        ) from None
    return [(p.from_ or 0, len(data) if p.to is None else p.to) for p in parsed]


def no_split(split: str, splits: list[str], field: str) -> Failure:
    """Return the Failure for a split that does not exist."""
    return Failure(
        ExitCode.INVALID_SPEC, f"{field}: there is no split {split!r}; the splits are: {', '.join(sorted(splits))}"
    )


def _as_table(data: Dataset) -> Table:
    """Return rows that `datasets` has read as a Table, without the files that they come from."""
    from datasets import Image

    names = tuple(data.column_names)
    texts = tuple(name for name in names if getattr(data.features[name], "dtype", None) in TEXT_TYPES)
    images = tuple(name for name in names if isinstance(data.features[name], Image))
    lists = tuple(name for name in names if holds_objects(data.features[name]))
    return Table(data, (), names, texts, images, lists)


def first_cause(error: BaseException) -> str:
    """Return the message of the first error in a chain of causes, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__
