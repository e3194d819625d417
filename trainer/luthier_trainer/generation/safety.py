"""Checks images by a second model, which classifies them: the score of what the job calls unsafe (`image.safety`).

Each image is looked at alone and in fp32, so that its score depends on nothing but its pixels and the hardware.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageClassification
from transformers.utils import logging

from luthier_api.exitcodes import ExitCode
from luthier_api.task_settings import ImageSettings, Safety
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.models import checks, inspect, processors, weight_check
from luthier_trainer.models.sources import OWN_WEIGHTS
from luthier_trainer.runtime.failure import Failure

FIELD = "spec.image.safety"
TASK = "image-classification"
SEVERAL = "multi_label_classification"


class SafetyChecker:
    """The model in `path`, which `check` has accepted, on a device."""

    def __init__(self, path: Path, safety: Safety, device: str) -> None:
        logging.disable_progress_bar()
        self.safety = safety
        self.processor = processors.read_image_processor(path, FIELD)
        self.model: Any = (
            AutoModelForImageClassification.from_pretrained(
                path, dtype=torch.float32, local_files_only=True, trust_remote_code=False, **OWN_WEIGHTS
            )
            .to(torch.device(device))
            .eval()
        )
        self.unsafe = [i for i, label in sorted(self.model.config.id2label.items()) if label in safety.labels]

    @torch.inference_mode()
    def score(self, image: Image.Image) -> float:
        """Return the sum of the probabilities of the unsafe labels, from 0 to 1."""
        given = self.processor(images=[image], return_tensors="pt").to(self.model.device)
        probabilities = self.model(**given).logits[0].softmax(-1)
        return min(1.0, float(probabilities[self.unsafe].sum()))

    def problem(self, score: float) -> str | None:
        """Return why an image with this score is withheld; None if it is kept."""
        if self.safety.policy == "flag" or not self.is_unsafe(score):
            return None
        return (
            f"image.safety: withheld, because its score of {score:.4f} for {', '.join(self.safety.labels)} is not below"
            f" the threshold of {self.safety.threshold:g}"
        )

    def is_unsafe(self, score: float) -> bool:
        """Return whether the score is at least the threshold."""
        return score >= self.safety.threshold


def check(path: Path, image: ImageSettings, folder: WorkspaceFolder) -> int:
    """Check that the model in `path` can tell of images whether they are unsafe, and return its number of weights.

    Raises Failure if it cannot.
    """
    assert image.safety, "the spec names a model that checks images"
    config = inspect.read_config(path, FIELD)
    checks.check_task(config, TASK, FIELD)
    checks.check_quantisation(config, set(), FIELD)
    if weight_check.fitting(path, config, TASK, FIELD, folder, named_by_adapter=False) != path:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{FIELD}: the names of its weights have the prefix of a wrapper, such as module.; save the model without"
            " it",
        )
    weight_check.check_head(path, config, TASK, (), FIELD, takes_adapters=False)
    check_labels(config, image.safety)
    try:
        rehearsed(path, image.width, image.height)
    except Failure:
        raise
    except Exception as error:  # processors and architectures check their inputs with many types of exceptions
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{FIELD}: the model does not take what its image processor makes of an image of {image.width} ×"
            f" {image.height}: {type(error).__name__}: {' '.join(str(error).split())[:300]}",
        ) from error
    return sum(weight.numel() for weight in inspect.skeleton(config, TASK, FIELD).parameters())


def check_labels(config: Any, safety: Safety) -> None:
    """Check the labels that mean unsafe. Raises Failure if the model lacks one, or if they are all that it has."""
    known = [str(label) for label in config.id2label.values()]
    if config.problem_type == SEVERAL or len(known) < 2:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{FIELD}: the model does not choose one of several labels for an image; choose one that does",
        )
    for label in safety.labels:
        if label not in known:
            near = difflib.get_close_matches(label, known, n=1)
            hint = f". Did you mean {near[0]!r}?" if near else ""
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{FIELD}.labels: the model has no label {label!r} (its labels: {', '.join(known[:20])}){hint}",
            )
    if set(known) <= set(safety.labels):
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{FIELD}.labels: these are all labels of the model, so that every image would be unsafe; remove one",
        )


def rehearsed(path: Path, width: int, height: int) -> tuple[Any, Any]:
    """Return the model on the meta device, and what it reads of an image of this size, after it has read it.

    Raises Failure or any other exception if it cannot.
    """
    model = inspect.skeleton(inspect.read_config(path, FIELD), TASK, FIELD).eval()
    processor = processors.read_image_processor(path, FIELD)
    made = processor(images=[Image.new("RGB", (width, height))], return_tensors="pt")
    given = {name: torch.empty_like(tensor, device="meta") for name, tensor in made.items()}
    with torch.no_grad():
        model(**given)
    return model, given
