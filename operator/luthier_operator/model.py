"""The nouns of the operator: what was observed, what was decided.

`reconcile` makes an `Observed` from the store, `decide` makes a `Decision` of it without any I/O, `reconcile` carries
that out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from luthier_api.conditions import ConditionType
from luthier_api.kinds import FineTuneJob, GenerateJob, JobKind
from luthier_api.status import JobStatus, Phase, Progress
from luthier_api.termination import TerminationMessage

Job = FineTuneJob | GenerateJob
Object = dict[str, Any]
"""A Kubernetes object as the API server sends it."""


@dataclass(frozen=True, order=True)
class Key:
    """Names a job of ours."""

    kind: JobKind
    namespace: str
    name: str


@dataclass(frozen=True, order=True)
class ChildRef:
    """Names a child within the job's namespace."""

    kind: Literal["Job", "JobSet", "ConfigMap", "PersistentVolumeClaim"]
    name: str


@dataclass(frozen=True)
class PodEnd:
    """A pod's container `trainer` that has terminated, as it was first seen: the evidence outlives the pod."""

    pod: str
    uid: str
    phase: Phase
    attempt: int
    """How often its group (JobSet), or its index (Job), was started again before."""
    index: int
    """Node rank or shard."""
    node: str | None
    exit_code: int
    kubernetes_reason: str
    """OOMKilled, Error, Completed, Evicted, ..."""
    disrupted: bool
    """Whether the pod had the condition DisruptionTarget."""
    message: TerminationMessage | None
    raw_message: str
    finished_at: datetime
    uncharged_before: int = 0
    """Of a shard: how many of those starts were not charged."""
    child: str = ""
    """uid of the Job or JobSet that the pod belonged to."""


@dataclass(frozen=True)
class Observed:
    """Everything that `decide` may look at."""

    job: Job
    children: Mapping[ChildRef, Object]
    """Jobs and JobSets that carry the job's labels and uid."""
    pods: Sequence[Object]
    """Its live pods."""
    ended: Sequence[PodEnd]
    """Its terminated pods of this operator's lifetime: those that ended well, then those that failed, oldest first."""
    progress: Progress | None = None
    """Read from the pods' metrics lately."""
    checkpoint_step: int | None = None
    """Of the newest verified checkpoint, 0 for none, as a pod that has not ended serves it."""
    broken_checkpoints: int | None = None
    sources: Mapping[str, FineTuneJob] = field(default_factory=dict)
    """The FineTuneJobs that it names and that exist, by name."""
    jobset_installed: bool = True


@dataclass(frozen=True)
class Event:
    """A line of `kubectl describe`."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


@dataclass(frozen=True)
class Decision:
    """What to do now."""

    status: JobStatus
    apply: Sequence[Object] = ()
    """Children to apply, in order: those that are missing. What exists is left alone: a queue owns part of it, and
    templates never change.
    """
    creating: ConditionType | None = None
    """The condition that tells of them."""
    delete: Sequence[ChildRef] = ()
    events: Sequence[Event] = ()
    requeue_after: float | None = None
    """Seconds until the job wants another look without any event."""
    delete_job: bool = False
    """Its time to live is over."""
