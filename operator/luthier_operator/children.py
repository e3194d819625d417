"""Reading the children of a job as the API server sends them: Jobs, JobSets and pods.

Nothing is decided here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from luthier_api.conditions import Reason
from luthier_api.exitcodes import ExitCode
from luthier_operator.model import Object
from luthier_operator.naming import (
    BEFORE_ANNOTATION,
    CHILD_LABELS,
    CONTAINER,
    INDEX_ANNOTATION,
    INDEX_FAILURES_ANNOTATION,
    INDEX_IGNORED_ANNOTATION,
    PHASE_LABEL,
    RESTART_LABEL,
    RESUMES_ANNOTATION,
)
from luthier_operator.statuses import moment

IMAGE_REASONS = {"ImagePullBackOff", "ErrImagePull", "ErrImageNeverPull", "InvalidImageName"}
OWN_CONTROLLERS = {None, "kubernetes.io/job-controller", "jobset.sigs.k8s.io/jobset-controller"}
"""Values of `spec.managedBy` of a child whose pods run in this cluster."""
VOLUME_TEXT = "persistentvolumeclaim"  # in the scheduler's message about claims, in lower case
IMAGE = re.compile(r'(?:image|tag|reference|manifest for) "(?P<image>[^"]+)"')
BACK_OFF = re.compile(r'^Back-off pulling image "[^"]*"(: \w+: )?')
MISSING_SECRET = re.compile(r'[sS]ecret "?(?:[^ "/]+/)?(?P<name>[^ "/]+)')
"""In the kubelet's messages: secret "hf" not found; couldn't find key token in Secret ml/hf."""
CONNECTION = re.compile(r"(read|write|dial) (tcp|udp) \S+->")
"""In a message of the kubelet: the address and port that a connection had on this side."""
NO_SCHEDULER_SECONDS = 300.0
"""A scheduler says within moments why no node takes a pod, in a burst of jobs within minutes."""
CONTAINER_REASONS = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}


@dataclass(frozen=True)
class PendingReason:
    """Why a pod does not run yet: reason and message of a condition."""

    reason: str
    message: str
    since: datetime | None = None
    """Since when a container cannot start, where it needs somebody's help."""


def holds_pods(child: Object) -> bool:
    """Whether it is a Job that holds the last failed pod of each index until it has created the next one."""
    return child.get("spec", {}).get("backoffLimitPerIndex") is not None


def condition(child: Object, *types: str) -> Object | None:
    """The first condition of one of `types` that is True."""
    found = child.get("status", {}).get("conditions") or []
    return next((c for c in found if c["type"] in types and c["status"] == "True"), None)


def succeeded(child: Object) -> Object | None:
    """The condition of success, if it is True. A Job calls it Complete, a JobSet Completed."""
    return condition(child, "Complete", "Completed")


def failed(child: Object) -> Object | None:
    return condition(child, "Failed")


def finished(child: Object) -> bool:
    return bool(succeeded(child) or failed(child))


def deleting(found: Object) -> bool:
    return "deletionTimestamp" in found["metadata"]


def created(child: Object) -> datetime | None:
    text = child["metadata"].get("creationTimestamp")
    return moment(text) if text else None


def ended_at(child: Object) -> datetime | None:
    """When it succeeded or failed."""
    end = succeeded(child) or failed(child)
    return moment(end["lastTransitionTime"]) if end and end.get("lastTransitionTime") else None


def suspended(child: Object) -> bool:
    """Whether a queue has suspended it. The operator itself never does."""
    return bool(child.get("spec", {}).get("suspend"))


def was_suspended(child: Object) -> bool:
    """Whether a queue has suspended it at some time."""
    return any(c["type"] == "Suspended" for c in child.get("status", {}).get("conditions") or [])


def manager(child: Object) -> str | None:
    """The controller that runs it in place of Kubernetes' own: MultiKueue, in another cluster."""
    named: str | None = child.get("spec", {}).get("managedBy")
    return None if named in OWN_CONTROLLERS else named


def active_since(child: Object) -> datetime | None:
    """Since when it may create pods: since its creation, or since a queue admitted it. None while it is suspended."""
    conditions = child.get("status", {}).get("conditions") or []
    suspension = next((c for c in conditions if c["type"] == "Suspended"), None)
    if suspended(child):
        return None
    if suspension is None:
        return created(child)
    if suspension["status"] == "True":
        return None
    return moment(suspension["lastTransitionTime"])


def suspended_since(child: Object) -> datetime | None:
    """Since when a queue has suspended it, where the Job or JobSet says so already."""
    found = condition(child, "Suspended")
    return moment(found["lastTransitionTime"]) if found and found.get("lastTransitionTime") else None


def restarts_before(child: Object) -> tuple[int, int]:
    """Restarts of the children of `run` before this one, and those of them that were charged."""
    total, _, charged = child["metadata"].get("annotations", {}).get(BEFORE_ANNOTATION, "").partition(",")
    return number(total), number(charged)


def resumes(child: Object) -> int:
    """How often the job had resumed when the child was made."""
    return number((child["metadata"].get("annotations") or {}).get(RESUMES_ANNOTATION))


def restarts(jobset: Object) -> tuple[int, int]:
    """Restarts of the group, and those of them that were charged, those of earlier JobSets included."""
    before, charged = restarts_before(jobset)
    status = jobset.get("status", {})
    return before + status.get("restarts", 0), charged + status.get("restartsCountTowardsMax", 0)


def annotation(child: Object, name: str) -> str:
    """Empty where the child has none of this name."""
    value: str = child["metadata"].get("annotations", {}).get(name, "")
    return value


def label(pod: Object, name: str) -> str | None:
    value: str | None = pod["metadata"].get("labels", {}).get(name)
    return value


def controller_uid(pod: Object) -> str:
    """uid of the Job or JobSet of ours that the pod belongs to. Empty if it does not say."""
    return next((uid for name in CHILD_LABELS if (uid := label(pod, name))), "")


def number(text: str | None) -> int:
    """A label or an annotation as a number. Zero for anything else: users who may create pods may write anything."""
    return int(text) if text and text.isdecimal() and len(text) < 10 else 0


def index(pod: Object) -> int:
    """Node rank or shard."""
    return number((pod["metadata"].get("annotations") or {}).get(INDEX_ANNOTATION) or label(pod, INDEX_ANNOTATION))


def starts_before(pod: Object) -> tuple[int, int]:
    """How often its group, or its index, was started before this pod, and how many of these starts were not charged.
    Zero where the pod does not say.
    """
    notes = pod["metadata"].get("annotations") or {}
    free = number(notes.get(INDEX_IGNORED_ANNOTATION))
    return number(label(pod, RESTART_LABEL)) or number(notes.get(INDEX_FAILURES_ANNOTATION)) + free, free


def scheduled(pod: Object) -> datetime | None:
    """When it got its node."""
    found = pod.get("status", {}).get("conditions") or []
    times = (c.get("lastTransitionTime") for c in found if c["type"] == "PodScheduled" and c["status"] == "True")
    return next((moment(time) for time in times if time), None)


def awaits_scheduler_since(pod: Object) -> datetime | None:
    """When a pod was created that no scheduler has tried to give a node yet. None for all others."""
    conditions = pod.get("status", {}).get("conditions") or []
    tried = any(c["type"] == "PodScheduled" for c in conditions) or pod.get("spec", {}).get("nodeName")
    return None if tried or container(pod) or terminated(pod) or deleting(pod) else created(pod)


def container(pod: Object) -> dict[str, Any]:
    """State of the container `trainer`: {running: ...}, {waiting: ...}, {terminated: ...} or nothing yet."""
    statuses = pod.get("status", {}).get("containerStatuses") or []
    state: dict[str, Any] = next((s.get("state") or {} for s in statuses if s["name"] == CONTAINER), {})
    return state


def memory_limit(pod: Object) -> str | None:
    """The memory limit of the container `trainer`, as a quantity: the job's, or that of a LimitRange."""
    containers = pod.get("spec", {}).get("containers") or []
    resources = next((c.get("resources") or {} for c in containers if c.get("name") == CONTAINER), {})
    limit: str | None = (resources.get("limits") or {}).get("memory")
    return limit


def terminated(pod: Object) -> bool:
    """Whether its container will never run again."""
    return pod.get("status", {}).get("phase") in ("Succeeded", "Failed") or "terminated" in container(pod)


def starts_as_expected(pod: Object) -> bool:
    """Whether it runs, or nobody has tried to give it a node yet: in both cases an event tells what comes next."""
    if deleting(pod) or terminated(pod):
        return False
    return "running" in container(pod) or not (scheduled(pod) or unschedulable(pod) or container(pod))


def pods_at_once(manifest: Object) -> int:
    """How many pods the controllers create for a Job or JobSet of ours at first."""
    if manifest["kind"] == "JobSet":
        jobs = ((part["replicas"], part["template"]["spec"]) for part in manifest["spec"]["replicatedJobs"])
        return sum(replicas * spec["parallelism"] for replicas, spec in jobs)
    pods: int = manifest["spec"]["parallelism"]
    return pods


def living(pods: Iterable[Object], phase: str) -> list[Object]:
    """Pods of a phase whose container runs or may still run, those that are being deleted among them."""
    return [pod for pod in pods if label(pod, PHASE_LABEL) == phase and not terminated(pod)]


def running(pods: Iterable[Object], attempt: int | None = None) -> int:
    """How many pods run; with `attempt`, only those of that restart of a JobSet."""
    return sum(
        "running" in container(p)
        and not deleting(p)
        and (attempt is None or label(p, RESTART_LABEL) in (None, str(attempt)))
        for p in pods
    )


def pending_reason(pods: Iterable[Object], secrets: Mapping[str, str]) -> PendingReason | None:
    """Why the first pod, by name, that cannot start does not. None if all can.

    `secrets`: name of a Secret that the pods need → field of the spec that names it.
    """
    for pod in sorted(pods, key=lambda pod: str(pod["metadata"]["name"])):
        found = None if deleting(pod) else _pending_reason(pod, secrets)
        if found:
            return found
    return None


def unschedulable(pod: Object) -> Object | None:
    """The scheduler's condition about a pod that no node can take, if there is one."""
    found = pod.get("status", {}).get("conditions") or []
    return next(
        (
            c
            for c in found
            if c["type"] == "PodScheduled" and c["status"] == "False" and c.get("reason") == "Unschedulable"
        ),
        None,
    )


@dataclass(frozen=True)
class Unbound:
    """The scheduler's message about a claim that is missing or not bound, and since when."""

    message: str
    since: datetime | None


def waits_for_volume(pod: Object) -> Unbound | None:
    """Whether the pod waits for a claim and not for a node."""
    found = unschedulable(pod)
    if deleting(pod) or found is None or VOLUME_TEXT not in found.get("message", "").lower():
        return None
    since = found.get("lastTransitionTime")
    return Unbound(found["message"], moment(since) if since else None)


def _pending_reason(pod: Object, secrets: Mapping[str, str]) -> PendingReason | None:
    name = pod["metadata"]["name"]
    if (found := unschedulable(pod)) and not waits_for_volume(pod):
        return PendingReason(Reason.UNSCHEDULABLE, f"pod {name}: {found.get('message', '')}")
    waiting = container(pod).get("waiting") or {}
    reason, message = waiting.get("reason", ""), waiting.get("message", "")
    if reason in IMAGE_REASONS:
        return PendingReason(Reason.IMAGE_PULL_FAILED, image_pull_failed(name, message), since=scheduled(pod))
    if reason in CONTAINER_REASONS:
        missing = MISSING_SECRET.search(message)
        field = secrets.get(missing["name"]) if missing else None
        where = f"{field}: " if field else ""
        text = f"{where}{message or reason} (pod {name})"
        return PendingReason(ExitCode.MISCONFIGURED.reason, text, since=scheduled(pod))
    return None


def image_pull_failed(pod: str, message: str) -> str:
    """What the kubelet's message about an image means, with the registry's error last.

    The kubelet goes to and fro between the error and a back-off, which an older one reports without the error, and the
    error may hold the port of a connection. The text is the same for all of them, but for a missing error.
    """
    named = IMAGE.search(message)
    image = named["image"] if named else "the trainer image"
    if named and ":" not in image.rpartition("/")[2]:
        image += ":latest"  # as the error says it, and the back-off does not
    error = CONNECTION.sub("", BACK_OFF.sub("", message)).strip()
    text = (
        f"{image} cannot be pulled for pod {pod}. An administrator sets it by trainer.image (chart), and"
        " imagePullSecrets for a registry that asks who pulls"
    )
    return f"{text}: {error}" if error else text
