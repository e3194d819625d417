"""What the administrator sets, from the environment: `LUTHIER_TRAINER_IMAGE=...`. The chart's values end here.

Nothing of it can be set in a job: the image, the Hub's endpoint and the service account decide what a user's pods may
do.
"""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from luthier_api.quantity import Bytes, Cores
from luthier_api.spec import ObjectName
from luthier_api.variables import Variables
from luthier_operator.versions import RELEASE

Names = Annotated[tuple[ObjectName, ...], NoDecode]
"""Written with commas between."""

NO_IMAGE = f"REGISTRY/trainer:{RELEASE}"


class Settings(BaseSettings):
    """Settings of the operator; field docstrings are the documentation. A wrong one ends the start, with the variable's
    name.
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
    """Image of every pod of a job; the default only fills a place in what `luthier render` prints."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When the nodes pull that image."""
    image_pull_secrets: Names = ()
    """Secrets, in the namespace of each job, to pull the image with; with commas between."""
    service_account: ObjectName | None = None
    """Service account of the jobs' pods; the namespace's default when empty. Its token is never mounted."""
    hub_endpoint: str | None = None
    """HF_ENDPOINT of `prepare` and `publish`: a mirror, or a Hub of one's own."""
    gpu_resource: str = "nvidia.com/gpu"
    """Extended resource that a GPU is."""
    cpu_request: Cores = "100m"
    """CPU request of the pods of `prepare` and `publish`, in cores."""
    memory_request: Bytes = "512Mi"
    """Memory request of the pods of `prepare` and `publish`."""
    prepare_retries: Annotated[int, Field(ge=0)] = 6
    """Failures of the infrastructure that `prepare` survives: about 10 minutes at Kubernetes' back-off."""
    publish_retries: Annotated[int, Field(ge=0)] = 20
    """The same of `publish`, where a finished run waits for the Hub: about 2.5 hours."""
    grace_seconds: Annotated[int, Field(ge=15)] = 60
    """Seconds that a stopped pod has at least to save its work; a plan with large checkpoints, or a job, asks for more.
    """
    workspace_size: Bytes = "10Gi"
    """Size of a workspace whose job sets none."""
    env: Annotated[dict[Annotated[str, Field(pattern="^[A-Za-z_][A-Za-z0-9_]*$")], str], NoDecode] = {}
    """More environment variables of every pod of a job, as JSON: a proxy, an authority's file, NCCL's own settings."""

    namespaces: Names = ()
    """Namespaces to watch, with commas between; empty: all."""
    lease: Annotated[str, Field(pattern="^([a-z0-9.-]+/[a-z0-9.-]+)?$")] = ""
    """NAMESPACE/NAME of the Lease whose holder, of several operators, does the work; empty: this one is alone."""
    identity: str = ""
    """Name of this operator in that Lease: its pod's, so that a container that starts again goes on at once; empty: the
    host's, with a random part.
    """
    workers: Annotated[int, Field(ge=1)] = 16
    """Jobs reconciled at once."""
    progress_every: Annotated[float, Field(gt=0)] = 15
    """Seconds between two readings of a running job's progress."""
    metrics_port: int = 8080
    """Port of the operator's own /metrics, /healthz and /readyz."""
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(str.upper)] = "INFO"
    """The least severe that the operator writes to its log."""

    @field_validator("namespaces", "image_pull_secrets", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("env", mode="before")
    @classmethod
    def _read(cls, value: object) -> object:
        try:
            return json.loads(value) if isinstance(value, str) else value
        except ValueError as error:
            raise ValueError(f"must be a JSON object of names and texts: {error}") from None

    @field_validator("env")
    @classmethod
    def _ours_stay(cls, value: dict[str, str]) -> dict[str, str]:
        if ours := sorted(
            name for name in value if name.startswith("LUTHIER_") or name in (Variables.TOKEN, Variables.NODE_RANK)
        ):
            raise ValueError(f"{', '.join(ours)}: set by Luthier itself; remove it")
        return value

    @field_validator("service_account", "hub_endpoint", mode="before")
    @classmethod
    def _empty_is_unset(cls, value: object) -> object:
        return value or None
