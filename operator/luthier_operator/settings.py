"""What the administrator sets, from the environment: `LUTHIER_TRAINER_IMAGE=...`. The chart's values end here.

Nothing of it can be set in a job: the image, the Hub's endpoint and the service account decide what a user's pods may do.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

Names = Annotated[tuple[str, ...], NoDecode]
"""Written with commas between."""


class Settings(BaseSettings):
    """Settings of the operator; field docstrings are the documentation."""

    model_config = SettingsConfigDict(env_prefix="LUTHIER_", frozen=True, use_attribute_docstrings=True, extra="ignore")

    trainer_image: str = "luthier/trainer:0.1.0"
    """Image of every pod of a job."""
    image_pull_policy: str = "IfNotPresent"
    image_pull_secrets: Names = ()
    """Secrets, in the namespace of the job, to pull the image with."""
    service_account: str | None = None
    """Service account of the jobs' pods; the namespace's default when empty. Its token is never mounted."""
    hub_endpoint: str | None = None
    """HF_ENDPOINT of `prepare` and `publish`: a mirror, or a Hub of one's own."""
    gpu_resource: str = "nvidia.com/gpu"
    """Extended resource that a GPU is."""
    cpu_request: str = "100m"
    """CPU request of the pods of `prepare` and `publish`."""
    memory_request: str = "512Mi"
    """Memory request of the pods of `prepare` and `publish`."""
    prepare_retries: Annotated[int, Field(ge=0)] = 6
    """Failures of the infrastructure that `prepare` survives: about 10 minutes at Kubernetes' back-off."""
    publish_retries: Annotated[int, Field(ge=0)] = 20
    """The same of `publish`, where a finished run waits for the Hub: about 2.5 hours."""
    grace_seconds: Annotated[int, Field(ge=15)] = 60
    """Seconds that a stopped pod has to save its work."""
    workspace_size: str = "10Gi"
    """Size of a workspace whose job sets none."""

    namespaces: Names = ()
    """Namespaces to watch; empty: all."""
    workers: Annotated[int, Field(ge=1)] = 16
    """Jobs reconciled at once."""
    progress_every: Annotated[float, Field(gt=0)] = 15
    """Seconds between two readings of a running job's progress."""
    metrics_port: int = 8080
    """Port of the operator's own /metrics, /healthz and /readyz."""
    log_level: str = "INFO"

    @field_validator("namespaces", "image_pull_secrets", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("service_account", "hub_endpoint", mode="before")
    @classmethod
    def _empty_is_unset(cls, value: object) -> object:
        return value or None
