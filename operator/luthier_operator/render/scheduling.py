"""Where the pods of a phase run: the fields of their spec that the scheduler reads, and the metadata of the user.

The pods of `run` go where the job and its class of GPUs say. Those of `prepare` and `publish` hold no GPU and run
anywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from luthier_api.status import Phase
from luthier_operator import naming
from luthier_operator.model import Job, Object
from luthier_operator.policy import gpu_class

if TYPE_CHECKING:
    from luthier_operator.settings import Settings
    from luthier_operator.workloads.base import Workload

UNREACHABLE_SECONDS = 60  # with the default of 300 the whole group would wait longer for a dead node
HOST = "kubernetes.io/hostname"


def metadata_of(job: Job, phase: Phase) -> Object:
    """Metadata of a pod template: Luthier's own labels win."""
    scheduling = job.spec.scheduling
    found: Object = {"labels": scheduling.labels | naming.labels(job, phase)}
    if scheduling.annotations:
        found["annotations"] = dict(scheduling.annotations)
    return found


def scheduling_of(workload: Workload, settings: Settings, phase: Phase) -> Object:
    """Fields of a pod spec."""
    scheduling = workload.job.spec.scheduling
    found: Object = {"tolerations": [t.dump() for t in scheduling.tolerations] + _dead_nodes()}
    if scheduling.priority_class_name:
        found["priorityClassName"] = scheduling.priority_class_name
    if phase == "run":
        found |= _of_run(workload, settings, found["tolerations"])
    return found


def _of_run(workload: Workload, settings: Settings, tolerations: list[Object]) -> Object:
    scheduling, gpus = workload.job.spec.scheduling, gpu_class(workload.job, settings)
    node_selector = gpus.node_selector | scheduling.node_selector
    runtime_class = scheduling.runtime_class_name or gpus.runtime_class_name
    found: Object = {
        "tolerations": [t.dump() for t in gpus.tolerations] + tolerations,
        "topologySpreadConstraints": _spread(workload),
    }
    if node_selector:
        found["nodeSelector"] = node_selector
    if scheduling.affinity:
        found["affinity"] = scheduling.affinity.model_dump(
            mode="json", by_alias=True, exclude_none=True, exclude_defaults=True
        )
    if scheduling.scheduler_name:
        found["schedulerName"] = scheduling.scheduler_name
    if runtime_class:
        found["runtimeClassName"] = runtime_class
    return found


def _spread(workload: Workload) -> list[Object]:
    """Without constraints of the job: one pod on each node if there are enough nodes, and several if not."""
    job = workload.job
    wanted = [constraint.dump() for constraint in job.spec.scheduling.topology_spread_constraints]
    pods = {"matchLabels": {naming.UID_LABEL: naming.uid(job), naming.PHASE_LABEL: "run"}}
    anywhere = {"maxSkew": 1, "topologyKey": HOST, "whenUnsatisfiable": "ScheduleAnyway"}
    return [constraint | {"labelSelector": pods} for constraint in wanted or [anywhere]]


def _dead_nodes() -> list[Object]:
    return [
        {
            "key": f"node.kubernetes.io/{taint}",
            "operator": "Exists",
            "effect": "NoExecute",
            "tolerationSeconds": UNREACHABLE_SECONDS,
        }
        for taint in ("not-ready", "unreachable")
    ]
