"""A kind cluster for the tests, where Docker is available: `CLUSTER=kind`.

Run with kind v0.33, Docker 20.10 and a node image of our own making with Kubernetes 1.35, not yet with the published
one. Other node images: KIND_IMAGE.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from cluster import kueue, probe
from cluster.local.components import JOBSET, KUEUE

NAME = "luthier"
KUBECONFIG = Path.home() / ".cache/cluster/kind.kubeconfig"
JOBSET_CHART = ("oci://registry.k8s.io/jobset/charts/jobset", "--version", JOBSET[1].removeprefix("v"))
KUEUE_CHART = ("oci://registry.k8s.io/kueue/charts/kueue", "--version", KUEUE[1].removeprefix("v"))
# Only counted, as in the local cluster
GPUS = json.dumps([{"op": "add", "path": "/status/capacity/nvidia.com~1gpu", "value": "8"}])


def run(*args: str, stdin: str | None = None) -> None:
    environment = os.environ | {"KUBECONFIG": str(KUBECONFIG)}
    subprocess.run(args, check=True, text=True, input=stdin, stdout=sys.stderr, env=environment)


class Kind:
    pull_policy = "IfNotPresent"  # `kind load` puts the image on the node; no registry has it
    access_mode = "ReadWriteOnce"  # its provisioner knows no other, which is enough on one node

    def install_packages(self) -> None:
        missing = [tool for tool in ("docker", "kind", "kubectl", "helm") if not shutil.which(tool)]
        if missing:
            raise SystemExit(f"CLUSTER=kind: not on PATH: {', '.join(missing)}. See https://kind.sigs.k8s.io.")

    def build(self) -> None:
        return

    check_free = build  # nobody else uses it
    recycle = build  # kind's storage class provisions volumes and deletes them with their claims

    def up(self) -> dict[str, str]:
        KUBECONFIG.parent.mkdir(parents=True, exist_ok=True)
        image = [f"--image={os.environ['KIND_IMAGE']}"] if "KIND_IMAGE" in os.environ else []
        run("kind", "create", "cluster", "--name", NAME, *image, "--kubeconfig", str(KUBECONFIG), "--wait", "3m")
        return self.ensure()

    def ensure(self) -> dict[str, str]:
        """What is there is kept, so a start that broke off goes on."""
        self.install_packages()
        clusters = subprocess.run(
            ["kind", "get", "clusters"], check=True, text=True, stdout=subprocess.PIPE
        ).stdout.split()
        if NAME not in clusters:
            return self.up()
        run(
            "helm",
            "upgrade",
            "--install",
            "jobset",
            *JOBSET_CHART,
            "-n",
            "jobset-system",
            "--create-namespace",
            "--wait",
        )
        run("kubectl", "wait", "--for=condition=Ready", "node", "--all", "--timeout=2m")
        # The components of the control plane, kube-proxy and CoreDNS
        run("kubectl", "-n", "kube-system", "wait", "--for=condition=Ready", "pod", "--all", "--timeout=2m")
        run("kubectl", *probe.CREATE, stdin=json.dumps(probe.JOBSET))
        run("kubectl", "patch", "node", f"{NAME}-control-plane", "--subresource=status", "--type=json", "-p", GPUS)
        return {"KUBECONFIG": str(KUBECONFIG)}

    def down(self) -> None:
        run("kind", "delete", "cluster", "--name", NAME, "--kubeconfig", str(KUBECONFIG))

    def image(self, context: str, target: str, name: str) -> str:
        """WHEELS, a folder for the local cluster, is a URL here: a build in Docker sees no other folder than its
        context.
        """
        wheels = os.environ.get("WHEELS", "")
        torch = f"FIND_LINKS={wheels}" if wheels.startswith("http") else "TORCH_BACKEND=cpu"
        run(
            "docker",
            "build",
            "--target",
            target,
            "--build-arg",
            "DS_ACCELERATOR=cpu",
            "--build-arg",
            torch,
            "--tag",
            name,
            context,
        )
        run("kind", "load", "docker-image", name, "--name", NAME)
        return name

    def image_size(self, name: str) -> str:
        raise SystemExit("image-size: only the local cluster has a registry to ask")

    def install_kueue(self, configuration: dict[str, Any]) -> None:
        values = KUBECONFIG.parent / "kueue-values.json"
        values.write_text(kueue.values(configuration))
        options = ("-n", kueue.NAMESPACE, "--create-namespace", "-f", str(values), "--wait")
        run("helm", "upgrade", "--install", "kueue", *KUEUE_CHART, *options)

    def remove_kueue(self) -> None:
        kueue.remove_objects(lambda *arguments: run("kubectl", *arguments))
        run("helm", "uninstall", "kueue", "-n", kueue.NAMESPACE, "--wait")
        run("kubectl", "delete", "namespace", kueue.NAMESPACE, "--ignore-not-found", "--timeout=60s")

    def kill(self, node: str, container: str) -> bool:
        """A node is a container of Docker's by the same name."""
        run("docker", "exec", node, "ctr", "-n", "k8s.io", "tasks", "kill", "-s", "SIGKILL", container)
        return True

    def volume(self, namespace: str, claim: str) -> None:
        return None  # it lies inside the node's container

    def audit(self, user: str, since: str) -> None:
        return None  # kind keeps none by itself
