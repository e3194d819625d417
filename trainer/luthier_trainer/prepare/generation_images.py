"""Reads the images of the rows of a GenerateJob: those that a dataset holds, or files that a row names by their paths.

Each is decoded once here, so that one that cannot be used is the error of its row before a GPU is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from luthier_api.run import GenerateRun
from luthier_api.tasks import GENERATION_TASKS
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.data import columns
from luthier_trainer.data.load import Rows
from luthier_trainer.generation.pictures import Pictures
from luthier_trainer.generation.rows import Line
from luthier_trainer.runtime.classify import FORBIDDEN_ERRNOS, STORAGE_ERRNOS, os_error
from luthier_trainer.runtime.notices import notice
from luthier_trainer.tasks.images import problem

INIT_IMAGE = "initImage"
SHAPE = 0.01  # by which the ratio of the sides may change: sizes are multiples of 8


class BadImage(ValueError):
    """Why an image cannot be used."""


def encoded(rows: Rows, roles: Mapping[str, str]) -> Rows:
    """Return rows whose images in the columns of `roles` are files, and not decoded."""
    from datasets import Image

    data = rows.data
    for column in roles.values():
        if column in data.column_names and isinstance(data.features[column], Image):
            data = data.cast_column(column, Image(decode=False))
    return replace(rows, data=data)


def reader(rows: Rows, run: GenerateRun, column: str, field: str, optional: bool) -> Callable[[Any], str | None]:
    """Return the function that stores the image of a cell and returns its SHA-256; it raises BadImage.

    `optional`: whether there need not be one, so that the function returns None for an empty cell.

    Raises Failure if the column holds neither images nor paths.
    """
    from datasets import Image

    columns.require(rows, column, field)
    feature = rows.data.features[column]
    if column in rows.mixed or not (isinstance(feature, Image) or columns.is_text(feature)):
        hint = f"columns of images: {', '.join(rows.images)}" if rows.images else "no column holds images"
        raise columns.invalid(
            f'{field}: column "{column}" of {rows.origin} holds {getattr(feature, "dtype", feature)}, and neither'
            f" images nor their paths ({hint})"
        )
    beside = {part.path.parent for part in rows.parts}
    folder = beside.pop() if len(beside) == 1 else None
    pictures = Pictures(WorkspaceFolder(Path(run.workspace)))
    return lambda cell: None if optional and not cell else kept(cell, pictures, folder)


def kept(cell: Any, pictures: Pictures, folder: Path | None) -> str:
    """Store the image of a cell, and return its SHA-256.

    `cell`: a path, or what `datasets` stores of an image. `folder`: what paths are relative to; None: to nothing.
    Raises BadImage if it cannot be used.
    """
    if not cell:
        raise BadImage("there is none")
    name, content = (cell, None) if isinstance(cell, str) else (cell["path"], cell["bytes"])
    if content is None:
        content = read(name, folder)
    if unusable := problem({"path": name, "bytes": content}):
        raise BadImage(unusable)
    return pictures.keep(content)


def read(name: str, folder: Path | None) -> bytes:
    """Return the content of a file. Raises BadImage if there is none."""
    path = Path(name)
    if not path.is_absolute():
        if folder is None:
            raise BadImage(f"{name}: is no path from / on; write the whole path inside the pods")
        path = folder / path
    try:
        return path.read_bytes()
    except OSError as error:
        if os_error(error, STORAGE_ERRNOS | FORBIDDEN_ERRNOS):
            raise  # an error of the volume or its permissions, not of the row
        raise BadImage(f"{name}: {error.strerror}") from None


def name_of(cell: Any) -> str | None:
    """Return the name of an image, as the data have it."""
    if isinstance(cell, str):
        return cell or None
    return cell["path"] if cell else None


def report_distorted(run: GenerateRun, rows: Iterable[Line]) -> None:
    """Give a notice if images get another shape: they are scaled to the size of their outputs, and not cut."""
    task, pictures = GENERATION_TASKS[run.spec.task], Pictures(WorkspaceFolder(Path(run.workspace)))
    if INIT_IMAGE not in task.columns:
        return
    found, first = 0, ""
    for line in rows:
        if "error" in line:
            continue
        own = (line.get("settings") or {}).get
        width, height = own("width", run.spec.image.width), own("height", run.spec.image.height)
        before = pictures.size(line[INIT_IMAGE])
        if abs(before[0] * height - before[1] * width) > max(before) * SHAPE * max(width, height):
            found += 1
            first = first or f"row {line['row']}, {before[0]} × {before[1]} becomes {width} × {height}"
    if found:
        notice(
            f"spec.image.width: {found} images change their shape, because they are scaled to the size of their"
            f" outputs (first: {first}). Cut them before, or set width and height in their overrides"
        )
