"""Prepare, as a table: one pod without a GPU, its troubles, and what becomes of what it found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from cases.observed import (
    BEGIN,
    HUB,
    NOW,
    PREPARED,
    RUNNING,
    at,
    child,
    decided,
    describe,
    ended,
    fine_tune,
    generate,
    pod,
    prepared_end,
    run_document,
    said,
    status,
    waiting,
)

from luthier_api.conditions import ConditionType
from luthier_api.status import JobStatus
from luthier_operator import naming
from luthier_operator.model import ChildRef, Object, PodEnd
from luthier_operator.statuses import text

PREPARING = status("Accepted", start_time=text(BEGIN))
JOB = fine_tune(PREPARING)
READ = {"tokenSecretRef": {"name": "hf"}}
DOING = "False Preparing: a pod resolves the model, loads the data and plans the run"
COLUMN = 'spec.dataset.columns.text: no column "txet" in train.jsonl (columns: text, label). Did you mean "text"?'


def test_it_begins_with_everything_that_the_pods_need() -> None:
    decision = decided(fine_tune())
    assert describe(decision) == "applies ConfigMap ftj-bot, PersistentVolumeClaim ftj-bot, Job ftj-bot-prepare"
    assert decision.status.start_time == text(NOW)
    assert (decision.status.shape, decision.status.state) == ("2×8", "Preparing")
    assert decision.status.workspace is not None
    assert (decision.status.workspace.claim_name, decision.status.workspace.folder) == ("ftj-bot", "ftj-bot-f00dcafe")
    assert [(e.reason, e.message) for e in decision.events] == [
        ("Preparing", "a pod resolves the model, loads the data and plans the run")
    ]


def test_a_claim_of_the_user_is_not_created() -> None:
    assert (
        describe(decided(generate(workspace={"claimName": "shared"})))
        == "applies ConfigMap gj-lutes, Job gj-lutes-prepare"
    )


def test_the_pods_find_the_other_job_even_after_it_is_gone() -> None:
    base = {"base": fine_tune(status("Trained"), name="base", uid="0ddba11-aaaa", workspace={"claimName": "shared"})}
    job = generate(model={"job": "base"})
    configmap, _, prepare = decided(job, sources=base).apply
    assert run_document(configmap)["sources"] == {"base": "/sources/shared/ftj-base-0ddba11-"}
    later = generate(status("Accepted", "Prepared", start_time=text(BEGIN)), model={"job": "base"})
    seen = child(later, "prepare", "Complete", notes=prepare["metadata"]["annotations"])
    anew = {"base": fine_tune(name="base", uid="another-uid")}
    for sources in ({}, anew):
        (run,) = decided(later, seen, sources=sources).apply
        claims = [
            v["persistentVolumeClaim"]["claimName"]
            for v in run["spec"]["template"]["spec"]["volumes"]
            if "persistentVolumeClaim" in v
        ]
        assert claims == ["gj-lutes", "shared"]


def situation(
    *children: Object,
    pods: Sequence[Object] = (),
    ends: Sequence[PodEnd] = (),
    given: JobStatus = PREPARING,
    **spec: Any,
) -> Any:
    return fine_tune(given, **spec), children, list(pods), list(ends)


@dataclass(frozen=True)
class Case:
    name: str
    given: Any
    expect: str
    condition: str


CASES = [
    Case(
        name="its pod is not there yet",
        given=situation(child(JOB, "prepare", born=at(-2))),
        expect="again in 28.1 s",
        condition=DOING,
    ),
    Case(
        name="its pod is still not there",
        given=situation(child(JOB, "prepare", born=at(-31))),
        expect="waits",
        condition=(
            "False NoPods: the cluster has created no pods for Job ftj-bot-prepare so far; see `kubectl describe job"
            " ftj-bot-prepare`"
        ),
    ),
    Case(
        name="its pod has ended well, the Job has not heard of it",
        given=situation(child(JOB, "prepare"), ends=[prepared_end(JOB)]),
        expect="waits",
        condition=DOING,
    ),
    Case(
        name="its pod has a node",
        given=situation(
            child(JOB, "prepare"), pods=[pod(JOB, "prepare", state=waiting("ContainerCreating"), scheduled=at(-10))]
        ),
        expect="again in 20 s",
        condition=DOING,
    ),
    Case(
        name="its container is long in coming",
        given=situation(
            child(JOB, "prepare"), pods=[pod(JOB, "prepare", state=waiting("ContainerCreating"), scheduled=at(-31))]
        ),
        expect="repairs ConfigMap ftj-bot",
        condition=(
            "False ContainerCreating: pod ftj-bot-prepare-0-0 was scheduled, but its container has not started after"
            " 30 s: it waits for its image or for a volume (spec.volumes, spec.workspace); see `kubectl describe pod"
            " ftj-bot-prepare-0-0`"
        ),
    ),
    Case(
        name="no scheduler has tried to give it a node; its own is that of the cluster",
        given=situation(
            child(JOB, "prepare"),
            pods=[pod(JOB, "prepare", over="Pending", node="", born=at(-301))],
            scheduling={"schedulerName": "volcano"},
        ),
        expect="waits",
        condition=(
            "False Unschedulable: pod ftj-bot-prepare-0-0 has no node, and no scheduler has said why for 300 s: the"
            " scheduler does not run in this cluster, or is behind"
        ),
    ),
    Case(
        name="its node does not answer",
        given=situation(child(JOB, "prepare"), pods=[pod(JOB, "prepare", scheduled=at(-31))]),
        expect="repairs ConfigMap ftj-bot",
        condition=(
            "False ContainerCreating: pod ftj-bot-prepare-0-0 was scheduled, but its container has not started after"
            " 30 s: it waits for its image or for a volume (spec.volumes, spec.workspace); see `kubectl describe pod"
            " ftj-bot-prepare-0-0`"
        ),
    ),
    Case(
        name="its container runs",
        given=situation(child(JOB, "prepare"), pods=[pod(JOB, "prepare", state=RUNNING, scheduled=at(-600))]),
        expect="waits",
        condition=DOING,
    ),
    Case(
        name="a queue that takes every Job holds it back",
        given=situation(child(JOB, "prepare", suspend=True)),
        expect="waits",
        condition=(
            "False WaitingForQueue: Job ftj-bot-prepare is suspended by a queue; see `kubectl describe workloads`"
        ),
    ),
    Case(
        name="the Hub was away, and the next pod is long in coming",
        given=situation(child(JOB, "prepare"), ends=[ended(JOB, "prepare", 69, message="503 from hub.example")]),
        expect="waits",
        condition=(
            "False HubUnavailable: 503 from hub.example (prepare, pod ftj-bot-prepare-0-0 on node-a, exit code 69)."
            " It will be retried"
        ),
    ),
    Case(
        name="no node has room",
        given=situation(
            child(JOB, "prepare"),
            pods=[pod(JOB, "prepare", unschedulable="0/3 nodes are available: 3 Insufficient memory.")],
        ),
        expect="waits",
        condition=(
            "False Unschedulable: spec.prepare.memory: pod ftj-bot-prepare-0-0: 0/3 nodes are available: 3 Insufficient"
            " memory. To solve it: ask for no more than one node has, or wait until other pods have ended"
        ),
    ),
    Case(
        name="its volume is not bound",
        given=situation(
            child(JOB, "prepare"), pods=[pod(JOB, "prepare", unschedulable='persistentvolumeclaim "ftj-bot" not found')]
        ),
        expect="waits",
        condition=(
            'False WaitingForVolume: spec.workspace: claim ftj-bot is not ready: persistentvolumeclaim "ftj-bot" not'
            " found (pod ftj-bot-prepare-0-0). Nothing provides a volume of 10Gi with the cluster's default storage"
            " class: set spec.workspace.storageClassName, accessMode or size to what the cluster has, or claimName to a"
            " claim that exists; `kubectl describe pvc ftj-bot` says more"
        ),
    ),
    Case(
        name="its image does not come",
        given=situation(
            child(JOB, "prepare"), pods=[pod(JOB, "prepare", state=waiting("ErrImagePull", "no such host"))]
        ),
        expect="waits",
        condition=(
            "False ImagePullFailed: the trainer image cannot be pulled for pod ftj-bot-prepare-0-0. An administrator"
            " sets it by trainer.image (chart), and imagePullSecrets for a registry that asks who pulls: no such host"
        ),
    ),
    Case(
        name="the secret is missing",
        given=situation(
            child(JOB, "prepare"),
            pods=[pod(JOB, "prepare", state=waiting("CreateContainerConfigError", 'secret "hf" not found'))],
            hub=READ,
        ),
        expect="waits",
        condition='False Misconfigured: spec.hub.tokenSecretRef: secret "hf" not found (pod ftj-bot-prepare-0-0)',
    ),
    Case(
        name="the secret lacks the key",
        given=situation(
            child(JOB, "prepare"),
            pods=[
                pod(
                    JOB,
                    "prepare",
                    state=waiting("CreateContainerConfigError", "couldn't find key token in Secret ml/hf"),
                )
            ],
            hub=READ,
        ),
        expect="waits",
        condition="False Misconfigured: spec.hub.tokenSecretRef: couldn't find key token in Secret ml/hf"
        " (pod ftj-bot-prepare-0-0)",
    ),
    Case(
        name="the Hub is away",
        given=situation(
            child(JOB, "prepare"),
            pods=[pod(JOB, "prepare", state=RUNNING)],
            ends=[ended(JOB, "prepare", 69, message="503 from hub.example")],
        ),
        expect="waits",
        condition=(
            "False HubUnavailable: 503 from hub.example (prepare, pod ftj-bot-prepare-0-0 on node-a, exit code 69)."
            " It will be retried"
        ),
    ),
    Case(
        name="a column is missing, the Job has not heard of it",
        given=situation(child(JOB, "prepare"), ends=[ended(JOB, "prepare", 65, message=COLUMN)]),
        expect="waits",
        condition="absent",
    ),
    Case(
        name="a column is missing",
        given=situation(child(JOB, "prepare", "Failed"), ends=[ended(JOB, "prepare", 65, message=COLUMN)]),
        expect="Failed InvalidDataset",
        condition=f"False InvalidDataset: {COLUMN} (prepare, pod ftj-bot-prepare-0-0 on node-a, exit code 65)",
    ),
    Case(
        name="it failed a moment ago, its pod has not been heard of",
        given=situation(child(JOB, "prepare", "Failed", since=at(-1))),
        expect="again in 3 s",
        condition="absent",
    ),
    Case(
        name="it failed while the operator was away, and the pod is gone",
        given=situation(
            child(
                JOB,
                "prepare",
                "Failed",
                reason="PodFailurePolicy",
                message=(
                    "Container trainer for pod ml/ftj-bot-prepare-x7 failed with exit code 66 matching FailJob rule at"
                    " index 0"
                ),
            )
        ),
        expect="Failed NotFound",
        condition=(
            "False NotFound: Container trainer for pod ml/ftj-bot-prepare-x7 failed with exit code 66 matching FailJob"
            " rule at index 0; the pod's own message was not seen. See `kubectl logs ftj-bot-prepare-x7 -c trainer`"
        ),
    ),
    Case(
        name="it failed, and nobody knows why",
        given=situation(child(JOB, "prepare", "Failed", message="Job has reached the specified backoff limit")),
        expect="Failed Failed",
        condition="False Failed: prepare failed: Job has reached the specified backoff limit",
    ),
    Case(
        name="it succeeded",
        given=situation(child(JOB, "prepare", "Complete"), ends=[prepared_end(JOB)]),
        expect="repairs ConfigMap ftj-bot; applies JobSet ftj-bot-run",
        condition="True Prepared: org/model@c0ffeec0ffee, 900 rows and 100 to evaluate, strategy ddp, 40 steps",
    ),
    Case(
        name="it succeeded, but what it said is lost",
        given=situation(child(JOB, "prepare", "Complete")),
        expect="repairs ConfigMap ftj-bot; applies JobSet ftj-bot-run",
        condition="True Prepared: prepared",
    ),
    Case(
        name="it is planned, and that is all",
        given=situation(child(JOB, "prepare", "Complete"), ends=[prepared_end(JOB)], planOnly=True),
        expect="waits",
        condition="True PlanOnly: org/model@c0ffeec0ffee, 900 rows and 100 to evaluate, strategy ddp, 40 steps",
    ),
    Case(
        name="its Job is gone, but it was done",
        given=situation(given=status("Accepted", "Prepared", prepared=PREPARED)),
        expect="repairs ConfigMap ftj-bot; applies JobSet ftj-bot-run",
        condition="True Prepared: org/model@c0ffeec0ffee, 900 rows and 100 to evaluate, strategy ddp, 40 steps",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_prepare(case: Case) -> None:
    job, children, pods, ends = case.given
    decision = decided(job, *children, pods=pods, ends=ends)
    assert describe(decision) == case.expect
    assert said(decision, "Prepared") == case.condition


@dataclass(frozen=True)
class BacklogCase:
    """A Job without its pod, while the controllers have other children to create pods for."""

    name: str
    backlog: int
    seconds: float
    """Since the Job was created."""
    missing: bool
    given: JobStatus = PREPARING


BACKLOGS = [
    BacklogCase(name="none", backlog=0, seconds=31, missing=True),
    BacklogCase(name="it is not yet its turn", backlog=100, seconds=31, missing=False),
    BacklogCase(name="its turn is over", backlog=100, seconds=41, missing=True),
    BacklogCase(name="no backlog is an excuse for longer than five minutes", backlog=9000, seconds=301, missing=True),
    BacklogCase(
        name="a burst that comes after the report",
        backlog=100,
        seconds=31,
        missing=True,
        given=status("Accepted", false={"Prepared": "NoPods"}, start_time=text(BEGIN)),
    ),
]


@pytest.mark.parametrize("case", BACKLOGS, ids=lambda case: case.name)
def test_a_pod_is_missing_after_its_turn(case: BacklogCase) -> None:
    job = fine_tune(case.given)
    found = decided(job, child(job, "prepare", born=at(-case.seconds)), backlog=case.backlog)
    condition = found.status.condition(ConditionType.PREPARED)
    assert condition
    assert condition.reason == ("NoPods" if case.missing else "Preparing")
    assert bool(found.ask) is case.missing


def test_a_condition_that_is_not_true_says_nothing() -> None:
    there = child(JOB, "prepare", born=at(-31))
    there["status"]["conditions"].append({"type": "Failed", "status": "False", "lastTransitionTime": text(NOW)})
    assert said(decided(JOB, there), "Prepared").startswith("False NoPods: the cluster has created no pods"), (
        "due since the Job was made"
    )


def test_a_plan_is_a_state_and_no_end() -> None:
    job = fine_tune(PREPARING, planOnly=True)
    planned = decided(job, child(job, "prepare", "Complete"), ends=[prepared_end(job)])
    assert (planned.status.state, planned.status.finished) == ("Planned", False)
    assert planned.status.prepared is not None
    assert planned.status.prepared.plan.steps == 40
    on = fine_tune(decided(fine_tune(planned.status), child(job, "prepare", "Complete")).status)
    assert (
        describe(decided(on, child(on, "prepare", "Complete")))
        == "repairs ConfigMap ftj-bot; applies JobSet ftj-bot-run"
    )


def test_what_prepare_said_may_come_late() -> None:
    job = fine_tune(status("Accepted", "Prepared", "Running"))
    assert (
        decided(job, child(job, "prepare", "Complete"), child(job, "run"), ends=[prepared_end(job)]).status.prepared
        == PREPARED
    )


def test_each_failed_pod_is_an_attempt_once() -> None:
    ends = [ended(JOB, "prepare", 69, when=-90, suffix="-a"), ended(JOB, "prepare", 69, when=-30, suffix="-b")]
    first = decided(JOB, child(JOB, "prepare"), ends=ends).status
    assert [(a.phase, a.attempt, a.reason, a.charged, a.rank) for a in first.attempts] == [
        ("prepare", 0, "HubUnavailable", True, None),
        ("prepare", 1, "HubUnavailable", True, None),
    ]
    assert decided(fine_tune(first), child(JOB, "prepare"), ends=ends).status == first
    assert decided(fine_tune(first), child(JOB, "prepare")).status == first, (
        "another operator, which has seen none of it"
    )


def test_attempts_are_numbered_in_each_phase_from_the_beginning() -> None:
    job = fine_tune(status("Accepted", "Prepared", "Trained", start_time=text(BEGIN)), hub=HUB)
    ends = [
        ended(job, phase, 69, when=when, suffix=f"{when}")
        for phase, when in (("prepare", -90), ("prepare", -80), ("publish", -70), ("publish", -60), ("publish", -50))
    ]
    decision = decided(job, child(job, "prepare"), child(job, "publish"), ends=ends)
    assert [(a.phase, a.attempt) for a in decision.status.attempts] == [
        ("prepare", 0),
        ("prepare", 1),
        ("publish", 0),
        ("publish", 1),
        ("publish", 2),
    ]


def test_where_the_results_of_other_jobs_are_stays_known_without_the_job_of_prepare() -> None:
    base = {"base": fine_tune(status("Complete"), name="base", uid="0ddba11-aaaa")}
    job = generate(status("Accepted", start_time=text(BEGIN)), model={"job": "base"})
    prepare = decided(job, sources=base).apply[-1]
    first = decided(job, child(job, "prepare", "Complete", notes=prepare["metadata"]["annotations"]))
    assert [source.dump() for source in first.status.sources or []] == [
        {"job": "base", "claimName": "ftj-base", "folder": "ftj-base-0ddba11-"}
    ]
    later = generate(first.status, model={"job": "base"})
    again = {"base": fine_tune(status(), name="base", uid="another1-aaaa")}
    (run,) = decided(later, sources=again).apply
    volumes = run["spec"]["template"]["spec"]["volumes"]
    assert "ftj-base" in [v["persistentVolumeClaim"]["claimName"] for v in volumes if "persistentVolumeClaim" in v]


def test_what_the_other_job_left_is_noted_as_json() -> None:
    base = {"base": fine_tune(status("Complete"), name="base", uid="0ddba11-aaaa")}
    prepare = decided(generate(model={"job": "base"}), sources=base).apply[-1]
    assert json.loads(prepare["metadata"]["annotations"][naming.SOURCES_ANNOTATION]) == {
        "base": ["ftj-base", "ftj-base-0ddba11-"]
    }


@dataclass(frozen=True)
class SeenCase:
    name: str
    state: str
    seconds: float
    """Since the operator has seen the end of the Job."""
    expect: str


SEEN = [
    SeenCase(
        name="just failed",
        state="Failed",
        seconds=1,
        expect="again in 3 s",
    ),
    SeenCase(
        name="failed, and no pod explains it",
        state="Failed",
        seconds=4,
        expect="Failed Failed",
    ),
    SeenCase(
        name="just complete",
        state="Complete",
        seconds=1,
        expect="again in 3 s",
    ),
]


@pytest.mark.parametrize("minutes", [-10, 10])
@pytest.mark.parametrize("case", SEEN, ids=lambda case: case.name)
def test_the_operators_clock_decides_how_long_it_waits_for_a_message(case: SeenCase, minutes: int) -> None:
    """The clock of the API server may be minutes ahead or behind."""
    over = child(JOB, "prepare", case.state, since=at(60 * minutes))
    since = {ChildRef("Job", over["metadata"]["name"]): at(-case.seconds)}
    assert describe(decided(JOB, over, ended_since=since)) == case.expect
