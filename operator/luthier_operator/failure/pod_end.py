"""How a pod ended: reading it from the pod, keeping it after the pod is deleted, and what it means.

When one pod of a group fails, the Job controller deletes the others at once. Their ends are therefore kept from the
moment in which they are first seen.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from datetime import datetime

from luthier_api.exitcodes import ERROR_RANK, EXTERNAL_SIGNALS, SIGNALED, ExitCode, Retry, ending
from luthier_api.status import PHASES, Phase
from luthier_api.termination import TerminationMessage
from luthier_operator import children
from luthier_operator.children import container, label
from luthier_operator.model import Object, PodEnd
from luthier_operator.naming import PHASE_LABEL
from luthier_operator.statuses import moment

NO_EXIT_CODE = -1
"""Of a pod that disappeared without an exit code of its container: it was evicted, or lost with its node."""
OOM_KILLED = "OOMKilled"  # reason of a container, set by containerd
DISRUPTED_RANK = -1
MESSAGE_CHARACTERS = 500  # of a line of output that stands in for a message
FAILED_ENDS_KEPT = 256

MORE_MEMORY: dict[Phase, str] = {
    "prepare": "Raise spec.prepare.memory, and the LimitRange of the namespace if it has one",
    "run": "Raise spec.resources.memory, or use smaller batches",
    "publish": "Raise spec.publish.memory, and the LimitRange of the namespace if it has one",
}
NODE_WITH_MEMORY: dict[Phase, str] = {
    "prepare": "Set spec.prepare.memory",
    "run": "Set spec.resources.memory",
    "publish": "Set spec.publish.memory",
}
DISK_FULL = ("Usage of EmptyDir volume", "ephemeral local storage usage exceeds", "local ephemeral storage")
"""How the kubelet begins or words the message about a pod that it evicts for what it wrote to its node's disk."""
MORE_DISK: dict[Phase, str] = {
    "prepare": "raise spec.prepare.ephemeralStorage",
    "run": "raise spec.resources.ephemeralStorage",
    "publish": "raise spec.publish.ephemeralStorage",
}


def pod_end(pod: Object, now: datetime, was_watched: bool) -> PodEnd | None:
    """Read how the container `trainer` of `pod` ended.

    Returns None while the container may still run, and for a pod without a phase label. `was_watched`: whether the
    operator has seen it at work, and sees its end now. Else it ended at some time before, of which only the clock of
    its node knows.
    """
    phase = next((known for known in PHASES if known == label(pod, PHASE_LABEL)), None)
    status, meta = pod.get("status", {}), pod["metadata"]
    terminated = container(pod).get("terminated")
    if phase is None:
        return None
    if terminated is None and status.get("phase") != "Failed":
        return None

    terminated = terminated or {}
    starts, uncharged = children.starts_before(pod)
    raw_message = terminated.get("message") or status.get("message") or ""
    conditions = status.get("conditions") or []
    finished, created = terminated.get("finishedAt"), children.created(pod)
    return PodEnd(
        pod=meta["name"],
        uid=meta["uid"],
        phase=phase,
        attempt=starts,
        uncharged_before=uncharged,
        index=children.index(pod),
        node=pod.get("spec", {}).get("nodeName"),
        exit_code=terminated.get("exitCode", NO_EXIT_CODE),
        kubernetes_reason=terminated.get("reason") or status.get("reason") or "",
        disrupted=any(c["type"] == "DisruptionTarget" and c["status"] == "True" for c in conditions),
        message=TerminationMessage.read(raw_message),
        raw_message=raw_message,
        ended_at=now if was_watched or not finished else ended_between(created, moment(finished), now),
        child=children.controller_uid(pod),
        memory_limit=children.memory_limit(pod),
    )


def ended_between(created: datetime | None, finished: datetime, now: datetime) -> datetime:
    """`finished`, as far as the clock of the node can be right: no pod ends before it was created, or in the future."""
    return min(max(finished, created or finished), now)


class PodEnds:
    """The ends of one job's pods that this operator has seen.

    A successful end is kept for each index, however many shards there are: the final metrics need all of them. Of
    failed ends only the newest are kept; the status holds the older ones by then.
    """

    def __init__(self) -> None:
        self._succeeded: dict[tuple[Phase, int], PodEnd] = {}  # by phase and index
        self._failed: OrderedDict[str, PodEnd] = OrderedDict()  # by uid of the pod

    def put(self, end: PodEnd) -> bool:
        """Keep `end`. Returns whether it changed what is known."""
        if self._is_known(end):
            return False
        if end.exit_code == 0:
            self._failed.pop(end.uid, None)
            self._succeeded[end.phase, end.index] = without_output(end)
            return True
        self._failed[end.uid] = end
        while len(self._failed) > FAILED_ENDS_KEPT:
            self._failed.popitem(last=False)
        return True

    def all(self) -> list[PodEnd]:
        """The successful ends, then the failed ones, oldest first."""
        return [*self._succeeded.values(), *self._failed.values()]

    def _is_known(self, end: PodEnd) -> bool:
        succeeded = self._succeeded.get((end.phase, end.index))
        if succeeded:
            older = end.exit_code == 0 and succeeded.ended_at > end.ended_at
            if succeeded.uid == end.uid or older:
                return True
        failed = self._failed.get(end.uid)
        if failed is None:
            return False
        # A pod that is lost with its node ends without an exit code. The exit code may follow when the node comes
        # back, and so may the condition DisruptionTarget.
        exit_code_is_new = end.exit_code >= 0 > failed.exit_code
        disruption_is_new = end.disrupted and not failed.disrupted
        return not (exit_code_is_new or disruption_is_new)


def without_output(end: PodEnd) -> PodEnd:
    """A successful end without its output, which is never read: there may be thousands of them."""
    message = end.message
    if message:
        message = message.model_copy(update={"message": "", "last_lines": ""})
    return replace(end, message=message, raw_message="")


def is_fatal(end: PodEnd) -> bool:
    """Whether the cluster does not start the pod again after this end."""
    return end.exit_code in ExitCode.codes(Retry.NEVER)


def is_uncharged(end: PodEnd) -> bool:
    """Whether a restart after this end does not count against `restarts.max`."""
    if is_fatal(end):
        return False
    return end.disrupted or end.exit_code in ExitCode.codes(Retry.FREE)


def reason(end: PodEnd) -> str:
    """The reason of an exit code that describes this end."""
    if end.kubernetes_reason == OOM_KILLED:  # containerd reports it whatever the exit code, so it overrides the code
        return ExitCode.HOST_OUT_OF_MEMORY.reason
    if is_uncharged(end):
        return ExitCode.PREEMPTED.reason
    if end.exit_code == NO_EXIT_CODE:
        return ExitCode.INFRASTRUCTURE_ERROR.reason
    return ending(end.exit_code).code.reason


def cause_rank(end: PodEnd) -> int:
    """`ExitCode.cause_rank`, with what only the cluster knows: a disrupted pod comes first, then one that was killed
    because of its memory use.
    """
    if end.disrupted and not is_fatal(end):
        return DISRUPTED_RANK
    if end.kubernetes_reason == OOM_KILLED:
        return ExitCode.HOST_OUT_OF_MEMORY.cause_rank
    # A pod that was killed from outside may have been killed because another one failed. It is ranked like a pod that
    # failed for an unknown reason.
    if end.exit_code == NO_EXIT_CODE or end.exit_code - SIGNALED in EXTERNAL_SIGNALS:
        return ERROR_RANK
    return ending(end.exit_code).code.cause_rank


def message(end: PodEnd) -> str:
    """What the user should read about this end."""
    if end.message and end.message.message:
        return end.message.message
    if end.kubernetes_reason == OOM_KILLED:
        return out_of_memory(end)
    lines = [line.strip() for line in end.raw_message.splitlines() if line.strip()]
    if end.disrupted:
        detail = f": {lines[-1]}" if lines else ""
        return f"the cluster stopped the pod (preemption, eviction or node drain){detail}"
    if lines and any(words in lines[-1] for words in DISK_FULL):
        return f"{lines[-1].rstrip('. ')} (/tmp and logs): {MORE_DISK[end.phase]}"[:MESSAGE_CHARACTERS]
    if end.exit_code == NO_EXIT_CODE:
        return lines[-1][:MESSAGE_CHARACTERS] if lines else "the pod disappeared without reporting an exit code"
    text = ending(end.exit_code).text
    # Of a container that never started, the runtime's error; else the end of the output.
    return f"{text}: {lines[-1][:MESSAGE_CHARACTERS]}" if end.message is None and lines else text


def out_of_memory(end: PodEnd) -> str:
    """What the user should read about a pod that the kernel killed for its memory. Its limit may be a LimitRange's."""
    if end.memory_limit:
        return f"the pod used more memory than its limit of {end.memory_limit}. {MORE_MEMORY[end.phase]}"
    return (
        "the pod was killed for its memory, although it has no limit: its node ran out of memory."
        f" {NODE_WITH_MEMORY[end.phase]}, so that the scheduler chooses a node that has it free"
    )
