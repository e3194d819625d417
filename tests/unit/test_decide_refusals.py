"""What a user reads while the cluster creates no pods or no volume for a job: field, the cluster's words, remedy."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import pytest
from cases.observed import NOW, at, child, decided, describe, fine_tune, generate, pod, said, status

from luthier_operator.model import ChildRef, Job

WAITS = fine_tune(status("Accepted", "Prepared"))
PREPARES = fine_tune(status("Accepted", false={"Prepared": "Preparing"}))
JOBSET = ChildRef("JobSet", "ftj-bot-run")
DESCRIBE = "see `kubectl describe jobset ftj-bot-run` and `kubectl describe job ftj-bot-run-node-0`"
QUOTA = 'pods "ftj-bot-run-node-0-0-" is forbidden: exceeded quota: gpus, requested: requests.nvidia.com/gpu=8, used: 0'
LIMIT = 'pods "x" is forbidden: maximum memory usage per Container is 1Gi, but limit is 2Gi'


@dataclass(frozen=True)
class Case:
    name: str
    warning: str | None
    """What the Events say: None while they are not read, empty if they say nothing."""
    born: datetime
    """When the JobSet was created. It has no pods."""
    expect: str
    condition: str
    asks: bool = False
    """Whether the Events of the JobSet are to be read."""


CASES = [
    Case(
        name="a moment ago",
        warning=None,
        born=at(-2),
        expect="again in 28.2 s",
        condition="False Starting: waiting for 2 pods on 16 GPUs to start",
    ),
    Case(
        name="for a while: the Events may tell",
        warning=None,
        born=at(-31),
        expect="waits",
        asks=True,
        condition=f"False NoPods: the cluster has created no pods for JobSet ftj-bot-run so far; {DESCRIBE}",
    ),
    Case(
        name="a quota",
        warning=QUOTA,
        born=at(-31),
        expect="waits",
        condition=(
            f"False NoPods: spec.resources: the cluster refuses the pods of JobSet ftj-bot-run: {QUOTA}. To solve it:"
            " ask for less, wait until other pods of the namespace have ended, or have its ResourceQuota raised"
        ),
    ),
    Case(
        name="a limit",
        warning=LIMIT,
        born=at(-31),
        expect="again in 1769 s",
        condition=(
            f"False NoPods: spec.resources: the cluster refuses the pods of JobSet ftj-bot-run: {LIMIT}. To solve it:"
            " stay within the LimitRange of the namespace, or have it changed"
        ),
    ),
    Case(
        name="a priority class that does not exist",
        warning='pods "x" is forbidden: no PriorityClass with name urgent was found',
        born=at(-31),
        expect="again in 1769 s",
        condition=(
            "False NoPods: spec.scheduling.priorityClassName: the cluster refuses the pods of JobSet ftj-bot-run:"
            ' pods "x" is forbidden: no PriorityClass with name urgent was found. To solve it: name one that `kubectl'
            " get priorityclasses` shows"
        ),
    ),
    Case(
        name="a policy of the cluster",
        warning="admission webhook says no",
        born=at(-31),
        expect="again in 1769 s",
        condition="False NoPods: the cluster refuses the pods of JobSet ftj-bot-run: admission webhook says no",
    ),
    Case(
        name="nothing but a backlog, as in a burst of jobs",
        warning="",
        born=at(-31),
        expect="again in 60 s",
        condition="False Starting: waiting for 2 pods on 16 GPUs to start",
    ),
    Case(
        name="nothing, for minutes",
        warning="",
        born=at(-301),
        expect="again in 60 s",
        condition=(
            "False NoPods: the cluster has created no pods for JobSet ftj-bot-run so far, and reports no problem: its"
            f" controllers are behind, or do not run; {DESCRIBE}"
        ),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_job_without_pods(case: Case) -> None:
    warnings = {} if case.warning is None else {JOBSET: case.warning}
    decision = decided(WAITS, child(WAITS, "run", born=case.born), warnings=warnings)
    assert describe(decision) == case.expect
    assert said(decision, "Running") == case.condition
    assert list(decision.ask) == ([JOBSET] if case.asks else [])


def test_the_resources_of_prepare_are_not_those_of_the_job() -> None:
    warnings = {ChildRef("Job", "ftj-bot-prepare"): LIMIT}
    decision = decided(PREPARES, child(PREPARES, "prepare", born=at(-31)), warnings=warnings)
    begin = "False NoPods: spec.prepare: the cluster refuses the pods of Job ftj-bot-prepare: "
    assert said(decision, "Prepared").startswith(begin)


def test_a_refusal_that_never_ends_by_itself_ends_the_job() -> None:
    decision = decided(WAITS, child(WAITS, "run", born=at(-1800)), warnings={JOBSET: LIMIT})
    assert describe(decision) == "deletes JobSet ftj-bot-run; Failed NoPods"
    waited = "or have it changed. It was waited for 1800 seconds (jobs.startTimeoutSeconds in the chart). To go on, "
    assert waited in said(decision, "Failed")


def test_a_quota_is_waited_for() -> None:
    decision = decided(WAITS, child(WAITS, "run", born=at(-100_000)), warnings={JOBSET: QUOTA})
    assert describe(decision) == "waits"


def test_a_claim_that_never_comes_ends_the_job() -> None:
    job = fine_tune(ACCEPTED, **NAMED)
    lost = pod(job, "prepare", unschedulable='persistentvolumeclaim "shared" not found', since=at(-1800))
    decision = decided(job, child(job, "prepare"), pods=[lost])
    assert describe(decision) == "deletes Job ftj-bot-prepare; Failed WaitingForVolume"
    assert "spec.workspace.claimName: claim shared is not ready" in said(decision, "Failed")


@dataclass(frozen=True)
class VolumeCase:
    name: str
    job: Job
    message: str
    """The scheduler's."""
    condition: str


OWN = {"workspace": {"storageClassName": "fast", "size": "200Gi"}}
NAMED = {"workspace": {"claimName": "shared"}}
DATA = {"volumes": [{"claimName": "corpus", "mountPath": "/data"}]}
ACCEPTED = status("Accepted", false={"Prepared": "Preparing"})

VOLUMES = [
    VolumeCase(
        name="nothing provides the workspace",
        job=fine_tune(ACCEPTED, **OWN),
        message="0/3 nodes are available: pod has unbound immediate PersistentVolumeClaims.",
        condition=(
            "spec.workspace: claim ftj-bot is not ready: 0/3 nodes are available: pod has unbound immediate"
            " PersistentVolumeClaims. (pod ftj-bot-prepare-0-0). Nothing provides a volume of 200Gi with storage class"
            " fast: set spec.workspace.storageClassName, accessMode or size to what the cluster has, or claimName to a"
            " claim that exists; `kubectl describe pvc ftj-bot` says more"
        ),
    ),
    VolumeCase(
        name="the claim of the workspace does not exist",
        job=fine_tune(ACCEPTED, **NAMED),
        message='0/3 nodes are available: persistentvolumeclaim "shared" not found.',
        condition=(
            "spec.workspace.claimName: claim shared is not ready: 0/3 nodes are available: persistentvolumeclaim"
            ' "shared" not found. (pod ftj-bot-prepare-0-0). Create that claim in this namespace, or name another one;'
            " `kubectl describe pvc shared` says what it lacks"
        ),
    ),
    VolumeCase(
        name="a claim with data does not exist",
        job=fine_tune(ACCEPTED, **DATA),
        message='0/3 nodes are available: persistentvolumeclaim "corpus" not found.',
        condition=(
            "spec.volumes[0].claimName: claim corpus is not ready: 0/3 nodes are available: persistentvolumeclaim"
            ' "corpus" not found. (pod ftj-bot-prepare-0-0). Create that claim in this namespace, or name another one;'
            " `kubectl describe pvc corpus` says what it lacks"
        ),
    ),
]


@pytest.mark.parametrize("case", VOLUMES, ids=lambda case: case.name)
def test_a_claim_that_is_not_ready(case: VolumeCase) -> None:
    waits = pod(case.job, "prepare", unschedulable=case.message, since=at(-16))
    decision = decided(case.job, child(case.job, "prepare"), pods=[waits])
    assert said(decision, "Prepared") == f"False WaitingForVolume: {case.condition}"


def test_a_new_claim_is_bound_within_seconds() -> None:
    job = fine_tune(ACCEPTED)
    text = "pod has unbound immediate PersistentVolumeClaims."
    decision = decided(job, child(job, "prepare"), pods=[pod(job, "prepare", unschedulable=text, since=NOW)])
    assert describe(decision) == "again in 15 s"
    assert said(decision, "Prepared").startswith("False Preparing: ")


def test_the_shards_of_a_job_are_asked_about_too() -> None:
    job = generate(status("Accepted", "Prepared"))
    assert list(decided(job, child(job, "run", born=at(-31))).ask) == [ChildRef("Job", "gj-lutes-run")]
