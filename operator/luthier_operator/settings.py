"""Settings of the administrator, from environment variables such as `LUTHIER_TRAINER_IMAGE`. The chart sets them.

A job cannot set them: the image, the Hub's endpoint and the service account decide what the pods of a user may do.
"""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from luthier_api.quantity import Bytes
from luthier_api.run import STEP_TIMEOUT_SECONDS
from luthier_api.spec import ObjectName
from luthier_operator.profiles import GpuClass, KeyPattern, PodResources, Policies, ResourceAmounts, VariableName
from luthier_operator.versions import RELEASE

Names = Annotated[tuple[ObjectName, ...], NoDecode]
"""Names, separated by commas."""

NO_IMAGE = f"REGISTRY/trainer:{RELEASE}"


class Settings(BaseSettings):
    """Settings of the operator. The docstrings of the fields are their documentation. The operator does not start with
    a wrong one, and names its variable.
    """

    model_config = SettingsConfigDict(
        # An alias rather than a prefix: errors name what the administrator has written.
        alias_generator=lambda name: f"LUTHIER_{name.upper()}",
        populate_by_name=True,
        frozen=True,
        use_attribute_docstrings=True,
        extra="ignore",
    )

    trainer_image: Annotated[str, Field(min_length=1)] = NO_IMAGE
    """Image of every pod of a job. Required by the operator; the default is only for the output of `luthier render`."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When the nodes pull that image."""
    image_pull_secrets: Names = ()
    """Secrets, in the namespace of each job, for pulling the image; separated by commas."""
    service_account: ObjectName | None = None
    """Service account of the jobs' pods; the namespace's default when empty. Its token is never mounted."""
    hub_endpoint: str | None = None
    """HF_ENDPOINT of `prepare` and `publish`: a mirror, or a private Hub."""
    run_as_user: Annotated[int, Field(ge=1)] | None = 1000
    """User of all pods of the jobs, and the group that a new workspace gets; empty: the cluster chooses (OpenShift).

    The same for all pods, because only the owner of files written by safetensors can read them.
    """
    run_as_group: Annotated[int, Field(ge=0)] | None = 1000
    """Group of all pods of the jobs; empty: the cluster chooses."""
    gpu_resource: str = "nvidia.com/gpu"
    """Extended resource name of a GPU."""
    gpu_classes: Annotated[dict[ObjectName, GpuClass], NoDecode] = {}
    """Classes of GPUs that a job may name (`resources.gpuClass`), as JSON: name to resource, node selector and so on.
    """
    namespace_policies: Annotated[Policies, NoDecode] = {}
    """Defaults and maxima of jobs, as JSON: namespace to policy; * stands for all other namespaces."""
    allowed_labels: Annotated[tuple[KeyPattern, ...], NoDecode] = ("team", "project", "cost-center")
    """Keys of `scheduling.labels` that a job may set, separated by commas; * at the end stands for any rest."""
    allowed_annotations: Annotated[tuple[KeyPattern, ...], NoDecode] = (
        "karpenter.sh/do-not-disrupt",
        "cluster-autoscaler.kubernetes.io/safe-to-evict",
        "kueue.x-k8s.io/podset-*",
    )
    """Keys of `scheduling.annotations` that a job may set, likewise. An annotation can make other controllers give the
    pod credentials, networks or containers.
    """
    prepare_resources: Annotated[PodResources, NoDecode] = PodResources(
        requests=ResourceAmounts(cpu="100m", memory="512Mi")
    )
    """Requests and limits of the pod of `prepare`, as JSON; a job may set others."""
    publish_resources: Annotated[PodResources, NoDecode] = PodResources(
        requests=ResourceAmounts(cpu="100m", memory="512Mi")
    )
    """Requests and limits of the pod of `publish`, likewise."""
    tmp_size: Bytes = "20Gi"
    """Most that a pod may write to /tmp, for caches of libraries, unless the job sets `ephemeralStorage`. A pod that
    writes more is evicted.
    """
    prepare_retries: Annotated[int, Field(ge=0)] = 6
    """Retries of `prepare` after failures of the infrastructure. The default takes about 10 minutes, with Kubernetes'
    back-off.
    """
    publish_retries: Annotated[int, Field(ge=0)] = 20
    """Retries of `publish`, during which a finished run waits for the Hub. The default takes about 2.5 hours."""
    finished_pods_seconds: Annotated[int, Field(ge=0)] = 24 * 3600
    """Seconds that the Jobs, JobSets and pods of a job stay after its end, so that their logs can be read. The job, its
    status and its results stay.
    """
    grace_seconds: Annotated[int, Field(ge=15)] = 60
    """Minimum grace period of a stopped pod in seconds, in which it saves its work. A plan with large checkpoints, or a
    job, may set a longer one.
    """
    start_timeout_seconds: Annotated[int, Field(ge=60)] = 1800
    """Seconds for which a pod is waited for that cannot start without somebody's help: its image cannot be pulled, a
    Secret or claim is missing, the cluster refuses it for another reason than a quota. After that its job fails, so
    that it holds no GPUs any more.
    """
    step_timeout_seconds: Annotated[int, Field(ge=30)] = STEP_TIMEOUT_SECONDS
    """Seconds without a step after which a run counts as hung, at most; a job may set its own limit. Its pods then
    write the stacks of all processes to the log, and start again.
    """
    workspace_size: Bytes = "10Gi"
    """Size of the workspace of a job that sets none."""
    python_rewards: bool = False
    """Whether jobs may run Python of their own in their pods, as rewards of the task grpo."""
    env: Annotated[dict[VariableName, str], NoDecode] = {}
    """Additional environment variables of every pod of a job, as JSON: a proxy, a certificate file, settings of NCCL.
    """

    namespaces: Names = ()
    """Namespaces to watch, separated by commas; empty: all."""
    lease: Annotated[str, Field(pattern="^([a-z0-9.-]+/[a-z0-9.-]+)?$")] = ""
    """NAMESPACE/NAME of the Lease whose holder works while the other replicas stand by; empty: there is only one."""
    identity: str = ""
    """Name of this replica in the Lease. The name of its pod lets a restarted container continue at once; empty: the
    host name with a random part.
    """
    workers: Annotated[int, Field(ge=1)] = 32
    """Jobs reconciled at once."""
    progress_every: Annotated[float, Field(gt=0)] = 15
    """Seconds between two updates of the progress of a running job. At most 20 jobs are read in a
    second, so that it grows from 300 running jobs on.
    """
    metrics_port: int = 8080
    """Port of the operator's own /metrics, /healthz and /readyz."""
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(str.upper)] = "INFO"
    """Lowest level of messages in the log of the operator."""

    @field_validator("namespaces", "image_pull_secrets", "allowed_labels", "allowed_annotations", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator(
        "env", "gpu_classes", "namespace_policies", "prepare_resources", "publish_resources", mode="before"
    )
    @classmethod
    def _read(cls, value: object) -> object:
        """Raises ValueError for what is not JSON."""
        try:
            return json.loads(value, parse_float=str) if isinstance(value, str) else value  # 0.5 may be a quantity
        except ValueError as error:
            raise ValueError(f"must be a JSON object: {error}") from None

    @field_validator("namespace_policies")
    @classmethod
    def _known_classes(cls, value: Policies, info: ValidationInfo) -> Policies:
        """Raises ValueError for a class that is not among `gpu_classes`."""
        known = info.data.get("gpu_classes", {})
        for namespace, policy in value.items():
            named = [*(policy.gpu_classes or []), *filter(None, [policy.defaults.gpu_class])]
            for name in named:
                if name not in known:
                    raise ValueError(f"{namespace}: there is no class {name} in gpuClasses; add it, or remove the name")
        return value

    @field_validator("service_account", "hub_endpoint", "run_as_user", "run_as_group", mode="before")
    @classmethod
    def _empty_is_unset(cls, value: object) -> object:
        return None if value == "" else value
