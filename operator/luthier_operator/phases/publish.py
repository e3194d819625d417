"""Publish: one pod without a GPU that uploads the result and checks it there. A Hub that is away costs time, never the
result.

The hash of `spec.hub`, kept on the Job, says whether that Job still does what the user wants; where not, it is
replaced. That holds after an end, too (`reopen`): what was trained can always be published.
"""

from __future__ import annotations

from luthier_api.conditions import ConditionType, Reason
from luthier_operator import children, naming, statuses
from luthier_operator.failure.cause import judge
from luthier_operator.phases import waiting
from luthier_operator.phases.reopen import HUB_CHANGED
from luthier_operator.phases.step import Situation, Step
from luthier_operator.render.configmap import configmap
from luthier_operator.render.job import publish as job_of_publish

PUBLISHED = ConditionType.PUBLISHED


def publish(s: Situation) -> Step:
    if s.status.is_true(PUBLISHED):
        return s.goes_on()
    ref, job = s.workload.child("publish"), s.child("publish")
    if not s.publishes:
        at_work = [ref] if job and not children.deleting(job) and not children.succeeded(job) else []
        return Step(statuses.without_condition(s.status, PUBLISHED), goes_on=True, delete=at_work)
    if wait := waiting.for_old_pods(s, "publish", PUBLISHED):
        return wait
    if job is None:
        places = s.places()
        # The config map once more: spec.hub may have changed since.
        drawn = (configmap(s.workload, s.settings, places), job_of_publish(s.workload, s.settings, places))
        return s.creates(PUBLISHED, Reason.PUBLISHING, starting(s), *drawn)
    if s.hub_changed:
        return s.say(PUBLISHED, "False", Reason.PUBLISHING, HUB_CHANGED).stops(delete=[ref])
    if children.succeeded(job):
        if wait := waiting.for_last_words(s, job, s.status.hub is not None):
            return wait
        at = f"@{s.status.hub.revision[:12]}" if s.status.hub else ""
        return s.say(PUBLISHED, "True", Reason.PUBLISHED, f"{repo(s)}{at}").goes_on()
    if end := children.failed(job):
        if wait := waiting.for_evidence(s, "publish", job):
            return wait
        found = judge(s.attempts("publish"), "publish", end)
        message = f"{found.message}. The result stays in {kept(s)}; a change of spec.hub publishes it again"
        return s.say(PUBLISHED, "False", found.reason, message).fails(found.reason, message)
    return waiting.for_one_pod(s, "publish", PUBLISHED, Reason.PUBLISHING, starting(s), f"uploading to {repo(s)}")


def starting(s: Situation) -> str:
    return f"waiting for the pod that uploads to {repo(s)}"


def repo(s: Situation) -> str:
    return (s.job.spec.hub and s.job.spec.hub.repo) or ""


def kept(s: Situation) -> str:
    where = naming.place(s.job)
    return f"{where.folder}/result of claim {where.claim}"
