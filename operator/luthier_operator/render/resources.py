"""Requests and limits of a pod: what the job asks for, what its class of GPUs needs, what the administrator has set.

Nothing that a pod writes is without a limit: its root is read-only, and each emptyDir has a size (`volumes`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from luthier_api.quantity import amount, canonical
from luthier_api.spec import PhaseResources
from luthier_api.status import Phase
from luthier_operator.model import Object
from luthier_operator.policy import gpu_class

if TYPE_CHECKING:
    from luthier_operator.profiles import PodResources
    from luthier_operator.settings import Settings
    from luthier_operator.workloads.base import Workload

DISK = "ephemeral-storage"


def resources_of(workload: Workload, settings: Settings, phase: Phase) -> Object:
    """The `resources` of the container."""
    spec = workload.job.spec
    match phase:
        case "prepare":
            return _of_phase(spec.prepare, settings.prepare_resources)
        case "publish":
            return _of_phase(spec.publish, settings.publish_resources)
        case "run":
            return _of_run(workload, settings)


def tmp_size(workload: Workload, settings: Settings, phase: Phase) -> str:
    """The most that a pod of `phase` may write to /tmp."""
    spec = workload.job.spec
    asked = {"prepare": spec.prepare, "run": spec.resources, "publish": spec.publish}[phase]
    return canonical((asked and asked.ephemeral_storage) or settings.tmp_size)


def _of_run(workload: Workload, settings: Settings) -> Object:
    asked = workload.job.spec.resources
    limits = {}
    if asked.memory:
        limits["memory"] = canonical(asked.memory)
    if asked.ephemeral_storage:
        limits[DISK] = canonical(asked.ephemeral_storage)
    limits |= _devices(workload, settings)
    requests = {"cpu": canonical(asked.cpu), **limits} if asked.cpu else limits
    return _without_empty(requests, limits)


def _devices(workload: Workload, settings: Settings) -> dict[str, str]:
    """GPUs, and the devices of a fast network where several pods work together."""
    gpus = workload.gpus_per_pod
    if not gpus:
        return {}
    found = gpu_class(workload.job, settings)
    devices = {found.resource or settings.gpu_resource: str(gpus)}
    if len(workload.groups[0]) > 1:
        devices |= found.network.per_pod
        devices |= {name: str(each * gpus) for name, each in found.network.per_gpu.items()}
    return devices


def _of_phase(asked: PhaseResources | None, default: PodResources) -> Object:
    """`default`, with what the job asks for in its place."""
    requests, limits = ({**amounts.dump()} for amounts in (default.requests, default.limits))
    if asked and asked.cpu:
        requests["cpu"] = asked.cpu
        if "cpu" in limits and amount(str(limits["cpu"])) < amount(asked.cpu):
            limits["cpu"] = asked.cpu
    if asked and asked.memory:
        requests["memory"] = limits["memory"] = asked.memory
    if asked and asked.ephemeral_storage:
        requests[DISK] = limits[DISK] = asked.ephemeral_storage
    texts = ({name: canonical(str(value)) for name, value in amounts.items()} for amounts in (requests, limits))
    return _without_empty(*texts)


def _without_empty(requests: dict[str, str], limits: dict[str, str]) -> Object:
    return {name: amounts for name, amounts in (("requests", requests), ("limits", limits)) if amounts}
