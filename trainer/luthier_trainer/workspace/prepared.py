"""`prepared/`: whether it is there, whole, and of this very job. Torch-free, because PID 1 looks too.

Neighbours: `prepare` writes it, `train`, `generate` and `publish` read it through `read_prepared`.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from pydantic import ValidationError

from luthier_api.exitcodes import ExitCode
from luthier_api.run import FineTuneRun, GenerateRun, PreparedRecord
from luthier_api.spec import JobControl
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.workspace.manifest import fsync

FINGERPRINT = "run.sha256"
# What may differ between two starts of the same job: it decides where and when work is done, never what is made.
CIRCUMSTANCES = set(JobControl.model_fields) | {
    "hub",
    "restarts",
    "retries_per_shard",
    "workspace",
    "volumes",
    "scheduling",
}


def fingerprint(run: FineTuneRun | GenerateRun) -> str:
    """SHA-256 of what the job is: its kind, its uid, and the part of its spec that decides the result."""
    spec = run.spec.model_dump(mode="json", exclude=CIRCUMSTANCES)
    identity = {"kind": run.kind, "name": run.name, "uid": run.uid, "spec": spec}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def belongs(run: FineTuneRun | GenerateRun) -> bool:
    """Whether `prepared/` was begun for this job and not for an earlier manifest in the same folder."""
    try:
        return (WorkspaceFolder(Path(run.workspace)).prepared / FINGERPRINT).read_text().strip() == fingerprint(run)
    except OSError:
        return False


def write_prepared(run: FineTuneRun | GenerateRun, record: PreparedRecord) -> None:
    """Make the record appear, whole and durable. `prepare` does this last."""
    path = WorkspaceFolder(Path(run.workspace)).prepared_record
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record.dump(), indent=1))
    fsync(partial)
    os.replace(partial, path)
    fsync(path.parent)


def read_prepared(run: FineTuneRun | GenerateRun) -> PreparedRecord:
    """The record of this job. Raises Failure when `prepare` has not ended well here."""
    path = WorkspaceFolder(Path(run.workspace)).prepared_record
    try:
        record = PreparedRecord.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise Failure(ExitCode.MISCONFIGURED, f"{path}: missing. Run `prepare` first, on the same workspace") from None
    except (OSError, ValidationError) as error:
        raise Failure(ExitCode.STORAGE_ERROR, f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if not belongs(run):
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{path}: was prepared for another version of job {run.name!r}. Run `prepare` again, or use another"
            " workspace",
        )
    return record
