"""Which cluster the tests use: the one KUBECONFIG names, a kind cluster, or the local one.

All three answer the same verbs, so neither the Makefile nor the end-to-end tests know which of them is there.
"""

import os
import subprocess
from pathlib import Path
from typing import Protocol

from cluster.kind import Kind
from cluster.local.cluster import Local
from cluster.local.shell import KUBECONFIG

# Targets of the Dockerfile: the variable that names the image where a given cluster already has it.
IMAGE_VARIABLES = {"operator": "LUTHIER_OPERATOR_IMAGE", "trainer": "LUTHIER_TRAINER_IMAGE"}


class Cluster(Protocol):
    pull_policy: str
    access_mode: str  # of a claim that several pods use

    def ensure(self) -> dict[str, str]:
        """A running cluster with JobSet; returns the environment in which kubectl and helm reach it."""

    def install_packages(self) -> None: ...
    def build(self) -> None: ...
    def up(self) -> dict[str, str]: ...
    def down(self) -> None: ...

    def image(self, context: str, target: str, name: str) -> str:
        """Builds a Dockerfile target where the nodes find it; returns the reference that pods use."""

    def image_size(self, name: str) -> str: ...

    def recycle(self) -> None:
        """Makes released volumes available again, where the cluster has no provisioner to do so."""

    def volume(self, namespace: str, claim: str) -> Path | None:
        """The folder on this machine that holds a claim's data; None where only a pod can see it."""


class Given:
    """A cluster that somebody else made: nothing is started, built or removed here."""

    pull_policy = "Always"
    access_mode = "ReadWriteMany"

    def ensure(self) -> dict[str, str]:
        if subprocess.run(["kubectl", "get", "--raw", "/readyz"], stdout=subprocess.DEVNULL).returncode:
            raise SystemExit(f"KUBECONFIG={os.environ['KUBECONFIG']}: no API server answers. Unset it to use a cluster of this machine.")
        return {"KUBECONFIG": os.environ["KUBECONFIG"]}

    up = ensure

    def install_packages(self) -> None:
        return

    build = down = recycle = install_packages

    def image(self, context: str, target: str, name: str) -> str:
        variable = IMAGE_VARIABLES[target]
        if variable not in os.environ:
            raise SystemExit(f"{variable}: not set. On a cluster given by KUBECONFIG, set it to a pushed image of the target {target!r}.")
        return os.environ[variable]

    def image_size(self, name: str) -> str:
        raise SystemExit("image-size: only the local cluster has a registry to ask")

    def volume(self, namespace: str, claim: str) -> None:
        return None


def cluster() -> Cluster:
    given = os.environ.get("KUBECONFIG")
    if given and Path(given) != KUBECONFIG and os.environ.get("CLUSTER") != "kind":
        return Given()
    return Kind() if os.environ.get("CLUSTER") == "kind" else Local()
