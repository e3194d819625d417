"""The `configs` entry of the card of a GenerateJob's outputs: files and column types for `load_dataset`.

The entry names the types of all columns (`generation.kinds`), which the shards have gathered from their lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from luthier_api.outputs import BATCH, OUTPUT_FORMATS, OutputFormat
from luthier_api.outputs import LINES as LINES_FORM
from luthier_trainer.generation.exports.batch import ANSWER
from luthier_trainer.generation.kinds import Kind, merged

FILE_NAME = "file_name"
LINES = ".jsonl"
IMAGE = ("image", "image")
"""Name and type of the column into which `datasets` loads the image files."""


def config(manifests: Sequence[dict[str, Any]], form: OutputFormat) -> dict[str, Any]:
    """Return the only entry of `configs`. `manifests`: the content of the manifests of all shards."""
    if form != LINES_FORM:
        return {"config_name": "default", "data_files": OUTPUT_FORMATS[form].files} | features(manifests, form)
    nothing: Kind = {}
    kind = reduce(merged, (manifest["kind"] for manifest in manifests), nothing)
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


def features(manifests: Sequence[dict[str, Any]], form: OutputFormat) -> dict[str, Any]:
    """Return the types of the columns of outputs in another form than lines; nothing if they stand elsewhere."""
    return {"features": fields(ANSWER)} if form == BATCH else {}


def info(manifests: Sequence[dict[str, Any]], form: OutputFormat) -> dict[str, Any] | None:
    """Return the entry `dataset_info`, for archives: their builder takes the types of columns from there alone.

    Without types it would take those of the first five samples.
    """
    suffixes = [Path(entry["path"]).suffix for manifest in manifests for entry in manifest["files"]]
    image = next((suffix.removeprefix(".") for suffix in suffixes if suffix != LINES), None)
    if form != "webdataset" or image is None:
        return None
    nothing: Kind = {}
    kind = reduce(merged, (manifest["kind"] for manifest in manifests), nothing)
    assert isinstance(kind, dict), "lines are objects"
    line = {name: inner for name, inner in kind.items() if name != FILE_NAME}
    columns: Kind = {image: IMAGE[1], "json": line, "__key__": "string", "__url__": "string"}
    return {"config_name": "default", "features": fields(columns)}


def has_images(manifest: dict[str, Any]) -> bool:
    """Return whether a shard has files besides its lines."""
    return any(not entry["path"].endswith(LINES) for entry in manifest["files"])


def folder(manifest: dict[str, Any]) -> str:
    """Return the folder of a shard's lines and images, relative to the result."""
    return str(Path(manifest["files"][0]["path"]).parent)


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
