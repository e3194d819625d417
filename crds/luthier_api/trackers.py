"""The table of trackers: programs that show the course of a training, one row for each.

A row says what the trainer image needs for it. `luthier_trainer.tracking` has an implementation for each row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TrackerInfo:
    """What is known of a tracker without its libraries."""

    title: str
    """Its own name."""
    package: str
    """What the trainer image imports to write for it."""
    distribution: str
    """How the package index calls that package."""
    fields: tuple[str, ...] = ()
    """Fields of `tracking` that it takes, besides its type."""
    required: tuple[str, ...] = ()
    """Those of them that it cannot do without."""
    credentials: tuple[tuple[str, ...], ...] = ()
    """Which credentials `secretRef.keys` may name: one of these sets."""


TrackerType = Literal["tensorboard", "mlflow", "wandb", "trackio"]

TRACKERS: Mapping[str, TrackerInfo] = {
    "tensorboard": TrackerInfo(title="TensorBoard", package="tensorboardX", distribution="tensorboardX"),
    "mlflow": TrackerInfo(
        title="MLflow",
        package="httpx",
        distribution="httpx",
        fields=("url", "experiment", "runName", "tags", "secretRef"),
        required=("url",),
        credentials=(("token",), ("username", "password")),
    ),
    "wandb": TrackerInfo(
        title="Weights & Biases",
        package="wandb",
        distribution="wandb",
        fields=("url", "experiment", "runName", "tags", "secretRef"),
        credentials=(("apiKey",),),
    ),
    "trackio": TrackerInfo(
        title="trackio",
        package="httpx",
        distribution="httpx",
        fields=("url", "experiment", "runName", "secretRef"),
        required=("url", "secretRef"),  # its server takes reports from nobody without a token
        credentials=(("writeToken",),),
    ),
}
