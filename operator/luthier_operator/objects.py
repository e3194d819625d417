"""All Kubernetes objects of a job, as `luthier render` prints them.

Uses no Kubernetes library, so that it works on a laptop. The operator applies the same objects phase by phase.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from luthier_api.kinds import source_name, source_of
from luthier_operator import naming
from luthier_operator.model import Job, Object
from luthier_operator.naming import Place
from luthier_operator.policy import check, with_defaults
from luthier_operator.render.claim import claim
from luthier_operator.render.configmap import configmap
from luthier_operator.render.job import prepare, publish
from luthier_operator.workloads import workload
from luthier_operator.workloads.sources import needed_jobs

if TYPE_CHECKING:
    from luthier_operator.settings import Settings


def objects(job: Job, settings: Settings | None = None, others: Iterable[Job] = ()) -> list[Object]:
    """All objects of `job`, in the order in which the operator applies them.

    `others`: jobs whose results it may use. A job that it names and that is not among them is assumed to have a claim
    of its own. Raises NotAllowed if the settings refuse the job.
    """
    if settings is None:
        from luthier_operator.settings import Settings as Defaults

        settings = Defaults()
    known = {source_name(naming.kind(other), other.metadata.name): other for other in others}
    places = {
        name: naming.place(source) if source else _place_of_unknown(name)
        for name, source in needed_jobs(job, known.get).items()
    }
    job = with_defaults(job, settings)
    work = workload(job)
    check(work, settings)
    found = [
        configmap(work, settings, places),
        claim(work, settings),
        prepare(work, settings, places),
        work.run_manifest(settings, places, restarts=0, charged=0),
    ]
    if job.spec.hub and job.spec.hub.repo:
        found.append(publish(work, settings, places))
    return [manifest for manifest in found if manifest is not None]


def _place_of_unknown(name: str) -> Place:
    stem = naming.stem(*source_of(name))
    return Place(stem, f"{stem}-{naming.UNKNOWN_UID[:8]}")
