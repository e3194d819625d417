"""The ledger of one shard: a line for every output, written after the output itself was flushed to disk.

A shard that was killed reads its own lines and continues. Lines that do not match the job any more are dropped, with a
notice, and files without a line are written again. At the end the outputs are linked into `result/`, with a manifest
that `publish` needs. Shards share no files.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from luthier_api.workspace import MANIFEST, WorkspaceFolder
from luthier_trainer.generation.records import Line, RecordForm, digest
from luthier_trainer.generation.samples import Output, Sample, Unusable
from luthier_trainer.generation.writing import at_the_same_time
from luthier_trainer.runtime.heartbeat import beat_before_first_step
from luthier_trainer.runtime.notices import notice
from luthier_trainer.workspace.manifest import fsync, replace_file, sha256

AT_ONCE = 64  # lines that are verified between two heartbeats
SHOWN = 60  # characters of a setting in a notice


def shard_name(index: int, count: int) -> str:
    """Return the name of a shard, for example shard-00002-of-00008."""
    return f"shard-{index:05d}-of-{count:05d}"


def shard_manifest(folder: WorkspaceFolder, index: int, count: int) -> Path:
    """Return the path of the manifest whose presence means that all outputs of a shard are in `result/`.

    It has the format of `workspace.manifest`, with paths relative to `result/`.
    """
    return folder.result / f"{shard_name(index, count)}.{MANIFEST}"


class Shard:
    """The outputs of shard `index` of `count`, stored in the record form of their engine.

    `settings`: everything that an output depends on, besides its sample.
    """

    def __init__(
        self,
        folder: WorkspaceFolder,
        index: int,
        count: int,
        records: RecordForm,
        settings: dict[str, Any],
        environment: str,
    ) -> None:
        self.folder, self.index, self.count, self.records = folder, index, count, records
        # Converted as JSON does it, where 1.0 and 1 are the same number, so that lines can be compared with it.
        self.settings, self.environment = json.loads(json.dumps(settings)), environment
        self.ledger = folder.shards / f"{shard_name(index, count)}.jsonl"
        self.done: dict[tuple[int, int], bool] = {}
        """(row, sample) of each line → True for an output, False for an error."""
        self.first_error: str | None = None
        folder.shards.mkdir(parents=True, exist_ok=True)

    @property
    def failed(self) -> int:
        """Number of samples that cannot be made."""
        return sum(not good for good in self.done.values())

    @property
    def own(self) -> str:
        """Name of the shard's folder of files, below `shards/` and below `result/`."""
        return shard_name(self.index, self.count)

    @property
    def files(self) -> Path:
        """Path of the folder that the files are written to."""
        return self.folder.shards / self.own

    def resume(self, samples: Sequence[Sample]) -> list[Sample]:
        """Keep the valid outputs of earlier attempts, and return the samples that are left to make, in order.

        A notice names the outputs that are not kept, and the reasons.
        """
        wanted = {s.key: s for s in samples}
        written = self.ledger.read_bytes().splitlines(keepends=True) if self.ledger.exists() else []
        refused: Counter[str] = Counter()
        fitting: list[tuple[Line, Sample, bytes]] = []
        for text in written:
            # A last line without a line break was cut off when the shard was killed. This needs no notice.
            line = _parse(text) if text.endswith(b"\n") else None
            if line is None:
                refused["it cannot be read"] += text.endswith(b"\n")
                continue
            sample = wanted.get((line.get("row", -1), line.get("sample", -1)))
            reason = "no such row is asked for any more" if sample is None else self._changed(line, sample)
            if reason:
                refused[reason] += 1
            elif sample:
                fitting.append((line, sample, text))

        kept: list[bytes] = []
        for (line, sample, text), damage in zip(fitting, self._damages([line for line, _, _ in fitting]), strict=True):
            if damage:
                refused[damage] += 1
            elif sample.key not in self.done:
                kept.append(text if line["input"] == sample.input else _encode(line | {"input": sample.input}))
                self._count(line)
        table = b"".join(kept)
        if table != b"".join(written):
            replace_file(self.ledger, table)
        self._report(refused, len(written))
        return [s for s in samples if s.key not in self.done]

    def _report(self, refused: Counter[str], written: int) -> None:
        reasons = [f"{count} because {reason}" for reason, count in refused.most_common() if count]
        if reasons:
            notice(
                f"spec: {sum(refused.values())} of {written} outputs that an earlier attempt left in {self.ledger.name}"
                f" are not used: {'; '.join(reasons)}"
            )

    def _changed(self, line: Line, sample: Sample) -> str | None:
        """Return why the line does not match the output that would be made now; None if it does."""
        facts = sample.facts()
        for name in ("prompt", "negativePrompt", "seed"):
            if line.get(name) != facts.get(name):
                return f"the row has another {name}"
        before, now = line.get("settings") or {}, self.settings
        if before != now:
            changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
            return ", ".join(
                f"{name} was {_shown(before.get(name))} and is {_shown(now.get(name))}" for name in changed
            )
        if line.keys() != set(self.records.keys):
            return "another version of Luthier wrote the line"
        return None

    def _damages(self, lines: Sequence[Line]) -> Iterator[str | None]:
        """Yield for each line why its output cannot be used, or None; sends a heartbeat every few lines."""
        for first in range(0, len(lines), AT_ONCE):
            beat_before_first_step()
            yield from self.records.damages(lines[first : first + AT_ONCE], self.files)

    def _count(self, line: Line) -> None:
        self.done[line["row"], line["sample"]] = line["error"] is None
        if self.first_error is None and line["error"] is not None:
            self.first_error = f"row {line['row']}: {line['error']}"

    def append(self, outputs: Sequence[Output]) -> None:
        """Store outputs: first their files, then their lines. Both are flushed to disk on return."""
        if not outputs:
            return
        lines = at_the_same_time(self._line, outputs)
        for parent in {(self.files / name).parent for line in lines if (name := self.records.file(line))}:
            fsync(parent)
        with self.ledger.open("ab") as file:
            file.write(b"".join(_encode(line) for line in lines))
            file.flush()
            os.fsync(file.fileno())
        for line in lines:
            self._count(line)

    def _line(self, output: Output) -> Line:
        """Write the file of an output, if it has one, and return its line."""
        sample = output.sample
        made = {"error": output.error} if output.error is not None else self._write(output)
        line = {
            **sample.facts(),
            **output.facts,
            "input": sample.input,
            "settings": self.settings,
            "environment": self.environment,
            **made,
        }
        keys = self.records.keys
        assert line.keys() <= set(keys), f"lines have no {line.keys() - set(keys)}"
        return {key: line.get(key) for key in keys}

    def _write(self, output: Output) -> Line:
        """Write the file of an output, and return the fields of its line."""
        try:
            return self.records.write(output, self.files)
        except Unusable as error:
            return {"error": str(error)}

    def open_result(self) -> None:
        """Remove the manifest of an older result of this shard, so that `publish` does not use it for the new one."""
        shard_manifest(self.folder, self.index, self.count).unlink(missing_ok=True)

    def finish(self, metrics: dict[str, float]) -> dict[str, float]:
        """Link the outputs into `result/`, in the order of row and sample, and write the manifest last.

        Returns the metrics of the result. If the result exists already, they are those of the earlier call.
        """
        self.ledger.touch()
        lines = sorted(self._lines(), key=lambda line: (line["row"], line["sample"]))
        table = b"".join(_encode(line) for line in lines)
        name = self.records.table(self.own)
        manifest = shard_manifest(self.folder, self.index, self.count)
        entry = {"path": name, "size": len(table), "sha256": digest(table)}
        files = [
            {"path": f"{self.own}/{file}", "size": line["size"], "sha256": line["sha256"]}
            for line in lines
            if (file := self.records.file(line))
        ]
        earlier = _parse(manifest.read_bytes()) if manifest.exists() else None
        if earlier and earlier["files"] == [entry, *files]:
            return dict(earlier["metrics"])
        (self.folder.result / name).parent.mkdir(parents=True, exist_ok=True)
        parents = {self.folder.result, (self.folder.result / name).parent}
        for item in files:
            source, target = self.folder.shards / item["path"], self.folder.result / item["path"]
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(source, target, item["sha256"])
            parents.add(target.parent)
        replace_file(self.folder.result / name, table)
        for parent in parents:
            fsync(parent)
        facts = {"shard": self.index, "shards": self.count, "settings": self.settings, "metrics": metrics}
        replace_file(manifest, json.dumps({**facts, "files": [entry, *files]}, indent=1).encode())
        return metrics

    def _lines(self) -> Iterator[Line]:
        """Yield one line for each output.

        An output can have two lines: a pod on a lost node may continue to write beside the pod that replaced it. Of two
        lines, the one that matches the file on the volume is used.
        """
        found: dict[tuple[int, int], list[Line]] = {}
        for text in self.ledger.read_bytes().splitlines():
            if (line := _parse(text)) and (line.get("row"), line.get("sample")) in self.done:
                found.setdefault((line["row"], line["sample"]), []).append(line)
        for lines in found.values():
            if len(lines) == 1:
                yield lines[0]
                continue
            damages = zip(lines, self.records.damages(lines, self.files), strict=True)
            yield next((line for line, damage in damages if damage is None), lines[-1])


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def _parse(text: bytes) -> Line | None:
    """Return the JSON object in `text`; None if it is incomplete."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


def _encode(line: Line) -> bytes:
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"


def _link(source: Path, target: Path, digest: str) -> None:
    """Make `target` a hard link to `source`, or a copy if the volume has no hard links (many object stores)."""
    if target.exists():
        if target.samefile(source) or sha256(target) == digest:
            return
        target.unlink()
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        fsync(target)
