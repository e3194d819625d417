"""What `load_dataset` has to be told about the outputs of a GenerateJob, for the front matter of their card.

`datasets` takes the types of columns from the first lines of one file, and fails where a column is null there and a
text further on. So all types are written down, found by looking at every line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

FILE_NAME = "file_name"
LINES = ".jsonl"

Kind = str | dict[str, Any] | list[Any] | None
"""A dtype, fields of an object, the kind of the items of a list, or None where all values are null so far."""


def config(result: Path, manifests: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The only entry of `configs`. `manifests` are those of the shards."""
    kind = kind_of_lines(line for manifest in manifests for line in lines(result, manifest))
    images = [any(not entry["path"].endswith(LINES) for entry in manifest["files"]) for manifest in manifests]
    files: str | list[str] = "shard-*.jsonl"
    if isinstance(kind, dict) and FILE_NAME in kind:
        # A shard of errors alone names no file, which `datasets` takes for a mistake; without any image it reads lines.
        folders = [
            f"{folder(manifest)}/**" for manifest, has_images in zip(manifests, images, strict=True) if has_images
        ]
        files = ("shard-*/**" if all(images) else folders) if folders else "shard-*/*.jsonl"
        if folders:
            kind = {
                "image" if name == FILE_NAME else name: "image" if name == FILE_NAME else inner
                for name, inner in kind.items()
            }
    return {"config_name": "default", "data_files": files, "features": fields(kind)}


def folder(manifest: dict[str, Any]) -> str:
    """Where a shard's lines and images lie."""
    return str(Path(manifest["files"][0]["path"]).parent)


def lines(result: Path, manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for entry in manifest["files"]:
        if entry["path"].endswith(LINES):
            with (result / entry["path"]).open(encoding="utf-8") as file:
                yield from map(json.loads, file)


def kind_of_lines(found: Iterable[dict[str, Any]]) -> Kind:
    kind: Kind = {}
    for line in found:
        kind = merged(kind, kind_of(line))
    return kind


def kind_of(value: Any) -> Kind:
    """What a value of JSON is."""
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
    """What holds values of both kinds."""
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
    """The fields of an object as front matter has them."""
    return [{"name": name, **field(inner)} for name, inner in kind.items()] if isinstance(kind, dict) else []


def field(kind: Kind) -> dict[str, Any]:
    if isinstance(kind, dict):
        return {"struct": fields(kind)}
    if isinstance(kind, list):
        inner = kind[0]
        return {"list": fields(inner) if isinstance(inner, dict) else inner or "null"}
    return {"dtype": kind or "null"}
