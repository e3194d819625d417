"""Delivers outputs in another form than lines, once all shards are complete.

The last shard that ends writes all files into a folder beside, then moves it to `data/`, and writes their manifest
last. If several shards end at the same time, each of them does so, and their files are the same.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any

from luthier_api.outputs import EXPORT_FOLDER, EXPORT_MANIFEST, LINES, OutputFormat
from luthier_api.run import GenerateRun, PreparedRecord
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.generation.engines.table import engine_class
from luthier_trainer.generation.exports.base import Outputs, Writer
from luthier_trainer.generation.kinds import Kind, merged
from luthier_trainer.generation.result import shard_manifest
from luthier_trainer.runtime.heartbeat import beating_while_growing
from luthier_trainer.workspace.manifest import fsync, replace_file, sha256

WRITERS: Mapping[OutputFormat, str] = {
    "parquet": "luthier_trainer.generation.exports.parquet",
    "webdataset": "luthier_trainer.generation.exports.webdataset",
    "openai-batch": "luthier_trainer.generation.exports.batch",
}
"""Form → the module whose `write` writes it, of all forms but lines."""


def writer(form: OutputFormat) -> Writer:
    """Return the writer of a form."""
    found: Writer = import_module(WRITERS[form]).write
    return found


def deliver(run: GenerateRun, record: PreparedRecord, folder: WorkspaceFolder, shard: int) -> None:
    """Write the outputs of a job, all of whose shards are complete, in the form that it asks for, unless they are.

    `shard`: the one that writes.
    """
    form = run.spec.outputs.format
    if form == LINES:
        return
    manifests = [json.loads(shard_manifest(folder, i, run.spec.shards).read_bytes()) for i in range(run.spec.shards)]
    about = {"format": form, "of": [manifest["files"][0]["sha256"] for manifest in manifests]}
    if is_there(folder.result, about):
        return
    nothing: Kind = {}
    kind = reduce(merged, (manifest["kind"] for manifest in manifests), nothing)
    outputs = Outputs(run, folder.result, engine_class(run.spec.task).records, kind, record.model.source)
    partial = folder.result / f".{EXPORT_FOLDER}-{shard}"
    shutil.rmtree(partial, ignore_errors=True)  # of an attempt that was killed
    partial.mkdir()
    with beating_while_growing(partial):
        writer(form)(outputs, partial)
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    for path in files:
        fsync(path)
    entries = [
        {"path": f"{EXPORT_FOLDER}/{path.name}", "size": path.stat().st_size, "sha256": sha256(path)} for path in files
    ]
    (folder.result / EXPORT_MANIFEST).unlink(missing_ok=True)
    move(partial, folder.result / EXPORT_FOLDER)
    runs: dict[str, Any] = {name: found for manifest in manifests for name, found in manifest["runs"].items()}
    document = {**about, "runs": runs, "files": entries}
    replace_file(folder.result / EXPORT_MANIFEST, json.dumps(document).encode())
    print(f"outputs are delivered as {form}: {len(files)} files in {folder.result / EXPORT_FOLDER}", flush=True)


def move(partial: Path, target: Path) -> None:
    """Put a folder into the place of another one, which a shard that ends at the same time may put there again."""
    while True:
        shutil.rmtree(target, ignore_errors=True)
        try:
            os.rename(partial, target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            return


def is_there(result: Path, about: dict[str, Any]) -> bool:
    """Return whether the outputs were delivered in this form, and nothing has changed since."""
    try:
        manifest = json.loads((result / EXPORT_MANIFEST).read_bytes())
        sizes = all((result / entry["path"]).stat().st_size == entry["size"] for entry in manifest["files"])
    except (OSError, ValueError, KeyError):
        return False
    return sizes and all(manifest.get(name) == value for name, value in about.items())
