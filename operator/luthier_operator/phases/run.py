"""Run: the pods that train or generate.

Begins when `prepare` has succeeded, ends when its JobSet (or Job) is terminal. JobSet restarts the group by itself,
also while the operator is away, so this step only creates, reads and judges. Neighbours: `render.jobset` and
`render.job` draw the manifests, `record` has written restarts and failures down.
"""

from __future__ import annotations

from luthier_api.conditions import ConditionType, Reason
from luthier_operator import children, naming, statuses
from luthier_operator.failure.cause import judge, location
from luthier_operator.model import Object
from luthier_operator.phases import waiting
from luthier_operator.phases.accept import for_jobset
from luthier_operator.phases.step import Situation, Step

RUNNING = ConditionType.RUNNING


def run(s: Situation) -> Step:
    if s.status.is_true(s.done):
        return s.goes_on()
    if wait := waiting.for_old_pods(s, "run", RUNNING):
        return wait
    group = s.child("run")
    if group is None:
        if wait := for_jobset(s, RUNNING):  # it was installed when the job was accepted, and may be gone since
            return wait
        manifest = s.workload.run_manifest(s.settings, s.places(), s.status.restarts, s.status.restarts_charged)
        return s.creates(RUNNING, Reason.STARTING, starting(s), manifest)
    if children.succeeded(group):
        return waiting.for_last_words(s, group, s.status.metrics is not None) or ended_well(s)
    if end := children.failed(group):
        if wait := waiting.for_evidence(s, "run", group):
            return wait
        found = judge(s.attempts("run"), "run", end)
        message = found.message + s.workload.describe_budget(end)
        return s.say(RUNNING, "False", found.reason, message).fails(found.reason, message)
    no_progress = s.workload.no_progress(s.attempts("run"), s.ends("run"))
    if no_progress:
        ended = s.say(RUNNING, "False", Reason.NO_PROGRESS, no_progress)
        return ended.fails(Reason.NO_PROGRESS, no_progress, delete=[s.workload.child("run")])
    return at_work(s, group)


def ended_well(s: Situation) -> Step:
    done = Reason(s.done)
    s = s.note(progress=statuses.at_end(s.status.progress, s.status.metrics))
    where = naming.place(s.job)
    s = s.say(s.done, "True", done, f"the result lies in {where.folder}/result of claim {where.claim}")
    return s.say(RUNNING, "False", done, "the pods have ended").goes_on()


def at_work(s: Situation, child: Object) -> Step:
    """The pods are queued, starting, running or restarting."""
    restart = s.workload.current_restart(child)
    running = children.running(s.pods("run"), restart)
    # The first pods of a group end before the others, and all of them before the child does: that is no new start.
    succeeded = sum(end.exit_code == 0 and restart in (None, end.attempt) for end in s.ends("run"))
    if s.workload.is_running(running, succeeded):
        s = s.say(RUNNING, "True", Reason.RUNNING, s.workload.describe_pods())
        since = s.status.condition(RUNNING)
        return s.note(run_start_time=s.status.run_start_time or (since and since.last_transition_time)).stops()

    attempts = s.attempts("run")
    repeated = s.workload.repeated_failure(attempts)
    if repeated:
        ended = s.say(RUNNING, "False", repeated.reason, repeated.message)
        return ended.fails(repeated.reason, repeated.message, delete=[s.workload.child("run")])

    found, again = waiting.obstacle(s, "run", s.workload.pods)
    if found:
        return s.say(RUNNING, "False", found.reason, found.message).stops(requeue_after=again)
    if attempts:
        last = attempts[-1]
        message = f"after {last.reason}: {last.message} ({location(last)})"
        return s.say(RUNNING, "False", Reason.RESTARTING, message).stops(requeue_after=again)
    return s.say(RUNNING, "False", Reason.STARTING, starting(s)).stops(requeue_after=again)


def starting(s: Situation) -> str:
    return f"waiting for {s.workload.describe_pods()} to start"
