"""The outputs of another GenerateJob as the rows of this one (`inputs.job`).

They are read from the tables of its shards, after these were compared with their manifests. A later phase checks by
their digests that they are the same.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from luthier_api.exitcodes import ExitCode
from luthier_api.inputs import InputData
from luthier_api.kinds import JobKind, source_name
from luthier_api.run import GenerateRun
from luthier_api.workspace import WorkspaceFolder, shard_manifests
from luthier_trainer.data.load import Loader, Rows
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.workspace.manifest import sha256

FIELD = "spec.inputs.job"
FILE_NAME = "file_name"
"""Column of outputs that are images with their files."""
ERROR = "error"
"""Column of outputs with the reason why one could not be made."""


def rows(run: GenerateRun, job: str, cache: Path) -> Rows:
    """Return the outputs of a job, in their order. Raises Failure if it has none, or if they are damaged."""
    found = tables(run, job)
    source = InputData(files=[str(found[0])], format="jsonl")
    read = Loader(source, FIELD, cache).files([str(path) for path in found], FIELD)
    return with_paths(read) if FILE_NAME in read.data.column_names else read


def with_paths(rows: Rows) -> Rows:
    """Return rows whose images are named by whole paths: in a table, they are relative to its folder."""
    folders = [part.path.parent for part in rows.parts for _ in range(part.rows)]
    names = [
        None if name is None else str(folder / name) for folder, name in zip(folders, rows.data[FILE_NAME], strict=True)
    ]
    return replace(rows, data=rows.data.remove_columns(FILE_NAME).add_column(FILE_NAME, names))


def tables(run: GenerateRun, job: str) -> list[Path]:
    """Return the table of each shard of a job. Raises Failure if one is missing or not as it was written."""
    name = source_name(JobKind.GENERATE, job)
    if name not in run.sources:
        raise Failure(ExitCode.NOT_FOUND, f"{FIELD}: the workspace of GenerateJob {job} is not mounted here")
    folder = WorkspaceFolder(Path(run.sources[name]))
    manifests = shard_manifests(folder)
    if not manifests:
        raise Failure(
            ExitCode.NOT_FOUND,
            f"{FIELD}: GenerateJob {job} has not left the outputs of all its shards in {folder.result}. Has it"
            " finished?",
        )
    found = []
    for manifest in manifests:
        try:
            entry = json.loads(manifest.read_bytes())["files"][0]  # the table comes before the files of its outputs
            path = folder.result / entry["path"]
            whole = path.stat().st_size == entry["size"] and sha256(path) == entry["sha256"]
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise Failure(
                ExitCode.STORAGE_ERROR, f"{FIELD}: the outputs of GenerateJob {job} cannot be read: {error}"
            ) from error
        if not whole:
            raise Failure(
                ExitCode.STORAGE_ERROR,
                f"{FIELD}: {path} of GenerateJob {job} is not as {manifest.name} says. Run it again",
            )
        if entry["size"]:  # a job may have more shards than outputs
            found.append(path)
    return found
