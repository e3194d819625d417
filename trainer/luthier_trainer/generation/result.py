"""The result of one shard: its outputs in `result/`, in the order of the inputs, and a manifest, which is written last.

Outputs are read once and as a stream, so that a shard of a million outputs needs no more memory than a small one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from luthier_api.workspace import MANIFEST, WorkspaceFolder
from luthier_trainer.generation.records import RecordForm
from luthier_trainer.runtime.heartbeat import beat
from luthier_trainer.scoring import sums
from luthier_trainer.scoring.sums import Sums
from luthier_trainer.workspace.manifest import CHUNK_BYTES, fsync, replace_file, sha256

ENTRIES = "\n"  # separates the entries of the files in a manifest, so that they can be read one at a time


def shard_name(index: int, count: int) -> str:
    """Return the name of a shard, for example shard-00002-of-00008."""
    return f"shard-{index:05d}-of-{count:05d}"


def shard_manifest(folder: WorkspaceFolder, index: int, count: int) -> Path:
    """Return the path of the manifest whose presence means that all outputs of a shard are in `result/`.

    It has the format of `workspace.manifest`, with paths relative to `result/`.
    """
    return folder.result / f"{shard_name(index, count)}.{MANIFEST}"


class ShardResult:
    """The result of shard `index` of `count`."""

    def __init__(self, folder: WorkspaceFolder, index: int, count: int, records: RecordForm) -> None:
        self.index, self.count, self.records = index, count, records
        self.folder, self.name = folder.result, shard_name(index, count)
        self.manifest = shard_manifest(folder, index, count)
        self.summary = folder.shards / f"{self.name}.{SUMMARY}"

    def metrics(self, span: range, settings: dict[str, Any]) -> dict[str, float] | None:
        """Return the metrics of the result if it is complete; None if it is not, or was made of something else."""
        try:
            summary = json.loads(self.summary.read_bytes())
            whole = (self.folder / self.records.table(self.name)).stat().st_size == summary["size"]
        except (OSError, ValueError, KeyError):
            return None
        is_this = summary["settings"] == settings and summary["span"] == [span.start, span.stop]
        return dict(summary["metrics"]) if whole and is_this and self.manifest.exists() else None

    def open(self) -> None:
        """Remove the manifest of an older result of this shard, so that `publish` does not use it for the new one."""
        self.manifest.unlink(missing_ok=True)
        self.summary.unlink(missing_ok=True)

    def write(self, segments: Iterable[tuple[Path, bytes]], about: dict[str, Any]) -> None:
        """Write the lines of all segments into one table, link their files, and write the manifest.

        `segments`: the folder of files and the lines of each. `about`: what the manifest says besides. Raises
        FileNotFoundError if the file of an output is gone.
        """
        table = self.folder / self.records.table(self.name)
        table.parent.mkdir(parents=True, exist_ok=True)
        partial, listed = (table.with_name(f".{table.name}.{part}") for part in ("partial", "files"))
        digest, size = hashlib.sha256(), 0
        parents = {self.folder, table.parent}
        with partial.open("wb") as file, listed.open("w", encoding="utf-8") as files:
            for source, text in segments:
                file.write(text)
                digest.update(text)
                size += len(text)
                for entry in self._link_files(source, text, parents):
                    files.write("," + ENTRIES + json.dumps(entry))
                beat()
            file.flush()
            os.fsync(file.fileno())
        partial.replace(table)
        for parent in parents:
            fsync(parent)
        entry = {"path": self.records.table(self.name), "size": size, "sha256": digest.hexdigest()}
        self._write_manifest(about, entry, listed)
        kept = {name: about[name] for name in ("span", "settings", "metrics", "sums")}
        replace_file(self.summary, json.dumps(kept | {"size": size}).encode())

    def _link_files(self, source: Path, text: bytes, parents: set[Path]) -> Iterator[dict[str, Any]]:
        """Link the files of the lines in `text` into the result, and yield their entries in the manifest."""
        if not self.records.has_files:
            return
        for line in map(json.loads, text.splitlines()):
            name = self.records.file(line)
            if name is None:
                continue
            target = self.folder / self.name / name
            target.parent.mkdir(parents=True, exist_ok=True)
            link(source / name, target, line["sha256"])
            parents.add(target.parent)
            yield {"path": f"{self.name}/{name}", "size": line["size"], "sha256": line["sha256"]}

    def _write_manifest(self, about: dict[str, Any], entry: dict[str, Any], listed: Path) -> None:
        """Write the manifest: `about`, the entry of the table, and the entries in the file `listed`."""
        partial = self.manifest.with_name(f".{self.manifest.name}.partial")
        head = json.dumps({"shard": self.index, "shards": self.count} | about)
        with partial.open("w", encoding="utf-8") as file:
            file.write(f'{head[:-1]}, "files": [{ENTRIES}{json.dumps(entry)}')
            with listed.open(encoding="utf-8") as entries:
                shutil.copyfileobj(entries, file, CHUNK_BYTES)
            file.write(f"{ENTRIES}]}}")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.manifest)
        fsync(self.folder)
        listed.unlink()


UNSAFE_ROWS = "unsafeRows"
"""Metric of a shard: images that `image.safety` has found unsafe, also those that are withheld."""
SUMMARY = "summary.json"
"""What the end of a shard's name in `shards/` is of the file that says how it ended."""


def total_sums(folder: WorkspaceFolder, count: int, settings: dict[str, Any]) -> Sums | None:
    """Return the sums over the outputs of all shards that were compared with references.

    None if not all of them are complete, or if they were not all made with these settings.
    """
    total: Sums = {}
    for i in range(count):
        try:
            summary = json.loads((folder.shards / f"{shard_name(i, count)}.{SUMMARY}").read_bytes())
        except FileNotFoundError:
            return None
        if summary["settings"] != settings:
            return None
        total = sums.added(total, sums.read(summary.get("sums", {})))
    return total


def failed_outputs(folder: WorkspaceFolder, count: int) -> int:
    """Return the number of outputs that cannot be made, of all shards that are complete."""
    return counted(folder, count, "failedRows")


def counted(folder: WorkspaceFolder, count: int, metric: str) -> int:
    """Return the sum of a metric that counts outputs, over all shards that are complete."""
    total = 0
    for i in range(count):
        with suppress(FileNotFoundError):
            summary = json.loads((folder.shards / f"{shard_name(i, count)}.{SUMMARY}").read_bytes())
            total += int(summary["metrics"][metric])
    return total


def link(source: Path, target: Path, digest: str | None = None) -> None:
    """Make `target` a hard link to `source`, or a copy if the volume has no hard links (many object stores).

    A target that has the content of `digest` already stays. Raises FileNotFoundError if there is no `source`.
    """
    if target.exists():
        if target.samefile(source) or (digest and sha256(target) == digest):
            return
        target.unlink()
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)
        fsync(target)
