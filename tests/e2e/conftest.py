"""The stage of the end-to-end tests: images built and pushed, the chart installed, a Hub, data on a claim, and a pod to
look with.

Everything goes through helm and kubectl, as a user would do it. The namespaces stay afterwards, for a look at what
happened; the next session begins by removing them.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster import choice
from e2e import data
from e2e.kube import Kube, Object
from hub import manifests as hub_manifests

TOP = Path(__file__).resolve().parents[2]
JOBS, SYSTEM = "luthier-e2e", "luthier-system"
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}
TOKENS = {"hub-token": "write", "wrong-token": "wrong"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of the pages come last: the last line of docs/install.md deletes the CRDs, and with them every job."""
    items.sort(key=lambda item: item.path.name == "test_pages.py")


@dataclass(frozen=True)
class Images:
    operator: str
    trainer: str


@pytest.fixture(scope="session")
def images(cluster: None) -> Images:
    ours = choice.cluster()
    return Images(*(ours.image(str(TOP), target, f"luthier/{target}:dev") for target in ("operator", "trainer")))


def namespace(name: str) -> None:
    """A new, empty namespace under Pod Security `restricted`."""
    kube = Kube(name)
    kube.run("delete", "namespace", name, "--ignore-not-found", "--timeout=120s")
    choice.cluster().recycle()
    kube.run(
        "create",
        "-f",
        "-",
        stdin=json.dumps({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": RESTRICTED}}),
    )


def claim(name: str) -> Object:
    spec = {"accessModes": [choice.cluster().access_mode], "resources": {"requests": {"storage": "5Gi"}}}
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name}, "spec": spec}


def restricted_pod(name: str, image: str, command: list[str]) -> Object:
    """A pod under Pod Security `restricted` that leaves the user to the image."""
    security = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 0,
            "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [
                {
                    "name": "main",
                    "image": image,
                    "imagePullPolicy": choice.cluster().pull_policy,
                    "command": command,
                    "securityContext": security,
                }
            ],
        },
    }


def inspector(image: str) -> Object:
    """A pod that sees the data and the shared workspace where the jobs' pods see them, as the same user."""
    pod = restricted_pod("inspector", image, ["sleep", "infinity"])
    mounts = {"data": "/data", "work": "/workspace", "tmp": "/tmp"}
    pod["spec"]["securityContext"] |= {"runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 1000}
    pod["spec"]["containers"][0] |= {
        "env": [{"name": "HOME", "value": "/tmp"}, {"name": "HF_HUB_OFFLINE", "value": "1"}],
        "volumeMounts": [{"name": n, "mountPath": m} for n, m in mounts.items()],
    }
    pod["spec"]["volumes"] = [{"name": n, "persistentVolumeClaim": {"claimName": n}} for n in ("data", "work")] + [
        {"name": "tmp", "emptyDir": {}}
    ]
    return pod


def install(images: Images, *values: str) -> None:
    """`helm install`, as the README says it."""
    policy = choice.cluster().pull_policy
    settings = [
        f"image.repository={images.operator.rpartition(':')[0]}",
        f"image.tag={images.operator.rpartition(':')[2]}",
        f"image.pullPolicy={policy}",
        f"trainer.image.repository={images.trainer.rpartition(':')[0]}",
        f"trainer.image.tag={images.trainer.rpartition(':')[2]}",
        f"trainer.image.pullPolicy={policy}",
        f"hub.endpoint={hub_manifests.url(SYSTEM)}",
        "jobs.pythonRewards=true",
        "jobs.progressEvery=2",  # the tests wait for the progress of jobs
        *values,
    ]
    subprocess.run(
        [
            "helm",
            "upgrade",
            "--install",
            "luthier",
            str(TOP / "charts/luthier"),
            "--namespace",
            SYSTEM,
            "--take-ownership",
            "--wait",
            "--timeout",
            "3m",
            *(part for s in settings for part in ("--set", s)),
        ],
        check=True,
    )


@pytest.fixture(scope="session")
def system(images: Images) -> Iterator[Kube]:
    """The namespace of the operator and of the Hub."""
    namespace(SYSTEM)
    kube = Kube(SYSTEM)
    kube.apply(*hub_manifests.objects(SYSTEM, image=images.operator))
    install(images)
    kube.run("rollout", "status", "deployment/hub", "--timeout=120s")
    return kube


@pytest.fixture(scope="session")
def kube(system: Kube, images: Images) -> Kube:
    """The namespace of the jobs, with data, a shared workspace claim, tokens and the inspector."""
    namespace(JOBS)
    kube = Kube(JOBS)
    secrets = [
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": name},
            "stringData": {"token": hub_manifests.token(kind)},
        }
        for name, kind in TOKENS.items()
    ]
    kube.apply(claim("data"), claim("work"), inspector(images.trainer), *secrets)
    kube.run("wait", "--for=condition=Ready", "pod/inspector", "--timeout=180s")
    fill(kube, "data", data.archive())
    return kube


def fill(kube: Kube, claim: str, archive: bytes) -> None:
    """Unpack a tar into the inspector's volume: on this machine where that is possible, because exec is slow for 100
    MB.
    """
    folder = choice.cluster().volume(kube.namespace, claim)
    if folder is None:
        unpack = "import sys, tarfile; tarfile.open(fileobj=sys.stdin.buffer, mode='r|').extractall('/data')"
        kube.python("inspector", unpack, stdin=archive)
        return
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
