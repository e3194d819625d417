"""The JobSet of a training: all nodes start together, and if one fails all restart from the newest checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from luthier_operator import naming
from luthier_operator.model import Object
from luthier_operator.naming import Place
from luthier_operator.render import rules
from luthier_operator.render.job import queue_label
from luthier_operator.render.meta import metadata
from luthier_operator.render.pod import template

if TYPE_CHECKING:
    from luthier_operator.settings import Settings
    from luthier_operator.workloads.base import Workload


def jobset(
    workload: Workload,
    settings: Settings,
    sources: Mapping[str, Place],
    max_restarts: int,
    annotations: dict[str, str],
) -> Object:
    """The JobSet of `run`."""
    meta = metadata(workload.job, workload.child("run").name, "run", annotations)
    meta["labels"] |= queue_label(workload)
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": meta,
        "spec": {
            "failurePolicy": rules.group(max_restarts),
            "replicatedJobs": [
                {
                    "name": naming.NODE,
                    "replicas": 1,
                    "template": {
                        "spec": {
                            "completionMode": "Indexed",
                            "completions": workload.pods,
                            "parallelism": workload.pods,
                            "backoffLimit": 0,
                            "podReplacementPolicy": "Failed",
                            "podFailurePolicy": rules.member(),
                            "template": template(workload, settings, "run", sources),
                        }
                    },
                }
            ],
        },
    }
