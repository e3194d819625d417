"""Archives of WebDataset: an image and what is said of it as JSON, which share a name.

An archive can only hold samples with the same files. So outputs that could not be made are lines of a file beside.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from luthier_trainer.generation.exports.base import Outputs
from luthier_trainer.generation.exports.parts import FILE_NAME, Item, counts_of, fitted, named_parts
from luthier_trainer.generation.kinds import Kind

FAILED = "failed.jsonl"


def write(outputs: Outputs, folder: Path) -> None:
    """Write the images in their order, and the records of errors, if there are any."""
    for name, items in named_parts(made(outputs), counts_of(made(outputs)), "tar"):
        write_file(folder / name, items, outputs.kind)
    failed = (line for line, file in outputs if file is None)
    first = next(failed, None)
    if first is not None:
        with (folder / FAILED).open("w", encoding="utf-8") as file:
            for line in (first, *failed):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def made(outputs: Outputs) -> Iterator[Item]:
    """Yield the outputs that have an image."""
    return ((line, file) for line, file in outputs if file is not None)


def write_file(path: Path, items: Iterable[Item], kind: Kind) -> None:
    """Write an archive. Its entries have no time and no owner, so that the same outputs give the same bytes."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for line, file in items:
            assert file is not None, "only images are written"
            about = {name: value for name, value in fitted(line, kind).items() if name != FILE_NAME}
            add(archive, f"{file.stem}{file.suffix}", file.read_bytes())
            add(archive, f"{file.stem}.json", json.dumps(about, ensure_ascii=False).encode())


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add an entry to an archive."""
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))
