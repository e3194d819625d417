"""The implementation of each row of `luthier_api.trackers`, and what `prepare` checks of it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec

from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import FineTuneJobSpec
from luthier_api.trackers import TRACKERS
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.tracking.base import Tracker

IMPLEMENTATIONS: Mapping[str, tuple[str, str]] = {
    "tensorboard": ("luthier_trainer.tracking.tensorboard", "TensorBoard"),
    "mlflow": ("luthier_trainer.tracking.mlflow", "MLflow"),
    "wandb": ("luthier_trainer.tracking.wandb", "WeightsAndBiases"),
    "trackio": ("luthier_trainer.tracking.trackio", "Trackio"),
}
"""Tracker → module and class. Only what a job uses is imported: their HTTP client alone takes 3 % of each start."""


def implementation(tracker: str) -> type[Tracker]:
    module, name = IMPLEMENTATIONS[tracker]
    found: type[Tracker] = getattr(import_module(module), name)
    return found


def check_packages(spec: FineTuneJobSpec) -> None:
    """Raise Failure if this image lacks the package of a tracker. The image that prepares is the one that trains."""
    for tracker in spec.tracking:
        info = TRACKERS[tracker.type]
        if find_spec(info.package) is None:
            raise Failure(
                ExitCode.MISCONFIGURED,
                f"spec.tracking: {tracker.type} needs the Python package {info.distribution}, which the trainer image"
                " does not have; use an image with it (the chart's value trainer.image; see Trackers in"
                " docs/training.md), or remove this tracker",
            )
