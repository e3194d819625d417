"""A job that uses the results of several others waits for all of them, and never for itself."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from harness import fine_tune, generate

from luthier_api.kinds import FineTuneJob, GenerateJob
from luthier_operator.model import Object
from luthier_operator.workloads import workload
from luthier_operator.workloads.sources import cycle


def rewarded(name: str, model: str, *judges: str) -> Object:
    """A job that improves the result of `model` by what `judges` say."""
    rewards = [{"type": "model", "model": {"job": judge}} for judge in judges]
    return fine_tune(name, task="grpo", model={"job": model}, grpo={"rewards": rewards})


@dataclass(frozen=True)
class Case:
    name: str
    jobs: list[Object]
    expect: tuple[str, ...]


CASES = [
    Case(
        name="a chain",
        jobs=[rewarded("a", "base", "judge"), fine_tune("judge", model={"job": "base"}), fine_tune("base")],
        expect=(),
    ),
    Case(
        name="over the model of a reward",
        jobs=[rewarded("a", "base", "judge"), fine_tune("judge", model={"job": "a"}), fine_tune("base")],
        expect=("a", "judge", "a"),
    ),
    Case(
        name="another job's cycle",
        jobs=[rewarded("a", "b", "b"), fine_tune("b", model={"job": "c"}), fine_tune("c", model={"job": "b"})],
        expect=(),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cycles_over_any_source(case: Case) -> None:
    jobs = {job["metadata"]["name"]: FineTuneJob.model_validate(job) for job in case.jobs}
    assert cycle(jobs["a"], jobs.get) == case.expect


def test_each_source_has_its_field() -> None:
    job = FineTuneJob.model_validate(rewarded("a", "base", "judge", "other"))
    assert workload(job).sources == {
        "spec.model.job": "base",
        "spec.grpo.rewards[0].model.job": "judge",
        "spec.grpo.rewards[1].model.job": "other",
    }


def test_a_cycle_of_outputs() -> None:
    def using(name: str, other: str) -> GenerateJob:
        spec = {"model": {"job": "base"}, "inputs": {"job": other, "columns": {"prompt": "text"}}}
        return GenerateJob.model_validate(generate(name, **spec))

    jobs = {f"GenerateJob/{name}": using(name, other) for name, other in (("a", "b"), ("b", "c"), ("c", "b"))}
    names = ("b", "c", "b")
    assert cycle(jobs["GenerateJob/b"], jobs.get) == tuple(f"GenerateJob/{name}" for name in names)
    assert cycle(jobs["GenerateJob/a"], jobs.get) == ()
