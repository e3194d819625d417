"""The provenance of a job: files and folders outside its workspace that it was built on, and whether they have changed.

Names and dates do not show it. A job that runs again leaves another result in the same folder, and a volume that is
mounted again may show other dates for the same bytes. So the content is compared: of data every byte, of a model's
folder its manifest, or what changes with any training.
"""

from __future__ import annotations

import functools
import hashlib
import json
import stat
from collections.abc import Iterable
from pathlib import Path

from luthier_api.exitcodes import ExitCode
from luthier_api.run import Origin
from luthier_api.workspace import METRICS_FILE
from luthier_trainer.runtime.failure import START_OVER, Failure
from luthier_trainer.workspace.manifest import read_manifest, sha256
from luthier_trainer.workspace.model_files import TEXT_SUFFIXES

LOADED = {".safetensors", *TEXT_SUFFIXES}
NOT_LOADED = {METRICS_FILE}  # it holds the seconds of the run
# Weights have up to hundreds of GB, so only their header and the last tensors are read. Any training changes these
# tensors, even in bf16, which rounds most small steps away.
EDGE_BYTES = 1 << 20


def of_data(path: Path, field: str) -> Origin:
    """The origin of a data file, or of a folder of images, as it is now."""
    size, mtime_ns = _stamp(path)
    return Origin(field=field, path=str(path), digest=_content(path, size, mtime_ns), size=size, mtime_ns=mtime_ns)


def of_streamed(path: Path, field: str) -> Origin:
    """The origin of a data file that is too large to read it all only for this. Its digest is of both its ends."""
    size, mtime_ns = _stamp(path)
    return Origin(field=field, path=str(path), digest=edges(path), size=size, mtime_ns=mtime_ns, whole=False)


def _stamp(path: Path) -> tuple[int, int]:
    """(bytes, time of the last change in ns) of a file, or of all files and folders in a folder."""
    facts = [path.stat(), *(p.stat() for p in path.rglob("*") if p.exists())]  # a link may lead nowhere
    return sum(f.st_size for f in facts if stat.S_ISREG(f.st_mode)), max(f.st_mtime_ns for f in facts)


@functools.cache
def _content(path: Path, size: int, mtime_ns: int) -> str:
    """SHA-256 of a file, or of the files of a folder. Cached, because several splits may be slices of the same file."""
    if path.is_dir():
        return combined(f"{p.relative_to(path).as_posix()} {sha256(p)}" for p in path.rglob("*") if p.is_file())
    return sha256(path)


def folder_digest(folder: Path) -> str:
    """A SHA-256 that identifies a version of a model, a pipeline or an adapter. A copy elsewhere has the same."""
    try:
        files = {entry["path"]: entry["sha256"] for entry in (read_manifest(folder) or {})["files"]}
    except (KeyError, TypeError):  # no manifest, or one of another program
        inside = (
            p
            for p in folder.rglob("*")
            if p.suffix in LOADED and not any(part.startswith(".") for part in p.relative_to(folder).parts)
        )
        files = {p.relative_to(folder).as_posix(): edges(p) for p in inside if p.is_file()}
    return combined(f"{name} {digest}" for name, digest in files.items() if name not in NOT_LOADED)


def edges(path: Path) -> str:
    """A SHA-256 of the size, the first and the last MiB of a file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(EDGE_BYTES)
        file.seek(max(len(first), size - EDGE_BYTES))
        return hashlib.sha256(b"%d " % size + first + file.read(EDGE_BYTES)).hexdigest()


def combined(digests: Iterable[str]) -> str:
    """One SHA-256 for several, whatever their order."""
    return hashlib.sha256(json.dumps(sorted(digests)).encode()).hexdigest()


def refuse_changes(origins: Iterable[Origin]) -> None:
    """Raise Failure when one of them is another than it was. One that is gone is no other: what was made of it may well
    outlive it.
    """
    for origin in origins:
        path = Path(origin.path)
        if path.exists() and not _same(origin, path):
            raise changed(origin.field, f"{path} has changed")


def _same(origin: Origin, path: Path) -> bool:
    if origin.size is None:  # a model
        return folder_digest(path) == origin.digest
    size, mtime_ns = _stamp(path)
    if (size, mtime_ns) == (origin.size, origin.mtime_ns):
        return True
    digest = _content(path, size, mtime_ns) if origin.whole else edges(path)
    return size == origin.size and digest == origin.digest


def changed(field: str, what: str) -> Failure:
    return Failure(
        ExitCode.INVALID_SPEC,
        f"{field}: {what} since this job was prepared, and what the job has made is of the old. {START_OVER}",
    )
