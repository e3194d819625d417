"""What the administrator's profiles mean for a job: the defaults that it gets, and why it is refused.

A refusal names the field, its value, the limit and who set it, so that a user knows whom to ask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic.alias_generators import to_camel

from luthier_api.kinds import FineTuneJob
from luthier_api.quantity import amount
from luthier_operator.model import Job
from luthier_operator.profiles import GpuClass

if TYPE_CHECKING:
    from luthier_operator.settings import Settings
    from luthier_operator.workloads.base import Workload

EVERYWHERE = "*"
CHART = "in the values of Luthier's chart"

FIELDS: dict[str, tuple[str, ...]] = {
    "queue_name": ("scheduling", "queue_name"),
    "priority_class_name": ("scheduling", "priority_class_name"),
    "gpu_class": ("resources", "gpu_class"),
    "cpu": ("resources", "cpu"),
    "memory": ("resources", "memory"),
    "workspace_size": ("workspace", "size"),
    "storage_class_name": ("workspace", "storage_class_name"),
    "active_deadline_seconds": ("active_deadline_seconds",),
    "ttl_seconds_after_finished": ("ttl_seconds_after_finished",),
    "tracking": ("tracking",),
}
"""Field of `Defaults` → where it stands in a spec."""
ONLY_WITH_GPUS = {"gpu_class"}
ONLY_FOR_NEW_CLAIMS = {"workspace_size", "storage_class_name"}


class NotAllowed(ValueError):
    """The administrator's settings do not allow what a job asks for."""


@dataclass(frozen=True)
class Setting:
    """A value that the administrator has set, and where."""

    value: Any
    where: str

    def __str__(self) -> str:
        return f"set by the administrator: {self.where} {CHART}"


@dataclass(frozen=True)
class Asked:
    """What a job asks for that may have a maximum."""

    maximum: str
    """Field of `Maxima`."""
    field: str
    """Of the spec."""
    value: str | None
    """None: without any limit."""
    what: str = ""


def with_defaults(job: Job, settings: Settings) -> Job:
    """`job` with the defaults of its namespace."""
    if not settings.namespace_policies:
        return job
    for path, setting in defaults(job, settings).items():
        *blocks, name = path
        if blocks:
            (block,) = blocks
            changed = getattr(job.spec, block).model_copy(update={name: setting.value})
            spec = job.spec.model_copy(update={block: changed})
        else:
            spec = job.spec.model_copy(update={name: setting.value})
        job = job.model_copy(update={"spec": spec})
    return job


def describe_defaults(job: Job, settings: Settings) -> str:
    """The defaults that `job` gets, as a sentence; empty if there are none."""
    found = [
        f"spec.{'.'.join(to_camel(step) for step in path)}: {shown(setting.value)}"
        for path, setting in defaults(job, settings).items()
    ]
    if not found:
        return ""
    return f". Left out, and set by the administrator for this namespace: {', '.join(found)}"


def shown(value: Any) -> str:
    """A value of the administrator in a message. A list is one of trackers."""
    if isinstance(value, list):
        return " and ".join(f"{tracker.type}{f' ({tracker.url})' if tracker.url else ''}" for tracker in value)
    return str(value)


def defaults(job: Job, settings: Settings) -> dict[tuple[str, ...], Setting]:
    """Path in the spec → the default, for each field that `job` leaves out."""
    found = {}
    for name, path in FIELDS.items():
        setting = _setting(job, settings, "defaults", name)
        if setting is None or path[0] not in type(job.spec).model_fields or _is_set(job, path):
            continue
        if name in ONLY_WITH_GPUS and not job.spec.resources.gpus_per_pod:
            continue
        if name in ONLY_FOR_NEW_CLAIMS and job.spec.workspace.claim_name:
            continue
        found[path] = setting
    return found


def gpu_class(job: Job, settings: Settings) -> GpuClass:
    """The class of the GPUs of `job`. Raises NotAllowed for one that the administrator does not know."""
    name = job.spec.resources.gpu_class
    if name is None:
        return GpuClass()
    if name not in settings.gpu_classes:
        known = ", ".join(sorted(settings.gpu_classes)) or "none"
        raise NotAllowed(
            f'spec.resources.gpuClass: there is no class "{name}" (known: {known}; set by the administrator: gpuClasses'
            f" {CHART}). Choose one of these, or remove gpuClass"
        )
    return settings.gpu_classes[name]


def allowed_classes(job: Job, settings: Settings) -> list[str]:
    """The classes that jobs of the namespace of `job` may name."""
    allowed = _setting(job, settings, "gpu_classes")
    return list(settings.gpu_classes) if allowed is None else list(allowed.value)


def check(workload: Workload, settings: Settings) -> None:
    """Raises NotAllowed if the administrator's settings refuse the job."""
    job = workload.job
    _check_class(workload, settings)
    _check_code(job, settings)
    for field, keys, allowed, value in (
        ("labels", job.spec.scheduling.labels, settings.allowed_labels, "jobs.allowedLabels"),
        ("annotations", job.spec.scheduling.annotations, settings.allowed_annotations, "jobs.allowedAnnotations"),
    ):
        for key in keys:
            if not any(_matches(key, pattern) for pattern in allowed):
                raise NotAllowed(
                    f"spec.scheduling.{field}: {key} is not among the keys that jobs may set"
                    f" ({', '.join(allowed) or 'none'}; set by the administrator: {value} {CHART}). Remove it, or ask"
                    " the administrator to add it"
                )
    if not settings.namespace_policies:
        return
    for asked in _asked(workload, settings):
        setting = _setting(job, settings, "maxima", asked.maximum)
        if setting is None:
            continue
        limit = f"a job in namespace {job.metadata.namespace} may have {setting.value} at most ({setting})"
        if asked.value is None:
            raise NotAllowed(f"{asked.field}: not set, so there is no limit, but {limit}. Set it to that or less")
        if amount(asked.value) > amount(str(setting.value)):
            raise NotAllowed(
                f"{asked.field}: {asked.value}{asked.what}, but {limit}. Ask for less, or ask the administrator to"
                " raise it"
            )


def _check_class(workload: Workload, settings: Settings) -> None:
    """Raises NotAllowed if the job may not use the class of GPUs that it names, or not so many in a pod."""
    job, name = workload.job, workload.job.spec.resources.gpu_class
    found = gpu_class(job, settings)
    allowed = _setting(job, settings, "gpu_classes")
    if name and allowed and name not in allowed.value:
        raise NotAllowed(
            f"spec.resources.gpuClass: jobs in namespace {job.metadata.namespace} may not use {name}, only"
            f" {', '.join(allowed.value) or 'none'} ({allowed})"
        )
    if found.max_per_pod and workload.gpus_per_pod > found.max_per_pod:
        raise NotAllowed(
            f"{workload.gpus_field}: {workload.gpus_per_pod}, but a node has {found.max_per_pod} of class {name} at"
            f" most (set by the administrator: gpuClasses.{name}.maxPerPod {CHART}). Use more pods with fewer GPUs"
            " each, or another class"
        )


def _check_code(job: Job, settings: Settings) -> None:
    """Raises NotAllowed if the job may not run code of its own, or if its pods would hold credentials beside it."""
    if not isinstance(job, FineTuneJob) or not job.spec.grpo or not job.spec.grpo.runs_code:
        return
    types = [reward.type for reward in job.spec.grpo.rewards]
    if not settings.python_rewards:
        raise NotAllowed(
            f"spec.grpo.rewards[{types.index('python')}].type: python runs code of the job in its pods, which is not"
            f" allowed (set by the administrator: jobs.pythonRewards {CHART}). Choose another type, or ask the"
            " administrator to allow it"
        )
    # Those that the job names are refused at apply.
    if any(tracker.secret_ref for tracker in job.spec.tracking):
        raise NotAllowed(
            "spec.tracking: the administrator's default for this namespace has credentials, which the code of a reward"
            " of type python could read in the pods of run (namespacePolicies.*.defaults.tracking"
            f" {CHART}). Name a tracker without credentials, for example tracking: [{{type: tensorboard}}]"
        )


def _asked(workload: Workload, settings: Settings) -> Iterator[Asked]:
    spec = workload.job.spec
    pods, gpus = workload.parallel_pods, workload.gpus_per_pod
    yield Asked("gpus", workload.gpus_field, str(pods * gpus), f" GPUs at once ({pods} pods with {gpus} each)")
    yield Asked("pods", workload.pods_field, str(pods), " pods at once")
    phases = [("resources", spec.resources), ("prepare", spec.prepare), ("publish", spec.publish)]
    for block, resources in phases:
        if resources is None:
            continue
        yield Asked("cpu", f"spec.{block}.cpu", resources.cpu or "0")
        memory_is_set = resources.memory or block == "resources"
        yield Asked("memory", f"spec.{block}.memory", resources.memory if memory_is_set else "0")
        disk = resources.ephemeral_storage or settings.tmp_size
        yield Asked("ephemeral_storage", f"spec.{block}.ephemeralStorage", disk)
    if not spec.workspace.claim_name:
        yield Asked("workspace_size", "spec.workspace.size", spec.workspace.size or settings.workspace_size)
    deadline = spec.active_deadline_seconds
    yield Asked("active_deadline_seconds", "spec.activeDeadlineSeconds", None if deadline is None else str(deadline))


def _setting(job: Job, settings: Settings, part: str, name: str | None = None) -> Setting | None:
    """What the policy of the job's namespace says, else the one of all namespaces."""
    for namespace in (job.metadata.namespace, EVERYWHERE):
        policy = settings.namespace_policies.get(namespace)
        value = getattr(policy, part) if policy else None
        if value is not None and name:
            value = getattr(value, name)
        if value is not None:
            path = ".".join(to_camel(step) for step in (part, name) if step)
            return Setting(value, f"namespacePolicies.{namespace}.{path}")
    return None


def _is_set(job: Job, path: tuple[str, ...]) -> bool:
    value: Any = job.spec
    for name in path:
        value = getattr(value, name)
    return value is not None and value != []


def _matches(key: str, pattern: str) -> bool:
    return key.startswith(pattern[:-1]) if pattern.endswith("*") else key == pattern
