"""What must hold before anything heavy starts: folders that can be written, GPUs that can be seen, a prepared workspace, and
models elsewhere that are still those it was prepared with.

Runs in PID 1, in milliseconds and without torch, so that a wrong mount costs a fraction of a second. Each check raises Failure.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from luthier_api.exitcodes import ExitCode
from luthier_api.run import FineTuneRun, GenerateRun
from luthier_trainer import origins
from luthier_trainer.ending import STORAGE_ERRNOS, Failure
from luthier_trainer.prepared import read_prepared


def check(verb: str, run: FineTuneRun | GenerateRun, run_dir: Path, devices: Path = Path("/dev")) -> None:
    """All checks of one verb; creates the job's workspace folder and the run folder on the way."""
    for folder, field in folders(run, run_dir):
        check_writable(folder, field)
    if verb in ("train", "generate"):
        record = read_prepared(run)
        in_place = {record.model_path, *record.adapter_paths}
        origins.refuse_changes(origin for origin in record.origins if origin.path in in_place)
        check_gpus(run, devices)


def folders(run: FineTuneRun | GenerateRun, run_dir: Path) -> Iterator[tuple[Path, str]]:
    """Each folder that the phases write to, with the name of what decides its place."""
    yield Path(run.workspace), "spec.workspace"
    yield run_dir, "LUTHIER_RUN_DIR"
    yield Path(tempfile.gettempdir()), "TMPDIR"
    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        if os.environ.get(name):
            yield Path(os.environ[name]), name


def check_writable(folder: Path, field: str) -> None:
    """Create `folder` if need be, and in it create, flush and delete a file."""
    probe = folder / f".luthier-probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with probe.open("wb") as file:
                file.write(b"luthier")
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        code = ExitCode.STORAGE_ERROR if error.errno in STORAGE_ERRNOS - {errno.EROFS} else ExitCode.MISCONFIGURED
        raise Failure(code, f"{field}: cannot write to {folder}: {error.strerror}. {_rights(folder)}") from error


def _rights(folder: Path) -> str:
    """Owner and mode of the nearest folder that exists, against who we are, and what to do about it."""
    there = next(p for p in (folder, *folder.parents) if p.exists())
    facts = there.stat()
    return (
        f"{there} belongs to {facts.st_uid}:{facts.st_gid}, mode {stat.S_IMODE(facts.st_mode):04o}; this process is {os.getuid()}:{os.getgid()}"
        f" (groups {', '.join(map(str, os.getgroups())) or 'none'}). Use a volume that honours fsGroup, or give its folder to that group"
    )


def check_gpus(run: FineTuneRun | GenerateRun, devices: Path) -> None:
    """A pod that asked for GPUs sees one at least; how many torch can use is counted by the processes themselves."""
    field, asked = (
        ("spec.resources.gpusPerNode", run.spec.resources.gpus_per_node)
        if isinstance(run, FineTuneRun)
        else ("spec.resources.gpus", run.spec.resources.gpus)
    )
    # NVIDIA, AMD, and NVIDIA under WSL
    if asked and not any([*devices.glob("nvidia[0-9]*"), *devices.glob("kfd"), *devices.glob("dxg")]):
        raise Failure(
            ExitCode.MISCONFIGURED,
            f"{field}: {asked} asked for, but no GPU is visible here. Check the node's driver and device plugin, or set {field}: 0 to run on CPU",
        )
