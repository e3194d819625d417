"""CUDA out of memory: the run is retried once with smaller micro-batches, in steps over the same rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from cases.observed import BEGIN, PREPARED, child, decided, describe, ended, fine_tune, run_document, said, status

from luthier_api.status import AppliedSpec
from luthier_operator import naming
from luthier_operator.model import Object
from luthier_operator.statuses import text

BEGUN = status("Accepted", "Prepared", start_time=text(BEGIN))
JOB = fine_tune(BEGUN)


def group(state: str = "", reason: str = "") -> Object:
    return child(JOB, "run", state, reason=reason)


@dataclass(frozen=True)
class OutOfMemoryCase:
    name: str
    micro_batch: int
    accumulation: int
    expect: tuple[int, int] | None
    """Micro-batch and accumulation of the next attempt. None: the job fails."""
    normalizes: bool = False
    spec: dict[str, Any] = field(default_factory=dict)
    reduced: int | None = None


OUT_OF_MEMORY = [
    OutOfMemoryCase(
        name="half of the rows",
        micro_batch=8,
        accumulation=2,
        expect=(4, 4),
    ),
    OutOfMemoryCase(
        name="an odd number of rows: the next smaller divisor of the step's",
        micro_batch=5,
        accumulation=3,
        expect=(1, 15),
    ),
    OutOfMemoryCase(
        name="a number that divides with the accumulation",
        micro_batch=9,
        accumulation=4,
        expect=(4, 9),
    ),
    OutOfMemoryCase(
        name="one row already",
        micro_batch=1,
        accumulation=8,
        expect=None,
    ),
    OutOfMemoryCase(
        name="once",
        micro_batch=4,
        accumulation=4,
        reduced=4,
        expect=None,
    ),
    OutOfMemoryCase(
        name="where the result depends on the rows of a forward pass",
        micro_batch=8,
        accumulation=2,
        normalizes=True,
        expect=None,
    ),
    OutOfMemoryCase(
        name="where the loss compares the rows of a forward pass",
        micro_batch=8,
        accumulation=2,
        spec={"task": "embedding"},
        expect=None,
    ),
]


@pytest.mark.parametrize("case", OUT_OF_MEMORY, ids=lambda case: case.name)
def test_cuda_out_of_memory_is_retried_once_with_smaller_micro_batches(case: OutOfMemoryCase) -> None:
    plan = PREPARED.plan.model_copy(
        update={
            "micro_batch_size": case.micro_batch,
            "accumulation_steps": case.accumulation,
            "normalizes_over_batch": case.normalizes or None,
        }
    )
    prepared = PREPARED.model_copy(update={"plan": plan})
    given = BEGUN.model_copy(update={"prepared": prepared, "reduced_micro_batch_size": case.reduced})
    old = group("Failed", reason="FailJobSetFailurePolicyAction")
    ends = [ended(JOB, "run", 79, 0, message="CUDA out of memory. The GPU is full")]
    decision = decided(fine_tune(given, **case.spec), old, ends=ends)
    if case.expect is None:
        assert describe(decision) == "Failed CudaOutOfMemory"
        assert decision.status.prepared == prepared
        return
    assert decision.status.prepared is not None
    planned = decision.status.prepared.plan
    assert (planned.micro_batch_size, planned.accumulation_steps) == case.expect
    assert (
        planned.reasons == decision.status.notices == [f"{said(decision, 'Running').partition(' exit code 79). ')[2]}"]
    )
    assert (decision.status.state, decision.status.completion_time) == ("Restarting", None)
    assert [e.reason for e in decision.events] == ["Notice"]
    job = fine_tune(decision.status)
    assert describe(decided(job, old, ends=ends)) == "deletes JobSet ftj-bot-run"
    gone = decided(job, ends=ends)
    assert describe(gone) == "repairs ConfigMap ftj-bot; applies JobSet ftj-bot-run"
    assert run_document(gone.repair)["spec"]["training"]["microBatchSize"] == case.expect[0]
    assert gone.apply[0]["metadata"]["annotations"][naming.BEFORE_ANNOTATION] == "1,0"


def test_another_layout_is_planned_without_the_reduction() -> None:
    status_before = BEGUN.model_copy(
        update={"prepared": PREPARED, "reduced_micro_batch_size": 2, "applied_spec": AppliedSpec(generation=0)}
    )
    decision = decided(fine_tune(status_before, strategy="zero3"), group())
    assert (decision.status.prepared, decision.status.reduced_micro_batch_size) == (None, None)
