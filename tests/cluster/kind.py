"""A kind cluster for the tests, where Docker is available: `CLUSTER=kind`.

This path has not been run: it was written from the documentation of kind v0.30 and JobSet v0.12. The local cluster is the one
that the tests are developed on.
"""

import os
import shutil
import subprocess
from pathlib import Path

NAME = "luthier"
KUBECONFIG = Path.home() / ".cache/cluster/kind.kubeconfig"
JOBSET_CHART, JOBSET_VERSION = "oci://registry.k8s.io/jobset/charts/jobset", "0.12.0"


def run(*args: str) -> None:
    subprocess.run(args, check=True, env=os.environ | {"KUBECONFIG": str(KUBECONFIG)})


class Kind:
    def install_packages(self) -> None:
        missing = [tool for tool in ("docker", "kind", "kubectl", "helm") if not shutil.which(tool)]
        if missing:
            raise SystemExit(f"CLUSTER=kind: not on PATH: {', '.join(missing)}. See https://kind.sigs.k8s.io.")

    def build(self) -> None:
        return

    recycle = build  # kind's storage class provisions volumes and deletes them with their claims

    def up(self) -> dict[str, str]:
        self.install_packages()
        KUBECONFIG.parent.mkdir(parents=True, exist_ok=True)
        run("kind", "create", "cluster", "--name", NAME, "--kubeconfig", str(KUBECONFIG), "--wait", "3m")
        run("helm", "install", "jobset", JOBSET_CHART, "--version", JOBSET_VERSION, "-n", "jobset-system", "--create-namespace", "--wait")
        return {"KUBECONFIG": str(KUBECONFIG)}

    def ensure(self) -> dict[str, str]:
        self.install_packages()
        clusters = subprocess.run(["kind", "get", "clusters"], check=True, text=True, stdout=subprocess.PIPE).stdout.split()
        return {"KUBECONFIG": str(KUBECONFIG)} if NAME in clusters else self.up()

    def down(self) -> None:
        run("kind", "delete", "cluster", "--name", NAME)

    def image(self, context: str, target: str, name: str) -> str:
        run(
            "docker",
            "build",
            "--target",
            target,
            "--build-arg",
            "DS_ACCELERATOR=cpu",
            "--build-arg",
            "TORCH_BACKEND=cpu",
            "--tag",
            name,
            context,
        )
        run("kind", "load", "docker-image", name, "--name", NAME)
        return name

    def image_size(self, name: str) -> str:
        raise SystemExit("image-size: only the local cluster has a registry to ask")

    def volume(self, namespace: str, claim: str) -> None:
        return None  # it lies inside the node's container
