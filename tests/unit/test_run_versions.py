"""What a trainer image does with the run config of another version; `docs/api-policy.md` promises it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cases.api import FINE_TUNE, GENERATE, Change, changed
from pydantic_core import to_jsonable_python

from luthier_api.base import ApiModel, model_in
from luthier_api.marks import written_part
from luthier_api.problems import InvalidDocument
from luthier_api.run import RUNS, FineTuneRun, read_run

DEFAULTS = Path(__file__).parent / "golden/run-v1-defaults.json"


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


@pytest.mark.parametrize("document", [FINE_TUNE, GENERATE], ids=["FineTuneJob", "GenerateJob"])
def test_what_is_written_is_what_was_set_and_reads_as_the_whole(document: Any) -> None:
    kind = document["kind"]
    whole = RUNS[kind].model_validate({"name": "sound", "workspace": "/workspace", "spec": document["spec"]})
    written = whole.document()
    again = read_run(json.dumps(written))
    assert again.model_copy(update={"written_by": ""}) == whole
    assert written["spec"] == written_part(again.spec)
    assert len(json.dumps(written)) < len(json.dumps(whole.dump())) / 2


def test_a_new_field_with_its_default_is_not_written() -> None:
    """So that an image that is one version older runs the job."""
    run = FineTuneRun.model_validate({"name": "sound", "workspace": "/workspace", "spec": FINE_TUNE["spec"]})
    assert "scheduling" not in run.document()["spec"]
    assert "keepCheckpoints" not in run.document()["spec"].get("training", {})


def test_an_image_that_does_not_understand_the_run_config_names_both_versions() -> None:
    text = run_config({"writtenBy": "9.9.0", "spec.training.sharpness": 1})
    with pytest.raises(InvalidDocument) as refused:
        read_run(text)
    assert [str(problem) for problem in refused.value.problems] == [
        "run config: written by Luthier 9.9.0, but this image is 0.1.0 and does not understand it; use the trainer"
        " image of the operator's version (the chart's value trainer.image)",
        "spec.training.sharpness: unknown field",
    ]


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


def defaults(model: type[ApiModel], path: str = "") -> Iterator[tuple[str, Any]]:
    """Path and default of each field that has one; blocks stand for their fields."""
    for name, info in model.model_fields.items():
        at = f"{path}{info.alias or name}"
        below = model_in(info.annotation)
        if below is not None:
            yield from defaults(below, f"{at}.")
        elif not info.is_required():
            yield at, to_jsonable_python(info.get_default(call_default_factory=True, validated_data={}))


def test_the_defaults_of_this_version_do_not_change() -> None:
    """What has its default is not written, so an operator and an image with other defaults would silently differ.

    After a change of a default, the run config needs another version (`docs/api-policy.md`). Before the first release
    `REFRESH_GOLDEN=1` suffices.
    """
    found = {str(kind): dict(defaults(run)) for kind, run in RUNS.items()}
    text = json.dumps(found, indent=1, sort_keys=True) + "\n"
    if os.environ.get("REFRESH_GOLDEN"):
        DEFAULTS.write_text(text)
    for kind, known in json.loads(DEFAULTS.read_text()).items():
        # A new field is none of theirs: it is written where it is set.
        assert {path: found[kind].get(path) for path in known} == known
