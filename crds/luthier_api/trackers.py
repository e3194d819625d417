"""The table of trackers: programs that show the course of a training, one row for each.

A row says what the trainer image needs for it. `luthier_trainer.tracking` has an implementation for each row.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from luthier_api.base import Rule


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
FIELDS = tuple(sorted({field for tracker in TRACKERS.values() for field in tracker.fields}))


def rules() -> Iterator[Rule]:
    """The CEL rules of an item of `tracking`: which fields each type takes, and which credentials."""
    for field in FIELDS:
        names = [name for name, tracker in TRACKERS.items() if field in tracker.fields]
        yield Rule(
            f"!has(self.{field}) || self.type in {_texts(names)}",
            f"tracking.{field}: belongs to {' and '.join(names)}; remove it",
        )
    for name, tracker in TRACKERS.items():
        for field in tracker.required:
            yield Rule(
                f"self.type != '{name}' || has(self.{field})",
                f"tracking.{field}: {name} cannot do without; set it",
            )
        if tracker.credentials:
            sets = " || ".join(f"({_only(some)})" for some in tracker.credentials)
            yield Rule(
                f"!has(self.secretRef) || self.type != '{name}' || {sets}",
                f"tracking.secretRef.keys: {name} takes "
                + ", or ".join(" and ".join(some) for some in tracker.credentials),
            )


def _only(some: Collection[str]) -> str:
    """CEL: whether `secretRef.keys` names these credentials and no others."""
    known = [name for tracker in TRACKERS.values() for names in tracker.credentials for name in names]
    return " && ".join(f"{'' if name in some else '!'}has(self.secretRef.keys.{name})" for name in dict.fromkeys(known))


def _texts(names: Iterable[str]) -> str:
    return "[" + ", ".join(f"'{name}'" for name in names) + "]"
