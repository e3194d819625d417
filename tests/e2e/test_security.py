"""What a platform engineer asks: where a token can be found, as which user the pods run, which rights are used.

The last test reads the audit log of everything that the tests before it made the operator do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from cluster import choice
from e2e import jobs
from e2e.conftest import JOBS, SYSTEM, TOKENS, Images, claim, install
from e2e.kube import Kube, Object
from hub import manifests as hub_manifests

pytestmark = pytest.mark.e2e

OPENSHIFT_USER = 1000650000
"""As OpenShift gives to a namespace: a user that no image knows, with group 0."""
OPERATOR = f"system:serviceaccount:{SYSTEM}:luthier"
ASKED_BY_ADMISSION = "finalizers"
"""Subresource that the operator never writes. The admission plugin OwnerReferencesPermissionEnforcement, which some
clusters run, asks whether it may.
"""


def small(name: str, **spec: object) -> Object:
    """A short run that reads a published base, trains two steps and publishes."""
    return jobs.fine_tune(
        name,
        model={"path": "/data/encoder"},
        task="text-classification",
        dataset={"files": ["/data/packages.jsonl"]},
        method={"type": "lora", "rank": 2},
        training=jobs.course(maxSteps=2, maxLength=128),
        **spec,
    )


def everything(kube: Kube) -> dict[str, str]:
    """Kind → all objects of a namespace, as JSON; Secrets only by their names."""
    kinds = kube.run("api-resources", "--namespaced", "--verbs=list", "--output=name").split()
    found = {kind: kube.run("get", kind, "-o", "json") for kind in kinds if kind != "secrets"}
    found["secrets"] = kube.run("get", "secrets", "-o", "name")
    return found


PASSWORD = "planted-password-of-a-tracker"
LOGIN = {"name": "tracker-login", "keys": {"username": "user", "password": "password"}}


def test_a_token_is_found_nowhere(kube: Kube, system: Kube) -> None:
    login = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": LOGIN["name"]}}
    kube.apply(login | {"stringData": {"user": "somebody", "password": PASSWORD}})
    # The Hub of these tests answers, but is no server of MLflow: so the tracker fails, and reports it.
    tracking = [{"type": "mlflow", "url": hub_manifests.url(SYSTEM), "secretRef": LOGIN}]
    kube.apply(small("discreet", hub=jobs.HUB | {"repo": "luthier/discreet"}, tracking=tracking))
    job = kube.complete("ftj", "discreet")
    assert any("spec.tracking: MLflow lacks" in notice for notice in job["status"]["notices"]), job["status"]["notices"]
    planted = (hub_manifests.token(TOKENS["hub-token"]), PASSWORD)
    pods = [pod["metadata"]["name"] for pod in kube.list("pods", "luthier.dev/job=discreet")]
    operators = [pod["metadata"]["name"] for pod in system.list("pods", "app.kubernetes.io/name=luthier")]
    texts = everything(kube)
    texts |= {f"log of {name}": kube.run("logs", name) for name in pods}
    texts |= {f"log of {name}": system.run("logs", name) for name in operators}
    texts["workspace"] = kube.run(
        "exec",
        "inspector",
        "--",
        "sh",
        "-c",
        f"grep -rl -e {' -e '.join(planted)} /workspace/{job['status']['workspace']['folder']} || true",
    )
    assert pods
    assert texts["workspace"] == ""
    assert [where for where, text in texts.items() if any(secret in text for secret in planted)] == []


@pytest.fixture
def foreign_claim(kube: Kube) -> Iterator[str]:
    """A claim that belongs to the group of OpenShift's user.

    The kubelet changes owners of volumes, but not of those that are folders of its node.
    """
    name = "anybody"
    kube.apply(claim(name))
    kube.until("pvc", name, lambda o: o["status"].get("phase") == "Bound", timeout=30, what="Bound")
    folder = choice.cluster().volume(JOBS, name)
    if folder is None:
        yield name
        return
    group = folder.stat().st_gid
    os.chown(folder, -1, OPENSHIFT_USER)
    yield name
    os.chown(folder, -1, group)


@pytest.fixture
def as_on_openshift(kube: Kube, images: Images) -> Iterator[None]:
    """The chart installed for a user that the images do not know, with group 0."""
    install(images, f"runAsUser={OPENSHIFT_USER}", "runAsGroup=0")
    yield
    install(images)


def test_the_images_run_as_any_user_with_group_0(
    kube: Kube, system: Kube, as_on_openshift: None, foreign_claim: str
) -> None:
    operators = system.list("pods", "app.kubernetes.io/name=luthier")
    # Those of the user before may still be ending.
    started = [pod for pod in operators if "deletionTimestamp" not in pod["metadata"]]
    assert {pod["spec"]["securityContext"]["runAsUser"] for pod in started} == {OPENSHIFT_USER}
    kube.apply(small("anybody", workspace={"claimName": foreign_claim, "ownership": "Change"}))
    kube.complete("ftj", "anybody")
    contexts = [p["spec"]["securityContext"] for p in kube.list("pods", "luthier.dev/job=anybody")]
    assert {(c["runAsUser"], c["runAsGroup"]) for c in contexts} == {(OPENSHIFT_USER, 0)}


class Right(NamedTuple):
    verb: str
    group: str
    resource: str
    """With its subresource, such as finetunejobs/status."""


def granted(system: Kube) -> set[Right]:
    roles = [system.get("clusterrole", "luthier"), system.get("role", "luthier-lease")]
    return {
        Right(verb, group, resource)
        for role in roles
        if role
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def needed(entry: Object) -> set[Right]:
    """The rights that a request of the audit log needs; none for a request about no object, such as discovery."""
    ref = entry.get("objectRef")
    if not ref or "resource" not in ref:
        return set()
    subresource = f"/{ref['subresource']}" if ref.get("subresource") else ""
    verbs = {entry["verb"]}
    if entry["verb"] == "patch" and entry.get("responseStatus", {}).get("code") == 201:
        verbs.add("create")  # server-side apply of an object that did not exist
    return {Right(verb, ref.get("apiGroup", ""), ref["resource"] + subresource) for verb in verbs}


def whole(request: pytest.FixtureRequest) -> bool:
    """Whether all files of these tests run in this session: only they together make the operator do all it can."""
    here = Path(__file__)
    return {p.name for p in here.parent.glob("test_*.py")} <= {item.path.name for item in request.session.items}


def retire_and_reuse(kube: Kube) -> None:
    """What no other test does: a GenerateJob is deleted after its time, and a job finds the claim of an earlier one."""
    nothing = {"path": "/none"}
    kube.apply(jobs.generate("retired", model=nothing, inputs={"rows": [{"prompt": "a"}]}, ttlSecondsAfterFinished=0))
    for _ in range(2):
        kube.apply(jobs.fine_tune("reused", model=nothing, dataset=jobs.PROSE, workspace={"size": "1Gi"}))
        kube.failed("ftj", "reused", timeout=120)
        kube.delete("ftj", "reused")
    kube.run("wait", "gj/retired", "--for=delete", "--timeout=120s")


def test_the_operator_has_the_rights_that_it_uses_and_no_others(
    kube: Kube, system: Kube, request: pytest.FixtureRequest
) -> None:
    retire_and_reuse(kube)
    retire_and_reuse(kube)
    namespace = system.get("namespace", SYSTEM) or {}
    audit = choice.cluster().audit(OPERATOR, since=namespace["metadata"]["creationTimestamp"])
    if audit is None:
        pytest.skip("the audit log of this cluster is out of reach")
    decision = "authorization.k8s.io/decision"
    used = {right for entry in audit for right in needed(entry)}
    refused = [entry for entry in audit if entry.get("annotations", {}).get(decision) == "forbid"]
    forbidden = {right for entry in refused for right in needed(entry)}
    rights = granted(system)
    # Between two installations a role may be missing for a moment, so a right that it has does not count.
    assert sorted(forbidden - rights) == []
    if not whole(request):
        return
    assert sorted(right for right in rights - used if not right.resource.endswith(ASKED_BY_ADMISSION)) == []
