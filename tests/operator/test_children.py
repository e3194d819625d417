"""What children of a job tell, as the API server sends them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from luthier_operator import children
from luthier_operator.model import Object
from luthier_operator.naming import CONTAINER


def pod(state: Object, phase: str = "Pending") -> Object:
    return {"phase": phase, "containerStatuses": [{"name": CONTAINER, "state": state}]}


@dataclass(frozen=True)
class Case:
    name: str
    kind: str
    status: Object
    waits: bool
    meta: dict[str, Any] = field(default_factory=dict)


UNSCHEDULABLE = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
CASES = [
    Case("a pod that is new", "Pod", {"phase": "Pending"}, waits=True),
    Case("a pod that has no node", "Pod", {"phase": "Pending", "conditions": [UNSCHEDULABLE]}, waits=True),
    Case("a pod whose image is pulled", "Pod", pod({"waiting": {"reason": "ContainerCreating"}}), waits=True),
    Case("a pod that has begun to run", "Pod", pod({"running": {}}, "Running"), waits=False),
    Case("a pod that has succeeded", "Pod", pod({"terminated": {"exitCode": 0}}, "Succeeded"), waits=True),
    Case("a pod that has failed", "Pod", pod({"terminated": {"exitCode": 75}}, "Failed"), waits=False),
    Case("a pod that was evicted before it ran", "Pod", {"phase": "Failed", "reason": "Evicted"}, waits=False),
    Case("a pod that is stopped", "Pod", pod({}), waits=False, meta={"deletionTimestamp": "2026-01-01T00:00:00Z"}),
    Case("a Job that has created its pod", "Job", {"active": 1}, waits=True),
    Case("a Job whose pod has failed", "Job", {"active": 1, "failed": 1}, waits=False),
    Case("a Job that is complete", "Job", {"conditions": [{"type": "Complete", "status": "True"}]}, waits=False),
    Case("a JobSet that is new", "JobSet", {"restarts": 0}, waits=True),
    Case("a JobSet that has started its pods again", "JobSet", {"restarts": 1}, waits=False),
    Case("a Workload of Kueue", "Workload", {}, waits=False),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_only_told_to_people_can_wait(case: Case) -> None:
    found = {"kind": case.kind, "metadata": {"name": "x"} | case.meta, "status": case.status}
    assert children.can_wait(found) is case.waits
