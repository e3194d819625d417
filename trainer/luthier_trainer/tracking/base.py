"""What a tracker is: it gets the reports of a training, one after another, and may fail at any of them."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from luthier_api.secrets import TRACKING
from luthier_api.tracking import Tracker as TrackerSpec

NOT_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}  # as protobuf writes them in JSON, and trackio


@dataclass(frozen=True)
class Report:
    """What the trainer logged after a step. Names are those of transformers: loss, learning_rate, eval_loss, ..."""

    step: int
    values: dict[str, float]


@dataclass(frozen=True)
class TrackedTraining:
    """What a tracker shows besides reports."""

    name: str
    """Name of the job."""
    namespace: str
    """Its namespace."""
    folder: Path
    """Folder of the workspace that belongs to the tracker. Later attempts of the job find it again."""
    next_step: int
    """The first step that this attempt makes: reports of it and of later ones that an earlier attempt has sent, whose
    work was lost, are replaced.
    """
    documents: dict[str, Any]
    """Title → JSON-ready data: the spec, and what the training was made of."""


class Tracker(Protocol):
    """A tracker. One thread calls it, which is not the one that trains; exceptions are counted, and stop nothing."""

    def __init__(self, spec: TrackerSpec, training: TrackedTraining) -> None: ...

    def send(self, report: Report) -> None:
        """Show `report`, or raise any exception; it is then sent again."""
        ...

    def close(self, complete: bool) -> None:
        """Show what is not shown yet. No report follows. `complete`: whether this attempt has ended the training."""
        ...


def credentials(spec: TrackerSpec) -> dict[str, str]:
    """The credentials of a tracker, by the names that `secretRef.keys` gives them; none without `secretRef`.

    Raises PermissionError if the pod did not get one: a Secret that is missing stops no training.
    """
    if spec.secret_ref is None:
        return {}
    found = {}
    for name, key in spec.secret_ref.credentials().items():
        value = os.environ.get(TRACKING.variables[name], "").strip()
        if not value:
            raise PermissionError(
                f"Secret {spec.secret_ref.name} has no key {key}, or it is empty; see spec.tracking.secretRef"
            )
        found[name] = value
    return found


def number(value: float) -> float | str:
    """Return `value` as servers take it in JSON, which has no NaN and no infinities: these are texts."""
    return value if math.isfinite(value) else NOT_FINITE[str(value)]
