"""The CRDs on a real API server: they are accepted (structure, CEL cost), and each rule lets pass and refuses what the table says."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from cases.api import CASES, FINE_TUNE, FIXED, GENERATE, LIVE, Case, Document, all_rules, changed

pytestmark = pytest.mark.cluster
CRDS = sorted((Path(__file__).resolve().parents[2] / "crds").glob("*.yaml"))


def kubectl(*arguments: str, document: Document | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["kubectl", *arguments], capture_output=True, text=True, check=False, input=json.dumps(document) if document else None
    )


@pytest.fixture(scope="module", autouse=True)
def crds(cluster: None) -> None:
    """Applying them proves that they are structural and that the cost of every rule is within the budget."""
    files = [argument for path in CRDS for argument in ("-f", str(path))]
    applied = kubectl("apply", "--server-side", "--force-conflicts", *files)
    assert applied.returncode == 0, applied.stderr
    assert kubectl("wait", "--for=condition=Established", "--timeout=30s", *files).returncode == 0


def create(document: Document) -> subprocess.CompletedProcess[str]:
    return kubectl("create", "--dry-run=server", "-f", "-", document=document)


def test_every_rule_has_a_case() -> None:
    rules = [rule.message for rule in all_rules() if not rule.transition]
    assert [m for m in rules if not any(m.startswith(case.message) for case in CASES)] == []
    assert [case.message for case in CASES if not any(m.startswith(case.message) for m in rules)] == []


@pytest.mark.parametrize("case", CASES, ids=[f"{c.base['kind']}: {c.message}" for c in CASES])
def test_a_rule_refuses_and_lets_pass(case: Case) -> None:
    refused = create(changed(case.base, case.refused))
    assert refused.returncode != 0
    assert case.message in refused.stderr
    accepted = create(changed(case.base, case.accepted))
    assert accepted.returncode == 0, accepted.stderr


@pytest.mark.parametrize("base", [FINE_TUNE, GENERATE], ids=["FineTuneJob", "GenerateJob"])
def test_unknown_fields_are_refused(base: Document) -> None:
    answer = create(changed(base, {"spec.modle": {"id": "x"}}))
    assert answer.returncode != 0
    assert 'unknown field "spec.modle"' in answer.stderr


@pytest.fixture(scope="module")
def existing() -> dict[str, Document]:
    """One suspended job of each kind."""
    documents = {}
    for base in (FINE_TUNE, GENERATE):
        document = changed(base, {"metadata.name": "fixed", "spec.suspend": True})
        kubectl("delete", base["kind"], "fixed", "--ignore-not-found")
        assert kubectl("create", "-f", "-", document=document).returncode == 0
        documents[base["kind"]] = document
    yield documents
    for kind in documents:
        kubectl("delete", kind, "fixed")


@pytest.mark.parametrize(("field", "base", "change"), FIXED, ids=[f"{b['kind']}.{f}" for f, b, _ in FIXED])
def test_a_field_is_fixed(existing: dict[str, Document], field: str, base: Document, change: dict[str, object]) -> None:
    answer = kubectl(
        "apply", "--server-side", "--dry-run=server", "--force-conflicts", "-f", "-", document=changed(existing[base["kind"]], change)
    )
    assert answer.returncode != 0
    assert f"spec.{field} cannot change once the job exists" in answer.stderr


def test_every_fixed_field_has_a_case() -> None:
    told = {rule.message.split()[0].removeprefix("spec.") for rule in all_rules() if rule.transition}
    assert told == {field for field, _, _ in FIXED}


@pytest.mark.parametrize("field", LIVE)
@pytest.mark.parametrize("kind", ["FineTuneJob", "GenerateJob"])
def test_a_field_may_change(existing: dict[str, Document], kind: str, field: str) -> None:
    answer = kubectl(
        "apply", "--server-side", "--dry-run=server", "--force-conflicts", "-f", "-", document=changed(existing[kind], {field: LIVE[field]})
    )
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize("kind", ["finetunejobs", "generatejobs"])
def test_kubectl_explains_every_field_of_the_spec(kind: str) -> None:
    text = kubectl("explain", f"{kind}.spec", "--api-version=luthier.dev/v1alpha1").stdout
    assert "DESCRIPTION" in text
    assert "task" in text
