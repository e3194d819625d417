"""Condition types of both kinds, and the reasons of conditions and events. Those of failed pods are in `exitcodes`."""

from __future__ import annotations

from enum import StrEnum


class ConditionType(StrEnum):
    ACCEPTED = "Accepted"
    PREPARED = "Prepared"
    ADMITTED = "Admitted"
    """By a queue of Kueue, with its reason. Only of jobs that name one, once the child of `run` exists."""
    RUNNING = "Running"
    TRAINED = "Trained"
    GENERATED = "Generated"
    PUBLISHED = "Published"
    SUSPENDED = "Suspended"
    COMPLETE = "Complete"
    FAILED = "Failed"
    RECONCILING = "Reconciling"
    """The operator is at work on the job. Absent at rest, as kstatus wants it, which Flux and Argo CD follow."""
    STALLED = "Stalled"
    """The job does not go on by itself. Absent otherwise, as above."""
    FIELDS_IGNORED = "FieldsIgnored"
    """The spec has fields that the operator does not know."""
    INTERNAL_ERROR = "InternalError"
    """The operator itself fails with the job."""


class Reason(StrEnum):
    # Accepted
    ACCEPTED = "Accepted"
    JOB_SET_MISSING = "JobSetMissing"
    INVALID_SPEC = "InvalidSpec"
    NOT_ALLOWED = "NotAllowed"
    """The administrator's settings refuse what the job asks for."""
    NOT_UNDERSTOOD = "NotUnderstood"
    """A field of the spec has a value that the operator does not know, because another version has accepted it."""
    SOURCE_NOT_UNDERSTOOD = "SourceNotUnderstood"
    # waiting
    WAITING_FOR_JOB = "WaitingForJob"
    WAITING_FOR_QUEUE = "WaitingForQueue"
    PENDING = "Pending"
    """Of Admitted, as the next ones. Kueue uses the same reason, and others that are not listed here."""
    QUOTA_RESERVED = "QuotaReserved"
    """Admission checks are left."""
    ADMITTED = "Admitted"
    WAITING_FOR_KUEUE = "WaitingForKueue"
    """The child is suspended, and Kueue has not made a Workload for it."""
    NOT_QUEUED = "NotQueued"
    """The job names a queue, but nothing held its child until there is quota."""
    INADMISSIBLE = "Inadmissible"
    UNSATISFIABLE = "Unsatisfiable"
    """The quota cannot meet the request even while nothing else runs."""
    DEACTIVATED = "Deactivated"
    RUNS_ELSEWHERE = "RunsElsewhere"
    """MultiKueue runs the child in another cluster."""
    WAITING_FOR_PODS = "WaitingForPods"
    WAITING_FOR_VOLUME = "WaitingForVolume"
    FAILED_CREATE = "FailedCreate"
    """The API server refuses to create a child. Kubernetes uses the same reason."""
    NO_PODS = "NoPods"
    """A Job or JobSet exists, but the cluster creates no pods for it."""
    CONTAINER_CREATING = "ContainerCreating"
    """A pod was scheduled, but its container has not started: it waits for its image or for a volume."""
    UNSCHEDULABLE = "Unschedulable"
    IMAGE_PULL_FAILED = "ImagePullFailed"
    SOURCE_FAILED = "SourceFailed"
    # phases
    PREPARING = "Preparing"
    PREPARED = "Prepared"
    PLAN_ONLY = "PlanOnly"
    STARTING = "Starting"
    RUNNING = "Running"
    NO_STEP = "NoStep"
    """The pods run, but one of them makes no progress."""
    PROGRESS_UNKNOWN = "ProgressUnknown"
    """The pods run, but the operator cannot read the metrics of one of them."""
    RESTARTING = "Restarting"
    TRAINED = "Trained"
    GENERATED = "Generated"
    PUBLISHING = "Publishing"
    PUBLISHED = "Published"
    # ends
    COMPLETED = "Completed"
    SUSPENDED = "Suspended"
    RESUMED = "Resumed"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    NO_PROGRESS = "NoProgress"
    FAILED = "Failed"
    CONDITIONS_LOST = "ConditionsLost"
    """The job has ended, but its status has lost the condition that says how."""
    # of the operator
    UNKNOWN_FIELDS = "UnknownFields"
    INTERNAL_ERROR = "InternalError"
    # only of events
    STARTED = "Started"
    EVICTED = "Evicted"
    PUBLISH_FAILED = "PublishFailed"
    SMALL_WORKSPACE = "SmallWorkspace"
    CHECKPOINT_BROKEN = "CheckpointBroken"
    NOTICE = "Notice"
    STATUS_REFUSED = "StatusRefused"
    """The API server refuses the status, so that no child is created."""


ONLY_EVENTS = frozenset(
    {
        Reason.STARTED,
        Reason.EVICTED,
        Reason.PUBLISH_FAILED,
        Reason.SMALL_WORKSPACE,
        Reason.CHECKPOINT_BROKEN,
        Reason.NOTICE,
        Reason.STATUS_REFUSED,
    }
)
"""Reasons that no condition has."""
