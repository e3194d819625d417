"""What a phase says of a child that is at work or not yet there: never nothing, so that a pending job explains itself."""

from __future__ import annotations

from datetime import timedelta

from luthier_api.conditions import ConditionType, Reason
from luthier_api.status import Phase
from luthier_operator import children
from luthier_operator.failure import KEPT, place
from luthier_operator.model import Object
from luthier_operator.phases.step import Situation, Step

EVIDENCE_SECONDS = 3.0
"""A child and its pods are watched apart: for so long after a failure, the word of a pod may still be under way."""


def for_old_pods(s: Situation, phase: Phase, condition: ConditionType) -> Step | None:
    """Waits until what was stopped has left: two groups of pods must never write to one folder. None when nothing is left."""
    child, pods = s.child(phase), s.pods(phase)
    if not (child and children.deleting(child)) and (child or not pods):
        return None
    names = ", ".join(sorted(p["metadata"]["name"] + (f" on {n}" if (n := p.get("spec", {}).get("nodeName")) else "") for p in pods)[:3])
    message = f"waiting for the pods that were stopped{': ' if names else ''}{names}{', ...' if len(pods) > 3 else ''}"
    return s.say(condition, "False", Reason.WAITING_FOR_PODS, message).stops()


def for_one_pod(s: Situation, phase: Phase, condition: ConditionType, reason: str, doing: str) -> Step:
    """What stands in the way of the one pod of `prepare` or `publish`; else its last failure, until it has succeeded; else `doing`."""
    trouble, failures = children.trouble(s.pods(phase)), s.attempts(phase)
    if trouble:
        reason, doing = trouble.reason, trouble.message
    elif failures:
        last = failures[-1]
        reason, doing = last.reason, f"{last.message} ({place(last)}). It is tried again"
    return s.say(condition, "False", reason, doing).stops()


def for_evidence(s: Situation, phase: Phase, child: Object) -> Step | None:
    """Waits a little until the last failure of a child that has just failed is explained by a pod. None when it is, or never will be."""
    at, known = children.ended_at(child), s.attempts(phase)
    if child["kind"] == "JobSet":
        explained = any(a.attempt == children.restarts(child)[0] for a in known)
    else:
        explained = len(known) >= min(KEPT, max(1, child.get("status", {}).get("failed") or 0))
    late = at is None or s.now >= at + timedelta(seconds=EVIDENCE_SECONDS)
    return None if explained or late else s.stops(requeue_after=EVIDENCE_SECONDS)
