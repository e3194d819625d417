"""The kinds of jobs as objects: `workload(job)` answers what depends on the kind."""

from __future__ import annotations

from luthier_api.kinds import JobKind
from luthier_operator.model import Job
from luthier_operator.workloads.base import Workload
from luthier_operator.workloads.finetune import FineTune
from luthier_operator.workloads.generate import Generate

WORKLOADS: dict[JobKind, type[Workload]] = {
    JobKind.FINE_TUNE: FineTune,
    JobKind.GENERATE: Generate,
}
"""One row for each member of JobKind."""


def workload(job: Job) -> Workload:
    """`job` as the work of its kind.

    Raises ValueError for a kind that does not exist, KeyError for one without a row.
    """
    return WORKLOADS[JobKind(job.kind)](job)
