"""Accept, as a table: what must be there before anything is created."""

from __future__ import annotations

import pytest
from cases.observed import NOW, child, decided, describe, fine_tune, generate, said, status

from luthier_operator.model import Decision

SOURCE = {"model": {"job": "base"}}
BASE = {"base": fine_tune(status("Trained", state="Publishing"), name="base")}
RUNNING_BASE = {"base": fine_tune(status(state="Running"), name="base")}
FAILED_BASE = {"base": fine_tune(status("Failed"), name="base")}
ADAPTER = {"adapters": [{"id": "org/style"}, {"job": "style"}]}
MANY_ROWS = {"inputs": {"rows": [{"prompt": "x" * 8000}] * 200}}

CASES = [
    ("nothing is missing", lambda: decided(fine_tune()), "True Accepted: The job can run", "Preparing"),
    (
        "a queue for a job without GPUs",
        lambda: decided(fine_tune(resources={"gpusPerNode": 0}, scheduling={"queueName": "team-a"})),
        'True Accepted: The job can run. spec.scheduling.queueName: "team-a" is not asked, because the job holds no'
        " GPUs",
        "Preparing",
    ),
    (
        "no JobSet",
        lambda: decided(fine_tune(), jobset_installed=False),
        (
            "False JobSetMissing: FineTuneJobs need JobSet, which this cluster does not have. Install it: kubectl apply"
            " --server-side -f https://github.com/kubernetes-sigs/jobset/releases/download/v0.12.0/manifests.yaml"
        ),
        "Pending",
    ),
    (
        "no JobSet, but generation needs none",
        lambda: decided(generate(), jobset_installed=False),
        "True Accepted: The job can run",
        "Preparing",
    ),
    (
        "no JobSet any more, once begun",
        lambda: (
            (j := fine_tune(status("Accepted"))) and decided(j, child(j, "prepare", born=NOW), jobset_installed=False)
        ),
        "True Accepted: ",
        "Preparing",
    ),
    (
        "the named job does not exist",
        lambda: decided(fine_tune(**SOURCE)),
        'False WaitingForJob: spec.model.job: there is no FineTuneJob "base" in this namespace; waiting for its result',
        "Waiting",
    ),
    (
        "the named job still runs",
        lambda: decided(fine_tune(**SOURCE), sources=RUNNING_BASE),
        'False WaitingForJob: spec.model.job: FineTuneJob "base" is Running; waiting for its result',
        "Waiting",
    ),
    (
        "the named job has its result, and publishes it",
        lambda: decided(fine_tune(**SOURCE), sources=BASE),
        "True Accepted: The job can run",
        "Preparing",
    ),
    (
        "the named job has failed",
        lambda: decided(fine_tune(**SOURCE), sources=FAILED_BASE),
        (
            'False SourceFailed: spec.model.job: FineTuneJob "base" has failed, so there is no result to start from. '
            "Create this job again once it has succeeded"
        ),
        "Failed",
    ),
    (
        "an adapter's job does not exist",
        lambda: decided(generate(**ADAPTER)),
        (
            'False WaitingForJob: spec.adapters[1].job: there is no FineTuneJob "style" in this namespace; waiting for'
            " its result"
        ),
        "Waiting",
    ),
    (
        "it names itself",
        lambda: decided(fine_tune(name="base", **SOURCE), sources=BASE),
        "False InvalidSpec: spec.model.job: base is this job itself; name the job whose result it starts from",
        "Failed",
    ),
    (
        "a GenerateJob may be called as its model",
        lambda: decided(generate(name="base", **SOURCE), sources=BASE),
        "True Accepted: The job can run",
        "Preparing",
    ),
    (
        "the names of a hundred pods would be too long",
        lambda: decided(fine_tune(name="n" * 40, resources={"nodes": 100}, training={"batchSize": 100})),
        (
            "False InvalidSpec: metadata.name: with spec.resources.nodes: 100, at most 39 characters, so that the names"
            " of pods fit; choose a shorter one"
        ),
        "Failed",
    ),
    (
        "the longest name for ten nodes",
        lambda: decided(fine_tune(name="n" * 40, resources={"nodes": 10}, training={"batchSize": 80})),
        "True Accepted: The job can run",
        "Preparing",
    ),
    (
        "more rows than a ConfigMap holds",
        lambda: decided(generate(**MANY_ROWS)),
        "False InvalidSpec: spec: 16",
        "Failed",
    ),
]


@pytest.mark.parametrize(("given", "expect", "state"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_accept(given: object, expect: str, state: str) -> None:
    decision: Decision = given()  # type: ignore[operator]
    assert said(decision, "Accepted")[: len(expect)] == expect
    assert decision.status.state == state


def test_only_a_queue_that_is_named_is_worth_a_remark() -> None:
    assert said(decided(fine_tune(resources={"gpusPerNode": 0})), "Accepted") == "True Accepted: The job can run"
    assert said(decided(fine_tune(scheduling={"queueName": "team-a"})), "Accepted") == "True Accepted: The job can run"


def test_a_status_that_was_not_written_is_caught_up_with() -> None:
    """The operator died between creating the Job and writing the status."""
    job = fine_tune()
    decision = decided(job, child(job, "prepare"))
    assert said(decision, "Accepted") == "True Accepted: The job can run"
    assert decision.status.start_time == "2026-03-01T11:00:00Z", "when the Job was created"


def test_only_a_job_that_had_to_wait_is_told_that_it_may_begin() -> None:
    waited = fine_tune(status(false={"Accepted": "JobSetMissing"}))
    assert [e.reason for e in decided(waited).events] == ["Accepted", "Preparing"]
    assert [e.reason for e in decided(fine_tune()).events] == ["Preparing"]


def test_a_job_that_waits_looks_again_without_any_event() -> None:
    assert describe(decided(fine_tune(**SOURCE))) == "again in 30 s"
    assert describe(decided(fine_tune(), jobset_installed=False)) == "again in 30 s"


def test_too_many_rows_are_sent_to_a_file() -> None:
    assert "spec.inputs.dataset.files" in said(decided(generate(**MANY_ROWS)), "Failed")
