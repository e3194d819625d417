"""Reads the images and the audio of the rows of a GenerateJob: files that a dataset holds, or that rows name by paths.

Each is decoded once here, so that one that cannot be used is the error of its row before a GPU is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from luthier_api.run import GenerateRun
from luthier_api.tasks import AUDIO, GENERATION_TASKS, IMAGES
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.data import audio, columns
from luthier_trainer.data.load import Rows
from luthier_trainer.generation.pictures import InputFiles, Pictures, Recordings
from luthier_trainer.generation.rows import Line
from luthier_trainer.runtime.classify import FORBIDDEN_ERRNOS, STORAGE_ERRNOS, os_error
from luthier_trainer.runtime.notices import notice
from luthier_trainer.tasks import images
from luthier_trainer.tasks.audio import holds_audio

INIT_IMAGE = "initImage"
SHAPE = 0.01  # by which the ratio of the sides may change: sizes are multiples of 8


class BadFile(ValueError):
    """Why a file cannot be used."""


@dataclass(frozen=True)
class FileKind:
    """What the files of a role are."""

    plural: str
    """As messages call them."""
    feature: str
    """Name of the feature of `datasets` for them."""
    holds: Callable[[Any], bool]
    """Whether a column with such a feature can hold them, or paths of them."""
    problem: Callable[[str | None, bytes], str | None]
    """(name, content) → why a file cannot be used; None if it can."""
    files: type[InputFiles]
    """Where they are stored."""


def holds_images(feature: Any) -> bool:
    """Return whether a column can hold images, or paths of them."""
    return type(feature).__name__ == "Image" or columns.is_text(feature)


def problem_of_image(name: str | None, content: bytes) -> str | None:
    """Return why an image cannot be used; None if it can."""
    return images.problem({"path": name, "bytes": content})


def problem_of_audio(name: str | None, content: bytes) -> str | None:
    """Return why audio cannot be used; None if it can."""
    try:
        audio.check(content)
    except audio.BadAudio as error:
        return f"{name}: {error}" if name else str(error)
    return None


KINDS: Mapping[str, FileKind] = {
    **dict.fromkeys(IMAGES, FileKind("images", "Image", holds_images, problem_of_image, Pictures)),
    **dict.fromkeys(AUDIO, FileKind("audio files", "Audio", holds_audio, problem_of_audio, Recordings)),
}
"""Role → what its files are, of the roles whose cells are files."""


def encoded(rows: Rows, roles: Mapping[str, str]) -> Rows:
    """Return rows whose images and audio in the columns of `roles` are files, and not decoded."""
    data = rows.data
    for role, column in roles.items():
        feature = data.features.get(column)
        if type(feature).__name__ == KINDS[role].feature:
            data = data.cast_column(column, type(feature)(decode=False))
    return replace(rows, data=data)


def reader(
    rows: Rows, run: GenerateRun, role: str, column: str, field: str, optional: bool
) -> Callable[[Any], str | None]:
    """Return the function that stores the file of a cell and returns its SHA-256; it raises BadFile.

    `optional`: whether there need not be one, so that the function returns None for an empty cell.

    Raises Failure if the column holds neither such files nor paths.
    """
    columns.require(rows, column, field)
    feature, kind = rows.data.features[column], KINDS[role]
    if column in rows.mixed or not kind.holds(feature):
        there = rows.images if role in IMAGES else ()
        hint = f"columns of {kind.plural}: {', '.join(there)}" if there else f"no column holds {kind.plural}"
        raise columns.invalid(
            f'{field}: column "{column}" of {rows.origin} holds {getattr(feature, "dtype", feature)}, and neither'
            f" {kind.plural} nor their paths ({hint})"
        )
    beside = {part.path.parent for part in rows.parts}
    folder = beside.pop() if len(beside) == 1 else None
    return lambda cell: None if optional and not cell else kept(role, cell, run, folder)


def kept(role: str, cell: Any, run: GenerateRun, folder: Path | None) -> str:
    """Store the file of a cell, and return its SHA-256.

    `cell`: a path, the file itself, or both as `datasets` stores them. `folder`: what paths are relative to; None: to
    nothing. Raises BadFile if the file cannot be used.
    """
    kind, name = KINDS[role], name_of(cell)
    content = cell["bytes"] if isinstance(cell, dict) else cell
    if not isinstance(content, bytes):
        if name is None:
            raise BadFile("there is none")
        content = read(name, folder)
    if unusable := kind.problem(name, content):
        raise BadFile(unusable)
    return kind.files(WorkspaceFolder(Path(run.workspace))).keep(content)


def read(name: str, folder: Path | None) -> bytes:
    """Return the content of a file. Raises BadFile if there is none."""
    path = Path(name)
    if not path.is_absolute():
        if folder is None:
            raise BadFile(f"{name}: is no path from / on; write the whole path inside the pods")
        path = folder / path
    try:
        return path.read_bytes()
    except OSError as error:
        if os_error(error, STORAGE_ERRNOS | FORBIDDEN_ERRNOS):
            raise  # an error of the volume or its permissions, not of the row
        raise BadFile(f"{name}: {error.strerror}") from None


def name_of(cell: Any) -> str | None:
    """Return the name of a file, as the data have it."""
    if isinstance(cell, dict):
        cell = cell["path"]
    return cell if isinstance(cell, str) and cell else None


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
