"""The Kubernetes objects of a job, drawn from the job alone: dictionaries that read like manifests.

Pure, and free of any Kubernetes library: `luthier render` draws them on a laptop. `phases` decides which are applied,
and when.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from luthier_api.kinds import FineTuneJob, JobKind
from luthier_operator import naming
from luthier_operator.model import Job, Object
from luthier_operator.naming import Place
from luthier_operator.render.claim import claim, shortfall
from luthier_operator.render.configmap import configmap, run_config
from luthier_operator.render.job import prepare, publish, shards
from luthier_operator.render.jobset import jobset

if TYPE_CHECKING:
    from luthier_operator.settings import Settings

__all__ = ["claim", "configmap", "jobset", "objects", "prepare", "publish", "run_config", "shards", "shortfall"]


def objects(
    job: Job, settings: Settings | None = None, sources: Mapping[str, FineTuneJob] | Iterable[FineTuneJob] = ()
) -> list[Object]:
    """All objects of a job, in the order in which the operator applies them.

    `sources`: the FineTuneJobs that it names. One that is not among them is taken to keep its work in a claim of its
    own.
    """
    if settings is None:
        from luthier_operator.settings import Settings as Defaults

        settings = Defaults()
    known = {s.metadata.name: s for s in (sources.values() if isinstance(sources, Mapping) else sources)}
    places = {
        name: naming.place(source) if source else _unknown(name)
        for name, source in naming.needed_jobs(job, known.get).items()
    }
    drawn = [configmap(job, settings, places), claim(job, settings), prepare(job, settings, places)]
    drawn.append(jobset(job, settings, places) if isinstance(job, FineTuneJob) else shards(job, settings, places))
    if job.spec.hub and job.spec.hub.repo:
        drawn.append(publish(job, settings, places))
    return [o for o in drawn if o is not None]


def _unknown(name: str) -> Place:
    stem = naming.stem(JobKind.FINE_TUNE, name)
    return Place(stem, f"{stem}-{naming.UNKNOWN_UID[:8]}")
