"""The pod template of a phase: restricted, no service-account token, a read-only root, secrets only where needed.

Every field was tested on a cluster that enforces Pod Security `restricted`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from luthier_api.quantity import cores
from luthier_api.run import METRICS_PORT, grace_of
from luthier_api.secrets import Reference, references
from luthier_api.status import Phase
from luthier_api.variables import Variables
from luthier_operator.model import Job, Object
from luthier_operator.naming import CONFIG, CONTAINER, INDEX_ANNOTATION, RUN_FILE, Place
from luthier_operator.policy import gpu_class
from luthier_operator.render.resources import resources_of
from luthier_operator.render.scheduling import metadata_of, scheduling_of
from luthier_operator.render.volumes import volumes_of, workspace_group

if TYPE_CHECKING:
    from luthier_operator.settings import Settings
    from luthier_operator.workloads.base import Workload

# The root is read-only, so caches of libraries go to /tmp. PYTHONPYCACHEPREFIX is not set: Python would not find the
# byte-code in the image.
WRITABLE = {
    "HOME": "/tmp",
    "USER": "luthier",
    "HF_HOME": "/tmp/hf",
    "TORCHINDUCTOR_CACHE_DIR": "/tmp/inductor",
    "TRITON_CACHE_DIR": "/tmp/triton",
}
QUIET = {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
ON_CPU = {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "eth0"}


def template(workload: Workload, settings: Settings, phase: Phase, sources: Mapping[str, Place]) -> Object:
    """Pod template of `phase`. `sources`: where the jobs that it names keep their work."""
    job = workload.job
    volumes, mounts = volumes_of(workload, settings, phase, sources)
    spec: Object = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": grace_seconds(job, settings, phase),
        "securityContext": {
            "runAsNonRoot": True,
            **_user(settings),
            "seccompProfile": {"type": "RuntimeDefault"},
            **workspace_group(job, settings.run_as_user),
        },
        **scheduling_of(workload, settings, phase),
        "containers": [_container(workload, settings, phase, mounts)],
        "volumes": volumes,
    }
    if settings.service_account:
        spec["serviceAccountName"] = settings.service_account
    if settings.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in settings.image_pull_secrets]
    return {"metadata": metadata_of(job, phase), "spec": spec}


def _user(settings: Settings) -> Object:
    """User and group of the pod. A cluster that chooses them itself, such as OpenShift, refuses others."""
    chosen = {"runAsUser": settings.run_as_user, "runAsGroup": settings.run_as_group}
    return {name: number for name, number in chosen.items() if number is not None}


def grace_seconds(job: Job, settings: Settings, phase: Phase) -> int:
    """Grace period in seconds. Pods of `run` save a checkpoint, for which `prepare` has planned the time."""
    if phase != "run":
        return settings.grace_seconds
    prepared = job.status.prepared
    return grace_of(job.spec, prepared.plan if prepared else None, settings.grace_seconds)


def _container(workload: Workload, settings: Settings, phase: Phase, mounts: list[Object]) -> Object:
    verb = workload.verb(phase)
    container: Object = {
        "name": CONTAINER,
        "image": settings.trainer_image,
        "imagePullPolicy": settings.image_pull_policy,
        "command": ["python", "-m", "luthier_trainer", verb, "--run", f"{CONFIG}/{RUN_FILE}"],
        "env": _environment(workload, settings, phase),
        "resources": resources_of(workload, settings, phase),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": mounts,
    }
    if phase == "run":
        container["ports"] = [{"name": "metrics", "containerPort": METRICS_PORT}]
    return container


def _environment(workload: Workload, settings: Settings, phase: Phase) -> list[Object]:
    job = workload.job
    values = WRITABLE | QUIET
    found: list[Object] = []
    if phase == "run":
        found.append(
            {
                "name": Variables.NODE_RANK,
                "valueFrom": {"fieldRef": {"fieldPath": f"metadata.annotations['{INDEX_ANNOTATION}']"}},
            }
        )
        values |= OFFLINE
        if not workload.gpus_per_pod:
            values |= ON_CPU
        values |= _threads(workload)
    else:
        values |= {"HF_ENDPOINT": settings.hub_endpoint} if settings.hub_endpoint else {}
    found += [_credential(reference) for reference in references(job.spec, phase)]
    values |= settings.env
    if phase == "run" and workload.gpus_per_pod and len(workload.groups[0]) > 1:
        values |= gpu_class(job, settings).network.env
    return found + [{"name": name, "value": value} for name, value in values.items()]


def _credential(reference: Reference) -> Object:
    """The variable that holds a credential. The kubelet reads it; nobody else has to see its value."""
    found: Object = {"name": reference.secret, "key": reference.key}
    if not reference.use.required:
        found["optional"] = True
    return {"name": reference.variable, "valueFrom": {"secretKeyRef": found}}


def _threads(workload: Workload) -> dict[str, str]:
    """The cores of a pod, divided among its processes. Where the job requests none, the trainer divides those of the
    node.
    """
    cpu = workload.job.spec.resources.cpu
    if not cpu:
        return {}
    threads = max(1, cores(cpu) // workload.processes_per_pod)
    return {"OMP_NUM_THREADS": str(threads)}
