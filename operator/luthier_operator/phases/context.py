"""What a step of `decide` sees (`Context`) and what it answers (`Step`). Both are values: a change makes a new one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from typing import Any

from luthier_api.conditions import ConditionType
from luthier_api.status import PHASES, Attempt, JobStatus, Phase
from luthier_operator import children, naming
from luthier_operator.model import ChildRef, Job, Object, Observed, PodEnd
from luthier_operator.naming import Place
from luthier_operator.policy import with_defaults
from luthier_operator.render.configmap import configmap
from luthier_operator.render.job import hub_hash, hub_target
from luthier_operator.settings import Settings
from luthier_operator.statuses import Value, moment, text, with_condition, without_condition
from luthier_operator.workloads import workload
from luthier_operator.workloads.base import Workload


@dataclass(frozen=True)
class Step:
    """What a step wants to be done, and whether the next step follows."""

    status: JobStatus
    goes_on: bool = False
    apply: Sequence[Object] = ()
    delete: Sequence[ChildRef] = ()
    requeue_after: float | None = None
    """Seconds."""
    delete_job: bool = False
    repair: Object | None = None
    """The config map of the job, if it has to be as it was rendered."""
    creating: ConditionType | None = None
    """The condition that reports on the objects in `apply`."""


@dataclass(frozen=True)
class Context:
    """Everything that a step may use. `status` is the one that the steps before it have made."""

    observed: Observed
    settings: Settings
    now: datetime
    status: JobStatus
    found: dict[tuple[str, Phase], list[Any]] = field(default_factory=dict, compare=False, repr=False)
    """What was looked up in `observed`, for all contexts of one decision: a job may have thousands of pods."""
    present: dict[Phase, Object | None] = field(default_factory=dict, compare=False, repr=False)
    """The children that were looked up, as `found`."""
    rendered: dict[int | None, Object] = field(default_factory=dict, compare=False, repr=False)
    """Config maps, as `found`, by the reduced micro-batch of the status: nothing else of it goes into them."""

    @cached_property
    def job(self) -> Job:
        """The job with the administrator's defaults for its namespace."""
        return with_defaults(self.observed.job, self.settings)

    @cached_property
    def workload(self) -> Workload:
        """The job as the work of its kind. It has the current status, because the plan may have just come in."""
        return workload(self.job.model_copy(update={"status": self.status}))

    @property
    def done(self) -> ConditionType:
        """The condition that is True once `run` has succeeded."""
        return self.workload.done

    @property
    def publishes(self) -> bool:
        return bool(self.job.spec.hub and self.job.spec.hub.repo)

    @property
    def last(self) -> Phase:
        """The phase after which the job is finished, by its current spec."""
        if self.job.spec.plan_only and not self.has_run:
            return "prepare"
        return "publish" if self.publishes else "run"

    @property
    def has_run(self) -> bool:
        """Whether the phase `run` has begun. Its child is deleted some time after the job has ended."""
        return bool(self.child("run") or self.status.run_start_time or self.status.is_true(self.done))

    @property
    def hub_changed(self) -> bool:
        """Whether spec.hub differs from the one that the last publish Job was made from."""
        request = self.status.hub_request
        return request is not None and request.hash != hub_hash(self.job)

    @property
    def target_changed(self) -> bool:
        """Whether spec.hub names another repository or branch than the last publish Job uploaded to."""
        request = self.status.hub_request
        return request is not None and request.target != hub_target(self.job)

    def child(self, phase: Phase) -> Object | None:
        if phase not in self.present:
            self.present[phase] = self.observed.children.get(self.workload.child(phase))
        return self.present[phase]

    def pods(self, phase: Phase) -> list[Object]:
        """The pods of `phase` that have not terminated."""
        if ("pods", phase) not in self.found:
            self.found["pods", phase] = children.living(self.observed.pods, phase)
        return self.found["pods", phase]

    def ends(self, phase: Phase) -> list[PodEnd]:
        """The ends of pods of the existing child.

        Pods of an earlier child, which was deleted when the job was suspended, did not fail.
        """
        if ("ends", phase) not in self.found:
            self.found["ends", phase] = self._find_ends(phase)
        return self.found["ends", phase]

    def _find_ends(self, phase: Phase) -> list[PodEnd]:
        child = self.child(phase)
        if child is None:
            return []
        uid: str | None = child["metadata"].get("uid")
        created = children.created(child)

        def belongs(end: PodEnd) -> bool:
            if end.child:
                return end.child == uid
            # Compared only where the pod does not name its child: clocks of nodes may be behind the API server's.
            return created is None or end.ended_at >= created

        return [end for end in self.observed.ended if end.phase == phase and belongs(end)]

    def attempts(self, phase: Phase) -> list[Attempt]:
        """The failures of the existing child that the status holds, oldest first."""
        child = self.child(phase)
        if child is None:
            return []
        if child["kind"] == "JobSet":
            # The attempts of all JobSets of a job are numbered on.
            first, _ = children.restarts_before(child)
            return [attempt for attempt in self.status.attempts if attempt.phase == phase and attempt.attempt >= first]
        created, seen = children.created(child), {end.pod for end in self.ends(phase)}

        def belongs(attempt: Attempt) -> bool:
            return attempt.pod in seen or created is None or moment(attempt.time or "") >= created

        return [attempt for attempt in self.status.attempts if attempt.phase == phase and belongs(attempt)]

    def is_outdated(self, phase: Phase) -> bool:
        """Whether the child of `phase` was made before the job resumed, and is in the way of the next one.

        What a run or an upload has finished stays finished. `prepare` plans anew where its condition was taken back.
        """
        child = self.child(phase)
        if child is None or children.resumes(child) >= self.status.resumes:
            return False
        return phase == "prepare" or not children.succeeded(child)

    def places(self) -> dict[str, Place]:
        """Where the jobs whose results this one uses keep their work, by name.

        As `prepare` found them: a job may have been deleted since, or created again with another folder.
        """
        current = {name: naming.place(source) for name, source in self.observed.sources.items()}
        return current | {source.job: Place(source.claim_name, source.folder) for source in self.status.sources or []}

    def configmap(self) -> Object:
        """The config map with the run config."""
        reduced = self.status.reduced_micro_batch_size
        if reduced not in self.rendered:
            self.rendered[reduced] = configmap(self.workload, self.settings, self.places())
        return self.rendered[reduced]

    def unfinished(self) -> list[ChildRef]:
        """The children that are neither finished nor being deleted."""
        found = []
        for phase in PHASES:
            child = self.child(phase)
            if child and not children.finished(child) and not children.deleting(child):
                found.append(self.workload.child(phase))
        return found

    # Changes of the status

    def with_condition(self, type: ConditionType, value: Value, reason: str, message: str) -> Context:
        generation = self.job.metadata.generation
        return self.having(with_condition(self.status, type, value, reason, message, self.now, generation))

    def without_condition(self, type: ConditionType) -> Context:
        return self.having(without_condition(self.status, type))

    def with_status(self, **fields: Any) -> Context:
        if all(getattr(self.status, name) == value for name, value in fields.items()):
            return self
        return self.having(self.status.model_copy(update=fields))

    def having(self, status: JobStatus) -> Context:
        """With this status. Most steps change nothing, and then what was looked up for this context stays known."""
        return self if status is self.status else replace(self, status=status)

    def with_image(self, phase: Phase) -> Context:
        """With the image of the pods of `phase`, whose child is made now. During an upgrade it may be an older one."""
        return self.with_status(images=self.status.images | {phase: self.settings.trainer_image})

    # Answers

    def goes_on(self, requeue_after: float | None = None) -> Step:
        """The next step follows."""
        return Step(self.status, goes_on=True, requeue_after=requeue_after)

    def stops(
        self,
        apply: Sequence[Object] = (),
        delete: Sequence[ChildRef] = (),
        requeue_after: float | None = None,
        delete_job: bool = False,
    ) -> Step:
        """No further step follows now."""
        return Step(self.status, False, apply, delete, requeue_after, delete_job)

    def waits(self, type: ConditionType, reason: str, message: str, requeue_after: float | None = None) -> Step:
        """The job waits, and the condition `type` is False and says for what."""
        return self.with_condition(type, "False", reason, message).stops(requeue_after=requeue_after)

    def creates(
        self, type: ConditionType, reason: str, message: str, *manifests: Object | None, repair: Object | None = None
    ) -> Step:
        """Children are created. If the API server refuses one, the condition `type` says so (`decide.refused`)."""
        step = self.waits(type, reason, message)
        return replace(step, apply=[manifest for manifest in manifests if manifest], repair=repair, creating=type)

    def fails(self, reason: str, message: str, delete: Sequence[ChildRef] = (), resumable: bool = True) -> Step:
        """The job has failed. The message says how it can go on, if it is `resumable`."""
        if resumable:
            message = f"{message.rstrip('.')}. {self.how_to_go_on()}"
        ctx = self.with_condition(ConditionType.FAILED, "True", reason, message)
        return ctx.with_status(completion_time=text(self.now)).stops(delete=delete)

    def how_to_go_on(self) -> str:
        checkpoint = self.status.checkpoint
        where = f" from step {checkpoint.step}" if checkpoint and not self.status.is_true(self.done) else ""
        return (
            f"To go on{where}, change the fields that are named here, or set spec.retry: {self.job.spec.retry + 1} to"
            " try again as it is"
        )
