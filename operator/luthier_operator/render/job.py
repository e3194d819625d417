"""The Jobs: one pod with retries for `prepare` and `publish`, and an Indexed Job for the shards of a GenerateJob."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from luthier_api.status import Phase
from luthier_operator import naming
from luthier_operator.model import Job, Object
from luthier_operator.naming import Place
from luthier_operator.render import rules
from luthier_operator.render.meta import metadata
from luthier_operator.render.pod import template

if TYPE_CHECKING:
    from luthier_operator.settings import Settings
    from luthier_operator.workloads.base import Workload


def hub_hash(job: Job) -> str:
    """Hash of spec.hub. Only of the fields that the user has set: a later version may add fields with defaults."""
    found = job.spec.hub and job.spec.hub.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    text = json.dumps(found, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hub_target(job: Job) -> str:
    """Repository and branch of spec.hub. If they change, a published result is published again."""
    return f"{job.spec.hub.repo}@{job.spec.hub.branch}" if job.spec.hub else ""


def prepare(workload: Workload, settings: Settings, sources: Mapping[str, Place]) -> Object:
    found = {name: [place.claim, place.folder] for name, place in sorted(sources.items())}
    notes = {naming.SOURCES_ANNOTATION: json.dumps(found)} if found else {}
    return _job(workload, "prepare", notes, _one_pod(workload, settings, "prepare", sources, settings.prepare_retries))


def publish(workload: Workload, settings: Settings, sources: Mapping[str, Place]) -> Object:
    notes = {naming.HUB_ANNOTATION: hub_hash(workload.job), naming.TARGET_ANNOTATION: hub_target(workload.job)}
    return _job(workload, "publish", notes, _one_pod(workload, settings, "publish", sources, settings.publish_retries))


def shards(
    workload: Workload,
    settings: Settings,
    sources: Mapping[str, Place],
    retries_per_shard: int,
    max_failed_shards: int,
    annotations: dict[str, str],
) -> Object:
    """An Indexed Job: a shard that fails is restarted alone. More than `max_failed_shards` that cannot succeed stop the
    others, because what they failed of may be common to all.
    """
    manifest = _job(
        workload,
        "run",
        annotations,
        {
            "completionMode": "Indexed",
            "completions": workload.pods,
            "parallelism": workload.parallel_pods,
            "backoffLimitPerIndex": retries_per_shard,
            "maxFailedIndexes": max_failed_shards,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": rules.alone("FailIndex"),
            "template": template(workload, settings, "run", sources),
        },
    )
    manifest["metadata"]["labels"] |= queue_label(workload)
    return manifest


def queue_label(workload: Workload) -> dict[str, str]:
    """The queue of the child of `run`, which Kueue has to admit.

    Set at creation and never changed. `spec.suspend` belongs to Kueue, and is in no manifest.
    """
    queue = workload.job.spec.scheduling.queue_name
    return {naming.QUEUE_LABEL: queue} if queue else {}


def _one_pod(
    workload: Workload, settings: Settings, phase: Phase, sources: Mapping[str, Place], retries: int
) -> Object:
    return {
        "completions": 1,
        "parallelism": 1,
        "backoffLimit": retries,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": rules.alone("FailJob"),
        "template": template(workload, settings, phase, sources),
    }


def _job(workload: Workload, phase: Phase, annotations: dict[str, str], spec: Object) -> Object:
    meta = metadata(workload.job, workload.child(phase).name, phase, annotations)
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": meta, "spec": spec}
