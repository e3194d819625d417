"""The `configs` entry of the card of a GenerateJob's outputs: files and column types for `load_dataset`.

`datasets` infers the types of columns from the first lines of one file, and fails if a column is null there and text
later. Therefore the entry names all types, which are derived from all lines.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

FILE_NAME = "file_name"
LINES = ".jsonl"
IMAGE = ("image", "image")
"""Name and type of the column into which `datasets` loads the image files."""

Kind = str | dict[str, Any] | list[Any] | None
"""A dtype, the fields of an object, the kind of the items of a list, or None if all values so far are null."""


def config(result: Path, manifests: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the only entry of `configs`. `manifests`: the content of the manifests of all shards."""
    kind = kind_of_lines(line for manifest in manifests for line in lines(result, manifest))
    files: str | list[str] = "shard-*.jsonl"
    if isinstance(kind, dict) and FILE_NAME in kind:
        # `datasets` refuses a folder without any image, for example of a shard whose outputs are all errors.
        with_images = [manifest for manifest in manifests if has_images(manifest)]
        if not with_images:
            files = "shard-*/*.jsonl"
        elif len(with_images) == len(manifests):
            files = "shard-*/**"
        else:
            files = [f"{folder(manifest)}/**" for manifest in with_images]
        if with_images:
            kind = dict(IMAGE if name == FILE_NAME else (name, inner) for name, inner in kind.items())
    return {"config_name": "default", "data_files": files, "features": fields(kind)}


def has_images(manifest: dict[str, Any]) -> bool:
    """Return whether a shard has files besides its lines."""
    return any(not entry["path"].endswith(LINES) for entry in manifest["files"])


def folder(manifest: dict[str, Any]) -> str:
    """Return the folder of a shard's lines and images, relative to the result."""
    return str(Path(manifest["files"][0]["path"]).parent)


def lines(result: Path, manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the lines of a shard."""
    for entry in manifest["files"]:
        if entry["path"].endswith(LINES):
            with (result / entry["path"]).open(encoding="utf-8") as file:
                yield from map(json.loads, file)


def kind_of_lines(found: Iterable[dict[str, Any]]) -> Kind:
    """Return the kind that can represent all lines."""
    kind: Kind = {}
    for line in found:
        kind = merged(kind, kind_of(line))
    return kind


def kind_of(value: Any) -> Kind:
    """Return the kind of a value of JSON."""
    if value is None:
        return None
    if isinstance(value, dict):
        return {name: kind_of(inner) for name, inner in value.items()}
    if isinstance(value, list):
        kind: Kind = None
        for item in value:
            kind = merged(kind, kind_of(item))
        return [kind]
    return {bool: "bool", int: "int64", float: "float64", str: "string"}[type(value)]


def merged(one: Kind, other: Kind) -> Kind:
    """Return the kind that can represent the values of both kinds."""
    if one is None or one == other:
        return other
    if other is None:
        return one
    if isinstance(one, dict) and isinstance(other, dict):
        return {name: merged(one.get(name), other.get(name)) for name in {**one, **other}}
    if isinstance(one, list) and isinstance(other, list):
        return [merged(one[0], other[0])]
    return "float64" if {str(one), str(other)} == {"int64", "float64"} else "string"


def fields(kind: Kind) -> list[dict[str, Any]]:
    """Return the fields of an object in the format of `features` in the front matter."""
    return [{"name": name, **field(inner)} for name, inner in kind.items()] if isinstance(kind, dict) else []


def field(kind: Kind) -> dict[str, Any]:
    """Return the type of a field in the format of `features` in the front matter."""
    if isinstance(kind, dict):
        return {"struct": fields(kind)}
    if isinstance(kind, list):
        inner = kind[0]
        return {"list": fields(inner) if isinstance(inner, dict) else inner or "null"}
    return {"dtype": kind or "null"}
