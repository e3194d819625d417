"""Volumes of the local cluster: folders of this machine, offered beforehand, because there is no provisioner.

A claim that is deleted leaves its volume `Released`, data and all. `recycle` wipes such volumes and offers them again;
the tests call it between cases, so that sixty-four are enough for any number of them.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from .shell import STATE, kubectl, write

COUNT = 64
FOLDER = STATE / "volumes"
GROUP = 1000  # a hostPath volume ignores fsGroup: the folder itself must be open to the group of our pods
STORAGE_CLASS = {
    "apiVersion": "storage.k8s.io/v1",
    "kind": "StorageClass",
    "metadata": {"name": "standard", "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}},
    "provisioner": "kubernetes.io/no-provisioner",
}


def volumes() -> None:
    """Creates the storage class `standard` (the default) and its volumes."""
    items = [STORAGE_CLASS]
    for number in range(COUNT):
        path = FOLDER / f"{number:03}"
        path.mkdir(parents=True, exist_ok=True)
        os.chown(path, 0, GROUP)
        path.chmod(0o2775)
        items.append(persistent_volume(f"local-{number:03}", path))
    kubectl("apply", "-f", write("volumes.json", json.dumps({"apiVersion": "v1", "kind": "List", "items": items})))


def volumes_exist() -> bool:
    return len(kubectl("get", "pv", "-o", "name", stderr=subprocess.DEVNULL).split()) >= COUNT


def persistent_volume(name: str, path: Path) -> dict[str, Any]:
    spec = {
        "storageClassName": "standard",
        "capacity": {"storage": "100Gi"},
        "hostPath": {"path": str(path)},
        "accessModes": ["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany"],
        "persistentVolumeReclaimPolicy": "Retain",
    }
    return {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name}, "spec": spec}


def volume(namespace: str, claim: str) -> Path:
    """The folder of a bound claim. Raises LookupError while it is not bound."""
    name = json.loads(kubectl("-n", namespace, "get", "pvc", claim, "-o", "json"))["spec"].get("volumeName")
    if not name:
        raise LookupError(f"claim {namespace}/{claim} is not bound yet")
    return Path(json.loads(kubectl("get", "pv", name, "-o", "json"))["spec"]["hostPath"]["path"])


def recycle() -> list[str]:
    """Wipes each `Released` volume of ours and offers it again; returns their names."""
    items = json.loads(kubectl("get", "pv", "-o", "json"))["items"]
    released = {
        item["metadata"]["name"]: Path(item["spec"]["hostPath"]["path"])
        for item in items
        if item["status"].get("phase") == "Released" and "hostPath" in item["spec"]
    }
    for name, path in released.items():
        for entry in path.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        kubectl("patch", "pv", name, "--type=merge", "-p", '{"spec":{"claimRef":null}}')
    return list(released)
