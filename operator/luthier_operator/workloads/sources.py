"""Which FineTuneJobs a job needs, because it uses their results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from luthier_api.conditions import ConditionType
from luthier_api.kinds import FineTuneJob, JobKind
from luthier_api.methods import METHODS
from luthier_api.stored import NotUnderstood, read_stored
from luthier_operator import naming
from luthier_operator.model import Job, Object
from luthier_operator.workloads import workload

SOURCE_KIND = JobKind.FINE_TUNE
"""The kind whose results other jobs use by name."""


@dataclass(frozen=True)
class Sources:
    """What is known of the FineTuneJobs whose results a job uses."""

    jobs: dict[str, FineTuneJob]
    """Those that exist, by name."""
    unreadable: dict[str, str]
    """Those that exist but cannot be read: name → problem."""
    cycle: tuple[str, ...]
    """Names from the job back to itself, if these jobs wait for each other's results."""


def observed_sources(job: Job, find: Callable[[str], Object | None]) -> Sources:
    """The sources of `job`. `find` returns the stored FineTuneJob of a name, if there is one."""
    unreadable: dict[str, str] = {}

    def read(name: str) -> FineTuneJob | None:
        found = find(name)
        if found is None:
            return None
        try:
            return read_stored(FineTuneJob, found).value
        except NotUnderstood as error:
            unreadable[name] = str(error)
            return None

    needed = needed_jobs(job, read)
    jobs = {name: source for name, source in needed.items() if source}
    return Sources(jobs, unreadable, cycle(job, read))


def cycle(job: Job, find: Callable[[str], FineTuneJob | None]) -> tuple[str, ...]:
    """Names from `job` back to itself (a, b, a), if these jobs wait for each other's results. Empty otherwise."""
    if naming.kind(job) != SOURCE_KIND or job.status.is_true(ConditionType.ACCEPTED):
        return ()
    start = job.metadata.name
    seen: set[str] = set()
    paths: list[tuple[str, ...]] = [(start, name) for name in workload(job).sources.values()]
    while paths:
        path = paths.pop()
        name = path[-1]
        if name == start:
            return path
        source = None if name in seen else find(name)
        seen.add(name)
        if source is None or source.status.finished or source.status.is_true(ConditionType.TRAINED):
            continue
        paths += [(*path, further) for further in workload(source).sources.values()]
    return ()


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
