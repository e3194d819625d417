"""What is read of the API server's text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from luthier_operator.wire import read_answer, read_event, read_list, read_object

POD = {
    "kind": "Pod",
    "metadata": {"name": "a", "uid": "1", "managedFields": [{"manager": "kubelet"}]},
    "spec": {"nodeName": "node", "containers": [{"name": "trainer", "image": "x", "resources": {"limits": {}}}]},
    "status": {
        "phase": "Running",
        "containerStatuses": [{"name": "trainer", "state": {"running": {}}, "imageID": "x"}],
    },
}
POD_READ = {
    "kind": "Pod",
    "metadata": {"name": "a", "uid": "1"},
    "spec": {"nodeName": "node", "containers": [{"name": "trainer", "resources": {"limits": {}}}]},
    "status": {"phase": "Running", "containerStatuses": [{"name": "trainer", "state": {"running": {}}}]},
}
JOB = {"kind": "FineTuneJob", "metadata": {"name": "a", "managedFields": []}, "spec": {"anything": [1]}}
STATUS = {"kind": "Status", "status": "Failure", "code": 410, "reason": "Expired"}


@dataclass(frozen=True)
class Case:
    name: str
    kind: str
    event: str
    sent: Any
    expect: Any


CASES = [
    Case(
        name="of a pod only what is used",
        kind="Pod",
        event="MODIFIED",
        sent=POD,
        expect=POD_READ,
    ),
    Case(
        name="a job of ours is whole",
        kind="FineTuneJob",
        event="MODIFIED",
        sent=JOB,
        expect=JOB,
    ),
    Case(
        name="an error is whole",
        kind="Pod",
        event="ERROR",
        sent=STATUS,
        expect=STATUS,
    ),
    Case(
        name="a child of an unexpected shape is whole",
        kind="Pod",
        event="ADDED",
        sent=POD | {"status": "unknown"},
        expect=POD | {"status": "unknown"},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_event(case: Case) -> None:
    line = json.dumps({"type": case.event, "object": case.sent}).encode()
    assert read_event(case.kind, line) == (case.event, case.expect)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_list(case: Case) -> None:
    text = json.dumps({"metadata": {"resourceVersion": "7"}, "items": [case.sent]}).encode()
    found = read_list(case.kind, text)
    assert found["metadata"] == {"resourceVersion": "7"}
    if case.event != "ERROR":
        assert found["items"] == [case.expect]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_object(case: Case) -> None:
    if case.event != "ERROR":
        assert read_object(case.kind, json.dumps(case.sent).encode()) == case.expect


@pytest.mark.parametrize("kind", ["ConfigMap", "Event"])
def test_of_what_was_just_created_only_the_metadata_is_read(kind: str) -> None:
    meta = {"name": "a", "resourceVersion": "7"}
    sent = {"kind": kind, "metadata": meta | {"managedFields": []}, "data": {"run.json": "{}"}, "message": "begun"}
    assert read_object(kind, json.dumps(sent).encode()) == {"kind": kind, "metadata": meta}


@pytest.mark.parametrize(
    ("sent", "expect"),
    [
        (b'{"kind": "Status"}', {"kind": "Status"}),
        (b"<html>bad gateway</html>", {"message": "<html>bad gateway</html>"}),
        (b'["no", "object"]', {"message": '["no", "object"]'}),
        (b"", {"message": ""}),
    ],
)
def test_answer(sent: bytes, expect: dict[str, Any]) -> None:
    assert read_answer(sent) == expect
