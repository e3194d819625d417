"""What a phase says of a child that is at work or not yet there: never nothing, so that a pending job explains
itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta

from luthier_api.conditions import ConditionType, Reason
from luthier_api.exitcodes import ExitCode, Retry
from luthier_api.status import Phase
from luthier_operator import children, naming
from luthier_operator.children import Trouble
from luthier_operator.failure.attempts import ATTEMPTS_KEPT
from luthier_operator.failure.cause import location
from luthier_operator.model import Object
from luthier_operator.phases.step import Situation, Step

EVIDENCE_SECONDS = 3.0
"""A child and its pods are watched apart: for so long after an end, the word of a pod may still be under way."""
NO_POD_SECONDS = 30.0
"""A Job has its first pod within a second, a JobSet within two; where 200 come at once, after ten. Later than this,
something refuses them.
"""
EACH_POD_SECONDS = 0.1  # the controllers make about 20 a second, for all jobs together
CONTAINER_SECONDS = 30.0
"""Volumes are mounted within seconds. What takes longer is worth a word, be it only a large image."""


def for_old_pods(s: Situation, phase: Phase, condition: ConditionType) -> Step | None:
    """Waits until what was stopped has left: two groups of pods must never write to one folder. None when nothing is
    left.
    """
    child, pods = s.child(phase), s.pods(phase)
    if not (child and children.deleting(child)) and (child or not pods):
        return None
    names = ", ".join(
        sorted(p["metadata"]["name"] + (f" on {n}" if (n := p.get("spec", {}).get("nodeName")) else "") for p in pods)[
            :3
        ]
    )
    message = f"waiting for the pods that were stopped{': ' if names else ''}{names}{', ...' if len(pods) > 3 else ''}"
    return s.say(condition, "False", Reason.WAITING_FOR_PODS, message).stops()


def for_one_pod(s: Situation, phase: Phase, condition: ConditionType, reason: str, starting: str, doing: str) -> Step:
    """What stands in the way of the one pod of `prepare` or `publish`; else its last failure, until it has succeeded;
    else what it does.
    """
    (trouble, again), failures = obstacle(s, phase, 1), s.attempts(phase)
    message = doing if children.running(s.pods(phase)) else starting
    if trouble:
        reason, message = trouble.reason, trouble.message
    elif failures:
        last = failures[-1]
        if last.exit_code in ExitCode.codes(Retry.NEVER):
            return s.stops(requeue_after=again)  # the Job says in a moment that it has failed
        reason, message = last.reason, f"{last.message} ({location(last)}). It is tried again"
    return s.say(condition, "False", reason, message).stops(requeue_after=again)


def obstacle(s: Situation, phase: Phase, pods: int) -> tuple[Trouble | None, float | None]:
    """What keeps the `pods` of a phase from running; and, where only time will tell, the seconds until it has."""
    child = s.child(phase)
    if child and children.held(child):
        queue = (
            f'waiting for quota in queue "{s.job.spec.scheduling.queue_name}"'
            if phase == "run"
            else f"{name(child)} is held back by a queue"
        )
        return Trouble(Reason.WAITING_FOR_QUEUE, f"{queue}; see `kubectl describe workloads`"), None
    if found := children.trouble(s.pods(phase)):
        return found, None
    due, found = min(overdue(s, phase, pods), key=lambda late: late[0], default=(s.now, None))
    return (found, None) if due <= s.now else (None, (due - s.now).total_seconds())


def overdue(s: Situation, phase: Phase, pods: int) -> Iterator[tuple[datetime, Trouble]]:
    """What has not happened yet, and the time from which on that is a trouble."""
    child, living = s.child(phase), s.pods(phase)
    made = len(living) + sum(e.exit_code == 0 for e in s.ends(phase))
    # Between two attempts there may be none for as long as the Job's back-off takes.
    if child and (since := children.since(child)) and made < pods and not s.attempts(phase):
        number = f"only {made} of {pods} pods" if made else "no pod"
        inner = (
            f", or `kubectl describe job {child['metadata']['name']}-{naming.NODE}-0`,"
            if child["kind"] == "JobSet"
            else ""
        )
        message = (
            f"the cluster has made {number} of {name(child)} so far; `kubectl describe {child['kind'].lower()}"
            f" {child['metadata']['name']}`{inner} says why: a quota, a priority class, a node selector, an admission"
            " policy"
        )
        yield since + timedelta(seconds=NO_POD_SECONDS + EACH_POD_SECONDS * pods), Trouble(Reason.NO_PODS, message)
    for pod in living:
        at = children.scheduled(pod)
        if at and not children.deleting(pod) and "running" not in children.container(pod):
            called = pod["metadata"]["name"]
            message = (
                f"pod {called} has a node, but no container after {CONTAINER_SECONDS:g} s: it waits for its image or"
                f" for a volume (spec.volumes, spec.workspace); `kubectl describe pod {called}` says for which"
            )
            yield at + timedelta(seconds=CONTAINER_SECONDS), Trouble(Reason.CONTAINER_CREATING, message)


def name(child: Object) -> str:
    return f"{child['kind']} {child['metadata']['name']}"


def for_evidence(s: Situation, phase: Phase, child: Object) -> Step | None:
    """Waits a little until the last failure of a child that has just failed is explained by a pod. None when it is, or
    never will be.
    """
    known = s.attempts(phase)
    if child["kind"] == "JobSet":
        explained = any(a.attempt == children.restarts(child)[0] for a in known)
    else:
        explained = len(known) >= min(ATTEMPTS_KEPT, max(1, child.get("status", {}).get("failed") or 0))
    return for_last_words(s, child, explained)


def for_last_words(s: Situation, child: Object | None, known: bool) -> Step | None:
    """Waits a little, after the end of a child, for what its pods have to say. None when that is `known`, or never will
    be.
    """
    at = children.ended_at(child) if child else None
    late = at is None or s.now >= at + timedelta(seconds=EVIDENCE_SECONDS)
    return None if known or late else s.stops(requeue_after=EVIDENCE_SECONDS)
