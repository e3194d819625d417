"""How PID 1 reads a run config: what it accepts, and what it says about each wrong field."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from cases.api import FINE_TUNE, GENERATE, changed

from luthier_api.exitcodes import ExitCode
from luthier_api.run import RUNS, FineTuneRun, GenerateRun
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.supervisor import run_config

GOLDEN = Path(__file__).parents[2] / "unit/golden"


def run_of(job: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The run config of a manifest, changed as `cases.api.changed` does it: None takes a field away."""
    run = {"kind": job["kind"], "name": "job", "workspace": "/workspace/job", "spec": job["spec"]}
    return changed(run, changes)


@pytest.fixture
def read(tmp_path: Path) -> Callable[[Any], FineTuneRun | GenerateRun]:
    """Read a document as PID 1 does."""

    def read_it(document: Any) -> FineTuneRun | GenerateRun:
        file = tmp_path / "run.json"
        file.write_text(json.dumps(document))
        return run_config.read("prepare", file)

    return read_it


Read = Callable[[Any], FineTuneRun | GenerateRun]


def configs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Run configs that the operator has written."""
    for file in sorted(GOLDEN.glob("*.yaml")):
        for document in yaml.safe_load_all(file.read_text()):
            if text := document.get("data", {}).get("run.json"):
                yield file.stem, json.loads(text)


def test_what_the_operator_writes_is_accepted(read: Read) -> None:
    found = dict(configs())
    assert {run["kind"] for run in found.values()} == set(RUNS)
    for document in found.values():
        assert read(document).document() == document


def test_what_the_types_write_is_accepted(
    read: Read, make_run: Callable[..., FineTuneRun], make_generate_run: Callable[..., GenerateRun]
) -> None:
    for run in (make_run(), make_generate_run()):
        assert read(run.dump()) == run
        # Null is no value
        assert read(run.model_dump(mode="json", by_alias=True)) == run


@dataclass(frozen=True)
class Case:
    name: str
    problems: list[str]
    """What each problem begins with, in their order; none if the document is accepted."""
    job: dict[str, Any] = field(default_factory=lambda: FINE_TUNE)
    """The manifest that the run config is of."""
    change: dict[str, Any] = field(default_factory=dict)
    """Path → value."""
    document: Any = None
    """In place of a run config."""


REPOSITORY = (
    "must be a repository of the Hub, OWNER/NAME, such as Qwen/Qwen3-8B: 96 characters each at most, without '--' and"
    " '..', and no .git at the end"
)
CASES = [
    Case(
        name="a list",
        document=[],
        problems=["run config: input should be an object (it is [])"],
    ),
    Case(
        name="an empty object",
        document={},
        problems=["kind: required"],
    ),
    Case(
        name="another kind",
        document={"kind": "Job"},
        problems=["kind: input should be 'FineTuneJob' or 'GenerateJob' (it is 'Job')"],
    ),
    Case(
        name="another version",
        change={"apiVersion": "v1"},
        problems=["apiVersion: input should be 'luthier.dev/run-v1' (it is 'v1')"],
    ),
    Case(
        name="an unknown field",
        change={"spec.dataset.splt": "train"},
        problems=["spec.dataset.splt: unknown field. Did you mean 'split'?"],
    ),
    Case(
        name="a field of no kind",
        change={"spec.xyzzy": 1},
        problems=["spec.xyzzy: unknown field"],
    ),
    Case(
        name="a field by its inner name",
        change={"spec.dataset.eval_split": "test"},
        problems=["spec.dataset.eval_split: unknown field. Did you mean 'evalSplit'?"],
    ),
    Case(
        name="a missing field",
        change={"spec.model": None},
        problems=["spec.model: required"],
    ),
    Case(
        name="not one of the choices",
        change={"spec.method.type": "loraa"},
        problems=["spec.method.type: input should be 'full', 'bitfit', 'lora'"],
    ),
    Case(
        name="not one of the choices of an optional field",
        change={"spec.workspace.accessMode": "RWO"},
        problems=[
            "spec.workspace.accessMode: input should be 'ReadWriteOnce', 'ReadWriteMany' or 'ReadWriteOncePod' (it is"
            " 'RWO')"
        ],
    ),
    Case(
        name="too small",
        change={"spec.training.maxSteps": 0},
        problems=["spec.training.maxSteps: input should be greater than or equal to 1 (it is 0)"],
    ),
    Case(
        name="too large",
        change={"spec.method.rank": 1025},
        problems=["spec.method.rank: input should be less than or equal to 1024 (it is 1025)"],
    ),
    Case(
        name="at an exclusive minimum",
        change={"spec.training.epochs": 0},
        problems=["spec.training.epochs: input should be greater than 0 (it is 0)"],
    ),
    Case(
        name="at an exclusive maximum",
        change={"spec.method.dropout": 1},
        problems=["spec.method.dropout: input should be less than 1 (it is 1)"],
    ),
    Case(
        name="not a multiple",
        job=GENERATE,
        change={"spec.image.width": 1025},
        problems=["spec.image.width: input should be a multiple of 8 (it is 1025)"],
    ),
    Case(
        name="a fraction for an integer",
        change={"spec.training.maxLength": 64.5},
        problems=["spec.training.maxLength: input should be a valid integer (it is 64.5)"],
    ),
    Case(
        name="a string for a number",
        change={"spec.training.epochs": "1"},
        problems=["spec.training.epochs: input should be a valid number (it is '1')"],
    ),
    Case(
        name="a boolean for a number",
        change={"spec.training.maxLength": True},
        problems=["spec.training.maxLength: input should be a valid integer (it is True)"],
    ),
    Case(
        name="a string for a boolean",
        change={"spec.suspend": "no"},
        problems=["spec.suspend: input should be a valid boolean (it is 'no')"],
    ),
    Case(
        name="a number for a string",
        change={"spec.model.id": 7},
        problems=["spec.model.id: input should be a valid string (it is 7)"],
    ),
    Case(
        name="a string for a list",
        change={"spec.volumes": "a"},
        problems=["spec.volumes: input should be a valid list (it is 'a')"],
    ),
    Case(
        name="a string for an object",
        change={"spec.hub": "org/out"},
        problems=["spec.hub: input should be an object (it is 'org/out')"],
    ),
    Case(
        name="null for a required field",
        document=run_of(FINE_TUNE, {}) | {"name": None},
        problems=["name: required"],
    ),
    Case(
        name="an empty list",
        change={"spec.dataset.files": []},
        problems=["spec.dataset.files: list should have at least 1 item"],
    ),
    Case(
        name="a list that is too long, whose value is cut",
        job=GENERATE,
        change={"spec.adapters": [{"id": "a"}] * 9},
        problems=[
            "spec.adapters: list should have at most 8 items after validation, not 9 (it is"
            f" {str([{'id': 'a'}] * 9)[:100]}…)"
        ],
    ),
    Case(
        name="an empty string",
        change={"spec.dataset.split": ""},
        problems=["spec.dataset.split: string should have at least 1 character (it is '')"],
    ),
    Case(
        name="a string that is too long, whose value is cut",
        change={"spec.dataset.split": "a" * 254},
        problems=[f"spec.dataset.split: string should have at most 253 characters (it is '{'a' * 99}…)"],
    ),
    Case(
        name="a string that does not match its pattern",
        change={"spec.model.id": "a b"},
        problems=[f"spec.model.id: {REPOSITORY} (it is 'a b')"],
    ),
    Case(
        name="a string with a part that is never allowed",
        change={"spec.model.id": "a--b"},
        problems=[f"spec.model.id: {REPOSITORY} (it is 'a--b')"],
    ),
    Case(
        name="a key that does not match its pattern",
        change={"spec.scheduling": {"nodeSelector": {"a b": "c"}}},
        problems=[
            "spec.scheduling.nodeSelector.a b: must be the key of a label or annotation, such as gpu or"
            " example.com/gpu (it is 'a b')"
        ],
    ),
    Case(
        name="in an item of a list",
        job=GENERATE,
        change={"spec.inputs.rows": [{"prompt": "a"}, {"prmpt": "b"}]},
        problems=["spec.inputs.rows[1].prmpt: unknown field. Did you mean 'prompt'?"],
    ),
    Case(
        name="infinity, which JSON does not have",
        change={"spec.training.maxGradNorm": float("inf")},
        problems=["run config: invalid JSON: expected value at line 1 column "],
    ),
    Case(
        name="not a number, where any value is allowed",
        change={"spec.model": {"config": {"modelType": "llama", "parameters": {"a": [float("nan")]}}}},
        problems=["run config: invalid JSON: expected value at line 1 column "],
    ),
    Case(
        name="half of a surrogate pair",
        job=GENERATE,
        change={"spec.inputs.rows": [{"prompt": "\ud83d"}]},
        problems=["run config: invalid JSON: unexpected end of hex escape at line 1 column "],
    ),
    Case(
        name="a token at the place where the value is cut",
        change={"spec.strategy": "a" * 90 + "hf_" + "a1B2" * 9},
        problems=[
            "spec.strategy: input should be 'auto', 'ddp', 'zero1', 'zero2', 'zero2-offload', 'zero3',"
            f" 'zero3-offload' or 'fsdp' (it is '{'a' * 90}hf_…')"
        ],
    ),
    Case(
        name="several fields",
        change={"spec.task": "x", "spec.training": {"epochs": -1, "packing": True}, "spec.strategy": "zero9"},
        problems=[
            "spec.task: input should be 'causal-lm'",
            "spec.training.epochs: input should be greater than 0 (it is -1)",
            "spec.training.packing: input should be 'none', 'isolated' or 'concatenate' (it is True)",
            "spec.strategy: input should be 'auto'",
        ],
    ),
    Case(
        name="a character outside ASCII",
        job=GENERATE,
        change={"spec.inputs.rows": [{"prompt": "\U0001f3b5 né"}]},
        problems=[],
    ),
    Case(
        name="an integer written as 64.0",
        change={"spec.training.maxLength": 64.0},
        problems=[],
    ),
    Case(
        name="null for an optional field",
        document=changed(run_of(FINE_TUNE, {}), {"spec.training": {"maxSteps": None}}),
        problems=[],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_said_about_a_wrong_field(case: Case, read: Read) -> None:
    document = run_of(case.job, case.change) if case.document is None else case.document
    if not case.problems:
        read(document)
        return

    with pytest.raises(Failure) as caught:
        read(document)

    assert caught.value.code == ExitCode.INVALID_SPEC
    found = caught.value.message.split("; ")
    assert len(found) == len(case.problems), found
    for line, begins in zip(found, case.problems, strict=True):
        assert line.startswith(begins)
