"""What `luthier plan --quick` says of memory, time and cost: asks the trainer, and writes the answer for people.

Nothing is downloaded. Classes of GPUs are those that the administrator has described, or else known by name.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from luthier_api.exitcodes import ExitCode
from luthier_api.gpus import KNOWN_GPUS
from luthier_api.kinds import JobKind
from luthier_api.quantity import amount
from luthier_api.run import FineTuneRun, Gpu
from luthier_cli.asking import ask
from luthier_cli.local import LocalJob
from luthier_cli.manifests import Refused
from luthier_cli.screen import duration, gigabytes
from luthier_operator.profiles import GpuClass

MODULE = "luthier_trainer.prepare.estimate"
VARIABLE = "LUTHIER_GPU_CLASSES"
VALUES = "gpuClasses"
"""Of the chart."""
HF_HOME = "~/.cache/huggingface"
FOR_USERS = (ExitCode.DOES_NOT_FIT, ExitCode.INVALID_SPEC)
"""Codes of what the user has to change. Whatever else fails only means that there is no estimate."""
NO_TRAINER = "memory and time are not estimated: luthier_trainer is not installed (pip install '.[trainer]')"


@dataclass(frozen=True)
class Wanted:
    """The options of `luthier plan` that decide what is estimated."""

    classes: Sequence[str] = ()
    """Names of classes to compare."""
    values: Path | None = None
    """A file with values of the chart, which describes classes."""
    config: Path | None = None
    """Configuration of the model."""
    rows: int | None = None
    """Rows to learn from."""


def known_classes(values: Path | None) -> dict[str, Gpu]:
    """Return the classes of GPUs by name: of `values`, else of the environment, and those known by name.

    Raises Refused for a file that does not describe them.
    """
    known = {
        name: Gpu(memory=gpu.memory, peak_flops=gpu.peak_flops, bandwidth=gpu.bandwidth)
        for name, gpu in KNOWN_GPUS.items()
    }
    try:
        if values is not None:
            document = yaml.safe_load(values.read_text())
        else:
            document = json.loads(os.environ.get(VARIABLE) or "{}")
        described = document.get(VALUES, document) or {}
        classes = {name: GpuClass.model_validate(given) for name, given in described.items()}
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        where = f"--gpu-classes {values}" if values is not None else VARIABLE
        raise Refused([f"{where}: describes no classes of GPUs: {' '.join(str(error).split())[:300]}"]) from None
    for name, given in classes.items():
        memory = int(amount(given.memory)) if given.memory else None
        known[name] = Gpu(memory=memory, peak_flops=given.peak_flops, bandwidth=given.bandwidth)
    return known


def estimate(job: LocalJob, wanted: Wanted) -> dict[str, Any]:
    """Return the plan of a FineTuneJob from its manifest and the configuration of its model.

    Where it cannot be estimated, the only entry is the reason. Raises Refused if the training does not fit, or for a
    class that is not known.
    """
    if job.kind is not JobKind.FINE_TUNE:
        return {}
    known = known_classes(wanted.values)
    if unknown := [name for name in wanted.classes if name not in known]:
        raise Refused([f"--gpu-class {', '.join(unknown)}: not known. Known are {', '.join(known)}"])
    classes = {name: known[name] for name in wanted.classes}
    if lacking := [name for name, gpu in classes.items() if gpu.memory is None]:
        raise Refused([f"--gpu-class {', '.join(lacking)}: its memory is not described; add gpuClasses.*.memory"])
    if reason := cannot_estimate(job, wanted):
        return {"notEstimated": reason}
    run = run_of(job)
    own = known.get(run.spec.resources.gpu_class or "")
    run = run.model_copy(update={"gpu": own, "gpu_classes": {n: gpu for n, gpu in known.items() if gpu.memory}})
    request = {
        "run": run.dump(),
        "classes": {name: gpu.dump() for name, gpu in classes.items()},
        "config": str(wanted.config.resolve()) if wanted.config else None,
        "rows": wanted.rows,
    }
    with tempfile.TemporaryDirectory(prefix="luthier-") as folder:
        file = Path(folder) / "request.json"
        file.write_text(json.dumps(request))
        try:
            return ask(MODULE, str(file), environment=job.environment("prepare", 0))
        except Refused as refused:
            if refused.code in FOR_USERS or wanted.classes or wanted.config:
                raise
            return {"notEstimated": refused.problems[0]}


def cannot_estimate(job: LocalJob, wanted: Wanted) -> str | None:
    """Return why memory and time are not estimated, as far as it is known before the trainer is asked.

    Raises Refused if classes of GPUs are to be compared for a job without GPUs.
    """
    if not job.workload.gpus_per_pod and wanted.classes:
        raise Refused([f"--gpu-class: {job.name} requests no GPUs; set {job.workload.gpus_field}"])
    if not job.workload.gpus_per_pod:
        return "memory and time are estimated for GPUs, and the job requests none"
    if find_spec("luthier_trainer") is None or find_spec("torch") is None:
        return NO_TRAINER
    model = job.manifest.job.spec.model
    cached = Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or HF_HOME).expanduser() / "hub")
    if wanted.config or not model.id or (cached / f"models--{model.id.replace('/', '--')}").is_dir():
        return None
    return (
        f"memory and time are not estimated: the configuration of {model.id} is not on this machine, and nothing is"
        " downloaded. Name its file with --model-config, or plan without --quick"
    )


def run_of(job: LocalJob) -> FineTuneRun:
    """Return the run config of a job whose rows need not be on this machine. Raises Refused if its model has to be."""
    spec = job.manifest.job.spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    if "path" in spec["model"]:
        spec["model"]["path"] = job.here("spec.model.path", spec["model"]["path"])
    sources = {name: str(job.place.folder(name)) for name in job.workload.sources.values()}
    run = {"name": job.name, "workspace": str(job.folder.root), "sources": sources, "spec": spec}
    return FineTuneRun.model_validate(run)


def figures(plan: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (name, figure) of a plan, as people read it."""
    memory = plan.get("memory") or {}
    layout = [plan["strategy"]] if plan["strategy"] != "none" else []
    layout.append(f"batch {plan['microBatchSize']} × {plan.get('accumulationSteps', 1)} × {plan['worldSize']}")
    layout += ["activations recomputed"] if plan.get("gradientCheckpointing") else []
    yield "weights", f"{plan.get('parameters', 0):,}, of which {plan.get('trainableParameters', 0):,} learn"
    yield "layout", ", ".join(layout)
    if memory.get("gpuBytes"):
        yield "memory of a GPU", gigabytes(memory["gpuBytes"])
        yield "", ", ".join(f"{name} {gigabytes(size)}" for name, size in memory["gpu"].items())
    if memory.get("hostBytes"):
        yield "memory of a pod", gigabytes(memory["hostBytes"])
    if plan.get("checkpointBytes"):
        yield "checkpoint", f"{gigabytes(plan['checkpointBytes'])}, result {gigabytes(plan['resultBytes'])}"
    yield from totals(plan)


def totals(plan: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (name, figure) of what all steps come to."""
    if plan.get("steps"):
        tokens = f", {plan['tokens']:,} tokens" if plan.get("tokens") else ""
        yield "steps", f"{plan['steps']:,}{tokens}"
    if plan.get("flops"):
        yield "operations", f"{plan['flops']:.3g} FLOP"
    if plan.get("seconds"):
        yield "time", f"about {duration(plan['seconds'])}, {plan['gpuHours']:,.3g} GPU-hours"


def shown(intended: Mapping[str, Any], estimated: Mapping[str, Any]) -> Iterator[str | Table]:
    """Yield what `luthier plan` prints of a job.

    A comparison of classes is an answer of its own: it comes without what would run, of which plan --quick tells.
    """
    if "classes" in estimated:
        yield compared(estimated["classes"])
    else:
        written = {name: value for name, value in intended.items() if value not in (None, [])}
        yield f"{yaml.safe_dump(written, sort_keys=False)}---"
    if "plan" in estimated:
        yield table(estimated["plan"])
    remarks = (estimated.get("notEstimated"), *estimated.get("assumptions", []), *estimated.get("notices", []))
    yield from (f"note: {remark}" for remark in remarks if remark)


def table(plan: Mapping[str, Any]) -> Table:
    """Return a plan as a table."""
    drawn = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, figure in figures(plan):
        drawn.add_row(name, figure)
    for reason in plan.get("reasons", []):
        drawn.add_row("", reason)
    return drawn


def compared(classes: Sequence[Mapping[str, Any]]) -> Table:
    """Return one row a class of GPUs."""
    drawn = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("class", "memory", "peak", "layout", "time", "GPU-hours"):
        drawn.add_column(title)
    for entry in classes:
        if not entry["fits"]:
            drawn.add_row(entry["gpuClass"], gigabytes(entry["memory"]), "does not fit", entry["message"])
            continue
        plan = entry["plan"]
        layout = dict(figures(plan))["layout"]
        time = duration(plan["seconds"]) if plan.get("seconds") else ""
        cost = f"{plan['gpuHours']:,.3g}" if plan.get("gpuHours") is not None else ""
        peak = gigabytes(plan["memory"]["gpuBytes"])
        drawn.add_row(entry["gpuClass"], gigabytes(entry["memory"]), peak, layout, time, cost)
    return drawn
