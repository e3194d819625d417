"""The forms in which outputs are stored: as text in the lines of the ledger, or as files beside them.

Each engine chooses a form and the keys of its lines. The ledger depends on nothing else of a task.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from luthier_api.tasks import SEED, TASKS
from luthier_trainer.generation.samples import Output
from luthier_trainer.workspace.manifest import place_file, sha256

Line = dict[str, Any]

SCORE, UNSAFE = "unsafeScore", "unsafe"
"""Keys of images: the score of `image.safety`, and whether that is at least the threshold. Null if there is none."""

# Number of rows, and of samples per row, whose files share a folder: the Hub wants fewer than 10,000 files in each.
FOLDER_ROWS, FOLDER_SAMPLES = 1000, 8
# Threads that read files in parallel: hashlib releases the GIL, and a network volume answers many requests as fast as
# one.
THREADS = 8


def line_keys(*own: str) -> tuple[str, ...]:
    """Return the keys of every line of an engine. `own`: those of its roles and of its outputs.

    `run` names the settings and the environment of the output, which the manifest of the shard holds once.
    """
    return ("row", "sample", "id", *own, "error", "seed", "settings", "input", "sha256", "run")


def keys_of(task: str, values: Sequence[str], facts: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the keys of the lines of a task: its roles, what was made of them, and what is told of that."""
    roles = [role for role in TASKS[task].generated.roles if role != SEED]
    return line_keys(*roles, *values, *facts)


class RecordForm(Protocol):
    """The form in which the outputs of one engine are stored. `folder` is always the shard's own folder of files."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of every line, null if a sample has no value: `line_keys` of those of the engine."""

    @property
    def has_files(self) -> bool:
        """Whether outputs are files beside their lines."""

    def table(self, shard: str) -> str:
        """Return the path of the file with the lines of a shard, relative to `result/`."""

    def write(self, output: Output, folder: Path) -> Line:
        """Write the file of an output, if the form has one, and return the fields of its line.

        The content is flushed to disk on return, the entry of its folder is not. Raises Unusable if there is no output.
        """

    def file(self, line: Line) -> str | None:
        """Return the path of a line's file, relative to `folder`; None if it has none."""

    def damages(self, lines: Iterable[Line], folder: Path) -> Iterator[str | None]:
        """Yield for each line why its output cannot be used; None if it is there and unchanged."""


@dataclass(frozen=True)
class TextRecords:
    """Stores each output as text in its line. The lines of a shard are one JSON Lines file."""

    keys: tuple[str, ...]
    has_files: ClassVar[bool] = False

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
class ValueRecords:
    """Stores each output as the values of its line named in `values`. The lines of a shard are one JSON Lines file."""

    keys: tuple[str, ...]
    values: tuple[str, ...]
    has_files: ClassVar[bool] = False

    def table(self, shard: str) -> str:
        return f"{shard}.jsonl"

    def write(self, output: Output, folder: Path) -> Line:
        return {**output.values, "sha256": self._digest(output.values)}

    def file(self, line: Line) -> str | None:
        return None

    def damages(self, lines: Iterable[Line], folder: Path) -> Iterator[str | None]:
        for line in lines:
            whole = line["error"] is not None or self._digest(line) == line["sha256"]
            yield None if whole else "its values are damaged"

    def _digest(self, line: Line) -> str:
        return digest(json.dumps({name: line.get(name) for name in self.values}, ensure_ascii=False).encode())


@dataclass(frozen=True)
class ImageRecords:
    """Stores each output as an image file. `file_name` is relative to the file of lines, as `datasets` requires."""

    keys: tuple[str, ...]
    has_files: ClassVar[bool] = True

    def table(self, shard: str) -> str:
        return f"{shard}/metadata.jsonl"

    def write(self, output: Output, folder: Path) -> Line:
        assert output.file, "an image is a file"
        image = output.file()
        row, index = output.sample.key
        name = f"{image_folder(row, index)}/{row:06d}-{index:02d}.{output.suffix}"
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        place_file(path, image)
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
    """Return the folder of image `index` of a row, relative to the folder of its shard."""
    more = f"-{index // FOLDER_SAMPLES:03d}" if index >= FOLDER_SAMPLES else ""
    return f"images/{row // FOLDER_ROWS:04d}{more}"


def digest(content: bytes) -> str:
    """Return the SHA-256 of `content` in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
