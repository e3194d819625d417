"""The verbs of the local cluster: the order in which its parts start, and how they are taken down again."""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import components, images, volumes
from .certificates import certificates
from .control_plane import control_plane
from .node import BRIDGE, network, node
from .shell import BIN, HOME, KUBECONFIG, STATE, ctr, kubectl, sh, stop

JOBSET_IMAGE, JOBSET_TAG = "local/jobset", components.JOBSET[1]


class Local:
    pull_policy = "Always"  # a tag is pushed again with each build
    access_mode = "ReadWriteMany"

    def check_free(self) -> None:
        return  # nobody else uses it

    def install_packages(self) -> None:
        components.install_packages()

    def build(self) -> None:
        components.build()

    def up(self) -> dict[str, str]:
        with alone():
            start_all()
        return environment()

    def down(self) -> None:
        with alone():
            stop_all()

    def ensure(self) -> dict[str, str]:
        with alone():
            components.build()
            if not answers():
                start_all()
        return environment()

    def image(self, context: str, target: str, name: str) -> str:
        return images.image(context, target, name)

    def image_size(self, name: str) -> str:
        return images.image_size(name)

    def kill(self, node: str, container: str) -> bool:
        ctr("tasks", "kill", "-s", "SIGKILL", container)
        return True

    def recycle(self) -> None:
        volumes.recycle()

    def volume(self, namespace: str, claim: str) -> Path:
        return volumes.volume(namespace, claim)

    def audit(self, user: str, since: str) -> list[dict[str, Any]]:
        with (STATE / "audit.log").open() as lines:
            entries = [json.loads(line) for line in lines if f'"username":"{user}"' in line]
        return [entry for entry in entries if entry["requestReceivedTimestamp"] >= since]


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Two test runs that begin together must not both start the cluster."""
    HOME.mkdir(parents=True, exist_ok=True)
    with (HOME / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def environment() -> dict[str, str]:
    """The administrator's kubeconfig, and kubectl and helm on the PATH."""
    path = os.environ.get("PATH", os.defpath).split(os.pathsep)
    return {
        "KUBECONFIG": str(KUBECONFIG),
        "PATH": os.pathsep.join([str(BIN), *(part for part in path if part != str(BIN))]),
    }


def answers() -> bool:
    if not KUBECONFIG.exists():
        return False
    with contextlib.suppress(subprocess.CalledProcessError):
        kubectl(
            "-n",
            "jobset-system",
            "rollout",
            "status",
            "deployment",
            "--timeout=60s",
            "--request-timeout=5s",
            stderr=subprocess.DEVNULL,
        )
        return True
    return False


def start_all() -> None:
    """Starts from an empty state, in about 30 s."""
    if STATE.exists():
        stop_all()
    STATE.mkdir(parents=True)
    begin = time.monotonic()
    network()
    images.registry()
    certificates()
    control_plane()
    node()
    volumes.volumes()
    jobset()
    print(f"ready in {time.monotonic() - begin:.0f} s", file=sys.stderr)


def jobset() -> None:
    images.load(images.scratch_image(f"{JOBSET_IMAGE}:{JOBSET_TAG}", BIN / "jobset", "/manager"))
    chart = components.module_dir(*components.JOBSET) / "charts/jobset"
    values = f"image.repository={JOBSET_IMAGE},image.tag={JOBSET_TAG},image.pullPolicy=Never"
    options = ("-n", "jobset-system", "--create-namespace", "--set", values, "--wait", "--timeout", "3m")
    sh(BIN / "helm", "--kubeconfig", KUBECONFIG, "install", "jobset", chart, *options, stdout=subprocess.DEVNULL)


def stop_all() -> None:
    """The kubelet first, then the containers it would restart, then what they need."""
    for name in ("coredns", "kube-proxy", "kubelet"):
        stop(name)
    with contextlib.suppress(subprocess.CalledProcessError):
        for task in ctr("tasks", "ls", "-q", stderr=subprocess.DEVNULL).split():
            ctr("tasks", "kill", "-s", "SIGKILL", task, stderr=subprocess.DEVNULL)
        time.sleep(1)
    for name in ("kube-scheduler", "kube-controller-manager", "kube-apiserver", "etcd", "containerd", "registry"):
        stop(name)
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in sorted((m for m in mounts if m.startswith(str(STATE))), reverse=True):
        subprocess.run(["umount", "-l", mount], stderr=subprocess.DEVNULL)
    subprocess.run(["ip", "link", "del", BRIDGE], stderr=subprocess.DEVNULL)
    subprocess.run([BIN / "kube-proxy", "--cleanup"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    shutil.rmtree(STATE, ignore_errors=True)
