"""What a step sees, and what it may answer. Both are values: a step that says something gets a new situation back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from typing import Any

from luthier_api.conditions import ConditionType
from luthier_api.status import PHASES, Attempt, JobStatus, Phase
from luthier_operator import children, naming
from luthier_operator.model import ChildRef, Job, Object, Observed, PodEnd
from luthier_operator.naming import Place
from luthier_operator.render.job import hub_hash, hub_target
from luthier_operator.settings import Settings
from luthier_operator.statuses import Value, moment, text, with_condition
from luthier_operator.workloads import workload
from luthier_operator.workloads.base import Workload


@dataclass(frozen=True)
class Step:
    """What a step wants done, and whether the next one is looked at."""

    status: JobStatus
    goes_on: bool = False
    apply: Sequence[Object] = ()
    delete: Sequence[ChildRef] = ()
    requeue_after: float | None = None
    """Seconds."""
    delete_job: bool = False
    creating: ConditionType | None = None
    """The condition that tells of what is applied."""


@dataclass(frozen=True)
class Situation:
    """Everything that a step may look at, with the status as the steps before it left it."""

    observed: Observed
    settings: Settings
    now: datetime
    status: JobStatus

    @property
    def job(self) -> Job:
        return self.observed.job

    @cached_property
    def workload(self) -> Workload:
        """The job as the work of its kind, with the status as it is now: the plan may have come in a moment ago."""
        return workload(self.observed.job.model_copy(update={"status": self.status}))

    @property
    def done(self) -> ConditionType:
        """The condition that is True once `run` has succeeded."""
        return self.workload.done

    @property
    def publishes(self) -> bool:
        return bool(self.job.spec.hub and self.job.spec.hub.repo)

    @property
    def last(self) -> Phase:
        """The phase after which nothing is left to do, as far as the job says now."""
        if self.job.spec.plan_only and not self.child("run"):
            return "prepare"
        return "publish" if self.publishes else "run"

    @property
    def hub_changed(self) -> bool:
        """Whether the publish Job was made from another spec.hub than that of now."""
        job = self.child("publish")
        return job is not None and job["metadata"].get("annotations", {}).get(naming.HUB_ANNOTATION) != hub_hash(
            self.job
        )

    @property
    def target_changed(self) -> bool:
        """Whether that Job brought the result to another place than spec.hub names now."""
        job = self.child("publish")
        brought = job and job["metadata"].get("annotations", {}).get(naming.TARGET_ANNOTATION)
        return brought is not None and brought != hub_target(self.job)

    def child(self, phase: Phase) -> Object | None:
        return self.observed.children.get(self.workload.child(phase))

    def pods(self, phase: Phase) -> list[Object]:
        return children.living(self.observed.pods, phase)

    def ends(self, phase: Phase) -> list[PodEnd]:
        """Ended pods of the child that exists now; those of one that was deleted for a suspension are no failures."""
        child = self.child(phase)
        if child is None:
            return []
        uid, since = child["metadata"].get("uid"), children.created(child)
        # Nodes' clocks may be behind the API server's: times decide only where a pod does not say whose it was.
        return [
            e
            for e in self.observed.ended
            if e.phase == phase and (e.child == uid if e.child else since is None or e.finished_at >= since)
        ]

    def attempts(self, phase: Phase) -> list[Attempt]:
        """Failures of the child that exists now, as the status remembers them, oldest first."""
        child = self.child(phase)
        if child is None:
            return []
        since, seen = children.created(child), {e.pod for e in self.ends(phase)}
        return [
            a
            for a in self.status.attempts
            if a.phase == phase and (a.pod in seen or since is None or moment(a.time or "") >= since)
        ]

    def places(self) -> dict[str, Place]:
        """Where the jobs whose results this one needs keep their work. One that was deleted since is remembered by the
        prepare Job.
        """
        prepare = self.child("prepare")
        notes = prepare["metadata"].get("annotations", {}) if prepare else {}
        known = {name: Place(*found) for name, found in json.loads(notes.get(naming.SOURCES_ANNOTATION, "{}")).items()}
        # What was remembered comes first: a job of that name may have been created anew, with another folder.
        return {name: naming.place(source) for name, source in self.observed.sources.items()} | known

    def unfinished(self) -> list[ChildRef]:
        """Children that are at work."""
        found = ((self.workload.child(p), self.child(p)) for p in PHASES)
        return [ref for ref, child in found if child and not children.finished(child) and not children.deleting(child)]

    def say(self, type: ConditionType, value: Value, reason: str, message: str) -> Situation:
        """With this condition in the status."""
        generation = self.job.metadata.generation
        return replace(self, status=with_condition(self.status, type, value, reason, message, self.now, generation))

    def note(self, **fields: Any) -> Situation:
        """With these fields in the status."""
        return replace(self, status=self.status.model_copy(update=fields))

    def goes_on(self, requeue_after: float | None = None) -> Step:
        return Step(self.status, goes_on=True, requeue_after=requeue_after)

    def stops(
        self,
        apply: Sequence[Object] = (),
        delete: Sequence[ChildRef] = (),
        requeue_after: float | None = None,
        delete_job: bool = False,
    ) -> Step:
        return Step(self.status, False, apply, delete, requeue_after, delete_job)

    def creates(self, type: ConditionType, reason: str, message: str, *apply: Object | None) -> Step:
        """Applies children, of which the condition tells: also that the API server refuses one (`decide.refused`)."""
        step = self.say(type, "False", reason, message).stops(apply=[manifest for manifest in apply if manifest])
        return replace(step, creating=type)

    def fails(self, reason: str, message: str, delete: Sequence[ChildRef] = ()) -> Step:
        """The end of the job."""
        ended = self.say(ConditionType.FAILED, "True", reason, message).note(completion_time=text(self.now))
        return ended.stops(delete=delete)
