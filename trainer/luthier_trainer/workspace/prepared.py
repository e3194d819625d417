"""Reads and writes the record of `prepare`, and checks that it is of this job. Torch-free: PID 1 reads it too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from luthier_api.decides import result_part
from luthier_api.exitcodes import ExitCode
from luthier_api.run import FineTuneRun, GenerateRun, PreparedRecord
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.workspace import gpu_memory
from luthier_trainer.workspace.manifest import replace_file

FINGERPRINT = "fingerprint.json"
DIFFERENCES_SHOWN = 5


def fingerprint(run: FineTuneRun | GenerateRun) -> str:
    """What the job is, as JSON: its kind, its name, its uid, and the part of its spec that decides the result."""
    identity = {"kind": run.kind, "name": run.name, "uid": run.uid, "spec": result_part(run.spec)}
    return json.dumps(identity, sort_keys=True)


def belongs(run: FineTuneRun | GenerateRun) -> bool:
    """Whether `prepared/` was begun for this job and not for an earlier manifest in the same folder."""
    return _fingerprint_found(run) == fingerprint(run)


def _fingerprint_found(run: FineTuneRun | GenerateRun) -> str | None:
    try:
        return (WorkspaceFolder(Path(run.workspace)).prepared / FINGERPRINT).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def write_prepared(run: FineTuneRun | GenerateRun, record: PreparedRecord) -> None:
    """Write the record, whole and durable. `prepare` does this last."""
    path = WorkspaceFolder(Path(run.workspace)).prepared_record
    replace_file(path, json.dumps(record.dump(), indent=1).encode())


def read_prepared(run: FineTuneRun | GenerateRun) -> PreparedRecord:
    """The record of this job. Its plan has the micro-batch that the run config asks for: after the GPU's memory has run
    out, the operator asks for a smaller one than `prepare` has planned.

    Raises Failure when `prepare` has not ended well here.
    """
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
            f"{path}: was prepared for another version of job {run.name!r}{_what_differs(run)}. Run `prepare` again,"
            " or use another workspace",
        )
    rows = run.spec.training.micro_batch_size if isinstance(run, FineTuneRun) else None
    if rows and rows != record.plan.micro_batch_size:
        assert isinstance(run, FineTuneRun), "only its spec has micro-batches"
        plan = record.plan.with_micro_batch(rows)
        if record.memory_facts is not None:
            plan = plan.model_copy(update={"memory": gpu_memory.peak(run.spec, plan, record.memory_facts)})
        return record.model_copy(update={"plan": plan})
    return record


def _what_differs(run: FineTuneRun | GenerateRun) -> str:
    """The fields that differ, for the message; nothing if another version of the image has written the fingerprint."""
    try:
        found = json.loads(_fingerprint_found(run) or "")
    except ValueError:
        return ""
    shown = list(differences(json.loads(fingerprint(run)), found))[:DIFFERENCES_SHOWN]
    return f": {'; '.join(shown)}" if shown else ""


def differences(wanted: Any, found: Any, path: str = "") -> Iterator[str]:
    """What differs between two JSON documents, a sentence for each field."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key in sorted(wanted.keys() | found.keys()):
            yield from differences(wanted.get(key), found.get(key), f"{path}.{key}".lstrip("."))
    elif wanted != found:
        yield f"{path} is {wanted!r}, there it was {found!r}"
