"""Checkpoints that can be trusted: staged beside, made durable, manifest last, renamed; what does not verify is never resumed from.

transformers writes in place and resumes from the highest number, whole or not, so the folder is ours: `loop` lets it
write into a staging folder, this module decides what becomes of it. Only rank 0 calls these functions.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

from luthier_api.exitcodes import ExitCode
from luthier_api.run import FineTuneRun, PreparedRecord
from luthier_trainer.ending import START_OVER, Failure
from luthier_trainer.manifest import fsync, problems, read_manifest, write_manifest

FOLDER = re.compile(r"checkpoint-(\d+)")
STAGING, CORRUPT = ".staging-", ".corrupt-"
SHARED_VOLUME_SECONDS = 60.0  # NFS clients may cache a folder's entries for 30 s (acdirmin)


def identity(run: FineTuneRun, prepared: PreparedRecord) -> dict[str, Any]:
    """What must be the same for a checkpoint, or a result, to belong to this run: field → value."""
    spec = run.spec.dump()
    return {f"spec.{field}": spec.get(field) for field in ("task", "model", "dataset", "method", "training")} | {
        "the model's revision": prepared.model.revision,
        "the dataset's revision": prepared.dataset.revision,
        "spec.strategy": prepared.plan.strategy,
        "the number of processes": run.spec.resources.world_size,
    }


def facts_of(run_identity: dict[str, Any]) -> dict[str, Any]:
    """How an identity is written into a manifest."""
    return {"run": run_identity, "runHash": _digest(run_identity)}


def check_identity(folder: Path, manifest: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise Failure(INVALID_SPEC) when what lies in `folder` was made by another run, and say what differs."""
    if manifest.get("runHash") == _digest(wanted):
        return
    differences = list(_differences("", json.loads(json.dumps(wanted)), manifest.get("run") or {}))
    raise Failure(
        ExitCode.INVALID_SPEC,
        f"{folder} was made by a run with other settings: {'; '.join(differences[:5]) or 'its manifest does not say which'}. {START_OVER}",
    )


def newest(folder: Path, wanted: dict[str, Any]) -> Path | None:
    """The newest checkpoint in `folder` that verifies, or None. Broken ones are set aside, left-overs of interrupted saves removed.

    Raises Failure(INVALID_SPEC) when that checkpoint belongs to a run with other settings.
    """
    if not folder.is_dir():
        return None
    for staging in folder.glob(f"{STAGING}*"):
        shutil.rmtree(staging)
    for checkpoint in sorted(checkpoints(folder), key=step_of, reverse=True):
        if broken := problems(checkpoint):
            aside = folder / f"{CORRUPT}{checkpoint.name}"
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)
            print(f"{checkpoint.name} is broken and set aside as {aside.name}: {'; '.join(broken[:3])}", flush=True)
            continue
        check_identity(checkpoint, read_manifest(checkpoint) or {}, wanted)
        return checkpoint
    return None


def commit(staged: Path, folder: Path, processes: int, facts: dict[str, Any]) -> Path:
    """Make `staged` the checkpoint of that name in `folder`. Every process has finished writing before.

    Raises Failure(STORAGE_ERROR) when the states of some processes are not to be seen: pods that do not share the volume.
    """
    deadline = time.monotonic() + SHARED_VOLUME_SECONDS
    while (seen := len(list(staged.glob("rng_state*.pth")))) < processes:
        if time.monotonic() > deadline:
            raise Failure(
                ExitCode.STORAGE_ERROR,
                f"spec.workspace: only {seen} of {processes} processes could be seen writing to {folder}. Pods on several nodes need a "
                "volume that they share (accessMode: ReadWriteMany)",
            )
        time.sleep(0.5)
    write_manifest(staged, **facts)
    final = folder / staged.name
    if final.exists():
        final.rename(staged.parent / "replaced")
    staged.rename(final)
    fsync(folder)
    shutil.rmtree(staged.parent)
    return final


def rotate(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints. Called when the newest has just been committed."""
    for old in sorted(checkpoints(folder), key=step_of)[:-keep]:
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if p.is_dir() and FOLDER.fullmatch(p.name)]


def set_aside(folder: Path) -> list[Path]:
    """Those in `folder` that were found broken."""
    return list(folder.glob(f"{CORRUPT}*"))


def step_of(checkpoint: Path) -> int:
    match = FOLDER.fullmatch(checkpoint.name)
    assert match, checkpoint
    return int(match[1])


def _digest(run_identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(run_identity, sort_keys=True).encode()).hexdigest()


def _differences(path: str, wanted: Any, found: Any) -> Any:
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key in sorted(wanted.keys() | found.keys()):
            yield from _differences(f"{path}.{key}".lstrip("."), wanted.get(key), found.get(key))
    elif wanted != found:
        yield f"{path} is {wanted!r}, there it was {found!r}"
