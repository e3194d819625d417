"""Pods that do not start although they have a node: one text while they are waited for, and an end to the wait."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from cases.observed import SETTINGS, at, child, decided, describe, ended, fine_tune, pod, said, status, text, waiting

from luthier_api.status import Phase

PREPARING = fine_tune(status("Accepted", start_time=text(at(-7200))))
RUNNING = fine_tune(status("Accepted", "Prepared", start_time=text(at(-7200))))
PUBLISHING = fine_tune(
    status("Accepted", "Prepared", "Trained", start_time=text(at(-7200))),
    hub={"repo": "org/bot", "tokenSecretRef": {"name": "hf"}},
)
PHASES: dict[Phase, tuple[Any, str]] = {
    "prepare": (PREPARING, "Prepared"),
    "run": (RUNNING, "Running"),
    "publish": (PUBLISHING, "Published"),
}
LIMIT = SETTINGS.start_timeout_seconds
NO_SECRET = waiting("CreateContainerConfigError", 'secret "hf" not found')
NOT_FOUND = 'failed to pull and unpack image "reg.example/trainer:7": not found'
NO_IMAGE = waiting("ErrImagePull", NOT_FOUND)


@dataclass(frozen=True)
class Case:
    name: str
    state: Any
    seconds: float
    """Since the pod has a node."""
    expect: str


CASES = [
    Case(
        name="an image that cannot be pulled is waited for",
        state=NO_IMAGE,
        seconds=LIMIT - 60,
        expect="again in 60 s",
    ),
    Case(
        name="but not for ever",
        state=NO_IMAGE,
        seconds=LIMIT,
        expect="deletes CHILD; Failed ImagePullFailed",
    ),
    Case(
        name="nor is a Secret",
        state=NO_SECRET,
        seconds=LIMIT,
        expect="deletes CHILD; Failed Misconfigured",
    ),
    Case(
        name="a large image takes its time",
        state=waiting("ContainerCreating"),
        seconds=10 * LIMIT,
        expect="repairs ConfigMap ftj-bot",
    ),
]


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_container_that_cannot_start(case: Case, phase: Phase) -> None:
    job, condition = PHASES[phase]
    work = child(job, phase)
    stuck = pod(job, phase, state=case.state, over="Pending", scheduled=at(-case.seconds))
    decision = decided(job, work, pods=[stuck])
    assert describe(decision).replace(f"{work['kind']} {work['metadata']['name']}", "CHILD") == case.expect
    if "Failed" in case.expect:
        assert f"It was waited for {LIMIT} seconds (jobs.startTimeoutSeconds in the chart)" in said(decision, condition)
        assert "spec.retry: 1" in said(decision, "Failed")


TEXT = (
    "reg.example/trainer:7 cannot be pulled for pod ftj-bot-prepare-0-0. An administrator sets it by trainer.image"
    " (chart), and imagePullSecrets for a registry that asks who pulls"
)
ABSENT = 'failed to resolve reference "reg.example/trainer:latest": no such host'
REFUSED = 'failed to resolve reference "reg.example/trainer:7": dial tcp 10.0.0.9:{}->10.1.1.1:443: connection refused'
SAME = [
    # what the kubelet says, by turns                                                           the one text for it
    ([NOT_FOUND, f'Back-off pulling image "reg.example/trainer:7": ErrImagePull: {NOT_FOUND}'], f"{TEXT}: {NOT_FOUND}"),
    ([NOT_FOUND, 'Back-off pulling image "reg.example/trainer:7"'], f"{TEXT}: {NOT_FOUND}"),
    (
        [ABSENT, 'Back-off pulling image "reg.example/trainer"'],  # named without a tag
        f"{TEXT.replace(':7', ':latest')}: {ABSENT}",
    ),
    (
        [REFUSED.format(40001), REFUSED.format(51234)],
        f'{TEXT}: failed to resolve reference "reg.example/trainer:7": 10.1.1.1:443: connection refused',
    ),
]


@pytest.mark.parametrize(("messages", "expect"), SAME)
def test_the_text_about_an_image_does_not_change_to_and_fro(messages: list[str], expect: str) -> None:
    """Each change would be a write, for as long as the image is missing."""
    job = PREPARING
    for turn in range(6):
        state = waiting(["ErrImagePull", "ImagePullBackOff"][turn % 2], messages[turn % 2])
        stuck = pod(job, "prepare", state=state, over="Pending", scheduled=at(-60))
        decision = decided(job, child(job, "prepare"), pods=[stuck])
        assert said(decision, "Prepared") == f"False ImagePullFailed: {expect}"
        assert turn == 0 or decision.status == job.status
        job = fine_tune(decision.status)


def test_evictions_of_one_pod_end_after_ten() -> None:
    """The cluster does not charge them, and would go on for ever."""
    ends = [ended(PREPARING, "prepare", 137, when=-600 + i, suffix=str(i), disrupted=True) for i in range(10)]
    nine = decided(PREPARING, child(PREPARING, "prepare"), ends=ends[:9])
    assert describe(nine).startswith("again in") or describe(nine) == "waits"
    ten = decided(PREPARING, child(PREPARING, "prepare"), ends=ends)
    assert describe(ten) == "deletes Job ftj-bot-prepare; Failed NoProgress"
    assert (
        "the cluster has stopped the pod 10 times in a row before it was done; the last one ended with Preempted"
        in (said(ten, "Failed"))
    )
    mixed = [*ends[:9], ended(PREPARING, "prepare", 69, when=-590, suffix="x")]
    assert "Failed" not in describe(decided(PREPARING, child(PREPARING, "prepare"), ends=mixed))
