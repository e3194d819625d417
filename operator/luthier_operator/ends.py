"""How the pods of one job have ended, as this operator saw it: the evidence outlives the pods.

What ended well is kept an end an index, however many shards there are: a job has its final figures once all have
spoken. Failures have no such bound, so only the newest are kept; older ones are in the status by then. Neighbours:
`failure` reads a pod's end, `store` keeps these.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

from luthier_api.status import Phase
from luthier_operator.model import PodEnd

FAILURES_KEPT = 256


class Ends:
    def __init__(self) -> None:
        self._well: dict[tuple[Phase, int], PodEnd] = {}  # by phase and index
        self._failed: OrderedDict[str, PodEnd] = OrderedDict()  # by the pod's uid

    def put(self, end: PodEnd) -> bool:
        """Remember it, unless the pod's end is known. Whether it was news."""
        well, failed = self._well.get((end.phase, end.index)), self._failed.get(end.uid)
        if well and (well.uid == end.uid or (end.exit_code == 0 and well.finished_at > end.finished_at)):
            return False
        # A pod that is lost with its node ends without an exit code, which may follow when the node comes back; so may
        # the reason.
        if failed and not (end.exit_code >= 0 > failed.exit_code or (end.disrupted and not failed.disrupted)):
            return False
        if end.exit_code == 0:
            self._failed.pop(end.uid, None)
            self._well[end.phase, end.index] = concise(end)
        else:
            self._failed[end.uid] = end
            while len(self._failed) > FAILURES_KEPT:
                self._failed.popitem(last=False)
        return True

    def all(self) -> list[PodEnd]:
        """Those that ended well, then the failures, oldest first."""
        return [*self._well.values(), *self._failed.values()]


def concise(end: PodEnd) -> PodEnd:
    """A good end without its output, which nobody reads: there may be thousands of them."""
    message = end.message and end.message.model_copy(update={"message": "", "last_lines": ""})
    return replace(end, message=message, raw_message="")
