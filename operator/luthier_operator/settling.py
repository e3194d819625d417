"""How long a change of a child settles before its job is looked at: changes that follow within this time cost nothing.

A job of two pods has a dozen changes from its creation to its first step, and only a few of them have a consequence.
"""

from __future__ import annotations

from luthier_api.status import State
from luthier_operator import children, naming
from luthier_operator.model import Object

ACT = 0.1
"""Seconds for what the operator may have to act on: a child or a pod that has ended, is stopped or runs. A Job, its pod
and the operator's own writes cause one reconcile.
"""
TELL = 1.0
"""Seconds for what is only told to people: why a pod does not start."""
SEEN = 15.0
"""Seconds for what only ends a message: a pod that is new, of a job that reports that there is none."""
NOTHING = 30.0
"""Seconds for what has no consequence yet: a pod that has its node, whose container is reported after as long if it
does not start (`phases/waiting`), or one that has succeeded, after which its Job or JobSet ends. The job is looked at
only if it is needed by then (`Reconciler.is_needed`).
"""
NO_LOOK = None
"""For what has no consequence at all: a Job that counts its pods, a pod that has no node yet, one that prepares. When a
pod would be missing was planned when its child was created.
"""
AS_EXPECTED = {State.PREPARING, State.STARTING, State.RUNNING, State.PUBLISHING}
"""States of a job that reports no problem, which a change of its pods could end."""


USUAL = "ContainerCreating"
"""Each container waits with this reason before it runs."""


def seconds(found: Object, job_state: str) -> float | None:
    """How long a change to `found`, a Job, JobSet, pod or Workload, settles. With `NO_LOOK` the job is not looked at.

    `job_state`: the state of its job, as kubectl shows it.
    """
    if children.deleting(found) or children.finished(found):
        return ACT
    if found["kind"] == "Pod":
        return _of_pod(found, job_state)
    if found["kind"] not in ("Job", "JobSet") or found.get("status", {}).get("failed"):
        return ACT
    if children.restarts(found) != (0, 0):
        return ACT
    return TELL if children.was_suspended(found) or children.suspended(found) else _unimportant(job_state)


def _of_pod(pod: Object, job_state: str) -> float | None:
    state = children.container(pod)
    if children.terminated(pod):
        return NOTHING if state.get("terminated", {}).get("exitCode") == 0 else ACT
    if "running" in state:
        if children.label(pod, naming.PHASE_LABEL) == "run":
            return ACT
        # It only ends the message why it did not run, if there is one.
        return NO_LOOK if job_state in AS_EXPECTED else TELL
    waits = state.get("waiting", {}).get("reason", USUAL) != USUAL
    if children.unschedulable(pod) or waits:
        return TELL
    if children.scheduled(pod) and job_state in AS_EXPECTED:
        return NOTHING
    return _unimportant(job_state)


def _unimportant(job_state: str) -> float | None:
    return NO_LOOK if job_state in AS_EXPECTED else SEEN
