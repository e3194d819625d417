"""The JobSet that trains: all nodes start together, and when one fails all start again from the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from luthier_api.kinds import FineTuneJob
from luthier_operator import naming
from luthier_operator.model import Object
from luthier_operator.naming import Place
from luthier_operator.render import rules
from luthier_operator.render.job import queue_label
from luthier_operator.render.meta import metadata, restarts_before
from luthier_operator.render.pod import template

if TYPE_CHECKING:
    from luthier_operator.settings import Settings


def jobset(
    job: FineTuneJob, settings: Settings, sources: Mapping[str, Place], restarts: int = 0, charged: int = 0
) -> Object:
    """`restarts`, `charged`: those of the JobSets before, when a suspended job goes on; what was charged stays
    charged.
    """
    nodes = job.spec.resources.nodes
    meta = metadata(job, naming.child(job, "run").name, "run", restarts_before(restarts, charged))
    meta["labels"] |= queue_label(job)
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": meta,
        "spec": {
            "failurePolicy": rules.group(max(0, job.spec.restarts.max - charged)),
            "replicatedJobs": [
                {
                    "name": naming.NODE,
                    "replicas": 1,
                    "template": {
                        "spec": {
                            "completionMode": "Indexed",
                            "completions": nodes,
                            "parallelism": nodes,
                            "backoffLimit": 0,
                            "podReplacementPolicy": "Failed",
                            "podFailurePolicy": rules.member(),
                            "template": template(job, settings, "run", sources),
                        }
                    },
                }
            ],
        },
    }
