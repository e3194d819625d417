"""The ledger of one shard: every output has one line, written after the output itself is durable.

A killed shard reads its own lines and goes on: a torn last line and lines that no longer fit the job are dropped, images without a line
are written again. At the end the outputs are linked into `result/`, with a manifest that `publish` waits for. Shards share no file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luthier_api.workspace import MANIFEST, WorkspaceFolder
from luthier_trainer.generation.samples import Output, Sample
from luthier_trainer.manifest import fsync, sha256

FOLDER_ROWS, FOLDER_SAMPLES = 1000, 8  # rows, and samples of each, whose images share a folder; the Hub wants fewer than 10,000 files in one
Line = dict[str, Any]


def shard_name(index: int, count: int) -> str:
    return f"shard-{index:05d}-of-{count:05d}"


def image_folder(row: int, index: int) -> str:
    """Where the image `index` of a row lies: it depends on these two alone, so that more shards or samples leave it there."""
    more = f"-{index // FOLDER_SAMPLES:03d}" if index >= FOLDER_SAMPLES else ""
    return f"images/{row // FOLDER_ROWS:04d}{more}"


def shard_manifest(folder: WorkspaceFolder, index: int, count: int) -> Path:
    """The file that says that a shard's outputs lie in `result/`, whole: `manifest.py`'s form, paths relative to `result/`."""
    return folder.result / f"{shard_name(index, count)}.{MANIFEST}"


class Shard:
    """The outputs of shard `index` of `count`. `settings` is everything beside the sample that an output depends on."""

    def __init__(self, folder: WorkspaceFolder, index: int, count: int, settings: dict[str, Any], environment: str) -> None:
        self.folder, self.index, self.count = folder, index, count
        self.settings, self.environment = settings, environment
        self.ledger = folder.shards / f"{shard_name(index, count)}.jsonl"
        self.done: dict[tuple[int, int], bool] = {}
        """Row and sample of each line → whether it is an output rather than an error."""
        self.first_error: str | None = None
        folder.shards.mkdir(parents=True, exist_ok=True)

    @property
    def failed(self) -> int:
        return sum(not good for good in self.done.values())

    def resume(self, samples: Sequence[Sample]) -> list[Sample]:
        """Take over what earlier attempts wrote; the samples that are left, in order."""
        wanted = {s.key: s for s in samples}
        written = self.ledger.read_bytes() if self.ledger.exists() else b""
        kept: list[bytes] = []
        for text in written.splitlines(keepends=True):
            line = _parse(text) if text.endswith(b"\n") else None
            sample = wanted.get((line.get("row", -1), line.get("sample", -1))) if line else None
            if line and sample and sample.key not in self.done and self._holds(line, sample):
                kept.append(text)
                self._count(line)
        if len(kept) < len(written.splitlines()):
            _replace(self.ledger, b"".join(kept))
        return [s for s in samples if s.key not in self.done]

    def _holds(self, line: Line, sample: Sample) -> bool:
        """Whether the line describes what would be made now, and its image is there."""
        # Compared as JSON: 1.0 and 1 are one number there.
        expected = json.loads(json.dumps({**sample.facts(), "settings": self.settings}))
        if {k: line.get(k) for k in expected} != expected or line.get("negativePrompt") != sample.negative_prompt:
            return False
        if "file" not in line:
            return "error" in line or "text" in line
        with contextlib.suppress(OSError):
            return (self.folder.shards / line["file"]).stat().st_size == line["size"]
        return False

    def _count(self, line: Line) -> None:
        self.done[line["row"], line["sample"]] = "error" not in line
        if self.first_error is None and "error" in line:
            self.first_error = f"row {line['row']}: {line['error']}"

    def append(self, outputs: Sequence[Output]) -> None:
        """Keep outputs: files first, then their lines; durable on return."""
        if not outputs:
            return
        lines = [self._line(output) for output in outputs]
        for parent in {(self.folder.shards / line["file"]).parent for line in lines if "file" in line}:
            fsync(parent)
        with self.ledger.open("ab") as file:
            file.write(b"".join(_encode(line) for line in lines))
            file.flush()
            os.fsync(file.fileno())
        for line in lines:
            self._count(line)

    def _line(self, output: Output) -> Line:
        line: Line = output.sample.facts()
        if output.error is not None:
            line["error"] = output.error
        elif output.image is not None:
            row, index = output.sample.key
            name = f"{image_folder(row, index)}/{row:06d}-{index:02d}.{output.suffix}"
            path = self.folder.shards / name
            path.parent.mkdir(parents=True, exist_ok=True)
            _replace(path, output.image)
            line |= {"file": name, "size": len(output.image), "sha256": hashlib.sha256(output.image).hexdigest()}
        else:
            text = output.text or ""
            line |= {"text": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
        return line | output.facts | {"settings": self.settings, "environment": self.environment}

    def open_result(self) -> None:
        """Take back an older result of this shard, so that `publish` cannot take it for the one in the making."""
        shard_manifest(self.folder, self.index, self.count).unlink(missing_ok=True)

    def finish(self, metrics: dict[str, float]) -> dict[str, float]:
        """Put the outputs into `result/`, in order of row and sample, the manifest last.

        Returns the metrics of the result: those of an earlier call when it is there already.
        """
        self.ledger.touch()
        lines = sorted((json.loads(t) for t in self.ledger.read_bytes().splitlines()), key=lambda line: (line["row"], line["sample"]))
        table = b"".join(_encode(line) for line in lines)
        name, manifest = f"{shard_name(self.index, self.count)}.jsonl", shard_manifest(self.folder, self.index, self.count)
        entry = {"path": name, "size": len(table), "sha256": hashlib.sha256(table).hexdigest()}
        images = [{"path": line["file"], "size": line["size"], "sha256": line["sha256"]} for line in lines if "file" in line]
        earlier = _parse(manifest.read_bytes()) if manifest.exists() else None
        if earlier and earlier["files"] == [entry, *images]:
            return dict(earlier["metrics"])
        self.folder.result.mkdir(parents=True, exist_ok=True)
        parents = {self.folder.result}
        for image in images:
            source, target = self.folder.shards / image["path"], self.folder.result / image["path"]
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(source, target, image["sha256"])
            parents.add(target.parent)
        _replace(self.folder.result / name, table)
        for parent in parents:
            fsync(parent)
        facts = {"shard": self.index, "shards": self.count, "settings": self.settings, "metrics": metrics}
        _replace(manifest, json.dumps({**facts, "files": [entry, *images]}, indent=1).encode())
        return metrics


def _parse(text: bytes) -> Line | None:
    """The JSON object in `text`; None when it is torn."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


def _encode(line: Line) -> bytes:
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, durably. A file that is linked elsewhere keeps its old bytes there."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    fsync(path.parent)


def _link(source: Path, target: Path, digest: str) -> None:
    """Make `target` the same file as `source`; a copy where the volume knows no hard links (many object stores)."""
    if target.exists():
        if target.samefile(source) or sha256(target) == digest:
            return
        target.unlink()
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        fsync(target)
