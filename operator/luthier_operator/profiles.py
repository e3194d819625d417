"""What the administrator says once for all jobs: classes of GPUs, and defaults and maxima by namespace.

The types of the chart's values `gpuClasses` and `namespacePolicies`. `policy` applies them to a job.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from luthier_api import secrets
from luthier_api.base import ApiModel
from luthier_api.quantity import Bytes, Cores
from luthier_api.scheduling import LabelKey, LabelValue, Toleration
from luthier_api.spec import ObjectName, QueueName
from luthier_api.tracking import Tracker
from luthier_api.validation import broken_rules

ResourceName = Annotated[str, Field(pattern="^([-a-z0-9.]+/[-a-zA-Z0-9._]+|hugepages-[0-9]+[KMG]i)$")]


def unreserved(name: str) -> str:
    """Return the name of a variable. Raises ValueError for one that Luthier itself sets."""
    if name.startswith("LUTHIER_") or name in secrets.VARIABLES:
        raise ValueError(f"{name}: set by Luthier itself; remove it")
    return name


Amount = Annotated[
    str,
    BeforeValidator(lambda value: str(value) if isinstance(value, int) else value),
    Field(pattern="^[0-9]+([KMG]i)?$"),
]
VariableName = Annotated[str, Field(pattern="^[A-Za-z_][A-Za-z0-9_]*$"), AfterValidator(unreserved)]
KeyPattern = Annotated[str, Field(pattern="^([-._/a-zA-Z0-9]*[*]|[-._/a-zA-Z0-9]+)$")]
"""A key of a label or annotation, or how it begins, with `*` at the end."""


class Network(ApiModel):
    """Resources of a fast network between nodes, such as RDMA devices. Only jobs of several nodes request them."""

    per_pod: dict[ResourceName, Amount] = Field(default_factory=dict)
    """Resource → amount for each pod, for example {rdma/hca: "1"}."""
    per_gpu: dict[ResourceName, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Resource → amount for each GPU, for example {vpc.amazonaws.com/efa: 4}."""
    env: dict[VariableName, str] = Field(default_factory=dict)
    """Variables of their pods of `run`, for example {NCCL_IB_HCA: mlx5}. They come after `env` of all pods."""


class GpuClass(ApiModel):
    """A kind of GPU, or a MIG profile of one."""

    resource: ResourceName | None = None
    """Extended resource that stands for one, for example nvidia.com/mig-3g.40gb; `gpuResource` when left out."""
    node_selector: dict[LabelKey, LabelValue] = Field(default_factory=dict)
    """Labels of the nodes that have them."""
    tolerations: list[Toleration] = Field(default_factory=list)
    """Taints of those nodes."""
    runtime_class_name: ObjectName | None = None
    """RuntimeClass that they need."""
    memory: Bytes | None = None
    """Memory of one, for which `prepare` plans a training."""
    peak_flops: Annotated[float, Field(gt=0)] | None = None
    """Dense 16-bit operations per second of one: for the estimated time, and for the metric of utilisation, for which
    there is a table when left out.
    """
    bandwidth: Annotated[float, Field(gt=0)] | None = None
    """Bytes per second that the memory of one reads or writes: for the estimated time. Left out: in proportion to
    `peakFlops`.
    """
    max_per_pod: Annotated[int, Field(ge=1)] | None = None
    """How many one node has at most; 1 for a MIG profile."""
    network: Network = Field(default_factory=Network)


class ResourceAmounts(ApiModel):
    """As in a container's `requests` or `limits`."""

    cpu: Cores | None = None
    memory: Bytes | None = None
    ephemeral_storage: Annotated[Bytes | None, Field(alias="ephemeral-storage")] = None


class PodResources(ApiModel):
    """As a container's `resources`."""

    requests: ResourceAmounts = Field(default_factory=ResourceAmounts)
    limits: ResourceAmounts = Field(default_factory=ResourceAmounts)


def valid(trackers: list[Tracker] | None) -> list[Tracker] | None:
    """Return `trackers`. Raises ValueError for a combination that the API server would refuse in a job."""
    found = trackers or []
    problems = [text for i, tracker in enumerate(found) for text in broken_rules(tracker, f"tracking[{i}]")]
    if len({tracker.type for tracker in found}) < len(found):
        problems.append("tracking: each type may be there once")
    if problems:
        raise ValueError("; ".join(problems))
    return trackers


class Defaults(ApiModel):
    """Values of fields that a job leaves out."""

    queue_name: QueueName | None = None
    """scheduling.queueName."""
    priority_class_name: ObjectName | None = None
    """scheduling.priorityClassName."""
    gpu_class: ObjectName | None = None
    """resources.gpuClass of jobs with GPUs."""
    cpu: Cores | None = None
    """resources.cpu."""
    memory: Bytes | None = None
    """resources.memory."""
    workspace_size: Bytes | None = None
    """workspace.size of claims that the operator creates."""
    storage_class_name: ObjectName | None = None
    """workspace.storageClassName of claims that the operator creates."""
    active_deadline_seconds: Annotated[int, Field(ge=1)] | None = None
    """activeDeadlineSeconds."""
    ttl_seconds_after_finished: Annotated[int, Field(ge=0)] | None = None
    """ttlSecondsAfterFinished."""
    tracking: Annotated[list[Tracker] | None, Field(min_length=1, max_length=4), AfterValidator(valid)] = None
    """tracking, of FineTuneJobs that name no tracker. A Secret must exist in the namespace of the job; who creates the
    job need not be allowed to read it.
    """


class Maxima(ApiModel):
    """The largest values that a job may ask for."""

    gpus: Annotated[int, Field(ge=0)] | None = None
    """GPUs of a job, over all pods that work at once."""
    pods: Annotated[int, Field(ge=1)] | None = None
    """Pods of a job that work at once."""
    cpu: Cores | None = None
    """CPU request of a pod."""
    memory: Bytes | None = None
    """Memory of a pod. A job that sets none, and gets none by default, is refused."""
    ephemeral_storage: Bytes | None = None
    """Local disk of a pod."""
    workspace_size: Bytes | None = None
    """Size of a claim that the operator creates."""
    active_deadline_seconds: Annotated[int, Field(ge=1)] | None = None
    """Deadline. A job that sets none, and gets none by default, is refused."""


class NamespacePolicy(ApiModel):
    """What holds for the jobs of a namespace; under `*`, for those of all namespaces whose own policy does not say."""

    defaults: Defaults = Field(default_factory=Defaults)
    maxima: Maxima = Field(default_factory=Maxima)
    gpu_classes: list[ObjectName] | None = None
    """Classes that jobs may name; all when left out."""


Policies = dict[Literal["*"] | ObjectName, NamespacePolicy]
