"""What another version has stored is read as far as it is understood."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from cases.api import FINE_TUNE

from luthier_api.crd import crd
from luthier_api.kinds import KINDS, FineTuneJob, JobKind
from luthier_api.stored import NotUnderstood, Stored, read_stored
from luthier_api.termination import TerminationMessage

TIME = "2026-03-01T12:00:00Z"
COMPLETE = {"type": "Complete", "status": "True", "reason": "Completed", "lastTransitionTime": TIME}
SOUND = {"state": "Complete", "conditions": [COMPLETE], "completionTime": TIME, "restarts": 2}
ATTEMPT = {"phase": "run", "reason": "Hang"}


def read(spec: dict[str, Any] | None = None, status: dict[str, Any] | None = None) -> Stored[FineTuneJob]:
    document = copy.deepcopy(FINE_TUNE)
    document["spec"] |= spec or {}
    return read_stored(FineTuneJob, document | {"status": status or {}})


@dataclass(frozen=True)
class StatusCase:
    name: str
    change: dict[str, Any]
    """Fields of the status that another version has written."""
    expect: dict[str, Any]
    """Those of them that are understood."""


STATUSES = [
    StatusCase(
        name="an unknown field",
        change={"later": {"deep": 1}},
        expect={},
    ),
    StatusCase(
        name="an unknown field further down",
        change={"progress": {"step": 3, "furlongs": 4}},
        expect={"progress": {"step": 3}},
    ),
    StatusCase(
        name="a condition of an unknown type",
        change={"conditions": [COMPLETE, COMPLETE | {"type": "Admitted"}]},
        expect={"conditions": [COMPLETE | {"message": ""}, COMPLETE | {"type": "Admitted", "message": ""}]},
    ),
    StatusCase(
        name="a condition with an unknown field",
        change={"conditions": [COMPLETE | {"severity": "low"}]},
        expect={"conditions": [COMPLETE | {"message": ""}]},
    ),
    StatusCase(
        name="conditions that are none",
        change={"conditions": [{"type": "Odd"}, COMPLETE, 7, COMPLETE | {"type": "Odd", "status": "Perhaps"}]},
        expect={"conditions": [COMPLETE | {"message": ""}]},
    ),
    StatusCase(
        name="a phase that does not exist yet",
        change={"attempts": [ATTEMPT | {"phase": "evaluate"}]},
        expect={"attempts": [ATTEMPT | {"phase": "evaluate"}]},
    ),
    StatusCase(
        name="an attempt of another type",
        change={"attempts": [ATTEMPT | {"attempt": "first"}, ATTEMPT | {"attempt": {}}, "gone", {"phase": "run"}]},
        expect={"attempts": [ATTEMPT, ATTEMPT]},
    ),
    StatusCase(
        name="a value of another type",
        change={"metrics": {"evalLoss": 1.5, "confusion": [[1]]}, "prepared": "yes"},
        expect={"metrics": {"evalLoss": 1.5}},
    ),
    StatusCase(
        name="an object that lacks what it needs",
        change={"hub": {"repo": "org/result"}},
        expect={},
    ),
]


@pytest.mark.parametrize("case", STATUSES, ids=lambda case: case.name)
def test_what_is_unreadable_in_a_status_is_left_out_alone(case: StatusCase) -> None:
    found = read(status=SOUND | case.change).value.status
    dumped = found.dump()
    assert {name: without_defaults(dumped.get(name)) for name in case.change if name in dumped} == {
        name: without_defaults(value) for name, value in case.expect.items()
    }
    assert (found.state, found.restarts, found.finished, found.is_true("Complete")) == ("Complete", 2, True, True)


def without_defaults(value: Any) -> Any:
    """Without what an attempt has if nothing is said."""
    absent = {"attempt": 0, "message": "", "lastLines": "", "charged": False}
    if isinstance(value, list):
        return [without_defaults(item) for item in value]
    return {k: v for k, v in value.items() if absent.get(k, ...) != v} if isinstance(value, dict) else value


def test_a_status_that_is_none_is_an_empty_one() -> None:
    assert read_stored(FineTuneJob, FINE_TUNE | {"status": "none"}).value.status.dump() == read().value.status.dump()


@dataclass(frozen=True)
class SpecCase:
    name: str
    change: dict[str, Any]
    unknown: tuple[str, ...] = ()
    problem: str = ""
    kept: dict[str, Any] = field(default_factory=dict)


SPECS = [
    SpecCase(
        name="an unknown field",
        change={"fancy": 1},
        unknown=("spec.fancy",),
    ),
    SpecCase(
        name="unknown fields further down, beside known ones",
        change={"training": {"epochs": 2, "sharpness": 1}, "volumes": [{"claimName": "c", "mountPath": "/c", "z": 1}]},
        unknown=("spec.training.sharpness", "spec.volumes[0].z"),
        kept={"volumes": [{"claimName": "c", "mountPath": "/c"}]},
    ),
    SpecCase(
        name="an unknown value",
        change={"strategy": "zero9", "fancy": 1},
        problem="spec.strategy: input should be",
    ),
    SpecCase(
        name="a value of another type",
        change={"resources": {"nodes": "two"}},
        problem="spec.resources.nodes: input should be a valid integer",
    ),
]


@pytest.mark.parametrize("case", SPECS, ids=lambda case: case.name)
def test_an_unknown_field_of_a_spec_is_named_and_an_unknown_value_is_not_understood(case: SpecCase) -> None:
    if case.problem:
        with pytest.raises(NotUnderstood, match=case.problem):
            read(case.change)
        return
    found = read(case.change)
    assert found.unknown == case.unknown
    assert {name: found.value.spec.dump()[name] for name in case.kept} == case.kept


def test_reading_does_not_change_what_is_stored() -> None:
    document = copy.deepcopy(FINE_TUNE) | {"status": {"conditions": [{"type": "Odd"}]}}
    before = copy.deepcopy(document)
    read_stored(FineTuneJob, document)
    assert document == before


def test_a_spec_is_read_once_and_what_is_wrong_in_it_is_found_each_time() -> None:
    first, other = read(), read({"suspend": True})
    assert read().value.spec is first.value.spec
    assert (first.value.spec.suspend, other.value.spec.suspend) == (False, True)
    for _ in range(2):
        assert read({"later": 1}).unknown == ("spec.later",)
        with pytest.raises(NotUnderstood, match=r"spec\.suspend"):
            read({"suspend": "perhaps"})


@pytest.mark.parametrize("kind", KINDS)
def test_the_schema_of_a_status_closes_no_list_of_values_and_bounds_every_message(kind: JobKind) -> None:
    """A newer operator may report to an older CRD. The values of a condition's status are Kubernetes' own."""
    schema = crd(kind, KINDS[kind])["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]
    nodes = dict(below(schema, "status"))
    assert [path for path, node in nodes.items() if "enum" in node] == ["status.conditions.status"]
    unbounded = [path for path, node in nodes.items() if path.endswith("message") and "maxLength" not in node]
    assert unbounded == []


def below(node: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Path → node of a schema."""
    yield path, node
    if "items" in node:
        yield from below(node["items"], path)
    for name, child in node.get("properties", {}).items():
        yield from below(child, f"{path}.{name}")


@dataclass(frozen=True)
class MessageCase:
    name: str
    change: dict[str, Any]
    """What an image of another version writes into its termination message."""
    expect: dict[str, Any] | None
    """The fields that are read otherwise; None: it is no message."""


MESSAGE = {"phase": "run", "code": 0, "reason": "Completed", "step": 30, "notices": ["a", "b"]}
MESSAGES = [
    MessageCase(
        name="an unknown field",
        change={"later": {"deep": [1]}},
        expect={},
    ),
    MessageCase(
        name="an unknown field further down",
        change={"hub": {"repo": "org/result", "revision": "c", "url": "u", "later": 1}},
        expect={"hub": {"repo": "org/result", "revision": "c", "url": "u"}},
    ),
    MessageCase(
        name="a known field of another type",
        change={"step": "thirty"},
        expect={"step": None},
    ),
    MessageCase(
        name="an item of another type",
        change={"notices": ["a", {"text": "b"}]},
        expect={"notices": ["a"]},
    ),
    MessageCase(
        name="an unknown phase",
        change={"phase": "evaluate"},
        expect=None,
    ),
    MessageCase(
        name="no code",
        change={"code": None},
        expect=None,
    ),
]


@pytest.mark.parametrize("case", MESSAGES, ids=lambda case: case.name)
def test_a_message_of_another_version_is_read_as_far_as_it_is_understood(case: MessageCase) -> None:
    found = TerminationMessage.read(json.dumps(MESSAGE | case.change))
    expected = None if case.expect is None else TerminationMessage.model_validate(MESSAGE | case.expect)
    assert found == expected
