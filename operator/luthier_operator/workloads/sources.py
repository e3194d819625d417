"""Which FineTuneJobs a job needs, because it uses their results."""

from __future__ import annotations

from collections.abc import Callable

from luthier_api.kinds import FineTuneJob, JobKind
from luthier_api.methods import METHODS
from luthier_operator.model import Job
from luthier_operator.workloads import workload

SOURCE_KIND = JobKind.FINE_TUNE
"""The kind whose results other jobs use by name."""


def needed_jobs(job: Job, find: Callable[[str], FineTuneJob | None]) -> dict[str, FineTuneJob | None]:
    """Name → FineTuneJob of each workspace that `job` reads.

    These are the jobs that it names and, where such a job trained an adapter, the job that trained the model below the
    adapter. A model below that was itself adapted was merged into the workspace of the job that trained on it.
    """
    named = {name: find(name) for name in workload(job).sources.values()}
    below: dict[str, FineTuneJob | None] = {}
    for source in named.values():
        if source is None or not METHODS[source.spec.method.type].adapter:
            continue
        for name in workload(source).sources.values():
            base = find(name)
            if base and not METHODS[base.spec.method.type].adapter:
                below[name] = base
    return below | named
