"""Kueue in a cluster of the tests: its chart's values, its configuration, and how it is removed again.

Only the tests of queues install it: its webhooks fail closed, and while it is away no namespace can be deleted.
"""

import json
from collections.abc import Callable
from typing import Any

NAMESPACE = "kueue-system"
MANAGED = {"kueue": "enabled"}
"""Labels of the namespaces whose Jobs and JobSets it manages; without the selector these are all of the cluster."""
CONFIGURATION = {
    "apiVersion": "config.kueue.x-k8s.io/v1beta2",
    "kind": "Configuration",
    "health": {"healthProbeBindAddress": ":8081"},
    "metrics": {"bindAddress": ":8443"},
    "webhook": {"port": 9443},
    "leaderElection": {"leaderElect": False},
    "clientConnection": {"qps": 300, "burst": 500},
    # The chart's default has pods and Deployments too, whose webhooks then fail closed in every namespace.
    "integrations": {"frameworks": ["batch/job", "jobset.x-k8s.io/jobset"]},
    "managedJobsNamespaceSelector": {"matchLabels": MANAGED},
}


def values(configuration: dict[str, Any], image: dict[str, str] | None = None) -> str:
    """Values of the chart, as JSON. `configuration`: beside the one above. `image`: in place of the published one."""
    manager: dict[str, Any] = {
        "resources": {"requests": {"cpu": "50m", "memory": "128Mi"}, "limits": {"memory": "512Mi"}}
    }
    if image:
        manager["image"] = image
    controller = {"manager": manager, "readinessProbe": {"initialDelaySeconds": 0, "periodSeconds": 1}}
    config = json.dumps(CONFIGURATION | configuration)
    return json.dumps({"controllerManager": controller, "managerConfig": {"controllerManagerConfigYaml": config}})


def remove_objects(kubectl: Callable[..., object]) -> None:
    """What has a finalizer of Kueue goes while its controller still runs; its CRDs would hang otherwise."""
    wait = ("--ignore-not-found", "--wait", "--timeout=60s")
    kubectl("delete", "jobsets,jobs", "-A", "-l", "kueue.x-k8s.io/queue-name", *wait)
    kubectl("delete", "workloads.kueue.x-k8s.io,localqueues.kueue.x-k8s.io", "-A", "--all", *wait)
    kinds = ("clusterqueues", "resourceflavors", "admissionchecks", "multikueueconfigs")
    kubectl("delete", ",".join(f"{kind}.kueue.x-k8s.io" for kind in kinds), "--all", *wait)
