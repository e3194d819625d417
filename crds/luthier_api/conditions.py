"""Condition types, and the reasons of conditions and events of both kinds, in one place. Reasons of failed pods come
from `exitcodes`.
"""

from __future__ import annotations

from enum import StrEnum


class ConditionType(StrEnum):
    ACCEPTED = "Accepted"
    PREPARED = "Prepared"
    RUNNING = "Running"
    TRAINED = "Trained"
    GENERATED = "Generated"
    PUBLISHED = "Published"
    SUSPENDED = "Suspended"
    COMPLETE = "Complete"
    FAILED = "Failed"


class Reason(StrEnum):
    # Accepted
    ACCEPTED = "Accepted"
    JOB_SET_MISSING = "JobSetMissing"
    INVALID_SPEC = "InvalidSpec"
    # waiting
    WAITING_FOR_JOB = "WaitingForJob"
    WAITING_FOR_QUEUE = "WaitingForQueue"
    WAITING_FOR_PODS = "WaitingForPods"
    WAITING_FOR_VOLUME = "WaitingForVolume"
    FAILED_CREATE = "FailedCreate"
    """The API server refuses a child; Kubernetes' own word for it."""
    NO_PODS = "NoPods"
    """A child is there, and the cluster makes no pod of it."""
    CONTAINER_CREATING = "ContainerCreating"
    """A pod has a node, and its container is long in coming: its image, or a volume."""
    UNSCHEDULABLE = "Unschedulable"
    IMAGE_PULL_FAILED = "ImagePullFailed"
    SOURCE_FAILED = "SourceFailed"
    # phases
    PREPARING = "Preparing"
    PREPARED = "Prepared"
    PLAN_ONLY = "PlanOnly"
    STARTING = "Starting"
    RUNNING = "Running"
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
    # of events alone
    STARTED = "Started"
    PUBLISH_FAILED = "PublishFailed"
    SMALL_WORKSPACE = "SmallWorkspace"
    CHECKPOINT_BROKEN = "CheckpointBroken"
    NOTICE = "Notice"


OF_EVENTS_ALONE = frozenset(
    {Reason.STARTED, Reason.PUBLISH_FAILED, Reason.SMALL_WORKSPACE, Reason.CHECKPOINT_BROKEN, Reason.NOTICE}
)
"""Those that no condition ever has."""
