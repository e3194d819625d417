"""What the store knows of the children of one job."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple

from luthier_operator import children
from luthier_operator.failure.pod_end import PodEnds
from luthier_operator.model import ChildRef, Object, Silence


class HeldPod(NamedTuple):
    """A pod that has terminated and was deleted, and which a finalizer holds."""

    child: str
    """uid of the Job or JobSet that it belongs to."""
    since: datetime
    """When that was first seen."""


@dataclass(slots=True)
class Parts:
    """What belongs to one job."""

    children: dict[ChildRef, Object] = field(default_factory=dict)
    ended_since: dict[ChildRef, datetime] = field(default_factory=dict)
    """When a child was first seen to have ended."""
    pods_expected: dict[str, int] = field(default_factory=dict)
    """uid of each child that this operator process has created → how many pods it has at first."""
    pods: dict[str, Object] = field(default_factory=dict)
    """Pods that have not terminated, by uid."""
    terminated: dict[str, int] = field(default_factory=dict)
    """uid of each pod that has terminated and still exists → its version, so that an older answer does not bring it
    back.
    """
    held: dict[str, HeldPod] = field(default_factory=dict)
    """Those of them that were deleted, by uid."""
    ends: PodEnds | None = None
    samples: dict[int, dict[str, float]] = field(default_factory=dict)
    sampled_at: datetime | None = None
    silences: dict[str, Silence] = field(default_factory=dict)
    """By uid of a pod that has not terminated."""

    def __bool__(self) -> bool:
        return bool(self.children or self.pods or self.terminated or self.ends or self.samples)

    def forget_reports(self) -> None:
        """Drop the ends of pods and their metrics, which the status of the job holds."""
        self.ends, self.sampled_at = None, None
        self.samples.clear()
        self.silences.clear()
        self.ended_since.clear()

    def awaits_pods(self, child: Object) -> bool:
        """Whether a controller has to create the first pod of a child."""
        if children.finished(child) or children.suspended(child) or children.deleting(child):
            return False
        uid = child["metadata"]["uid"]
        return not any(children.controller_uid(pod) == uid for pod in self.pods.values())

    def go_as_expected(self) -> bool:
        """Whether a child is at work and all of its pods are there and start as expected. Not where it is unknown how
        many there are to be.
        """
        at_work = [child for child in self.children.values() if not children.finished(child)]
        if not at_work or any(children.suspended(child) or children.deleting(child) for child in at_work):
            return False
        present = Counter(map(children.controller_uid, self.pods.values()))
        uids = [child["metadata"]["uid"] for child in at_work]
        complete = all(uid in self.pods_expected and present[uid] >= self.pods_expected[uid] for uid in uids)
        return complete and all(map(children.starts_as_expected, self.pods.values()))

    def awaits_scheduler_since(self) -> datetime | None:
        """When the first of its pods was created that no scheduler has tried to give a node yet; None without one."""
        return min(filter(None, map(children.awaits_scheduler_since, self.pods.values())), default=None)

    def keepers(self) -> list[Object]:
        """The Jobs that hold pods, and are neither finished nor being deleted."""
        uids = {pod.child for pod in self.held.values()}
        hold = (c for c in self.children.values() if c["metadata"]["uid"] in uids and children.holds_pods(c))
        return [child for child in hold if not (children.finished(child) or children.deleting(child))]

    def held_since(self) -> datetime | None:
        """When the newest pod that `keepers` hold was first seen to be held. None if there is none."""
        uids = {child["metadata"]["uid"] for child in self.keepers()}
        return max((pod.since for pod in self.held.values() if pod.child in uids), default=None)
