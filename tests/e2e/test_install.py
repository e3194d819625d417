"""The other ways to install: one namespace only, an operator and a trainer image of different versions, and a cluster
that gets JobSet later than Luthier.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from cluster import choice
from e2e import jobs
from e2e.conftest import JOBS, SYSTEM, Images, fill, install
from e2e.kube import Kube, Object, condition, conditions

pytestmark = pytest.mark.e2e
JOBSET_CRD = "jobsets.jobset.x-k8s.io"
SKEW = """
# Python runs this at its start. By the name of the job, the trainer is newer than the operator, or older.
import json, pathlib

from luthier_api import run, terminationlog

path = pathlib.Path("/etc/luthier/run.json")
name = json.loads(path.read_text())["name"] if path.exists() else ""
encode, read = terminationlog.encode, run.from_json


def of_a_newer_operator(text, **options):
    document = read(text, **options)
    document["writtenBy"] = "9.9.9"
    if name == "other-run-version":
        document["apiVersion"] = "luthier.dev/run-v9"
    if name == "other-field":
        document["spec"]["training"]["later"] = 1
    return document


if name == "newer-image":
    terminationlog.encode = lambda message: encode(message | {"later": {"deep": [1]}})
if name.startswith("other-"):
    run.from_json = of_a_newer_operator
"""


def plan(kube: Kube, name: str) -> None:
    kube.apply(
        jobs.fine_tune(
            name,
            model={"path": "/data/encoder"},
            task="text-classification",
            dataset={"files": ["/data/packages.jsonl"]},
            training={"maxLength": 128},
            planOnly=True,
        )
    )


@pytest.fixture(scope="class")
def namespaced(kube: Kube, images: Images) -> Iterator[None]:
    """The chart installed for the namespace of the jobs alone, whose trainer may be of another version."""
    install(images, f"watchNamespaces={{{JOBS}}}", "jobs.env.PYTHONPATH=/data/skew")
    yield
    install(images)


@dataclass(frozen=True)
class SkewCase:
    name: str
    messages: list[str]
    """Parts of the message of the condition Failed."""


NEWER_IMAGE = "newer-image"
SKEWS = [
    SkewCase(
        name="other-run-version",
        messages=["9.9.9", "apiVersion", "luthier.dev/run-v1", "luthier.dev/run-v9"],
    ),
    SkewCase(
        name="other-field",
        messages=["9.9.9", "spec.training.later"],
    ),
]


def archive(**files: str) -> bytes:
    """A tar with a folder `skew`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, text in files.items():
            entry = tarfile.TarInfo(f"skew/{name}.py")
            entry.size = len(text.encode())
            tar.addfile(entry, io.BytesIO(text.encode()))
    return buffer.getvalue()


@pytest.mark.usefixtures("namespaced")
class TestOneNamespace:
    def test_it_needs_no_cluster_role(self, kube: Kube) -> None:
        roles = json.loads(
            kube.run("get", "clusterroles,clusterrolebindings", "-l", "app.kubernetes.io/name=luthier", "-o", "json")
        )["items"]
        assert roles == []
        plan(kube, "namespaced")
        kube.until("ftj", "namespaced", is_planned, timeout=120, what="Planned")
        elsewhere = Kube("default")
        plan(elsewhere, "elsewhere")
        kube.until("ftj", "namespaced", is_planned, timeout=10, what="Planned")
        assert "status" not in (elsewhere.get("ftj", "elsewhere") or {})
        elsewhere.delete("ftj", "elsewhere")

    def test_operator_and_trainer_image_may_have_different_versions(self, kube: Kube) -> None:
        fill(kube, "data", archive(sitecustomize=SKEW))
        for name in (NEWER_IMAGE, *(case.name for case in SKEWS)):
            plan(kube, name)
        job = kube.until("ftj", NEWER_IMAGE, is_planned, timeout=120, what="Planned")
        assert job["status"]["prepared"]["dataset"]["rows"] > 0, "the message was read"
        (pod,) = kube.list("pods", f"luthier.dev/job={NEWER_IMAGE}")
        assert '"later"' in pod["status"]["containerStatuses"][0]["state"]["terminated"]["message"]
        for case in SKEWS:
            job = kube.failed("ftj", case.name)
            found = conditions(job)["Failed"]
            assert found["reason"] == "InvalidSpec"
            assert [text for text in case.messages if text not in found["message"]] == [], found["message"]
            assert len(job["status"]["attempts"]) == 1, "it is not tried again"


def is_planned(job: Object) -> bool:
    return bool(job["status"].get("state") == "Planned")


def give_back(kube: Kube, text: str) -> None:
    found = json.loads(text)
    meta = {k: v for k, v in found["metadata"].items() if k in ("name", "labels", "annotations")}
    kube.run(
        "create", "-f", "-", stdin=json.dumps({k: v for k, v in found.items() if k != "status"} | {"metadata": meta})
    )
    kube.until("crd", JOBSET_CRD, lambda o: condition(o, "Established") == "True", timeout=60, what="Established")


@pytest.mark.skipif(
    isinstance(choice.cluster(), choice.Given),
    reason="it deletes JobSet's CRD, and with it every JobSet of the cluster that KUBECONFIG names",
)
def test_jobset_may_come_later(kube: Kube) -> None:
    text = kube.run("get", "crd", JOBSET_CRD, "-o", "json")
    kube.run("delete", "crd", JOBSET_CRD, "--timeout=60s")
    try:
        # Restarted, as after an installation; a running one notices within a relist.
        Kube(SYSTEM).run("rollout", "restart", "deployment/luthier")
        Kube(SYSTEM).run("rollout", "status", "deployment/luthier", "--timeout=120s")
        plan(kube, "before-jobset")
        job = kube.until("ftj", "before-jobset", conditions, timeout=60, what="looked at")
        assert conditions(job)["Accepted"]["reason"] == "JobSetMissing"
        assert "kubectl apply --server-side -f https://" in conditions(job)["Accepted"]["message"]
    finally:
        give_back(kube, text)
    kube.until("ftj", "before-jobset", is_planned, timeout=180, what="Planned")
