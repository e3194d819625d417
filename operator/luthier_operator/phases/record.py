"""Facts that come in by themselves, written down before anything is decided: what pods have said, progress, restarts,
failures.

They may come late, even after the job is complete, or not at all when a pod is gone before the operator saw it end: no
step waits for them for ever (`waiting.for_last_words`).
"""

from __future__ import annotations

from luthier_api.conditions import ConditionType
from luthier_api.kinds import FineTuneJob
from luthier_api.status import Attempt, Checkpoint, HubStatus, Phase, finite
from luthier_operator import children, naming, statuses
from luthier_operator.failure.attempts import attempts_of_group, attempts_of_pods
from luthier_operator.model import Object, PodEnd
from luthier_operator.phases.step import Situation

NOTICES = 40  # as many as the status may hold


def record(s: Situation) -> Situation:
    """The situation with everything noted that was observed."""
    s = s.note(
        observed_generation=s.job.metadata.generation,
        shape=statuses.shape(s.job),
        workspace=naming.workspace_status(s.job),
    )
    s = said(s)
    if not s.status.finished and not s.job.spec.suspend:
        s = restarts(s)
        for phase in ("prepare", "publish"):
            s = s.note(attempts=attempts_of_pods(s.status.attempts, s.ends(phase), phase))
    return s


def said(s: Situation) -> Situation:
    """What pods that ended well have said, and what is read of those that run."""
    status = s.status
    whole = [e for e in s.observed.ended if e.exit_code == 0 and e.message]
    prepared = next(
        (e.message.prepared for e in reversed(whole) if e.phase == "prepare" and e.message and e.message.prepared), None
    )
    metrics = run_metrics(s, [e for e in whole if e.phase == "run"]) or status.metrics
    progress = s.observed.progress if s.observed.progress and not status.is_true(s.done) else status.progress
    if status.is_true(s.done):
        progress = statuses.at_end(progress, metrics)
    return s.note(
        notices=notices(s),
        prepared=status.prepared or prepared,
        metrics=metrics,
        hub=hub(s) or status.hub,
        progress=progress,
        checkpoint=checkpoint(s),
        broken_checkpoints=status.broken_checkpoints
        if (broken := s.observed.broken_checkpoints) is None
        else broken or None,
    )


def notices(s: Situation) -> list[str]:
    """Those that are known, and after them the new ones of pods that have ended; at most `NOTICES` of them, each
    once.
    """
    told = [text for e in s.observed.ended if e.message for text in e.message.notices]
    return list(dict.fromkeys([*s.status.notices, *told]))[:NOTICES]


def hub(s: Situation) -> HubStatus | None:
    """Where the pod of `publish` has put the result, if that is where spec.hub still wants it."""
    ends = s.ends("publish")
    # The Job is gone, its word may still come
    if s.child("publish") is None and s.status.is_true(ConditionType.PUBLISHED):
        ends = [e for e in s.observed.ended if e.phase == "publish"]
    told = (e.message.hub for e in reversed(ends) if e.exit_code == 0 and e.message and e.message.hub)
    return None if s.hub_changed else next(told, None)


def run_metrics(s: Situation, ends: list[PodEnd]) -> dict[str, float] | None:
    """Final figures: those of the first node, or the sums over all shards once all have spoken."""
    latest = {e.index: e.message.metrics for e in ends if e.message and e.message.metrics}
    if isinstance(s.job, FineTuneJob):
        return latest.get(0)
    if len(latest) < s.job.spec.shards:
        return None
    names = {name: None for metrics in latest.values() for name in metrics}
    return finite({name: sum(metrics.get(name, 0) for metrics in latest.values()) for name in names})


def checkpoint(s: Situation) -> Checkpoint | None:
    """The newest verified one, by the newest word: as the first node serves it, or as the last pods said when they
    ended.

    It may be an older one than was known: a broken one is set aside when the run goes on.
    """
    known, step = s.status.checkpoint, s.observed.checkpoint_step
    if not isinstance(s.job, FineTuneJob):
        return known
    if step is None:
        ends = s.ends("run")
        last = [e.message.step for e in ends if e.attempt == max(e.attempt for e in ends) and e.message]
        step = max((told for told in last if told is not None), default=None)
    if step is None or (known and known.step == step):
        return known
    return Checkpoint(step=step, time=statuses.text(s.now)) if step else None


def restarts(s: Situation) -> Situation:
    """Failures of the run, and its restarts."""
    group = s.child("run")
    if group is None or children.deleting(group):
        return s
    if group["kind"] == "Job":
        total, charged = restarts_of_shards(s, group)
        return s.note(
            attempts=attempts_of_pods(s.status.attempts, s.ends("run"), "run"), restarts=total, restarts_charged=charged
        )
    (total, charged), (before, _) = children.restarts(group), children.restarts_before(group)
    end = children.failed(group)
    fatal = bool(end and end.get("reason") == "FailJobSetFailurePolicyAction")
    step = s.status.checkpoint.step if s.status.checkpoint else None
    attempts = attempts_of_group(s.status.attempts, s.ends("run"), before, step, fatal)
    if total == s.status.restarts + 1:
        # JobSet knows what it has charged; the exit code alone was a guess.
        attempts = [charge(a, "run", s.status.restarts, charged > s.status.restarts_charged) for a in attempts]
    return s.note(attempts=attempts, restarts=total, restarts_charged=charged)


def restarts_of_shards(s: Situation, group: Object) -> tuple[int, int]:
    """All of them, and those that were charged. Each pod knows how often its index was started before, so the newest of
    each tell it all.
    """
    known = {e.index: (e.attempt, e.uncharged_before) for e in sorted(s.ends("run"), key=lambda e: e.attempt)}
    for pod in s.pods("run"):
        known[children.index(pod)] = max(children.starts_before(pod), known.get(children.index(pod), (0, 0)))
    before, charged = children.restarts_before(group)
    total = before + sum(number for number, _ in known.values())
    # Pods that are gone, of an operator that was away, are missing here: what was counted stays counted.
    return max(total, s.status.restarts), max(
        charged + sum(n - free for n, free in known.values()), s.status.restarts_charged
    )


def charge(attempt: Attempt, phase: Phase, number: int, charged: bool) -> Attempt:
    same = attempt.phase == phase and attempt.attempt == number
    return attempt.model_copy(update={"charged": charged}) if same and attempt.charged != charged else attempt
