"""CRDs that are newer or older than the operator, on a real API server, which prunes and defaults as they say."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from perf.operator_process import AuditLog, verb_and_resource

from cluster import choice
from cluster.operating import TOP, World, audit_log, connected, job, kubectl, namespaces, operator, until
from luthier_operator import reconcile
from luthier_operator.client import RESOURCES
from luthier_operator.model import Object

pytestmark = pytest.mark.cluster
NAMESPACE = "test-skew"
CRD = "finetunejobs.luthier.dev"
KEPT = ("conditions", "state", "startTime", "completionTime", "observedGeneration", "writes")
"""Fields of the status that the older CRD knows."""


@pytest.fixture(scope="module", autouse=True)
def running(cluster: None) -> Iterator[None]:
    if isinstance(choice.cluster(), choice.Given) and not audit_log().exists():
        pytest.skip("it changes the CRDs of the cluster that KUBECONFIG names")
    with namespaces(NAMESPACE), operator(NAMESPACE):
        yield
        install(lambda properties: None)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with connected() as client:
        yield World(client, NAMESPACE)


def install(change: Callable[[Object], Any]) -> None:
    """The CRD of FineTuneJobs, with other properties of spec and status."""
    found = next(
        o
        for path in (Path(TOP) / "crds").glob("*.yaml")
        for o in yaml.safe_load_all(path.read_text())
        if o["metadata"]["name"] == CRD
    )
    change(found["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"])
    kubectl("replace", "-f", "-", document=found)


def with_new_field(properties: Object) -> None:
    properties["spec"]["properties"]["later"] = {"type": "string", "default": "x"}


def with_new_task(properties: Object) -> None:
    properties["spec"]["properties"]["task"]["enum"].append("telepathy")


def without_most_of_the_status(properties: Object) -> None:
    status = properties["status"]["properties"]
    for name in status.keys() - set(KEPT):
        del status[name]


async def test_a_field_of_a_newer_crd_is_named_and_ignored(world: World) -> None:
    install(with_new_field)
    await until("the default of the new field", lambda: creates(world, "newer", lambda o: "later" in o["spec"]))
    found = await until("named", lambda: touched(world, "newer"), seconds=120)
    assert found["message"].startswith("spec.later: this operator")
    await world.prepare("newer")
    await until("a JobSet", lambda: world.get("JobSet", "ftj-newer-run"))
    config = await world.get("ConfigMap", "ftj-newer")
    assert config is not None
    assert "later" not in config["data"]["run.json"]


async def test_a_value_of_a_newer_crd_is_left_to_the_newer_operator(world: World) -> None:
    install(with_new_task)
    await until("the new task", lambda: creates(world, "telepathic", lambda o: True, task="telepathy"))
    found = await world.until_condition("FineTuneJob", "telepathic", "Accepted", "NotUnderstood")
    assert "\nspec.task: input should be 'causal-lm'" in found["message"]
    assert await world.get("Job", "ftj-telepathic-prepare") is None


async def test_an_older_crd_that_drops_most_of_the_status_stops_no_job(world: World) -> None:
    install(without_most_of_the_status)
    await world.create(job("FineTuneJob", "asked", suspend=True))
    await until("the older schema", lambda: drops(world, "asked"))
    audit = AuditLog(audit_log(), NAMESPACE)
    await world.create(job("FineTuneJob", "older"))
    await world.prepare("older")
    await until("a JobSet", lambda: world.get("JobSet", "ftj-older-run"))
    await asyncio.sleep(3)
    found = await world.get("FineTuneJob", "older")
    assert found is not None
    assert found["status"].keys() <= set(KEPT), "the schema is the older one"
    # What the controllers still report is written once, and so is a pod that is late.
    at_rest, before = 0, -1
    for _ in range(4):
        before, at_rest = at_rest, len(statuses(audit))
        if before == at_rest:
            break
        await asyncio.sleep(reconcile.CREATED_SECONDS + 1)
    assert before == at_rest, "what is dropped is not written again and again"
    assert at_rest <= 8


def statuses(audit: AuditLog) -> list[Object]:
    return [c for c in audit.calls() if verb_and_resource(c) == "patch/finetunejobs/status"]


async def drops(world: World, name: str) -> bool:
    """Whether the API server would drop a field of the status that it knows by the newer schema."""
    path = RESOURCES["FineTuneJob"].path(NAMESPACE, name, "status")
    content, patch = "application/merge-patch+json", {"status": {"state": "Pending", "restarts": 7}}
    _, _, answer = await world.client._send("PATCH", path, {"dryRun": "All"}, patch, content)
    found = json.loads(answer)
    return found.get("status", {}).get("state") == "Pending" and "restarts" not in found["status"]


async def touched(world: World, name: str) -> Object | None:
    """The condition FieldsIgnored. A watch that has begun under the earlier schema goes on for up to a minute, and does
    not show the field: each change of the job is another chance.
    """
    await world.patch("FineTuneJob", name, {"metadata": {"annotations": {"touched": str(time.monotonic())}}})
    await asyncio.sleep(1)
    return await world.condition("FineTuneJob", name, "FieldsIgnored")


async def creates(world: World, name: str, right: Callable[[Object], bool], **spec: Any) -> bool:
    """Whether the API server takes the job, by the new schema; then it is created. A dry run asks: the operator would
    begin with a job that is created and deleted again, and its objects would stand in the way of the next one.
    """
    wanted = job("FineTuneJob", name, **spec)
    path = RESOURCES["FineTuneJob"].path(NAMESPACE)
    status, _, answer = await world.client._send("POST", path, {"dryRun": "All"}, wanted, "application/json")
    if status != 201 or not right(json.loads(answer)):
        return False
    await world.create(wanted)
    return True
