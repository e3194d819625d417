"""A real kubelet changes no owner and no mode of a user's files, and would where a claim is writable.

On volumes of the type `local`, because the kubelet ignores fsGroup on those of the local cluster (`hostPath`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from cases.observed import SETTINGS, fine_tune

from cluster import choice
from cluster.local.cluster import Local
from cluster.local.node import PAUSE
from cluster.local.shell import NODE, STATE, kubectl
from luthier_operator.objects import objects

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.usefixtures("cluster"),
    pytest.mark.skipif(not isinstance(choice.cluster(), Local), reason="needs folders of the node"),
]
NAMESPACE = "test-ownership"
CLAIMS = ("data", "home")
FOLDER = STATE / NAMESPACE
OF_ROOT, OF_THE_PODS = (0, "0600"), (1000, "0660")


def local_claim(name: str) -> list[dict[str, Any]]:
    """A claim, bound to a folder of the node."""
    here = {"key": "kubernetes.io/hostname", "operator": "In", "values": [NODE]}
    size = {"storage": "1Gi"}
    spec = {
        "storageClassName": "",
        "capacity": size,
        "local": {"path": str(FOLDER / name)},
        "accessModes": ["ReadWriteMany"],
        "claimRef": {"namespace": NAMESPACE, "name": name},
        "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [here]}]}},
    }
    volume = {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": f"{NAMESPACE}-{name}"}, "spec": spec}
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {"storageClassName": "", "accessModes": ["ReadWriteMany"], "resources": {"requests": size}},
    }
    return [volume, claim]


@pytest.fixture
def claims() -> Iterator[None]:
    """Two claims, each with a file that only root may read."""
    for name in CLAIMS:
        (FOLDER / name).mkdir(parents=True)
        (FOLDER / name / "private").touch(0o600)
    kubectl("create", "namespace", NAMESPACE)
    for item in (item for name in CLAIMS for item in local_claim(name)):
        kubectl("create", "-f", "-", input=json.dumps(item))
    yield
    kubectl("delete", "namespace", NAMESPACE)
    kubectl("delete", "pv", *(f"{NAMESPACE}-{name}" for name in CLAIMS))
    shutil.rmtree(FOLDER)


def owner(name: str) -> tuple[int, str]:
    """Group and mode of the file on a claim."""
    found = (FOLDER / name / "private").stat()
    return found.st_gid, f"{found.st_mode & 0o7777:04o}"


def start(workspace: dict[str, str], read_only: bool) -> None:
    """Start the pod of `prepare`, with a program that only waits, and wait until its volumes are mounted."""
    job = fine_tune(workspace=workspace, volumes=[{"claimName": "data", "mountPath": "/data"}])
    config, prepare = (o for o in objects(job, SETTINGS) if o["metadata"]["name"] in ("ftj-bot", "ftj-bot-prepare"))
    spec = prepare["spec"]["template"]["spec"]
    spec["terminationGracePeriodSeconds"] = 0  # the program takes no notice of SIGTERM
    (container,) = spec["containers"]
    container |= {"image": PAUSE, "command": ["/pause"], "imagePullPolicy": "Never"}
    if not read_only:
        for volume in spec["volumes"]:
            volume.get("persistentVolumeClaim", {}).pop("readOnly", None)
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "bot", "namespace": NAMESPACE}, "spec": spec}
    config["metadata"] = {"name": config["metadata"]["name"], "namespace": NAMESPACE}
    for item in (config, pod):
        kubectl("create", "-f", "-", input=json.dumps(item))
    kubectl("-n", NAMESPACE, "wait", "pod/bot", "--for=condition=Ready", "--timeout=90s")


@dataclass(frozen=True)
class Case:
    name: str
    workspace: dict[str, str]
    read_only: bool
    data: tuple[int, str]
    home: tuple[int, str]


CASES = [
    Case(
        name="as Luthier renders it",
        workspace={"claimName": "home"},
        read_only=True,
        data=OF_ROOT,
        home=OF_ROOT,
    ),
    Case(
        name="the job lets the workspace be changed",
        workspace={"claimName": "home", "ownership": "Change"},
        read_only=True,
        data=OF_ROOT,
        home=OF_THE_PODS,
    ),
    Case(
        name="read-only in the mount alone, which would not be enough",
        workspace={"claimName": "home", "ownership": "Change"},
        read_only=False,
        data=OF_THE_PODS,
        home=OF_THE_PODS,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_kubelet_changes_only_what_the_job_lets_it(claims: None, case: Case) -> None:
    start(case.workspace, case.read_only)
    assert owner("data") == case.data
    assert owner("home") == case.home
