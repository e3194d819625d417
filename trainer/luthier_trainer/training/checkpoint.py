"""Checkpoints: written to a staging folder, flushed to disk, described by a manifest and then renamed.

transformers writes checkpoints in place and resumes from the highest number, even if that one is incomplete. Therefore
`resilience` lets it write into a staging folder, and this module commits, verifies and removes checkpoints. A run never
resumes from one that does not match its manifest. Each rank describes the files that it has written and verifies its
share of a checkpoint; only rank 0 moves and removes folders.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier_api.decides import result_part
from luthier_api.exitcodes import ExitCode
from luthier_api.run import FineTuneRun, PreparedRecord
from luthier_api.workspace import MANIFEST
from luthier_trainer.runtime.failure import START_OVER, Failure
from luthier_trainer.runtime.heartbeat import beat, beat_before_first_step
from luthier_trainer.workspace import manifest, space
from luthier_trainer.workspace.manifest import Entry, fsync, read_manifest
from luthier_trainer.workspace.prepared import DIFFERENCES_SHOWN, differences

if TYPE_CHECKING:
    from luthier_trainer.distributed.ranks import Ranks  # imports torch

FOLDER = re.compile(r"checkpoint-(\d+)")
STAGING, CORRUPT = ".staging-", ".corrupt-"
KEPT_CORRUPT = 2  # enough to investigate the cause; a broken checkpoint takes as much space as a good one
SHARED_VOLUME_SECONDS = 60.0  # NFS clients may cache a folder's entries for 30 s (acdirmin)
SHARDS = "fsdp_rank_{}_states.pt"  # what a process has of weights and optimiser under FSDP
# Files with the number of the rank that writes them in their names: transformers' states of the random generators, and
# the shards of weights and optimizer, of FSDP or DeepSpeed. Rank 0 writes all other files.
OF_A_RANK = re.compile(
    r"rng_state_(\d+)\.pth|fsdp_rank_(\d+)_states\.pt"
    r"|(?:.+_)?zero_pp_rank_(\d+)_mp_rank_\d+_(?:model|optim)_states\.pt"
)


def identity(run: FineTuneRun, prepared: PreparedRecord) -> dict[str, Any]:
    """Return what must be the same for a checkpoint, or a result, to belong to this run: field → value.

    It holds the fields of the spec that affect the result, and the revisions of model and dataset. Strategy and
    resources are represented by what they resolve to: the planned strategy and the number of processes. Where a
    micro-batch has images of one size, the order of an epoch depends on how many rows that are.
    """
    spec = {f"spec.{field}": value for field, value in result_part(run.spec).items() if field != "resources"}
    if run.spec.has_buckets:
        spec["spec.training.microBatchSize"] = prepared.plan.micro_batch_size
    return spec | {
        "the model's revision": prepared.model.revision,
        "the dataset's revision": prepared.dataset.revision,
        "spec.strategy": prepared.plan.strategy,
        "the number of processes": run.spec.resources.world_size,
    }


def facts_of(run_identity: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a manifest that record an identity: the identity itself and its SHA-256."""
    return {"run": run_identity, "runHash": digest(run_identity)}


def check_identity(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise Failure(INVALID_SPEC) if the checkpoint or result in `folder` was made by a run with another identity.

    `found`: its manifest. `wanted`: the identity of this run. The message names the differences.
    """
    if found.get("runHash") == digest(wanted):
        return
    found_differences = list(differences(json.loads(json.dumps(wanted)), found.get("run") or {}))
    raise Failure(
        ExitCode.INVALID_SPEC,
        f"{folder} was made by a run with other settings:"
        f" {'; '.join(found_differences[:DIFFERENCES_SHOWN]) or 'its manifest does not say which'}. Change it back to"
        f" resume, or {START_OVER[0].lower()}{START_OVER[1:]}",
    )


def newest(folder: Path, wanted: dict[str, Any], ranks: Ranks) -> Path | None:
    """Return the newest checkpoint in `folder` that matches its manifest, or None.

    Broken checkpoints are set aside, and folders left by interrupted saves are removed. All ranks call this function
    and share the work of reading the files. Raises Failure(INVALID_SPEC) if the checkpoint belongs to a run with other
    settings.
    """
    for checkpoint in ranks.decide(lambda: candidates(folder)):
        found, broken = verify(checkpoint, ranks)
        if not broken:
            check_identity(checkpoint, found, wanted)
            return checkpoint
        ranks.decide(partial(reject, checkpoint, broken))
    return None


def verify(checkpoint: Path, ranks: Ranks) -> tuple[dict[str, Any], list[str]]:
    """Return the manifest of a checkpoint, and a line for each difference between the manifest and the files.

    All ranks call this function, and each one reads a share of the files. The result is the same on all of them.
    """
    found = ranks.decide(lambda: read_manifest(checkpoint))
    if found is None:
        return {}, [f"its {MANIFEST} is missing, unreadable or incomplete"]
    share = share_of(found["files"], ranks.rank, ranks.count)
    reports = ranks.each(lambda: manifest.differences(checkpoint, share, beat_before_first_step))
    return found, [line for report in reports for line in report]


def candidates(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, newest first, and remove the folders left by interrupted saves."""
    if not folder.is_dir():
        return []
    for staging in folder.glob(f"{STAGING}*"):
        shutil.rmtree(staging)
    return sorted(checkpoints(folder), key=step_of, reverse=True)


def share_of(entries: Sequence[Entry], rank: int, count: int) -> list[Entry]:
    """Return the entries that `rank` of `count` ranks reads.

    The files are distributed round-robin by size, the largest first, so that all ranks read about as many bytes.
    """
    return sorted(entries, key=lambda entry: (-int(entry["size"]), str(entry["path"])))[rank::count]


def reject(checkpoint: Path, broken: list[str]) -> None:
    """Rename a broken checkpoint, so that no attempt resumes from it.

    `broken`: the differences to its manifest, for the log. Only the newest `KEPT_CORRUPT` broken checkpoints are kept.
    """
    aside = checkpoint.with_name(f"{CORRUPT}{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    os.utime(aside)
    print(f"{checkpoint.name} is broken and set aside as {aside.name}: {'; '.join(broken[:3])}", flush=True)
    by_age = sorted(set_aside(checkpoint.parent), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for old in by_age[KEPT_CORRUPT:]:
        print(f"{old.name} is removed: {KEPT_CORRUPT} newer ones lie set aside", flush=True)
        shutil.rmtree(old)


def make_room(folder: Path, size: int) -> None:
    """Ensure that the volume has space for a checkpoint of `size` bytes. If needed, broken checkpoints are removed.

    Raises Failure(STORAGE_ERROR) if the space is still too small.
    """
    for broken in set_aside(folder):
        if space.volume(folder)[0] < size:
            print(f"{broken.name} is removed: the volume has no room for the next checkpoint beside it", flush=True)
            shutil.rmtree(broken)
    space.check_save(folder, size)


def writer(file: Path, ranks: int) -> int:
    """Return the rank, of `ranks` in total, that writes `file`, derived from its name.

    The result only decides which rank reads a file back. It does not affect what the manifest records.
    """
    match = OF_A_RANK.fullmatch(file.name)
    rank = int(match[match.lastindex or 0]) if match else 0
    return rank if rank < ranks else 0


def describe(staged: Path, rank: int, ranks: int) -> list[Entry]:
    """Flush the files that `rank` has written to `staged`, and return path, size and digest of each.

    Every rank does this for its own files, because a node can flush only its own writes.
    """
    files = manifest.files_in(staged)
    return manifest.describe(staged, [file for file in files if writer(file, ranks) == rank], beat)


def commit(staged: Path, folder: Path, described: Sequence[Sequence[Entry]], facts: dict[str, Any]) -> Path:
    """Move `staged` to its final name in `folder` and return that path. Only rank 0 calls this function.

    `described`: the entries of `describe`, one list for each rank. `facts`: further entries of the manifest. Raises
    Failure(STORAGE_ERROR) if the files of some ranks are not visible, because the pods do not share the volume.
    """
    entries = {entry["path"]: entry for of_rank in described for entry in of_rank}
    deadline = time.monotonic() + SHARED_VOLUME_SECONDS
    while missing := [
        rank for rank, of_rank in enumerate(described) if not all(_is_seen(staged, entry) for entry in of_rank)
    ]:
        if time.monotonic() > deadline:
            raise Failure(
                ExitCode.STORAGE_ERROR,
                f"spec.workspace: only {len(described) - len(missing)} of {len(described)} processes could be seen"
                f" writing to {folder}. Pods on several nodes need a volume that they share (accessMode:"
                " ReadWriteMany)",
            )
        time.sleep(0.5)
    left = [file for file in manifest.files_in(staged) if file.relative_to(staged).as_posix() not in entries]
    manifest.write_manifest(staged, [*entries.values(), *manifest.describe(staged, left, beat)], **facts)
    final = folder / staged.name
    if final.exists():
        final.rename(staged.parent / "replaced")
    staged.rename(final)
    fsync(folder)
    shutil.rmtree(staged.parent)
    return final


def load_back(folder: Path, ranks: Ranks) -> None:
    """Read the checkpoint from its volume, and load its files as a resumed attempt would.

    All ranks call this function, and each one reads a share of the files. Raises Failure(STORAGE_ERROR) if files are
    not what was written, or cannot be loaded.
    """
    ranks.each(lambda: _forget(folder))
    found, broken = verify(folder, ranks)
    share = share_of(found["files"], ranks.rank, ranks.count) if found else []
    reports = ranks.each(lambda: [line for entry in share if (line := _unloadable(folder / entry["path"]))])
    lines = [*broken, *(line for report in reports for line in report)]
    if lines:
        raise Failure(
            ExitCode.STORAGE_ERROR,
            f"spec.workspace: {folder.name} was written, and cannot be read back:"
            f" {'; '.join(lines[:DIFFERENCES_SHOWN])}. Look after the volume",
        )


def _forget(folder: Path) -> None:
    """Drop the files from this node's memory, so that they are read from the volume."""
    for file in manifest.files_in(folder):
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def _unloadable(file: Path) -> str | None:
    """Return why a file of a checkpoint cannot be loaded; None if it can, or if it is none that is loaded."""
    import torch
    from safetensors import safe_open

    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                names = list(tensors.keys())
                empty = [name for name in names if 0 in tensors.get_slice(name).get_shape()]
            if empty:
                return f"{file.name} has empty tensors, among them {empty[0]}"
        elif file.suffix in (".pt", ".pth"):
            torch.load(file, map_location="cpu", mmap=True, weights_only=False)
        elif file.suffix == ".json":
            json.loads(file.read_bytes())
    except Exception as error:  # each format has its own
        return f"{file.name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    beat()
    return None


def _is_seen(staged: Path, entry: Entry) -> bool:
    path = staged / entry["path"]
    return path.is_file() and path.stat().st_size == entry["size"]


def rotate(folder: Path, keep: int, best: int | None = None) -> None:
    """Remove all but the newest `keep` checkpoints and that of step `best`.

    Called right after the newest one was committed.
    """
    for old in sorted(checkpoints(folder), key=step_of)[:-keep]:
        if step_of(old) != best:
            shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """Return the committed checkpoints in `folder`, in no particular order."""
    return [p for p in folder.iterdir() if p.is_dir() and FOLDER.fullmatch(p.name)]


def set_aside(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder` that were found broken and renamed."""
    return list(folder.glob(f"{CORRUPT}*"))


def step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint, from the name of its folder."""
    match = FOLDER.fullmatch(checkpoint.name)
    assert match, checkpoint
    return int(match[1])


def digest(run_identity: dict[str, Any]) -> str:
    """Return the SHA-256 of an identity."""
    return hashlib.sha256(json.dumps(run_identity, sort_keys=True).encode()).hexdigest()
