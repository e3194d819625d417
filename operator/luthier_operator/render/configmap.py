"""The run config, in the ConfigMap that every pod of the job mounts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from luthier_api.base import once_for_each
from luthier_api.kinds import FineTuneJob
from luthier_api.marks import TabledSpec, written_part
from luthier_api.quantity import amount
from luthier_api.run import RUNS, FineTuneRun, GenerateRun, Gpu
from luthier_operator import naming, policy
from luthier_operator.model import Object
from luthier_operator.naming import Place
from luthier_operator.profiles import GpuClass
from luthier_operator.render.meta import metadata

if TYPE_CHECKING:
    from luthier_operator.settings import Settings
    from luthier_operator.workloads.base import Workload

LIMIT_BYTES = (1 << 20) - 4096  # a ConfigMap holds 1 MiB, its keys included


def folder(place: Place, own_claim: str) -> str:
    """Path of the folder of a job in the pods: their own claim is mounted at /workspace, others below /sources."""
    mount = naming.WORKSPACE if place.claim == own_claim else f"{naming.SOURCES}/{place.claim}"
    return f"{mount}/{place.folder}"


def run_config(workload: Workload, settings: Settings, sources: Mapping[str, Place]) -> FineTuneRun | GenerateRun:
    """The run config: the document that the pods read."""
    job = workload.job
    own = naming.place(job)
    fields: dict[str, Any] = {
        "name": job.metadata.name,
        "namespace": job.metadata.namespace,
        "uid": job.metadata.uid,
        "workspace": folder(own, own.claim),
        "sources": {name: folder(place, own.claim) for name, place in sorted(sources.items())},
        "rendezvous_host": workload.rendezvous_host,
        "grace_seconds": settings.grace_seconds,
        "step_timeout_seconds": settings.step_timeout_seconds,
        "gpu": gpu_figures(workload, settings),
        "gpu_classes": gpu_classes(workload, settings),
        "spec": workload.run_spec,
    }
    return RUNS[job.kind](**fields)


def gpu_figures(workload: Workload, settings: Settings) -> Gpu | None:
    """What the job's class of GPUs says about them. A class that is gone says nothing: no pod is created with it."""
    name = workload.job.spec.resources.gpu_class
    found = settings.gpu_classes.get(name) if name else None
    return figures_of(found) if found else None


def gpu_classes(workload: Workload, settings: Settings) -> dict[str, Gpu]:
    """The classes that a training may name instead of its own, if it has GPUs: those whose memory is known."""
    if not isinstance(workload.job, FineTuneJob) or not workload.gpus_per_pod:
        return {}
    allowed = policy.allowed_classes(workload.job, settings)
    known = {
        name: figures_of(found) for name, found in settings.gpu_classes.items() if name in allowed and found.memory
    }
    return {name: figures for name, figures in known.items() if figures}


def figures_of(found: GpuClass) -> Gpu | None:
    """What the run config has of a class; None if the administrator has given neither memory nor speed."""
    if not (found.memory or found.peak_flops):
        return None
    memory = int(amount(found.memory)) if found.memory else None
    return Gpu(memory=memory, peak_flops=found.peak_flops, bandwidth=found.bandwidth)


@once_for_each
def spec_text(spec: TabledSpec) -> msgspec.Raw:
    """The spec of a run config as JSON. It takes as long as all the rest of a config map."""
    return msgspec.Raw(msgspec.json.encode(written_part(spec)))


def configmap(workload: Workload, settings: Settings, sources: Mapping[str, Place]) -> Object:
    job, run = workload.job, run_config(workload, settings, sources)
    document = {**run.head(), "spec": spec_text(run.spec)}
    text = msgspec.json.format(msgspec.json.encode(document), indent=1).decode()
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(job, naming.config_name(job)),
        "data": {naming.RUN_FILE: text + "\n"},
    }
