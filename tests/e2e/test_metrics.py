"""Prometheus text of the operator and of pods at work: each name of docs/metrics.md is there, and says what is so.

The jobs are still at work when that is read, and are deleted after it: then all that they made goes, and a claim only
where the job says so.
"""

from __future__ import annotations

import time
from collections import Counter
from importlib.metadata import version

import pytest
from e2e import figures, jobs
from e2e.figures import documented
from e2e.kube import Kube

pytestmark = pytest.mark.e2e
STEPS, SAVE, RATE, ROWS = 5000, 50, 0.002, 1000
MEASURED = jobs.fine_tune(
    "measured",
    model={"job": "base"},
    dataset=jobs.REGISTER,
    method={"type": "lora", "rank": 2},
    workspace={"size": "1Gi", "whenDeleted": "Delete"},
    training=jobs.training(maxSteps=STEPS, saveSteps=SAVE, learningRate=RATE),
)
DRAWN = jobs.generate(
    "drawn",
    task="text-to-image",
    model={"path": "/data/sdxl"},
    batchSize=2,
    workspace={"size": "1Gi"},
    inputs={"rows": [{"prompt": f"a lute on a bench, study {i}"} for i in range(ROWS)]},
    image={"steps": 100, "width": 64, "height": 64},
)
MISTAKEN = jobs.fine_tune(
    "mistaken",
    model={"job": "base"},
    dataset={"files": ["/data/prose.txt"], "split": "train[500%:]"},
    training=jobs.training(),
)
JOBS = (("ftj", "measured"), ("gj", "drawn"))
# Lowest and highest value that is believed. A name of the page without a line here fails.
TRAINING = {
    "luthier_train_step": (SAVE, STEPS),
    "luthier_train_max_steps": (STEPS, STEPS),
    "luthier_train_epoch": (0.01, 10_000),
    "luthier_train_loss": (0.01, 20),
    "luthier_train_eval_loss": (0.01, 20),
    "luthier_train_learning_rate": (RATE / 100, RATE),
    "luthier_train_grad_norm": (1e-6, 1000),
    "luthier_train_tokens_total": (SAVE * 8 * 16, STEPS * 8 * 64),
    "luthier_train_padding_tokens_total": (0, STEPS * 8 * 64),
    "luthier_train_tokens_per_second": (10, 1e7),
    "luthier_train_samples_total": (SAVE * 8, STEPS * 8),
    "luthier_train_samples_per_second": (0.1, 1e6),
    "luthier_train_step_duration_seconds": (SAVE, STEPS),  # how many were measured
    "luthier_train_nonfinite_total": (0, 0),
    "luthier_train_eta_seconds": (1, 1e6),
    "luthier_train_memory_allocated_bytes": (1e7, 1e11),
    "luthier_train_memory_reserved_bytes": (1e7, 1e11),
    "luthier_train_memory_peak_bytes": (1e7, 1e11),
    "luthier_train_memory_peak_reserved_bytes": (1e7, 1e11),
    "luthier_checkpoint_last_step": (SAVE, STEPS),
    "luthier_checkpoint_last_success_timestamp_seconds": (1.7e9, 1e10),
    "luthier_checkpoint_duration_seconds": (0.001, 60),
    "luthier_checkpoints_broken": (0, 0),
    "luthier_heartbeat_age_seconds": (0, 300),
}
# Not served without a GPU (docs/metrics.md says it of each).
ON_GPUS = {
    "luthier_train_memory_planned_bytes",
    "luthier_train_plan_memory_ratio",
    "luthier_train_plan_seconds_ratio",
    "luthier_train_mfu_ratio",
    "luthier_train_gpu_hours",
}
GENERATION = {
    "luthier_generate_rows": (1, ROWS),
    "luthier_generate_max_rows": (ROWS, ROWS),
    "luthier_generate_failed_rows": (0, 0),
    "luthier_generate_rows_per_second": (0.01, 10_000),
    "luthier_heartbeat_age_seconds": (0, 300),
}
# Only where rows have references, and where images are checked.
ON_REQUEST = {"luthier_generate_scored_rows", "luthier_generate_score", "luthier_generate_unsafe_rows"}
OPERATOR = {
    "controller_runtime_reconcile_total": (3, 1e7),
    "controller_runtime_reconcile_errors_total": (0, 100),
    "controller_runtime_reconcile_time_seconds": (3, 1e7),
    "controller_runtime_active_workers": (0, 32),
    "controller_runtime_max_concurrent_reconciles": (32, 32),  # the chart's
    "workqueue_depth": (0, 100),
    "workqueue_adds_total": (3, 1e7),
    "workqueue_queue_duration_seconds": (3, 1e7),
    "workqueue_work_duration_seconds": (3, 1e7),
    "workqueue_retries_total": (0, 1000),
    "rest_client_requests_total": (10, 1e8),
    "leader_election_master_status": (1, 1),
    "luthier_build_info": (1, 1),
    "luthier_jobs": (4, 1000),
    "luthier_job_duration_seconds": (1, 1000),
    "luthier_job_queue_seconds": (2, 1000),
    "luthier_job_failures_total": (1, 1000),
    "luthier_progress_reads_total": (1, 1e7),
    "luthier_progress_interval_seconds": (0.1, 600),
    "luthier_events_dropped_total": (0, 0),
}
# Their first sample comes with the first event, and test_failures looks at them where it makes one.
LATER = {"luthier_job_restarts_total", "luthier_hub_upload_bytes_total", "luthier_hub_upload_failures_total"}


def believed(found: figures.Figures, ranges: dict[str, tuple[float, float]]) -> None:
    values = {name: found.total(name) for name in ranges}
    assert {name: value for name, value in values.items() if not ranges[name][0] <= value <= ranges[name][1]} == {}


@pytest.fixture(scope="module", autouse=True)
def applied(kube: Kube) -> None:
    kube.apply(jobs.BASE, MEASURED, DRAWN, MISTAKEN)


def pod_of(kube: Kube, name: str) -> figures.Figures:
    (pod,) = kube.list("pods", f"luthier.dev/job={name},luthier.dev/phase=run")
    return figures.of_pod(kube, pod)


def test_a_training_pod(kube: Kube) -> None:
    kube.until(
        "ftj",
        "measured",
        lambda o: (o["status"].get("checkpoint") or {}).get("step"),
        timeout=400,
        what="at a checkpoint",
    )
    found = pod_of(kube, "measured")
    found.check(m for m in documented("pod-metrics") if m.name in TRAINING)
    believed(found, TRAINING)
    assert found.total("luthier_checkpoint_last_step") % SAVE == 0
    assert ON_GPUS.isdisjoint(found.families)
    assert time.time() - found.total("luthier_checkpoint_last_success_timestamp_seconds") < 300


def test_a_shard_of_a_generation(kube: Kube) -> None:
    kube.until("gj", "drawn", lambda o: (o["status"].get("progress") or {}).get("rows"), timeout=400, what="at a row")
    found = pod_of(kube, "drawn")
    found.check(m for m in documented("pod-metrics") if m.name in GENERATION)
    believed(found, GENERATION)
    assert ON_REQUEST.isdisjoint(found.families)


def test_the_operator(kube: Kube) -> None:
    kube.failed("ftj", "mistaken")
    found = figures.of_operator(kube)
    found.check(documented("operator-metrics"), without_samples=LATER)
    believed(found, OPERATOR)
    assert found.total("luthier_build_info", version=version("luthier")) == 1
    assert figures.of_any_operator(kube).total("luthier_build_info", version=version("luthier")) == 1
    assert found.total("luthier_job_failures_total", kind="FineTuneJob", reason="InvalidSpec") >= 1
    assert found.total("luthier_job_duration_seconds", kind="FineTuneJob", result="failed") >= 1
    assert {found.total("luthier_job_queue_seconds", kind=kind) > 0 for kind in ("FineTuneJob", "GenerateJob")} == {
        True
    }
    states = Counter(
        (o["kind"], o["status"]["state"])
        for o in [*kube.list("ftj"), *kube.list("gj")]
        if o["metadata"]["name"] in ("measured", "drawn", "mistaken")
    )
    assert states == {("FineTuneJob", "Running"): 1, ("GenerateJob", "Running"): 1, ("FineTuneJob", "Failed"): 1}
    for (kind, state), number in states.items():
        assert found.total("luthier_jobs", kind=kind, state=state, namespace=kube.namespace) >= number


@pytest.mark.parametrize(
    ("kind", "name", "group", "left"), [("ftj", "measured", {"JobSet", "Service"}, 0), ("gj", "drawn", set(), 1)]
)
def test_a_running_job_goes_with_all_that_it_made(kube: Kube, kind: str, name: str, group: set[str], left: int) -> None:
    assert kube.list("pods", f"luthier.dev/job={name},luthier.dev/phase=run")[0]["status"]["phase"] == "Running"
    kube.delete_with_children(kind, name, {"ConfigMap", "Job", "Pod"} | group)
    kube.until_claims(name, left)
