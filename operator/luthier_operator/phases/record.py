"""Facts that come in by themselves, written down before anything is decided: what pods have said, progress, restarts,
failures.

They may come late, even after the job is complete, or not at all when a pod is gone before the operator saw it end: no
step waits for them for ever (`waiting.for_last_words`).
"""

from __future__ import annotations

from luthier_api.conditions import ConditionType
from luthier_api.status import Checkpoint, HubStatus
from luthier_operator import children, naming, statuses
from luthier_operator.failure.attempts import attempts_of_pods
from luthier_operator.model import PodEnd
from luthier_operator.phases.step import Situation

NOTICES = 40  # as many as the status may hold


def record(s: Situation) -> Situation:
    """The situation with everything noted that was observed."""
    s = s.note(
        observed_generation=s.job.metadata.generation,
        shape=s.workload.shape,
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
    """Metrics of the result. None until all pods that count have reported."""
    by_index = {end.index: end.message.metrics for end in ends if end.message and end.message.metrics}
    return s.workload.final_metrics(by_index)


def checkpoint(s: Situation) -> Checkpoint | None:
    """The newest verified one, by the newest word: as the first node serves it, or as the last pods said when they
    ended.

    It may be an older one than was known: a broken one is set aside when the run goes on.
    """
    known, step = s.status.checkpoint, s.observed.checkpoint_step
    if not s.workload.has_checkpoints:
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
    child = s.child("run")
    if child is None or children.deleting(child):
        return s
    found = s.workload.restarts(child, s.status, s.ends("run"), s.pods("run"))
    return s.note(attempts=found.attempts, restarts=found.total, restarts_charged=found.charged)
