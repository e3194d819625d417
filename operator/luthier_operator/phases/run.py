"""Run: the pods that train or generate.

Begins when `prepare` has succeeded, ends when its JobSet (or Job) is terminal. JobSet restarts the group by itself,
also while the operator is away, so this step only creates, reads and judges. Neighbours: `render.jobset` and
`render.job` draw the manifests, `record` has written restarts and failures down.
"""

from __future__ import annotations

from luthier_api.conditions import ConditionType, Reason
from luthier_api.kinds import FineTuneJob
from luthier_operator import children, naming, render, statuses
from luthier_operator.failure.attempts import no_progress_of_group, no_progress_of_shards
from luthier_operator.failure.cause import judge, location, repeated_out_of_memory
from luthier_operator.model import Object
from luthier_operator.phases import waiting
from luthier_operator.phases.accept import for_jobset
from luthier_operator.phases.step import Situation, Step
from luthier_operator.render.pod import gpus

RUNNING = ConditionType.RUNNING


def run(s: Situation) -> Step:
    if s.status.is_true(s.done):
        return s.goes_on()
    if wait := waiting.for_old_pods(s, "run", RUNNING):
        return wait
    group = s.child("run")
    if group is None:
        # It was there when the job was accepted: a cluster may lose it.
        return for_jobset(s, RUNNING) or s.creates(RUNNING, Reason.STARTING, starting(s), manifest(s))
    if children.succeeded(group):
        return waiting.for_last_words(s, group, s.status.metrics is not None) or ended_well(s)
    if end := children.failed(group):
        if wait := waiting.for_evidence(s, "run", group):
            return wait
        found = judge(s.attempts("run"), "run", end)
        message = found.message + (exhausted(s) if end.get("reason") == "ReachedMaxRestarts" else "")
        return s.say(RUNNING, "False", found.reason, message).fails(found.reason, message)
    if (
        stuck := no_progress_of_group(s.attempts("run"))
        if isinstance(s.job, FineTuneJob)
        else no_progress_of_shards(s.ends("run"))
    ):
        return s.say(RUNNING, "False", Reason.NO_PROGRESS, stuck).fails(
            Reason.NO_PROGRESS, stuck, delete=[naming.child(s.job, "run")]
        )
    return at_work(s, group)


def manifest(s: Situation) -> Object:
    before = s.status.restarts, s.status.restarts_charged
    job = s.job.model_copy(update={"status": s.status})  # with the plan, which may have come in this very reconcile
    if isinstance(job, FineTuneJob):
        return render.jobset(job, s.settings, s.places(), *before)
    return render.shards(job, s.settings, s.places(), *before)


def ended_well(s: Situation) -> Step:
    done = Reason.TRAINED if s.done is ConditionType.TRAINED else Reason.GENERATED
    s = s.note(progress=statuses.at_end(s.status.progress, s.status.metrics))
    where = naming.place(s.job)
    s = s.say(s.done, "True", done, f"the result lies in {where.folder}/result of claim {where.claim}")
    return s.say(RUNNING, "False", done, "the pods have ended").goes_on()


def at_work(s: Situation, group: Object) -> Step:
    """Queued, starting, running or restarting."""
    pods, attempt = s.pods("run"), None
    if group["kind"] == "JobSet":
        attempt = group.get("status", {}).get("restarts", 0)
    up = children.running(pods, attempt)
    # The first pods of a group end, and all of them, before the child is told: that is no new start.
    over = sum(e.exit_code == 0 and attempt in (None, e.attempt) for e in s.ends("run"))
    if up + over >= pods_of(s) or (up and attempt is None):
        s = s.say(RUNNING, "True", Reason.RUNNING, what(s))
        since = s.status.condition(RUNNING)
        return s.note(run_start_time=s.status.run_start_time or (since and since.last_transition_time)).stops()
    failures = s.attempts("run")
    if attempt is not None and (hopeless := repeated_out_of_memory(failures)):
        return s.say(RUNNING, "False", hopeless.reason, hopeless.message).fails(
            hopeless.reason, hopeless.message, delete=[naming.child(s.job, "run")]
        )
    found, again = waiting.obstacle(s, "run", pods_of(s))
    if found:
        return s.say(RUNNING, "False", found.reason, found.message).stops(requeue_after=again)
    if failures:
        last = failures[-1]
        return s.say(
            RUNNING, "False", Reason.RESTARTING, f"after {last.reason}: {last.message} ({location(last)})"
        ).stops(requeue_after=again)
    return s.say(RUNNING, "False", Reason.STARTING, starting(s)).stops(requeue_after=again)


def starting(s: Situation) -> str:
    return f"waiting for {what(s)} to start"


def pods_of(s: Situation) -> int:
    return s.job.spec.resources.nodes if isinstance(s.job, FineTuneJob) else s.job.spec.shards


def what(s: Situation) -> str:
    """2 pods on 16 GPUs."""
    pods, each = pods_of(s), gpus(s.job)
    word = ("pod" if isinstance(s.job, FineTuneJob) else "shard") + ("s" if pods > 1 else "")
    return f"{pods} {word} on {f'{pods * each} GPU' + ('s' if pods * each > 1 else '') if each else 'CPU'}"


def exhausted(s: Situation) -> str:
    most = s.job.spec.restarts.max if isinstance(s.job, FineTuneJob) else 0
    return f". That was the last of {most} restarts (spec.restarts.max)"
