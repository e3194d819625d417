"""Which cluster the tests use: the one KUBECONFIG names, a kind cluster, or the local one.

All three answer the same verbs, so neither the Makefile nor the end-to-end tests know which of them is there.
"""

import functools
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from cluster import audit, probe
from cluster.kind import KUBECONFIG as KIND_KUBECONFIG
from cluster.kind import Kind
from cluster.local.cluster import Local
from cluster.local.shell import KUBECONFIG
from luthier_operator.versions import INSTALL_JOBSET

CLUSTERS: dict[str, Callable[[], "Cluster"]] = {"local": Local, "kind": Kind}
# Targets of the Dockerfile: the variable that names the image where a given cluster already has it.
IMAGE_VARIABLES = {"operator": "LUTHIER_OPERATOR_IMAGE", "trainer": "LUTHIER_TRAINER_IMAGE"}
# What the tests install, change and delete: on a given cluster, none of it may be there before.
OURS = (
    "namespace/luthier-system",
    "namespace/luthier-e2e",
    "crd/finetunejobs.luthier.dev",
    "crd/generatejobs.luthier.dev",
)
MAY_DELETE = "LUTHIER_TESTS_MAY_DELETE"


class Cluster(Protocol):
    pull_policy: str
    access_mode: str  # of a claim that several pods use

    def ensure(self) -> dict[str, str]:
        """A running cluster with JobSet; returns the environment in which kubectl and helm reach it."""

    def check_free(self) -> None:
        """Raises SystemExit where the tests would replace or delete what is somebody's."""

    def install_packages(self) -> None: ...
    def build(self) -> None: ...
    def up(self) -> dict[str, str]: ...
    def down(self) -> None: ...

    def image(self, context: str, target: str, name: str) -> str:
        """Builds a Dockerfile target where the nodes find it; returns the reference that pods use."""

    def image_size(self, name: str) -> str: ...

    def install_kueue(self, configuration: dict[str, Any]) -> None:
        """Kueue, or its new configuration: what it has beside the one of `kueue.CONFIGURATION`.

        Raises NotImplementedError where the cluster is somebody else's.
        """

    def remove_kueue(self) -> None: ...

    def kill(self, node: str, container: str) -> bool:
        """SIGKILL to the first process of a container, which the runtime of `node` knows by this id. False: that node
        is out of reach.
        """

    def recycle(self) -> None:
        """Makes released volumes available again, where the cluster has no provisioner to do so."""

    def volume(self, namespace: str, claim: str) -> Path | None:
        """The folder on this machine that holds a claim's data; None where only a pod can see it."""

    def audit(self, user: str, since: str) -> list[dict[str, Any]] | None:
        """The requests of a user since a time (RFC 3339, UTC), from the audit log; None where it is out of reach."""


class Given:
    """A cluster that somebody else made: nothing is started, built or removed here."""

    pull_policy = "Always"
    access_mode = "ReadWriteMany"

    def ensure(self) -> dict[str, str]:
        if subprocess.run(["kubectl", "get", "--raw", "/readyz"], stdout=subprocess.DEVNULL).returncode:
            raise SystemExit(
                f"KUBECONFIG={os.environ['KUBECONFIG']}: no API server answers. Unset it to use a cluster of this"
                " machine."
            )
        asked = subprocess.run(
            ["kubectl", *probe.CREATE], input=json.dumps(probe.JOBSET), text=True, stdout=subprocess.DEVNULL
        )
        if asked.returncode:
            raise SystemExit(
                f"KUBECONFIG={os.environ['KUBECONFIG']}: JobSet does not answer there. Install it: {INSTALL_JOBSET}"
            )
        return {"KUBECONFIG": os.environ["KUBECONFIG"]}

    up = ensure

    def check_free(self) -> None:
        if os.environ.get(MAY_DELETE) == "yes":
            return
        asked = subprocess.run(
            ["kubectl", "get", *OURS, "--ignore-not-found", "-o", "json"], check=True, text=True, stdout=subprocess.PIPE
        )
        found = [
            f"{item['kind']} {item['metadata']['name']}"
            for item in json.loads(asked.stdout or '{"items": []}')["items"]
        ]
        if found:
            raise SystemExit(
                f"KUBECONFIG={os.environ['KUBECONFIG']}: this cluster has {', '.join(found)} already. The tests would"
                " replace them, and delete what is in them. If nobody needs them (an earlier test leaves them, too),"
                f" say {MAY_DELETE}=yes; or unset KUBECONFIG to use a cluster of this machine."
            )

    def install_packages(self) -> None:
        return

    build = down = recycle = install_packages

    def image(self, context: str, target: str, name: str) -> str:
        variable = IMAGE_VARIABLES[target]
        if variable not in os.environ:
            raise SystemExit(
                f"{variable}: not set. On a cluster given by KUBECONFIG, set it to a pushed image of the target"
                f" {target!r}."
            )
        return os.environ[variable]

    def install_kueue(self, configuration: dict[str, Any]) -> None:
        raise NotImplementedError("Kueue is not installed into a cluster given by KUBECONFIG")

    def remove_kueue(self) -> None:
        raise NotImplementedError

    def image_size(self, name: str) -> str:
        raise SystemExit("image-size: only the local cluster has a registry to ask")

    def kill(self, node: str, container: str) -> bool:
        return False

    def volume(self, namespace: str, claim: str) -> None:
        return None

    def audit(self, user: str, since: str) -> list[dict[str, Any]] | None:
        return audit.requests(Path(os.environ["KUBECONFIG"]).with_name("audit.log"), user, since)


def cluster() -> Cluster:
    """Raises SystemExit for an unknown CLUSTER."""
    given, named = os.environ.get("KUBECONFIG"), os.environ.get("CLUSTER") or prebuilt()
    if given and Path(given) not in (KUBECONFIG, KIND_KUBECONFIG) and os.environ.get("CLUSTER") != "kind":
        return Given()
    if named not in CLUSTERS:
        raise SystemExit(f"CLUSTER={named}: one of {', '.join(CLUSTERS)}")
    return CLUSTERS[named]()


@functools.cache
def prebuilt() -> str:
    """kind, whose images are built already, where it and Docker are there and the local cluster does not run."""
    if KUBECONFIG.exists() or not (shutil.which("kind") and shutil.which("docker")):
        return "local"
    answers = subprocess.run(["docker", "info"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return "local" if answers.returncode else "kind"
