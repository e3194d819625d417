"""Rows from files or from the Hub, by split. Which rows, from where; what is in them is for `columns`.

Text files: one row a line, empty lines dropped. With packing, text must read as it was written: then each line keeps its line break,
empty lines stay, and a column `ends` marks the last line of each file.
"""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_api.run import Origin
from luthier_api.spec import DatasetSource
from luthier_trainer import origins
from luthier_trainer.data.files import BUILDERS, find_files, format_of, image_folder, suffix_of
from luthier_trainer.ending import FORBIDDEN_ERRNOS, STORAGE_ERRNOS, Failure, os_error
from luthier_trainer.hub import hub_api, patiently

if TYPE_CHECKING:
    from datasets import Dataset

FILES_SPLIT = "train"
UNKNOWN_SPLIT = re.compile(r"Unknown split .*?one of \[(.*?)\]")  # what `datasets` says


@dataclass(frozen=True)
class Rows:
    """Rows, and how messages call the place they came from."""

    data: Dataset
    origin: str
    revision: str | None = None
    documents: bool = False
    """Lines of text files, with line breaks and the column `ends`."""
    origins: tuple[Origin, ...] = ()
    """The files, where they do not come from the Hub."""


@dataclass(frozen=True)
class Loader:
    """Reads what a dataset field of a spec names."""

    source: DatasetSource
    field: str
    """Path of the field, for messages."""
    cache: Path
    documents: bool = False
    """Text files keep their line breaks."""

    def split(self, instruction: str, field: str) -> Rows:
        """The rows of a split, or of slices of it (train[:80%])."""
        return self._files(self.source.files, "files", instruction, field) if self.source.files else self._hub(instruction, field)

    def files(self, files: list[str], field: str) -> Rows:
        """All rows of other files, of the same format."""
        return self._files(files, field, FILES_SPLIT, field)

    def _files(self, files: list[str], name: str, instruction: str, field: str) -> Rows:
        where = f"{self.field}.{name}"
        image_folders = self.source.format == "imagefolder"
        paths = find_files(files, where, folders=image_folders)
        kind = self.source.format or format_of(paths, where)
        origin = paths[0].name if len(paths) == 1 else f"{len(paths)} files ({paths[0].name}, ...)"
        data = self._images(paths, where) if image_folders else self._read(kind, paths, where)
        documents = self.documents and kind == "text"
        if kind == "text":
            data = lines(data) if documents else data.filter(_not_blank, batched=True)
        rows = cut(data, instruction, [FILES_SPLIT], f"{self.field}.{field}", origin)
        return Rows(rows, origin, documents=documents, origins=tuple(origins.of_data(p, where) for p in paths))

    def _images(self, paths: list[Path], where: str) -> Dataset:
        """Columns `image` and `label`: `datasets` has its own opinion of which folders count, and tells nobody. Or those of metadata."""
        from datasets import Dataset, Features, Image, Value

        folders = [image_folder(path, where) for path in paths]
        images = [image for folder in folders for image in folder.images]
        if any(folder.tables for folder in folders):
            data = self._read("imagefolder", paths, where)
            if len(data) < len(images):
                print(f"{where}: {len(images) - len(data)} images are in no row of the metadata, and are left out", flush=True)
            return data
        columns = {"image": [str(image.absolute()) for image in images], "label": [name for folder in folders for name in folder.classes(where)]}
        return Dataset.from_dict(columns, features=Features({"image": Image(), "label": Value("string")}))

    def _read(self, kind: str, paths: list[Path], where: str) -> Dataset:
        from datasets import load_dataset

        options: dict[str, Any] = {"split": FILES_SPLIT, "cache_dir": str(self.cache)}
        if kind == "csv":
            # An empty cell is empty and the text "NA" is a text: pandas would make both null.
            options |= {"keep_default_na": False, "sep": "\t" if suffix_of(paths[0]) == ".tsv" else ","}
        if kind == "text":
            options |= {"sample_by": "document" if self.documents else "line", "keep_linebreaks": self.documents}
        # `datasets` takes each name for a pattern.
        names = [glob.escape(str(p)) + ("/**" if kind == "imagefolder" else "") for p in paths]
        if empty := [p for p in paths if p.is_file() and p.stat().st_size == 0]:
            raise Failure(ExitCode.INVALID_DATASET, f"{where}: {empty[0]} is empty")
        try:
            return load_dataset(BUILDERS[kind], data_files={FILES_SPLIT: names}, **options)
        except Exception as error:
            if os_error(error, STORAGE_ERRNOS | FORBIDDEN_ERRNOS):
                raise  # the volume or its rights, not the data
            if len(paths) > 1:
                for path in paths:
                    self._read(kind, [path], where)  # names the one that is to blame
            raise Failure(ExitCode.INVALID_DATASET, f"{where}: {paths[0]} cannot be read as {kind}: {first_cause(error)}") from error

    def _hub(self, instruction: str, field: str) -> Rows:
        from datasets import DownloadConfig, load_dataset

        name, api = str(self.source.id), hub_api()
        what = f"dataset {name}"
        info = patiently(lambda: api.dataset_info(name, revision=self.source.revision), f"{self.field}.id", what)
        base = instruction.partition("[")[0]

        def load() -> Dataset:
            try:
                return load_dataset(
                    name, self.source.name, revision=info.sha, split=base, cache_dir=str(self.cache), token=api.token or None,
                    download_config=DownloadConfig(cache_dir=self.cache / "downloads", token=api.token or None, max_retries=1),
                )  # fmt: skip
            except ValueError as error:
                raise self._unfit(error, base, field) from error

        data = patiently(load, f"{self.field}.id", what)
        return Rows(cut(data, instruction, [base], f"{self.field}.{field}", name), f"{name}, split {base}", revision=info.sha)

    def _unfit(self, error: ValueError, split: str, field: str) -> Failure:
        text = " ".join(str(error).split())
        if unknown := UNKNOWN_SPLIT.search(text):
            return no_split(split, re.findall(r"\w+", unknown[1]), f"{self.field}.{field}")
        if "BuilderConfig" in text or "Config name is missing" in text:
            return Failure(ExitCode.INVALID_SPEC, f"{self.field}.name: {text[:1500]}")
        return Failure(ExitCode.INVALID_DATASET, f"{self.field}.id: {self.source.id} cannot be read: {first_cause(error)}")


def cut(data: Dataset, instruction: str, splits: list[str], field: str, origin: str) -> Dataset:
    """The rows that `instruction` names, for example train[:80%] or train[:10]+train[50:]. Never empty."""
    found = ranges(data, instruction, splits, field)
    whole = found == [(0, len(data))]
    rows = data if whole else data.select([i for start, end in found for i in range(start, end)])
    if len(rows) == 0:
        raise Failure(ExitCode.INVALID_DATASET, f"{field}: {instruction} of {origin} is empty: it has {len(data)} rows")
    return rows


def ranges(data: Dataset, instruction: str, splits: list[str], field: str) -> list[tuple[int, int]]:
    """Row numbers (from, to) that `instruction` names in a split of `data`."""
    from datasets import ReadInstruction

    try:
        parsed = ReadInstruction.from_spec(instruction).to_absolute({split: len(data) for split in splits})
    except ValueError as error:
        if UNKNOWN_SPLIT.search(str(error)):
            raise no_split(instruction.partition("[")[0], splits, field) from None
        raise Failure(ExitCode.INVALID_SPEC, f"{field}: {instruction!r} is not a split; write train, train[:80%] or train[100:200]") from None
    return [(p.from_ or 0, len(data) if p.to is None else p.to) for p in parsed]


def no_split(split: str, splits: list[str], field: str) -> Failure:
    return Failure(ExitCode.INVALID_SPEC, f"{field}: there is no split {split!r}; the splits are: {', '.join(sorted(splits))}")


def _not_blank(batch: dict[str, list[str]]) -> list[bool]:
    return [bool(text.strip()) for text in batch["text"]]


def lines(documents: Dataset) -> Dataset:
    """Whole files → their lines, with line breaks; `ends` is true on the last line of each file."""

    def explode(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        found = [line for text in batch["text"] for line in text.splitlines(keepends=True)]
        ends = [i == last for text in batch["text"] for last in [len(text.splitlines()) - 1] for i in range(last + 1)]
        return {"text": found, "ends": ends}

    return documents.map(explode, batched=True, batch_size=1, remove_columns=documents.column_names)


def first_cause(error: BaseException) -> str:
    """What went wrong at the bottom, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__
