"""How the outputs of an engine are kept: as a text in their line, or as a file beside it.

Each engine chooses a form and names the keys of its lines; the ledger knows nothing else of a task.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from luthier_trainer.generation.samples import Output
from luthier_trainer.workspace.manifest import replace_file, sha256

Line = dict[str, Any]

# Rows, and samples of each row, whose files share a folder: the Hub wants fewer than 10,000 files in one.
FOLDER_ROWS, FOLDER_SAMPLES = 1000, 8
# Threads that read files at once: hashlib releases the interpreter's lock, and a network volume answers many requests
# as fast as one.
THREADS = 8


class RecordForm(Protocol):
    """The form in which the outputs of one engine are kept. `folder` is always the shard's own folder of files."""

    @property
    def keys(self) -> tuple[str, ...]:
        """What each line has, null where a sample has none: readers take the keys of the first lines for all."""

    def table(self, shard: str) -> str:
        """Where the lines of a shard stand in `result/`."""

    def write(self, output: Output, folder: Path) -> Line:
        """The fields of a line that describe a good output. A file is durable on return, but not its folder's entry."""

    def file(self, line: Line) -> str | None:
        """The file of a line, relative to `folder`; None if it has none."""

    def damages(self, lines: Iterable[Line], folder: Path) -> Iterator[str | None]:
        """For each line why its output cannot be used; None when it is there, as it was written."""


@dataclass(frozen=True)
class TextRecords:
    """Each output is a text in its line; the lines of a shard are one JSON Lines file."""

    keys: tuple[str, ...]

    def table(self, shard: str) -> str:
        return f"{shard}.jsonl"

    def write(self, output: Output, folder: Path) -> Line:
        text = output.text or ""
        return {"text": text, "sha256": digest(text.encode())}

    def file(self, line: Line) -> str | None:
        return None

    def damages(self, lines: Iterable[Line], folder: Path) -> Iterator[str | None]:
        for line in lines:
            whole = line["error"] is not None or digest(str(line["text"]).encode()) == line["sha256"]
            yield None if whole else "its text is damaged"


@dataclass(frozen=True)
class ImageRecords:
    """Each output is an image beside its line, whose `file_name` is relative to the lines, as `datasets` wants it."""

    keys: tuple[str, ...]

    def table(self, shard: str) -> str:
        return f"{shard}/metadata.jsonl"

    def write(self, output: Output, folder: Path) -> Line:
        image = output.file or b""
        row, index = output.sample.key
        name = f"{image_folder(row, index)}/{row:06d}-{index:02d}.{output.suffix}"
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, image)
        return {"file_name": name, "size": len(image), "sha256": digest(image)}

    def file(self, line: Line) -> str | None:
        name: str | None = line["file_name"]
        return name

    def damages(self, lines: Iterable[Line], folder: Path) -> Iterator[str | None]:
        with ThreadPoolExecutor(THREADS) as threads:
            yield from threads.map(lambda line: self._damage(line, folder), lines)

    def _damage(self, line: Line, folder: Path) -> str | None:
        if line["error"] is not None:
            return None
        path = folder / (line["file_name"] or "")
        try:
            if path.stat().st_size == line["size"] and sha256(path) == line["sha256"]:
                return None
        except FileNotFoundError:
            return "its image is gone"
        return "its image is damaged"


def image_folder(row: int, index: int) -> str:
    """Where the image `index` of a row lies in the folder of its shard."""
    more = f"-{index // FOLDER_SAMPLES:03d}" if index >= FOLDER_SAMPLES else ""
    return f"images/{row // FOLDER_ROWS:04d}{more}"


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
