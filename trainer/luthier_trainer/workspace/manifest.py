"""Manifests: the files that a folder must hold, with sizes and digests. A manifest is written last, so that a folder
with one is complete.

Checkpoints, results and shards have one, and `publish` compares the Hub with it. Files are hashed by several threads,
because hashlib releases the interpreter's lock. `progress` is called for each chunk, so that a caller can send
heartbeats: the supervisor ends a process without them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from luthier_api.workspace import MANIFEST

CHUNK_BYTES = 4 << 20
MOST_THREADS = 8  # a core hashes about 1 GB/s, so that eight keep up with most volumes
SHA256 = re.compile(r"[0-9a-f]{64}")

Entry = dict[str, Any]
"""`path` below the folder, `size` in bytes, `sha256` in hexadecimal digits."""
Progress = Callable[[], None]


def _silent() -> None:
    pass


def threads() -> int:
    """Threads that hash at once: this process's share of the cores, which `launch` writes into OMP_NUM_THREADS."""
    share = os.environ.get("OMP_NUM_THREADS", "")
    cores = int(share) if share.isdecimal() else len(os.sched_getaffinity(0))
    return max(1, min(cores, MOST_THREADS))


def sha256(path: Path, progress: Progress = _silent) -> str:
    """SHA-256 of a file; `progress` is called for each chunk."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            progress()
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Make a file's bytes, or a folder's entries, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, durably. A file that is linked elsewhere keeps its old bytes there."""
    place_file(path, content)
    fsync(path.parent)


def place_file(path: Path, content: bytes) -> None:
    """The same, but the entry of its folder is not durable on return: one `fsync` of the folder does for many files."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def files_in(folder: Path) -> list[Path]:
    """Every file below `folder`, in order, but its manifest."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)


def describe(folder: Path, files: Iterable[Path], progress: Progress = _silent) -> list[Entry]:
    """The entries of `files` below `folder`. Their bytes are durable on return, and readable by the group."""

    def entry(path: Path) -> Entry:
        os.chmod(path, 0o664)  # safetensors writes 0600: another uid of the group could not read it
        fsync(path)
        progress()
        return {
            "path": path.relative_to(folder).as_posix(),
            "size": path.stat().st_size,
            "sha256": sha256(path, progress),
        }

    with ThreadPoolExecutor(threads()) as pool:
        return list(pool.map(entry, files))


def write_manifest(
    folder: Path, entries: Iterable[Entry] | None = None, progress: Progress = _silent, **facts: Any
) -> dict[str, Any]:
    """Write a manifest of every file below `folder`, with its size and SHA-256, and `facts`. All is durable on return.

    `entries`: the entries of all files, if they are known already. Default: the files are read here.
    """
    files = files_in(folder)
    known = describe(folder, files, progress) if entries is None else sorted(entries, key=lambda e: str(e["path"]))
    for below in sorted({parent for file in files for parent in file.parents if folder in parent.parents}):
        fsync(below)
    manifest = facts | {"files": known}
    replace_file(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    return manifest


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of `folder`; None if it is missing, cannot be read, or lacks an entry's fields.

    A manifest without files counts as missing: every folder without files would match it.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    found = entries_in(manifest)
    return manifest if found else None


def names_in(text: bytes) -> list[str] | None:
    """The paths in a manifest of unknown origin; None if an entry is not as `write_manifest` makes it."""
    try:
        found = entries_in(json.loads(text))
    except (ValueError, RecursionError):
        return None
    return None if found is None else [entry["path"] for entry in found]


def entries_in(manifest: Any) -> list[Entry] | None:
    """The entries of a manifest of unknown origin; None if one is not as `write_manifest` makes it."""
    entries = manifest.get("files") if isinstance(manifest, dict) else None
    return entries if isinstance(entries, list) and all(map(_is_entry, entries)) else None


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    path, size, digest = entry.get("path"), entry.get("size"), entry.get("sha256")
    return (
        isinstance(path, str)
        and type(size) is int
        and size >= 0
        and isinstance(digest, str)
        and bool(SHA256.fullmatch(digest))
    )


def problems(folder: Path, progress: Progress = _silent) -> list[str]:
    """How `folder` differs from its manifest; empty if it does not."""
    manifest = read_manifest(folder)
    return (
        [f"{MANIFEST} is missing, unreadable or incomplete"]
        if manifest is None
        else differences(folder, manifest["files"], progress)
    )


def differences(folder: Path, entries: Collection[Entry], progress: Progress = _silent) -> list[str]:
    """How the files below `folder` differ from `entries`."""

    def difference(entry: Entry) -> str | None:
        name, path = entry["path"], folder / entry["path"]
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            return f"{name} is outside the folder"
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != entry["size"]:
            return f"{name} has {size} bytes, not {entry['size']}"
        if sha256(path, progress) != entry["sha256"]:
            return f"{name} has changed: its SHA-256 differs"
        return None

    with ThreadPoolExecutor(threads()) as pool:
        return [found for found in pool.map(difference, entries) if found]
