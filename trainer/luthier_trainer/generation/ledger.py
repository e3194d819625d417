"""The ledger of one shard: every output has one line, written after the output itself is durable.

A killed shard reads its own lines and goes on: lines that no longer fit the job are dropped, which a notice says, and
images without a line are written again. At the end the outputs are linked into `result/`, with a manifest that
`publish` waits for. Shards share no file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from luthier_api.workspace import MANIFEST, WorkspaceFolder
from luthier_trainer.generation.samples import Output, Sample
from luthier_trainer.runtime.heartbeat import beat
from luthier_trainer.runtime.notices import notice
from luthier_trainer.workspace.manifest import fsync, sha256

# Rows, and samples of each, whose images share a folder; the Hub wants fewer than 10,000 files in one
FOLDER_ROWS, FOLDER_SAMPLES = (
    1000,
    8,
)
# that read images at once: hashlib releases the interpreter, and a volume in the network answers many requests as fast
# as one
THREADS = 8
AT_ONCE = 64  # of them
SHOWN = 60  # characters of a setting
Line = dict[str, Any]

KEYS = {
    "text-generation": (
        "row",
        "sample",
        "prompt",
        "seed",
        "input",
        "text",
        "error",
        "finishReason",
        "promptTokens",
        "newTokens",
        "sha256",
        "settings",
        "environment",
    ),
    "text-to-image": (
        "row",
        "sample",
        "prompt",
        "negativePrompt",
        "seed",
        "input",
        "file_name",
        "error",
        "unreadTokens",
        "unreadNegativeTokens",
        "size",
        "sha256",
        "settings",
        "environment",
    ),
}
"""Task → what each of its lines has, null where there is nothing to say: readers take the keys of the first lines for
those of all.
"""
TABLES = {"text-generation": "{shard}.jsonl", "text-to-image": "{shard}/metadata.jsonl"}
"""Task → where the lines of a shard stand in `result/`. The name is the one that `datasets` looks for beside images,
whose `file_name` begins there.
"""


def shard_name(index: int, count: int) -> str:
    return f"shard-{index:05d}-of-{count:05d}"


def image_folder(row: int, index: int) -> str:
    """Where the image `index` of a row lies in the folder of its shard."""
    more = f"-{index // FOLDER_SAMPLES:03d}" if index >= FOLDER_SAMPLES else ""
    return f"images/{row // FOLDER_ROWS:04d}{more}"


def shard_manifest(folder: WorkspaceFolder, index: int, count: int) -> Path:
    """The file that says that a shard's outputs lie in `result/`, whole: `manifest.py`'s form, paths relative to
    `result/`.
    """
    return folder.result / f"{shard_name(index, count)}.{MANIFEST}"


class Shard:
    """The outputs of shard `index` of `count`. `settings` is everything beside the sample that an output depends on."""

    def __init__(
        self, folder: WorkspaceFolder, index: int, count: int, settings: dict[str, Any], environment: str
    ) -> None:
        self.folder, self.index, self.count = folder, index, count
        # As JSON has it: 1.0 and 1 are one number there, so that lines can be compared with it.
        self.settings, self.environment = json.loads(json.dumps(settings)), environment
        self.ledger = folder.shards / f"{shard_name(index, count)}.jsonl"
        self.done: dict[tuple[int, int], bool] = {}
        """Row and sample of each line → whether it is an output rather than an error."""
        self.first_error: str | None = None
        folder.shards.mkdir(parents=True, exist_ok=True)

    @property
    def failed(self) -> int:
        return sum(not good for good in self.done.values())

    @property
    def own(self) -> str:
        """The folder of its images, below `shards/` and below `result/`."""
        return shard_name(self.index, self.count)

    def resume(self, samples: Sequence[Sample]) -> list[Sample]:
        """Take over what earlier attempts wrote; the samples that are left, in order. A notice says what is not taken
        over, and why.
        """
        wanted = {s.key: s for s in samples}
        written = self.ledger.read_bytes().splitlines(keepends=True) if self.ledger.exists() else []
        refused: Counter[str] = Counter()
        fitting: list[tuple[Line, Sample, bytes]] = []
        for text in written:
            # A line without its end was cut by a kill, which is no news.
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
            _replace(self.ledger, table)
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
        """Why the line does not describe what would be made now; None when it does."""
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
        if line.keys() != set(KEYS[self.settings["task"]]):
            return "another version of Luthier wrote the line"
        return None

    def _damages(self, lines: Sequence[Line]) -> Iterator[str | None]:
        """`_damage` of each line, in order; images are read by several threads, with a sign of life for each few of
        them.
        """
        with ThreadPoolExecutor(THREADS) as threads:
            for first in range(0, len(lines), AT_ONCE):
                beat()
                some = lines[first : first + AT_ONCE]
                yield from threads.map(self._damage, some) if "file_name" in some[0] else map(self._damage, some)

    def _damage(self, line: Line) -> str | None:
        """Why the output of a line cannot be used; None when it is there, as it was written."""
        if line["error"] is not None:
            return None
        if "text" in line:
            return None if _digest(str(line["text"]).encode()) == line["sha256"] else "its text is damaged"
        path = self.folder.shards / self.own / (line["file_name"] or "")
        try:
            if path.stat().st_size != line["size"]:
                return "its image is damaged"
            return None if sha256(path) == line["sha256"] else "its image is damaged"
        except FileNotFoundError:
            return "its image is gone"

    def _count(self, line: Line) -> None:
        self.done[line["row"], line["sample"]] = line["error"] is None
        if self.first_error is None and line["error"] is not None:
            self.first_error = f"row {line['row']}: {line['error']}"

    def append(self, outputs: Sequence[Output]) -> None:
        """Keep outputs: files first, then their lines; durable on return."""
        if not outputs:
            return
        lines = [self._line(output) for output in outputs]
        for parent in {
            (self.folder.shards / self.own / line["file_name"]).parent for line in lines if line.get("file_name")
        }:
            fsync(parent)
        with self.ledger.open("ab") as file:
            file.write(b"".join(_encode(line) for line in lines))
            file.flush()
            os.fsync(file.fileno())
        for line in lines:
            self._count(line)

    def _line(self, output: Output) -> Line:
        sample = output.sample
        facts = (
            sample.facts()
            | output.facts
            | {
                "input": sample.input,
                "settings": self.settings,
                "environment": self.environment,
            }
        )
        if output.error is not None:
            facts["error"] = output.error
        elif output.image is not None:
            row, index = sample.key
            name = f"{image_folder(row, index)}/{row:06d}-{index:02d}.{output.suffix}"
            path = self.folder.shards / self.own / name
            path.parent.mkdir(parents=True, exist_ok=True)
            _replace(path, output.image)
            facts |= {"file_name": name, "size": len(output.image), "sha256": _digest(output.image)}
        else:
            text = output.text or ""
            facts |= {"text": text, "sha256": _digest(text.encode())}
        keys = KEYS[self.settings["task"]]
        assert facts.keys() <= set(keys), f"lines have no {facts.keys() - set(keys)}"
        return {key: facts.get(key) for key in keys}

    def open_result(self) -> None:
        """Take back an older result of this shard, so that `publish` cannot take it for the one in the making."""
        shard_manifest(self.folder, self.index, self.count).unlink(missing_ok=True)

    def finish(self, metrics: dict[str, float]) -> dict[str, float]:
        """Put the outputs into `result/`, in order of row and sample, the manifest last.

        Returns the metrics of the result: those of an earlier call when it is there already.
        """
        self.ledger.touch()
        lines = sorted(self._lines(), key=lambda line: (line["row"], line["sample"]))
        table = b"".join(_encode(line) for line in lines)
        name, manifest = (
            TABLES[self.settings["task"]].format(shard=self.own),
            shard_manifest(self.folder, self.index, self.count),
        )
        entry = {"path": name, "size": len(table), "sha256": _digest(table)}
        images = [
            {"path": f"{self.own}/{line['file_name']}", "size": line["size"], "sha256": line["sha256"]}
            for line in lines
            if line.get("file_name")
        ]
        earlier = _parse(manifest.read_bytes()) if manifest.exists() else None
        if earlier and earlier["files"] == [entry, *images]:
            return dict(earlier["metrics"])
        (self.folder.result / name).parent.mkdir(parents=True, exist_ok=True)
        parents = {self.folder.result, (self.folder.result / name).parent}
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

    def _lines(self) -> Iterator[Line]:
        """The line of each output, once.

        An output can have two: a pod on a node that was lost may write on beside the one that took its place. Of two
        lines the one is kept that describes the image that is there.
        """
        found: dict[tuple[int, int], list[Line]] = {}
        for text in self.ledger.read_bytes().splitlines():
            if (line := _parse(text)) and (line.get("row"), line.get("sample")) in self.done:
                found.setdefault((line["row"], line["sample"]), []).append(line)
        for lines in found.values():
            yield (
                lines[0] if len(lines) == 1 else next((line for line in lines if self._damage(line) is None), lines[-1])
            )


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


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
