"""What users come for: each method, each task, to Complete on a real cluster, with what was promised lying in the
workspace.

The jobs are applied together, as a user would who has a chain in mind: each waits for the job that it names.
"""

from __future__ import annotations

import json
import re

import pytest
from e2e import jobs
from e2e.kube import Kube, Object, condition, conditions
from hub import manifests as hub_manifests

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module", autouse=True)
def applied(kube: Kube) -> None:
    kube.apply(jobs.BASE, jobs.ADAPTER, jobs.QUANTISED, jobs.TEXT, jobs.CLASSIFIER, jobs.READER)


def folder(job: Object) -> str:
    """Where the inspector sees the job's workspace."""
    return f"/workspace/{job['status']['workspace']['folder']}"


def losses(job: Object) -> tuple[float, float]:
    metrics = job["status"]["metrics"]
    return metrics["evalLossBefore"], metrics["evalLoss"]


def test_a_job_waits_for_the_job_it_names(kube: Kube) -> None:
    kube.apply(jobs.fine_tune("early", model={"job": "not-yet"}, dataset=jobs.REGISTER))
    waiting = kube.until("ftj", "early", conditions, timeout=30, what="looked at")
    assert conditions(waiting)["Accepted"]["reason"] == "WaitingForJob"
    assert 'spec.model.job: there is no FineTuneJob "not-yet"' in conditions(waiting)["Accepted"]["message"]
    kube.delete("ftj", "early")


def test_full_fine_tuning_with_zero2_offload_on_two_processes(kube: Kube) -> None:
    job = kube.complete("ftj", "base")
    before, after = losses(job)
    assert after < before - 1
    plan = job["status"]["prepared"]["plan"]
    assert (plan["strategy"], plan["worldSize"]) == ("zero2-offload", 2)


def test_lora_over_two_pods_shows_its_progress(kube: Kube) -> None:
    running = kube.until(
        "ftj", "adapter", lambda o: o["status"].get("progress", {}).get("step"), timeout=300, what="at a step"
    )
    assert running["status"]["progress"]["loss"] > 0
    assert len(kube.list("pods", "luthier.dev/job=adapter,luthier.dev/phase=run")) == 2
    table = kube.run("get", "ftj", "adapter")
    assert re.search(r"NAME\s+STATE\s+STEP\s+LOSS\s+NODES×GPUS\s+RESTARTS\s+AGE", table)
    assert re.search(r"adapter\s+Running\s+\d+\s+\d+\.\d+\s+2×CPU", table)


ADAPTER_LOSS = """
import json, sys, torch
from datasets import load_from_disk
from peft import AutoPeftModelForCausalLM
folder = sys.argv[1]
model = AutoPeftModelForCausalLM.from_pretrained(folder + "/result").eval()
total = tokens = 0
with torch.no_grad():
    for row in load_from_disk(folder + "/prepared/dataset")["eval"]:
        ids = torch.tensor([row["input_ids"]])
        count = ids.shape[1] - 1
        total += model(input_ids=ids, labels=ids).loss.item() * count
        tokens += count
print(json.dumps(total / tokens))
"""


def test_the_adapter_loads_with_plain_peft_and_has_the_loss_of_the_status(kube: Kube) -> None:
    job = kube.complete("ftj", "adapter")
    before, after = losses(job)
    assert after < before
    measured = json.loads(kube.python("inspector", ADAPTER_LOSS, folder(job)).splitlines()[-1])
    assert measured == pytest.approx(after, abs=2e-3)


def test_the_result_is_on_the_hub_at_the_revision_of_the_status(kube: Kube, system: Kube) -> None:
    job = kube.complete("ftj", "adapter")
    hub = job["status"]["hub"]
    assert hub["repo"] == "luthier/adapter"
    assert re.fullmatch(r"[0-9a-f]{40}", hub["revision"])
    manifest = json.loads(kube.run("exec", "inspector", "--", "cat", f"{folder(job)}/result/MANIFEST.json"))
    tree = hub_manifests.tree(system, hub["repo"], hub["revision"])
    assert {f["path"]: f["size"] for f in manifest["files"]}.items() <= {f["path"]: f["size"] for f in tree}.items()


def test_qlora_in_one_pod(kube: Kube) -> None:
    before, after = losses(kube.complete("ftj", "quantised"))
    assert after < before


def test_classification_on_a_pretrained_encoder(kube: Kube) -> None:
    metrics = kube.complete("ftj", "classifier")["status"]["metrics"]
    assert metrics["majorityShare"] == pytest.approx(0.25)
    assert metrics["accuracy"] > 0.6


def test_what_should_be_known_stands_in_the_status_and_is_an_event(kube: Kube) -> None:
    job = kube.complete("ftj", "classifier")
    head = next((text for text in job["status"]["notices"] if "begins with random weights" in text), None)
    assert head, job["status"]["notices"]
    assert head.startswith("spec.model: it has no head for labels")
    assert "Notice" in kube.events("classifier")


def test_image_classification_over_two_pods(kube: Kube) -> None:
    job = kube.complete("ftj", "reader")
    metrics = job["status"]["metrics"]
    assert metrics["accuracy"] > 0.7 > 0.2 > metrics["majorityShare"]
    assert job["status"]["prepared"]["dataset"]["labels"] == [str(digit) for digit in range(10)]
    assert "preprocessor_config.json" in kube.run("exec", "inspector", "--", "ls", f"{folder(job)}/result")


def test_text_with_the_adapter(kube: Kube) -> None:
    job = kube.complete("gj", "text")
    assert job["status"]["progress"]["rows"] == 3
    lines = kube.run("exec", "inspector", "--", "sh", "-c", f"cat {folder(job)}/result/*.jsonl").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [r["prompt"] for r in rows] == [r["prompt"] for r in jobs.TEXT["spec"]["inputs"]["rows"]]
    assert all(r["text"].strip() for r in rows)


def test_an_adapter_of_another_job_as_a_model_each_on_a_claim_of_its_own(kube: Kube) -> None:
    """The base model lies in the workspace of a third job, which the GenerateJob does not name."""
    kube.apply(jobs.REGISTERED, jobs.MERGED)
    kube.complete("ftj", "registered")
    assert kube.complete("gj", "merged")["status"]["metrics"]["rows"] == 1
    prepare = kube.list("jobs", "luthier.dev/job=merged,luthier.dev/phase=prepare")[0]
    mounted = {m["mountPath"] for m in prepare["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]}
    assert {"/sources/work", "/sources/ftj-registered"} <= mounted


def test_events_tell_the_story(kube: Kube) -> None:
    kube.complete("ftj", "adapter")
    told = kube.events("adapter")
    assert {"Preparing", "Prepared", "Started", "Trained", "Publishing", "Published", "Completed"} <= set(told)
    assert len(told) < 20


def test_the_job_ends_with_every_condition_a_program_may_wait_for(kube: Kube) -> None:
    job = kube.complete("ftj", "adapter")
    assert {t for t in conditions(job) if condition(job, t) == "True"} >= {
        "Accepted",
        "Prepared",
        "Trained",
        "Published",
        "Complete",
    }
    assert kube.run("wait", "--for=condition=Complete", "ftj/adapter", "--timeout=5s")
