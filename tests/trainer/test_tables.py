"""Each row of the API's tables has an implementation here, and nothing here is without a row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from transformers import AutoModel

from luthier_api.methods import METHODS, QUANTIZATIONS
from luthier_api.optimizers import OPTIMIZERS
from luthier_api.tasks import GENERATION_TASKS, TASKS, TRAINING_TASKS
from luthier_trainer.generation.engines import table as engines
from luthier_trainer.methods import quantization
from luthier_trainer.methods import table as methods
from luthier_trainer.models import inspect
from luthier_trainer.prepare import generation as prepare_generation
from luthier_trainer.publish import model_card
from luthier_trainer.tasks import table
from luthier_trainer.workspace import optimizer_state


@dataclass(frozen=True)
class Case:
    name: str
    rows: Iterable[str]
    implementations: Mapping[Any, Any]


CASES = [
    Case(
        name="tasks of a FineTuneJob: what learns",
        rows=TRAINING_TASKS,
        implementations=table.TASKS,
    ),
    Case(
        name="tasks of a GenerateJob: engines",
        rows=GENERATION_TASKS,
        implementations=engines.ENGINES,
    ),
    Case(
        name="libraries of a GenerateJob: models, in prepare",
        rows={TASKS[name].library for name in GENERATION_TASKS},
        implementations=prepare_generation.CHECKED_MODELS,
    ),
    Case(
        name="libraries of a GenerateJob: models with adapters, in prepare",
        rows={TASKS[name].library for name in GENERATION_TASKS},
        implementations=prepare_generation.CHECKED_TOGETHER,
    ),
    Case(
        name="what rows of a GenerateJob hold: what is saved of models of transformers",
        rows={TASKS[name].modality for name in GENERATION_TASKS if TASKS[name].library == "transformers"},
        implementations=prepare_generation.SAVED_PROCESSORS,
    ),
    Case(
        name="methods that make adapters",
        rows=[name for name, method in METHODS.items() if method.adapter],
        implementations=methods.FAMILIES,
    ),
    Case(
        name="optimisers: what they keep, in the plan",
        rows=OPTIMIZERS,
        implementations=optimizer_state.STATE_BYTES,
    ),
    Case(
        name="quantisations",
        rows=QUANTIZATIONS,
        implementations=quantization.SETTINGS,
    ),
    Case(
        name="modalities: processors on the model card",
        rows={TASKS[name].modality for name in TRAINING_TASKS},
        implementations=model_card.PROCESSORS,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_row_is_implemented(case: Case) -> None:
    assert set(case.implementations) == set(case.rows)


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.library == "transformers"])
def test_transformers_has_the_class_of_each_task(name: str) -> None:
    assert issubclass(inspect.auto_class(name), AutoModel.__base__)


def test_a_task_without_a_row_is_refused_loudly() -> None:
    with pytest.raises(KeyError):
        inspect.auto_class("poetry")
