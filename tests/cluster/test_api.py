"""The CRDs on a real API server: they are accepted (structure, CEL cost), and each rule lets pass and refuses what the
table says.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cases.api import (
    CASES,
    EXISTING,
    FINE_TUNE,
    FIXED,
    GENERATE,
    LIVE,
    STRANGE,
    WHILE_STOPPED,
    WRITTEN,
    Case,
    Document,
    FixedCase,
    StrangeCase,
    Written,
    all_rules,
    changed,
    fields_of,
    schemas,
    words,
)
from kubernetes import client, config

from luthier_api import API_VERSION
from luthier_api.kinds import KINDS, JobKind

pytestmark = pytest.mark.cluster
PUBLISHED_SECONDS = 60  # the API server publishes the schemas of new CRDs in the background
CRDS = sorted((Path(__file__).resolve().parents[2] / "crds").glob("*.yaml"))


def kubectl(*arguments: str, document: Document | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["kubectl", *arguments],
        capture_output=True,
        text=True,
        check=False,
        input=json.dumps(document) if document else None,
    )


@pytest.fixture(scope="module", autouse=True)
def crds(cluster: None) -> None:
    """Applying them proves that they are structural and that the cost of every rule is within the budget."""
    files = [argument for path in CRDS for argument in ("-f", str(path))]
    applied = kubectl("apply", "--server-side", "--force-conflicts", *files)
    assert applied.returncode == 0, applied.stderr
    assert kubectl("wait", "--for=condition=Established", "--timeout=30s", *files).returncode == 0


@dataclass(frozen=True)
class Answer:
    refusal: str
    """Empty if the API server accepts it."""
    spec: dict[str, Any]


@functools.cache
def api() -> client.CustomObjectsApi:
    """Asked directly, because a process of kubectl takes twenty times as long as its request."""
    return client.CustomObjectsApi(config.new_client_from_config(os.environ["KUBECONFIG"]))


def ask(call: Callable[..., Any], kind: str, *arguments: Any, **options: Any) -> Answer:
    """Return what the API server answers to a dry run."""
    group, _, version = API_VERSION.partition("/")
    place = (group, version, "default", KINDS[JobKind(kind)].plural)
    try:
        made = call(*place, *arguments, dry_run="All", field_validation="Strict", **options)
    except client.ApiException as error:
        return Answer(json.loads(error.body)["message"], {})
    return Answer("", made["spec"])


def create(document: Document) -> Answer:
    return ask(api().create_namespaced_custom_object, document["kind"], document)


def create_by_kubectl(document: Document) -> subprocess.CompletedProcess[str]:
    return kubectl("create", "--dry-run=server", "-f", "-", document=document)


def test_every_rule_has_a_case() -> None:
    rules = [rule.message for rule in all_rules() if not rule.transition]
    assert [m for m in rules if not any(m.startswith(case.message) for case in CASES)] == []
    assert [case.message for case in CASES if not any(m.startswith(case.message) for m in rules)] == []


@pytest.mark.parametrize("case", CASES, ids=[f"{c.base['kind']}: {c.message}" for c in CASES])
def test_a_rule_refuses_and_lets_pass(case: Case) -> None:
    refused = create(changed(case.base, case.refused))
    assert case.message in refused.refusal
    accepted = create(changed(case.base, case.accepted))
    assert not accepted.refusal


@pytest.mark.parametrize("written", WRITTEN, ids=[f"{w.base['kind']}: {w.field}" for w in WRITTEN])
def test_a_format_refuses_and_lets_pass(written: Written) -> None:
    for text in written.refused:
        refused = create(changed(written.base, written.change(text)))
        assert refused.refusal, text
        assert written.begins in refused.refusal
        assert words()[written.field] in refused.refusal
    for text in written.accepted:
        accepted = create(changed(written.base, written.change(text)))
        assert not accepted.refusal


@pytest.mark.parametrize("case", STRANGE, ids=lambda case: case.name)
def test_a_strange_manifest_is_judged_as_on_a_laptop(case: StrangeCase) -> None:
    answer = create_by_kubectl(case.document)
    assert (answer.returncode == 0) == (case.message is None), answer.stderr


@pytest.mark.parametrize("base", [FINE_TUNE, GENERATE], ids=["FineTuneJob", "GenerateJob"])
def test_unknown_fields_are_refused(base: Document) -> None:
    answer = create_by_kubectl(changed(base, {"spec.modle": {"id": "x"}}))
    assert answer.returncode != 0
    assert 'unknown field "spec.modle"' in answer.stderr


@pytest.fixture(scope="module")
def existing() -> Iterator[None]:
    for kind, document in EXISTING.items():
        kubectl("delete", kind, "fixed", "--ignore-not-found")
        created = kubectl("create", "-f", "-", document=document)
        assert created.returncode == 0, created.stderr
    yield
    for kind in EXISTING:
        kubectl("delete", kind, "fixed")


@pytest.mark.parametrize("kind", LIVE)
def test_the_status_in_a_manifest_hides_no_change_of_the_spec(existing: None, kind: str) -> None:
    """Where `status.writes` differs the rules are left out, so it must not come from who writes a spec."""
    case = next(case for case in FIXED if case.base["kind"] == kind)
    status = {"writes": 7, "state": "Failed"}
    refused = kubectl(
        "patch", kind, "fixed", "--type=merge", "-p", json.dumps(changed({}, case.change) | {"status": status})
    )
    assert f"spec.{case.field} cannot change once the job exists" in refused.stderr
    wrong = next(case for case in CASES if case.base["kind"] == kind and "spec." in case.message)
    created = create(changed(wrong.base, wrong.refused) | {"status": status})
    assert wrong.message in created.refusal


def test_one_refusal_names_all_that_is_wrong() -> None:
    wrong = {"spec.training": {"optimizer": "muon"}, "spec.strategy": "zero3", "metadata.name": "a" * 41}
    refused = create_by_kubectl(changed(FINE_TUNE, wrong)).stderr
    for field in ("metadata.name: at most 40", "spec.method.type: muon works", "spec.strategy: muon works"):
        assert field in refused


def test_a_job_that_is_no_longer_valid_can_be_labelled_and_told_its_status(existing: None) -> None:
    """An earlier version may have accepted it. Here no spec is valid any more."""
    crd = json.loads(kubectl("get", "crd", "finetunejobs.luthier.dev", "-o", "json").stdout)
    rules = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["x-kubernetes-validations"]
    for rule in rules:
        unchanged = re.match(r".*? \|\| .*?oldSelf(\.value\(\))?\.spec\)?(?= \|\| \()", rule["rule"])
        if unchanged:
            rule |= {"rule": f"{unchanged[0]} || self.spec.task == ''", "message": "no longer"}
            del rule["messageExpression"]
    assert kubectl("replace", "-f", "-", document=crd).returncode == 0
    try:
        until = time.monotonic() + PUBLISHED_SECONDS
        while "no longer" not in (refused := create(changed(FINE_TUNE, {"metadata.name": "another"})).refusal):
            assert time.monotonic() < until, refused
            time.sleep(1)
        assert "no longer" in kubectl("patch", "ftj", "fixed", "--type=merge", "-p", '{"spec": {"retry": 3}}').stderr
        labelled = kubectl("label", "ftj", "fixed", "new=label")
        assert labelled.returncode == 0, labelled.stderr
        for writes in (1, 2):
            patch = json.dumps({"status": {"writes": writes, "state": f"state {writes}"}})
            written = kubectl("patch", "ftj", "fixed", "--subresource=status", "--type=merge", "-p", patch)
            assert written.returncode == 0, written.stderr
    finally:
        files = [argument for path in CRDS for argument in ("-f", str(path))]
        kubectl("apply", "--server-side", "--force-conflicts", *files)
        while "no longer" in create(changed(FINE_TUNE, {"metadata.name": "another"})).refusal:
            time.sleep(1)


def update(document: Document) -> Answer:
    return ask(
        api().patch_namespaced_custom_object,
        document["kind"],
        document["metadata"]["name"],
        document,
        field_manager="kubectl",
        force=True,
        _content_type="application/apply-patch+yaml",
    )


@pytest.mark.parametrize("case", FIXED, ids=lambda case: f"{case.base['kind']}.{case.field}")
def test_a_field_is_fixed(existing: None, case: FixedCase) -> None:
    answer = update(changed(EXISTING[case.base["kind"]], case.change))
    assert f"spec.{case.field} cannot change once the job exists" in answer.refusal


@pytest.mark.parametrize(("kind", "path"), [(kind, path) for kind, changes in LIVE.items() for path in changes])
def test_a_field_may_change(existing: None, kind: str, path: str) -> None:
    answer = update(changed(EXISTING[kind], {path: LIVE[kind][path]}))
    assert not answer.refusal
    before = update(EXISTING[kind]).spec
    assert {f"spec.{name}" for name, value in answer.spec.items() if value != before.get(name)} == {path}


@pytest.fixture
def waiting(request: pytest.FixtureRequest) -> Iterator[Document]:
    """A job of a kind that is not suspended, and for which no operator makes pods: it waits for another job."""
    document = changed(EXISTING[request.param], {"metadata.name": "waiting", "spec.suspend": False})
    document = changed(document, {"spec.model": {"job": "missing"}})
    kubectl("delete", request.param, "waiting", "--ignore-not-found")
    created = kubectl("create", "-f", "-", document=document)
    assert created.returncode == 0, created.stderr
    yield document
    kubectl("delete", request.param, "waiting")


@pytest.mark.parametrize("waiting", WHILE_STOPPED, indirect=True)
def test_a_field_changes_only_while_no_pods_work_with_it(waiting: Document) -> None:
    changes = WHILE_STOPPED[waiting["kind"]]
    for path, value in changes.items():
        refused = update(changed(waiting, {path: value}))
        assert f"{path} cannot change while pods work with it; set spec.suspend: true first" in refused.refusal
        suspended = update(changed(waiting, {path: value, "spec.suspend": True}))
        assert not suspended.refusal
    # As an operator writes it, so that one that is installed leaves it.
    now = "2026-03-01T12:00:00Z"
    end = {"type": "Failed", "status": "True", "reason": "Failed", "message": "", "lastTransitionTime": now}
    status = {"status": {"state": "Failed", "completionTime": now, "conditions": [end]}}
    patch = ("patch", waiting["kind"], "waiting", "--subresource=status", "--type=merge", "-p", json.dumps(status))
    assert kubectl(*patch).returncode == 0
    for path, value in changes.items():
        failed = update(changed(waiting, {path: value}))
        assert not failed.refusal


@pytest.mark.parametrize("kind", LIVE)
def test_kubectl_explains_every_field_of_the_spec(kind: str) -> None:
    """It prints a page for each object, all from one document of the API server: that document, and the first page."""
    expect = described(schemas(kind))
    assert len(expect) > 100
    assert all(expect.values())
    until = time.monotonic() + PUBLISHED_SECONDS
    while (found := published(kind)) != expect:
        assert time.monotonic() < until, {path for path in found | expect if found.get(path) != expect.get(path)}
        time.sleep(1)
    told = " ".join(kubectl("explain", f"{kind}.spec", f"--api-version={API_VERSION}").stdout.split())
    fields = {path.removeprefix("spec."): text for path, text in expect.items() if path.count(".") == 1}
    assert [name for name, text in fields.items() if f" {name} " not in told or text not in told] == []


def published(kind: str) -> dict[str, str]:
    """The descriptions that `kubectl explain` reads."""
    document = json.loads(kubectl("get", "--raw", f"/openapi/v3/apis/{API_VERSION}").stdout)
    group, _, version = API_VERSION.partition("/")
    name = ".".join([*reversed(group.split(".")), version, kind])
    return described(fields_of("spec", document["components"]["schemas"][name]["properties"]["spec"]))


def described(fields: Iterable[tuple[str, Document]]) -> dict[str, str]:
    """Path → description of each field, without the items of lists and the values of maps."""
    return {
        path: " ".join(node.get("description", "").split())
        for path, node in fields
        if "." in path and not path.endswith(("[]", "{}"))
    }
