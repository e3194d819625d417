"""What the descriptions of fields that may change while a job lives promise: when a change counts."""

from __future__ import annotations

from cases.api import schemas
from cases.observed import BEGIN, child, decided, describe, fine_tune, generate, status

from luthier_api.status import Plan, Prepared, ResolvedDataset, ResolvedSource
from luthier_operator.statuses import text

AT_WORK = status("Accepted", "Prepared", "Running", start_time=text(BEGIN), restarts=3, restarts_charged=2)
PROMISE = "Read when the run is created: to apply a change to a running job, suspend and resume it."


def test_restarts_count_for_the_run_that_is_created_next() -> None:
    job = fine_tune(AT_WORK, restarts={"max": 7})
    assert describe(decided(job, child(job, "prepare", "Complete"), child(job, "run"))) == "waits"
    (made,) = decided(job, child(job, "prepare", "Complete")).apply
    assert made["spec"]["failurePolicy"]["maxRestarts"] == 7 - 2
    assert dict(schemas("FineTuneJob"))["spec.restarts.max"]["description"].endswith(PROMISE)


def test_the_plan_gives_the_pods_of_the_run_their_grace() -> None:
    """The plan is in the status that this reconcile writes, and not yet in the job that it has read."""
    plan = Plan(strategy="none", grace_seconds=1333)
    found = Prepared(model=ResolvedSource(source="m"), dataset=ResolvedDataset(source="d", rows=1), plan=plan)
    job = fine_tune(status("Accepted", "Prepared", start_time=text(BEGIN), prepared=found))
    (made,) = decided(job, child(job, "prepare", "Complete")).apply
    assert (
        made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        == 1333
    )


def test_retries_of_shards_count_for_the_run_that_is_created_next() -> None:
    job = generate(AT_WORK, retriesPerShard=7)
    assert describe(decided(job, child(job, "prepare", "Complete"), child(job, "run"))) == "waits"
    (made,) = decided(job, child(job, "prepare", "Complete")).apply
    assert made["spec"]["backoffLimitPerIndex"] == 7
    assert dict(schemas("GenerateJob"))["spec.retriesPerShard"]["description"].endswith(PROMISE)
