"""The types of the operator: what is observed, what is decided.

`reconcile` takes an `Observed` from the store, `decide` turns it into a `Decision` without any I/O, and `reconcile`
carries that out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, NamedTuple

from luthier_api.conditions import ConditionType
from luthier_api.kinds import FineTuneJob, GenerateJob, JobKind
from luthier_api.status import JobStatus, Phase, Progress
from luthier_api.termination import TerminationMessage

Job = FineTuneJob | GenerateJob
Object = dict[str, Any]
"""A Kubernetes object as the API server sends it."""


class Key(NamedTuple):
    """Identifies a job. A tuple, because each event looks up several dictionaries by it."""

    kind: JobKind
    namespace: str
    name: str


class ChildRef(NamedTuple):
    """Identifies a child in the namespace of its job."""

    kind: Literal["Job", "JobSet", "ConfigMap", "PersistentVolumeClaim"]
    name: str


@dataclass(frozen=True)
class PodEnd:
    """How the container `trainer` of a pod terminated, kept after the pod is deleted."""

    pod: str
    uid: str
    phase: Phase
    attempt: int
    """How often its group (JobSet), or its index (Job), was restarted before."""
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
    ended_at: datetime
    """By the operator's clock, where it has seen the end. Clocks of nodes may be minutes apart."""
    uncharged_before: int = 0
    """Of a shard: how many of these restarts were not charged."""
    child: str = ""
    """uid of the Job or JobSet that the pod belonged to."""
    memory_limit: str | None = None
    """Of its container, as a quantity."""


@dataclass(frozen=True)
class KueueCondition:
    is_true: bool
    reason: str
    message: str


@dataclass(frozen=True)
class KueueWorkload:
    """What is kept of a Workload of Kueue, which belongs to a child of `run`."""

    name: str
    uid: str
    version: int
    child: str
    """uid of the JobSet or Job."""
    conditions: Mapping[str, KueueCondition]
    requeue_at: str | None = None
    """When it queues again after an eviction."""
    checks: Mapping[str, Object] = field(default_factory=dict)
    """Its admission checks by name: state and message."""

    def is_true(self, type: str) -> bool:
        condition = self.conditions.get(type)
        return condition is not None and condition.is_true


@dataclass(frozen=True)
class Silence:
    """How long a pod has been without progress, as it served it when its metrics were last read."""

    seconds: float
    error: str = ""
    """Why its metrics cannot be read. `seconds` are then those since they were last read."""


@dataclass(frozen=True)
class Observed:
    """Everything that `decide` may look at."""

    job: Job
    children: Mapping[ChildRef, Object]
    """Jobs and JobSets with the labels and the uid of the job."""
    pods: Sequence[Object]
    """Its pods that exist."""
    ended: Sequence[PodEnd]
    """Ends of its pods that this operator process has seen: the successful ones, then the failed ones, oldest first."""
    ended_since: Mapping[ChildRef, datetime] = field(default_factory=dict)
    """When this operator process first saw that a child had ended."""
    progress: Progress | None = None
    """As last read from the metrics of its pods."""
    checkpoint_step: int | None = None
    """Step of the newest verified checkpoint, as a running pod serves it. 0: there is none."""
    broken_checkpoints: int | None = None
    silences: Mapping[str, Silence] = field(default_factory=dict)
    """By uid of the pod."""
    sources: Mapping[str, Job] = field(default_factory=dict)
    """The existing jobs whose results it uses, as `kinds.source_name` calls them."""
    unreadable_sources: Mapping[str, str] = field(default_factory=dict)
    """Those that exist but cannot be read: name → problem."""
    cycle: Sequence[str] = ()
    """The jobs from this one back to itself, if they wait for each other's results."""
    unknown_fields: Sequence[str] = ()
    """Paths of fields of the job that this operator does not know."""
    jobset_installed: bool = True
    admission: KueueWorkload | None = None
    """What Kueue says about the child of `run`."""
    kueue_readable: bool = False
    """Whether Workloads of Kueue are known: it is installed, and the operator may read them."""
    backlog: int = 0
    """Children of all jobs that have no pod yet: the controllers create pods one after another."""
    warnings: Mapping[ChildRef, str] = field(default_factory=dict)
    """What the Events of children say against their pods, where `decide` has asked for it; empty if nothing."""


@dataclass(frozen=True)
class Event:
    """A Kubernetes Event about the job."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


@dataclass(frozen=True)
class Decision:
    """What to do now."""

    status: JobStatus
    apply: Sequence[Object] = ()
    """Missing children, in the order in which they are created. Existing ones are not changed: a queue owns part of
    them, and templates are immutable.
    """
    repair: Object | None = None
    """The config map that these children need. It should exist, but somebody may have changed or deleted it."""
    creating: ConditionType | None = None
    """The condition that reports on them."""
    delete: Sequence[ChildRef] = ()
    ask: Sequence[ChildRef] = ()
    """Children whose Events may tell why they have no pods. They are to be read, and then it is decided again."""
    events: Sequence[Event] = ()
    requeue_after: float | None = None
    """Seconds until the job is to be reconciled again without an event."""
    delete_job: bool = False
    """Whether its time to live is over."""
