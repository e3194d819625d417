"""The other ways to install: one namespace only, and a cluster that gets JobSet later than Luthier."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from cluster import choice
from e2e import jobs
from e2e.conftest import JOBS, SYSTEM, Images, install
from e2e.kube import Kube, condition, conditions

pytestmark = pytest.mark.e2e
JOBSET_CRD = "jobsets.jobset.x-k8s.io"


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


@pytest.fixture
def namespaced(kube: Kube, images: Images) -> Iterator[None]:
    """The chart installed for the namespace of the jobs alone."""
    install(images, f"watchNamespaces={{{JOBS}}}")
    yield
    install(images)


def test_one_namespace_needs_no_cluster_role(kube: Kube, namespaced: None) -> None:
    roles = json.loads(
        kube.run("get", "clusterroles,clusterrolebindings", "-l", "app.kubernetes.io/name=luthier", "-o", "json")
    )["items"]
    assert roles == []
    plan(kube, "namespaced")
    kube.until("ftj", "namespaced", lambda o: o["status"].get("state") == "Planned", timeout=120, what="Planned")
    elsewhere = Kube("default")
    plan(elsewhere, "elsewhere")
    kube.until("ftj", "namespaced", lambda o: o["status"].get("state") == "Planned", timeout=10, what="Planned")
    assert "status" not in (elsewhere.get("ftj", "elsewhere") or {})
    elsewhere.delete("ftj", "elsewhere")


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
    kube.until("ftj", "before-jobset", lambda o: o["status"].get("state") == "Planned", timeout=180, what="Planned")
