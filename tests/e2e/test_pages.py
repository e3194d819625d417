"""The pages' own commands, typed into a cluster one after another as a stranger would: install, a token, jobs, upgrade,
removal.

They run last of all (conftest.py), because the last line of docs/install.md deletes every job.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from cases.pages import TOP, blocks
from cluster import choice
from e2e import jobs
from e2e.conftest import SYSTEM, Images, namespace
from e2e.kube import Kube

from luthier_operator.phases.accept import INSTALL_JOBSET

pytestmark = pytest.mark.e2e
HERE = "luthier-pages"
ORDER = (
    "README.md",
    "examples/quickstart/README.md",
    "docs/generation.md",
    "docs/troubleshooting.md",
    "docs/install.md",
)
LEFT_OUT = {INSTALL_JOBSET}  # from GitHub; the cluster has the same version from its Go module
WATCHING_SECONDS = 15
SHOWS = {  # what a reader would look for in the output
    "kubectl get crd": ["finetunejobs.luthier.dev", "generatejobs.luthier.dev"],
    "kubectl --namespace luthier-system rollout": ["successfully rolled out"],
    "kubectl get ftj -w": ["STATE", "storyteller"],
    "kubectl describe ftj": ["Preparing", "Events:"],
    "helm uninstall": ["kept due to the resource policy"],
}


def commands() -> list[str]:
    """Each command for a cluster once, in the order of the pages."""
    found = [line for page in ORDER for block in blocks() if block.page == TOP / page for line in block.commands()]
    return list(
        dict.fromkeys(line for line in found if line.split()[0] in ("kubectl", "helm") and line not in LEFT_OUT)
    )


def test_no_page_has_commands_for_a_cluster_that_nobody_types() -> None:
    everywhere = {line for block in blocks() for line in block.commands() if line.split()[0] in ("kubectl", "helm")}
    assert everywhere == {*commands(), *LEFT_OUT}


def typed(line: str, environment: dict[str, str]) -> str:
    """What a command prints. One that watches is ended after a while."""
    try:
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=TOP,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=WATCHING_SECONDS if line.endswith(" -w") else 300,
        )
    except subprocess.TimeoutExpired as watched:
        assert line.endswith(" -w"), line
        return (watched.stdout or b"").decode()
    assert done.returncode == 0, f"{line}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.mark.skipif(
    isinstance(choice.cluster(), choice.Given),
    reason="it deletes Luthier's CRDs, and with them every job of the cluster that KUBECONFIG names",
)
def test_the_commands_of_the_pages(kube: Kube, images: Images, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if request.session.testsfailed:
        pytest.skip("it would delete the jobs that failed")
    Kube(SYSTEM).run("delete", "deployment,service", "hub")
    namespace(HERE)
    Kube(HERE).apply(jobs.fine_tune("kept", model={"id": "a/b"}, dataset={"id": "a/b"}, suspend=True))
    shutil.copy(os.environ["KUBECONFIG"], tmp_path / "config")
    environment = os.environ | {"KUBECONFIG": str(tmp_path / "config")}
    typed(f"kubectl config set-context --current --namespace {HERE}", environment)
    typed(f"helm uninstall luthier --namespace {SYSTEM}", environment)
    assert Kube(HERE).run("get", "ftj", "-o", "name") == "finetunejob.luthier.dev/kept\n", (
        "jobs are kept when the chart is uninstalled"
    )
    # What a first installation does not find; a new one would wait until it has run out
    Kube(SYSTEM).run("delete", "lease", "luthier")

    (operator, operator_tag), (trainer, trainer_tag) = (
        image.rsplit(":", 1) for image in (images.operator, images.trainer)
    )
    for line in commands():
        command = line.replace("REGISTRY/operator", operator).replace("REGISTRY/trainer", trainer)
        if line.startswith("helm install"):
            command += f" --wait --set image.tag={operator_tag} --set trainer.image.tag={trainer_tag}"
        printed = typed(command, environment)
        for words in (w for begin, w in SHOWS.items() if line.startswith(begin)):
            assert [w for w in words if w not in printed] == [], f"{line}\n{printed}"
    assert "finetunejobs.luthier.dev" not in kube.run("get", "crd", "-o", "name")
    assert kube.run("get", "pvc", "work", "-o", "name") == "persistentvolumeclaim/work\n", "workspaces stay"
    kube.run("delete", "namespace", HERE, "--timeout=120s")
