"""Checks before anything heavy starts: visible GPUs, a prepared workspace, and models outside the workspace that have
not changed since.

They run in PID 1, in milliseconds and without torch. Each raises Failure.
"""

from __future__ import annotations

import os
import runpy
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path

from luthier_api.exitcodes import ExitCode
from luthier_api.run import FineTuneRun, GenerateRun
from luthier_trainer.distributed.strategy import uses_deepspeed
from luthier_trainer.runtime import compiler
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.workspace import provenance
from luthier_trainer.workspace.prepared import read_prepared


def check(verb: str, run: FineTuneRun | GenerateRun, devices: Path = Path("/dev")) -> None:
    """All checks of one verb."""
    if verb in ("train", "generate"):
        record = read_prepared(run)
        in_place = {record.model_path, *record.adapter_paths, *record.other_model_paths}
        provenance.refuse_changes(origin for origin in record.origins if origin.path in in_place)
        check_gpus(run, devices)
        if isinstance(run, FineTuneRun):
            compiler.check(run.spec)
        if isinstance(run, FineTuneRun) and needs_operators(record.plan.strategy, run.spec.resources.gpus_per_node):
            check_operators(record.plan.strategy, "cuda" if run.spec.resources.gpus_per_node else "cpu")


def check_gpus(run: FineTuneRun | GenerateRun, devices: Path) -> None:
    """Raise Failure if the pod asked for GPUs and none is visible. The processes count how many torch can use."""
    field, asked = (
        ("spec.resources.gpusPerNode", run.spec.resources.gpus_per_node)
        if isinstance(run, FineTuneRun)
        else ("spec.resources.gpus", run.spec.resources.gpus)
    )
    # NVIDIA, AMD, and NVIDIA under WSL
    if asked and not any([*devices.glob("nvidia[0-9]*"), *devices.glob("kfd"), *devices.glob("dxg")]):
        raise Failure(
            ExitCode.MISCONFIGURED,
            f"{field}: {asked} asked for, but no GPU is visible here. Check the node's driver and device plugin, or set"
            f" {field}: 0 to run on CPU",
        )


def needs_operators(strategy: str, gpus: int) -> bool:
    """Whether DeepSpeed needs its own compiled operators: the CPU optimizer for offload, and its collectives on CPU."""
    return uses_deepspeed(strategy) and (strategy.endswith("-offload") or not gpus)


def check_operators(strategy: str, accelerator: str, install: Path | None = None) -> None:
    """DeepSpeed loads only operators that were built for the accelerator it runs on, and else compiles them, where
    there is a compiler.

    `install`: its folder; default: that of this Python.

    Raises Failure where there are neither. Where they are compiled, locks of killed processes are deleted before.
    """
    spec = find_spec("deepspeed")
    folder = install or Path(next(iter((spec and spec.submodule_search_locations) or ["/"])))
    notes = folder / "git_version_info_installed.py"
    built = runpy.run_path(str(notes)) if notes.exists() else {}
    if built.get("accelerator_name") == accelerator and built.get("installed_ops", {}).get("cpu_adam"):
        return
    if not shutil.which(shlex.split(os.environ.get("CXX") or "c++")[0]):  # CXX may hold arguments, as in `ccache g++`
        raise Failure(
            ExitCode.MISCONFIGURED,
            f"spec.strategy: {strategy} needs DeepSpeed's operators for {accelerator}. This installation has none, and"
            " there is no C++ compiler to make them. Use a trainer image that was built with"
            f" DS_ACCELERATOR={accelerator}, or another strategy",
        )
    from luthier_trainer.supervisor.dead_locks import remove_dead_locks  # psutil: 20 ms that few jobs need

    remove_dead_locks()
