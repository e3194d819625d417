"""What a trainer image does with the run config of another version; `docs/api-policy.md` promises it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
from cases.api import FINE_TUNE, Change, changed

from luthier_api.problems import InvalidDocument
from luthier_api.run import FineTuneRun, read_run


def run_config(change: Change) -> str:
    """As the operator writes it: the spec with every default."""
    run = FineTuneRun.model_validate({"name": "sound", "workspace": "/workspace", "spec": FINE_TUNE["spec"]})
    document: dict[str, Any] = run.dump()
    return json.dumps(changed(document, change))


@dataclass(frozen=True)
class OlderCase:
    name: str
    change: Change


OLDER = [
    OlderCase(
        name="the same version",
        change={},
    ),
    OlderCase(
        name="without a field of the run config",
        change={"graceSeconds": None},
    ),
    OlderCase(
        name="without a field of the spec",
        change={"spec.training.keepCheckpoints": None},
    ),
    OlderCase(
        name="without a block of the spec",
        change={"spec.scheduling": None},
    ),
]


@pytest.mark.parametrize("case", OLDER, ids=lambda case: case.name)
def test_a_run_config_of_an_older_operator_gets_the_defaults_of_the_image(case: OlderCase) -> None:
    assert read_run(run_config(case.change)) == read_run(run_config({}))


@dataclass(frozen=True)
class NewerCase:
    name: str
    change: Change
    message: str


NEWER = [
    NewerCase(
        name="a field of the run config that the image does not know",
        change={"colour": "red"},
        message="colour: unknown field",
    ),
    NewerCase(
        name="a field of the spec that the image does not know",
        change={"spec.training.sharpness": 1},
        message="spec.training.sharpness: unknown field",
    ),
    NewerCase(
        name="another version of the run config",
        change={"apiVersion": "luthier.dev/run-v2"},
        message="apiVersion: input should be 'luthier.dev/run-v1' (it is 'luthier.dev/run-v2')",
    ),
]


@pytest.mark.parametrize("case", NEWER, ids=lambda case: case.name)
def test_a_run_config_that_the_image_does_not_understand_is_refused_by_the_field(case: NewerCase) -> None:
    with pytest.raises(InvalidDocument) as refused:
        read_run(run_config(case.change))
    assert [str(problem) for problem in refused.value.problems] == [case.message]
