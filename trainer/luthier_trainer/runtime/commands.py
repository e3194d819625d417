"""The verbs of the trainer image. Plain data: PID 1 reads it before anything else is imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from luthier_api.status import Phase

VERBS: Mapping[str, Phase] = {"prepare": "prepare", "train": "run", "generate": "run", "publish": "publish"}
"""Verb → phase."""
MODULES: Mapping[str, str] = {
    "prepare": "luthier_trainer.prepare.main",
    "train": "luthier_trainer.training.main",
    "generate": "luthier_trainer.generation.main",
    "publish": "luthier_trainer.publish.main",
}
"""Verb → the module whose `main` does the work of a process."""
KINDS: Mapping[str, str] = {"train": "FineTuneJob", "generate": "GenerateJob"}
"""Verb → the only kind it works on. The others take both."""
