"""The verbs of the local cluster: the order in which its parts start, and how they are taken down again."""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import audit, kueue, probe

from . import components, control_plane, images, node, volumes
from .certificates import certificates
from .node import BRIDGE, network
from .progress import Progress, say
from .shell import BIN, HOME, KUBECONFIG, STATE, alive, answers, ctr, kubectl, sh, stop, wait, write

KUEUE_IMAGE = "local/kueue"
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
        """Starts from an empty state, in about 30 s."""
        with alone():
            stop_all()
            repair()
        return environment()

    def down(self) -> None:
        with alone():
            stop_all()

    def ensure(self) -> dict[str, str]:
        """What runs is kept; a component that does not is started again. Only a cluster of which nothing runs, as after
        a restart of the machine, begins from an empty state.
        """
        with alone():
            components.build()
            if not any(alive(part.name) for part in PARTS):
                stop_all()
            repair()
        return environment()

    def image(self, context: str, target: str, name: str) -> str:
        return images.image(context, target, name)

    def image_size(self, name: str) -> str:
        return images.image_size(name)

    def install_kueue(self, configuration: dict[str, Any]) -> None:
        image = {"repository": KUEUE_IMAGE, "tag": components.KUEUE[1], "pullPolicy": "Never"}
        images.load(images.scratch_image(f"{KUEUE_IMAGE}:{components.KUEUE[1]}", BIN / "kueue", "/manager"))
        chart = components.module_dir(*components.KUEUE) / "charts/kueue"
        values = write("kueue-values.json", kueue.values(configuration, image))
        helm("upgrade", "--install", "kueue", chart, "-n", kueue.NAMESPACE, "--create-namespace", "-f", values)

    def remove_kueue(self) -> None:
        kueue.remove_objects(kubectl)
        helm("uninstall", "kueue", "-n", kueue.NAMESPACE)
        kubectl("delete", "namespace", kueue.NAMESPACE, "--ignore-not-found", "--timeout=60s")

    def kill(self, node: str, container: str) -> bool:
        ctr("tasks", "kill", "-s", "SIGKILL", container)
        return True

    def recycle(self) -> None:
        volumes.recycle()

    def volume(self, namespace: str, claim: str) -> Path:
        return volumes.volume(namespace, claim)

    def audit(self, user: str, since: str) -> list[dict[str, Any]] | None:
        return audit.requests(STATE / "audit.log", user, since)


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


@dataclass(frozen=True)
class Part:
    """A component of the cluster: how it is started, and how it shows that it works."""

    name: str
    start: Callable[[], None]
    works: Callable[[], bool]
    is_process: bool = True
    """Of this machine. The others are objects in the API server."""


def repair() -> None:
    """Starts each part that does not work, and does not go on before it does. Raises TimeoutError, which names it."""
    STATE.mkdir(parents=True, exist_ok=True)
    network()
    if not KUBECONFIG.exists():
        certificates()
    say(f"{len(PARTS)} components, state and logs in {STATE}")
    for part in PARTS:
        if works(part):
            say(f"{part.name}: works")
            continue
        progress = Progress(f"{part.name}: start")
        stop(part.name)
        part.start()
        wait(part.name, part.works)
        progress.done()
    say("all components work")


def works(part: Part) -> bool:
    """A process that runs may be busy, and gets some time to answer."""
    if not part.is_process:
        return answers(part.works)
    if alive(part.name):
        with contextlib.suppress(TimeoutError):
            wait(part.name, part.works, PATIENCE)
            return True
    return False


def jobset() -> None:
    images.load(images.scratch_image(f"{JOBSET_IMAGE}:{JOBSET_TAG}", BIN / "jobset", "/manager"))
    chart = components.module_dir(*components.JOBSET) / "charts/jobset"
    values = f"image.repository={JOBSET_IMAGE},image.tag={JOBSET_TAG},image.pullPolicy=Never"
    helm("upgrade", "--install", "jobset", chart, "-n", "jobset-system", "--create-namespace", "--set", values)


def helm(*arguments: object) -> None:
    command = (BIN / "helm", "--kubeconfig", KUBECONFIG, *arguments, "--wait", "--timeout", "3m")
    sh(*command, stdout=subprocess.DEVNULL)


def jobset_answers() -> bool:
    """The API server asks JobSet's webhook about it, which takes pods, their network and a Service."""
    kubectl(*probe.CREATE, input=json.dumps(probe.JOBSET), stderr=subprocess.DEVNULL)
    return True


# In the order in which they need each other.
PARTS = (
    Part("registry", images.registry, images.registry_answers),
    Part("etcd", control_plane.etcd, control_plane.etcd_answers),
    Part("kube-apiserver", control_plane.api_server, control_plane.api_server_answers),
    Part("kubelet-readers", control_plane.kubelet_readers, control_plane.kubelet_readers_exist, is_process=False),
    Part("kube-controller-manager", control_plane.controllers, control_plane.controllers_answer),
    Part("kube-scheduler", control_plane.scheduler, control_plane.scheduler_answers),
    Part("containerd", node.containerd, node.containerd_answers),
    Part("kubelet", node.kubelet, node.node_is_ready),
    Part("gpus", node.gpus, node.gpus_are_counted, is_process=False),
    Part("kube-proxy", node.kube_proxy, node.kube_proxy_answers),
    Part("coredns", node.coredns, node.coredns_answers),
    Part("volumes", volumes.volumes, volumes.volumes_exist, is_process=False),
    Part("jobset", jobset, jobset_answers, is_process=False),
)
PATIENCE = 30.0  # seconds that a running component gets to answer before it is started again


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
