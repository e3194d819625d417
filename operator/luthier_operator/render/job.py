"""The Jobs: `prepare` and `publish`, one pod that is tried again, and the shards of a GenerateJob, which stand for
themselves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from luthier_api.kinds import GenerateJob
from luthier_api.status import Phase
from luthier_operator import naming
from luthier_operator.model import Job, Object
from luthier_operator.naming import Place
from luthier_operator.render import rules
from luthier_operator.render.meta import metadata, restarts_before
from luthier_operator.render.pod import gpus, template

if TYPE_CHECKING:
    from luthier_operator.settings import Settings


def hub_hash(job: Job) -> str:
    """Changes when spec.hub does: what the user has set of it, because a later version may know more fields, and their
    defaults.
    """
    found = job.spec.hub and job.spec.hub.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    text = json.dumps(found, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hub_target(job: Job) -> str:
    """Where the result belongs: the part of spec.hub whose change makes a result that is published be published
    elsewhere.
    """
    return f"{job.spec.hub.repo}@{job.spec.hub.branch}" if job.spec.hub else ""


def prepare(job: Job, settings: Settings, sources: Mapping[str, Place]) -> Object:
    found = {name: [place.claim, place.folder] for name, place in sorted(sources.items())}
    notes = {naming.SOURCES_ANNOTATION: json.dumps(found)} if found else {}
    return _job(job, "prepare", notes, _one_pod(job, settings, "prepare", sources, settings.prepare_retries))


def publish(job: Job, settings: Settings, sources: Mapping[str, Place]) -> Object:
    notes = {naming.HUB_ANNOTATION: hub_hash(job), naming.TARGET_ANNOTATION: hub_target(job)}
    return _job(job, "publish", notes, _one_pod(job, settings, "publish", sources, settings.publish_retries))


def shards(
    job: GenerateJob, settings: Settings, sources: Mapping[str, Place], restarts: int = 0, charged: int = 0
) -> Object:
    """An Indexed Job: a shard that fails is started again alone, and one that cannot succeed does not stop the others.

    `restarts`, `charged`: those of the Jobs before, when a suspended job goes on.
    """
    manifest = _job(
        job,
        "run",
        restarts_before(restarts, charged),
        {
            "completionMode": "Indexed",
            "completions": job.spec.shards,
            "parallelism": job.spec.shards,
            "backoffLimitPerIndex": job.spec.retries_per_shard,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": rules.alone("FailIndex"),
            "template": template(job, settings, "run", sources),
        },
    )
    manifest["metadata"]["labels"] |= queue_label(job)
    return manifest


def queue_label(job: Job) -> dict[str, str]:
    """Kueue admits what holds GPUs. Set at creation and never touched again; `spec.suspend` is Kueue's and never in our
    manifest.
    """
    queue = job.spec.scheduling.queue_name
    return {naming.QUEUE_LABEL: queue} if queue and gpus(job) else {}


def _one_pod(job: Job, settings: Settings, phase: Phase, sources: Mapping[str, Place], retries: int) -> Object:
    return {
        "completions": 1,
        "parallelism": 1,
        "backoffLimit": retries,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": rules.alone("FailJob"),
        "template": template(job, settings, phase, sources),
    }


def _job(job: Job, phase: Phase, annotations: dict[str, str], spec: Object) -> Object:
    meta = metadata(job, naming.child(job, phase).name, phase, annotations)
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": meta, "spec": spec}
