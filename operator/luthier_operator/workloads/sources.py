"""Which jobs a job needs, because it uses their results. They are called as `kinds.source_name` does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from luthier_api.conditions import ConditionType
from luthier_api.kinds import KINDS, FineTuneJob, source_name, source_of
from luthier_api.methods import METHODS
from luthier_api.stored import NotUnderstood, read_stored
from luthier_operator import naming
from luthier_operator.model import Job, Object
from luthier_operator.workloads import workload


@dataclass(frozen=True)
class Sources:
    """What is known of the jobs whose results a job uses."""

    jobs: dict[str, Job]
    """Those that exist."""
    unreadable: dict[str, str]
    """Those that exist but cannot be read → problem."""
    cycle: tuple[str, ...]
    """From the job back to itself, if these jobs wait for each other's results."""


def observed_sources(job: Job, find: Callable[[str], Object | None]) -> Sources:
    """The sources of `job`. `find` returns the stored job, if there is one."""
    unreadable: dict[str, str] = {}

    def read(name: str) -> Job | None:
        found = find(name)
        if found is None:
            return None
        try:
            return read_stored(KINDS[source_of(name)[0]].model, found).value
        except NotUnderstood as error:
            unreadable[name] = str(error)
            return None

    needed = needed_jobs(job, read)
    jobs = {name: source for name, source in needed.items() if source}
    return Sources(jobs, unreadable, cycle(job, read))


def cycle(job: Job, find: Callable[[str], Job | None]) -> tuple[str, ...]:
    """The jobs from `job` back to itself (a, b, a), if they wait for each other's results. Empty otherwise."""
    if job.status.is_true(ConditionType.ACCEPTED):
        return ()
    start = source_name(naming.kind(job), job.metadata.name)
    seen: set[str] = set()
    paths: list[tuple[str, ...]] = [(start, name) for name in workload(job).sources.values()]
    while paths:
        path = paths.pop()
        name = path[-1]
        if name == start:
            return path
        source = None if name in seen else find(name)
        seen.add(name)
        if source is None or source.status.finished or source.status.is_true(workload(source).done):
            continue
        paths += [(*path, further) for further in workload(source).sources.values()]
    return ()


def needed_jobs(job: Job, find: Callable[[str], Job | None]) -> dict[str, Job | None]:
    """Each job whose workspace `job` reads, or None if it does not exist.

    These are the jobs that it names and, where such a job trained an adapter, the job that trained the model below the
    adapter. A model below that was itself adapted was merged into the workspace of the job that trained on it.
    """
    named = {name: find(name) for name in workload(job).sources.values()}
    below: dict[str, Job | None] = {}
    for source in named.values():
        if not trains_adapter(source):
            continue
        assert source is not None
        for name in workload(source).sources.values():
            base = find(name)
            if base and not trains_adapter(base):
                below[name] = base
    return below | named


def trains_adapter(job: Job | None) -> bool:
    """Whether the result of a job is an adapter."""
    return isinstance(job, FineTuneJob) and METHODS[job.spec.method.type].adapter
