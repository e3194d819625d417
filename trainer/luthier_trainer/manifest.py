"""Manifests: what a folder must hold to be whole. Written last, so that its presence says that the rest is there.

Checkpoints, results and shards all carry one; `publish` compares the Hub with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from luthier_api.workspace import MANIFEST

CHUNK_BYTES = 1 << 20
SHA256 = re.compile(r"[0-9a-f]{64}")


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Make a file's bytes, or a folder's entries, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_manifest(folder: Path, **facts: Any) -> dict[str, Any]:
    """Record every file below `folder` with size (bytes) and SHA-256, beside `facts`; all of it durable on return."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    for path in files:
        os.chmod(path, 0o664)  # safetensors writes 0600: another uid of the group could not read it
        fsync(path)
    entries = [{"path": str(p.relative_to(folder)), "size": p.stat().st_size, "sha256": sha256(p)} for p in files]
    manifest = facts | {"files": entries}
    partial = folder / f".{MANIFEST}.partial"
    partial.write_text(json.dumps(manifest, indent=1))
    fsync(partial)
    partial.replace(folder / MANIFEST)
    fsync(folder)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of `folder`; None when there is none or it cannot be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and isinstance(manifest.get("files"), list) else None


def names_in(text: bytes) -> list[str] | None:
    """The files that a manifest of unknown origin names, as it writes them; None when not every entry is as `write_manifest` makes them."""
    try:
        entries = json.loads(text)["files"]
        whole = all(SHA256.fullmatch(e["sha256"]) and isinstance(e["size"], int) and isinstance(e["path"], str) for e in entries)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return [e["path"] for e in entries] if whole else None


def problems(folder: Path) -> list[str]:
    """Why `folder` is not what its manifest says; empty when it is."""
    manifest = read_manifest(folder)
    if manifest is None:
        return [f"{MANIFEST} is missing or unreadable"]
    found = []
    for entry in manifest["files"]:
        path = folder / entry["path"]
        if not path.is_file():
            found.append(f"{entry['path']} is missing")
        elif path.stat().st_size != entry["size"]:
            found.append(f"{entry['path']} has {path.stat().st_size} bytes, not {entry['size']}")
        elif sha256(path) != entry["sha256"]:
            found.append(f"{entry['path']} has changed: its SHA-256 differs")
    return found
