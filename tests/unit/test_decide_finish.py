"""Finish: exactly one end, the time to live, and what is written after it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cases.observed import (
    BEGIN,
    NOW,
    at,
    child,
    decided,
    describe,
    ended,
    fine_tune,
    hub_end,
    prepared_end,
    said,
    status,
)

from luthier_api.status import JobStatus, Phase
from luthier_operator.model import Job, Object, PodEnd
from luthier_operator.statuses import text

TRAINED = status("Accepted", "Prepared", "Trained", start_time=text(BEGIN), metrics={"evalLoss": 1.5})
ENDED = {"completion_time": text(at(-60))}

TTL = [
    ("none", status("Complete", **ENDED), {}, "Complete Complete"),
    ("not over", status("Complete", **ENDED), {"ttlSecondsAfterFinished": 100}, "Complete Complete; again in 40 s"),
    ("over", status("Complete", **ENDED), {"ttlSecondsAfterFinished": 60}, "deletes the job; Complete Complete"),
    ("over, of a failure", status("Failed", **ENDED), {"ttlSecondsAfterFinished": 0}, "deletes the job; Failed Failed"),
    ("not finished", status("Accepted", "Prepared"), {"ttlSecondsAfterFinished": 0}, "applies JobSet ftj-bot-run"),
]


@pytest.mark.parametrize(("given", "spec", "expect"), [c[1:] for c in TTL], ids=[c[0] for c in TTL])
def test_the_time_to_live(given: object, spec: dict[str, int], expect: str) -> None:
    assert describe(decided(fine_tune(given, **spec))) == expect  # type: ignore[arg-type]


def test_complete_says_where_the_result_is() -> None:
    job = fine_tune(TRAINED)
    decision = decided(job, child(job, "run", "Complete"))
    assert said(decision, "Complete") == "True Completed: the result is in ftj-bot-f00dcafe/result of claim ftj-bot"
    assert (decision.status.completion_time, decision.status.state) == (text(NOW), "Complete")
    assert [(e.type, e.reason) for e in decision.events] == [("Normal", "Completed")]


def run_end(job: Job) -> PodEnd:
    return ended(job, "run", 0, metrics={"evalLoss": 1.5})


HUB = {"repo": "org/bot", "tokenSecretRef": {"name": "hf"}}
BEGUN = {"start_time": text(BEGIN)}
LAST_WORDS = [
    ("prepare", status("Accepted", **BEGUN), {"planOnly": True}, prepared_end, "Planned"),
    ("run", status("Accepted", "Prepared", "Running", **BEGUN), {}, run_end, "Complete"),
    (
        "publish",
        status("Accepted", "Prepared", "Trained", metrics={"evalLoss": 1.5}, **BEGUN),
        {"hub": HUB},
        hub_end,
        "Complete",
    ),
]


@pytest.mark.parametrize(("phase", "given", "spec", "words", "expect"), LAST_WORDS, ids=[c[0] for c in LAST_WORDS])
def test_the_last_words_of_a_phase_are_waited_for_but_not_for_ever(
    phase: Phase, given: JobStatus, spec: Object, words: Callable[[Job], PodEnd], expect: str
) -> None:
    """A Job and its pod are watched apart: whoever reads Planned, Trained or Complete finds there what the pods have
    said.
    """
    job = fine_tune(given, **spec)
    just = child(job, phase, "Complete", since=at(-1))
    silent = decided(job, just)
    assert (describe(silent), [c.type for c in silent.status.conditions]) == (
        "again in 3 s",
        [c.type for c in given.conditions],
    )
    told = decided(job, just, ends=[words(job)])
    assert told.status.state == expect
    assert (told.status.prepared, told.status.metrics, told.status.hub)[
        ("prepare", "run", "publish").index(phase)
    ] is not None
    assert decided(job, child(job, phase, "Complete", since=at(-4))).status.state == expect


def test_what_comes_after_the_end_is_still_written() -> None:
    job = fine_tune(
        status("Accepted", "Prepared", "Trained", "Published", "Complete", **ENDED),
        hub={"repo": "org/bot", "tokenSecretRef": {"name": "hf"}},
    )
    decision = decided(job, ends=[ended(job, "run", 0, metrics={"evalLoss": 1.25}), hub_end(job)])
    assert decision.status.metrics == {"evalLoss": 1.25}
    assert decision.status.hub is not None
    assert decision.status.hub.revision == "abcdef0123456789"


def test_nothing_is_done_for_a_finished_job_whatever_is_left() -> None:
    for end in ("Complete", "Failed"):
        job = fine_tune(status("Accepted", end, **ENDED), suspend=True, activeDeadlineSeconds=1)
        decision = decided(job, child(job, "run"))
        assert (decision.apply, decision.delete, decision.status.is_true("Suspended")) == ((), (), False)


def test_a_job_that_is_being_deleted_is_left_to_the_garbage_collector() -> None:
    job = fine_tune(TRAINED)
    going = job.model_copy(update={"metadata": job.metadata.model_copy(update={"deletion_timestamp": text(NOW)})})
    assert describe(decided(going)) == "waits"
    assert decided(going).status == TRAINED
