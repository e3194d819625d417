"""How soon a job is looked at after a change of a child, as the API server sends it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from luthier_api.status import State
from luthier_operator.model import Object
from luthier_operator.naming import CONTAINER, PHASE_LABEL
from luthier_operator.settling import ACT, NO_LOOK, NOTHING, SEEN, TELL, seconds


def pod(state: Object, phase: str = "Pending") -> Object:
    return {"phase": phase, "containerStatuses": [{"name": CONTAINER, "state": state}]}


def labelled(phase: str) -> Object:
    return {"labels": {PHASE_LABEL: phase}}


@dataclass(frozen=True)
class Case:
    name: str
    kind: str
    status: Object
    settles: float | None
    meta: dict[str, Any] = field(default_factory=dict)
    job: str = State.PREPARING


UNSCHEDULABLE = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
SCHEDULED = {"type": "PodScheduled", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}
CASES = [
    Case("a pod that is new", "Pod", {"phase": "Pending"}, NO_LOOK),
    Case("a pod that has a node", "Pod", {"phase": "Pending", "conditions": [SCHEDULED]}, NOTHING),
    Case(
        name="a pod that has a node, after it was reported to be missing",
        kind="Pod",
        status={"phase": "Pending", "conditions": [SCHEDULED]},
        settles=SEEN,
        job="NoPods",
    ),
    Case("a pod that is new, after it was reported to be missing", "Pod", {"phase": "Pending"}, SEEN, job="NoPods"),
    Case("a pod that has no node", "Pod", {"phase": "Pending", "conditions": [UNSCHEDULABLE]}, TELL),
    Case(
        name="a pod whose image is pulled",
        kind="Pod",
        status=pod({"waiting": {"reason": "ContainerCreating"}}) | {"conditions": [SCHEDULED]},
        settles=NOTHING,
    ),
    Case("a pod whose image is missing", "Pod", pod({"waiting": {"reason": "ErrImagePull"}}), TELL),
    Case("a pod that has begun to train", "Pod", pod({"running": {}}, "Running"), ACT, meta=labelled("run")),
    Case("a pod that has begun to prepare", "Pod", pod({"running": {}}, "Running"), NO_LOOK, meta=labelled("prepare")),
    Case(
        name="a pod that has begun to prepare after it could not",
        kind="Pod",
        status=pod({"running": {}}, "Running"),
        settles=TELL,
        meta=labelled("prepare"),
        job="ImagePullFailed",
    ),
    Case("a pod that has succeeded", "Pod", pod({"terminated": {"exitCode": 0}}, "Succeeded"), NOTHING),
    Case("a pod that has failed", "Pod", pod({"terminated": {"exitCode": 75}}, "Failed"), ACT),
    Case("a pod that was evicted before it ran", "Pod", {"phase": "Failed", "reason": "Evicted"}, ACT),
    Case("a pod that is stopped", "Pod", pod({}), ACT, meta={"deletionTimestamp": "2026-01-01T00:00:00Z"}),
    Case("a Job that has created its pod", "Job", {"active": 1}, NO_LOOK),
    Case("a Job that has created the pod that was missing", "Job", {"active": 1}, SEEN, job="NoPods"),
    Case("a Job whose pod has failed", "Job", {"active": 1, "failed": 1}, ACT),
    Case("a Job that is complete", "Job", {"conditions": [{"type": "Complete", "status": "True"}]}, ACT),
    Case("a Job that a queue holds", "Job", {"conditions": [{"type": "Suspended", "status": "True"}]}, TELL),
    Case("a JobSet that is new", "JobSet", {"restarts": 0}, NO_LOOK),
    Case("a JobSet that has started its pods again", "JobSet", {"restarts": 1}, ACT),
    Case("a Workload of Kueue", "Workload", {}, ACT),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_follows_from_a_change_decides_how_long_it_settles(case: Case) -> None:
    found = {"kind": case.kind, "metadata": {"name": "x"} | case.meta, "status": case.status}
    assert seconds(found, case.job) == case.settles
