"""Condition types of both kinds, and the reasons of conditions and events. Those of failed pods are in `exitcodes`."""

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
    # only of events
    STARTED = "Started"
    PUBLISH_FAILED = "PublishFailed"
    SMALL_WORKSPACE = "SmallWorkspace"
    CHECKPOINT_BROKEN = "CheckpointBroken"
    NOTICE = "Notice"


ONLY_EVENTS = frozenset(
    {Reason.STARTED, Reason.PUBLISH_FAILED, Reason.SMALL_WORKSPACE, Reason.CHECKPOINT_BROKEN, Reason.NOTICE}
)
"""Reasons that no condition has."""
