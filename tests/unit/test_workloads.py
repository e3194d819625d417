"""What each kind of job answers about itself."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import pytest
from cases.observed import PREPARED, fine_tune, generate

from luthier_api.kinds import KINDS, JobKind
from luthier_api.status import JobStatus
from luthier_operator.model import Job
from luthier_operator.workloads import WORKLOADS, workload
from luthier_operator.workloads.base import Workload


@dataclass(frozen=True)
class Case:
    name: str
    job: Job
    pods: str
    shape: str
    groups: list[list[int]]
    gpus_at_once: int
    processes_per_pod: int
    sources: dict[str, str]


CASES = [
    Case(
        name="2 nodes of 8 GPUs, from the result of a job",
        job=fine_tune(model={"job": "base"}),
        pods="2 pods on 16 GPUs",
        shape="2×8",
        groups=[[0, 1]],
        gpus_at_once=16,
        processes_per_pod=8,
        sources={"spec.model.job": "base"},
    ),
    Case(
        name="2 processes on one node without a GPU",
        job=fine_tune(resources={"gpusPerNode": 0, "processesPerNode": 2}),
        pods="1 pod on CPU",
        shape="1×CPU",
        groups=[[0]],
        gpus_at_once=0,
        processes_per_pod=2,
        sources={},
    ),
    Case(
        name="3 shards with an adapter of a job",
        job=generate(shards=3, adapters=[{"id": "org/one"}, {"job": "style"}]),
        pods="3 shards on 3 GPUs",
        shape="3×1",
        groups=[[0], [1], [2]],
        gpus_at_once=1,
        processes_per_pod=1,
        sources={"spec.adapters[1].job": "style"},
    ),
    Case(
        name="a model and inputs of two jobs of one name",
        job=generate(shards=1, model={"job": "lute"}, inputs={"job": "lute", "columns": {"prompt": "text"}}),
        pods="1 shard on 1 GPU",
        shape="1×1",
        groups=[[0]],
        gpus_at_once=1,
        processes_per_pod=1,
        sources={"spec.model.job": "lute", "spec.inputs.job": "GenerateJob/lute"},
    ),
    Case(
        name="1 shard without a GPU",
        job=generate(shards=1, resources={"gpus": 0}),
        pods="1 shard on CPU",
        shape="1×CPU",
        groups=[[0]],
        gpus_at_once=0,
        processes_per_pod=1,
        sources={},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_pods_and_sources(case: Case) -> None:
    work = workload(case.job)
    assert work.describe_pods() == case.pods
    assert work.shape == case.shape
    assert work.groups == case.groups
    assert work.gpus_at_once == case.gpus_at_once
    assert work.processes_per_pod == case.processes_per_pod
    assert work.sources == case.sources


@pytest.mark.parametrize("kind", list(JobKind))
def test_every_kind_has_a_workload_and_its_fields_exist(kind: JobKind) -> None:
    of_kind = WORKLOADS[kind]
    assert of_kind.kind is kind
    assert set(KINDS) == set(WORKLOADS)
    _, resources, field = of_kind.gpus_field.split(".")
    spec = KINDS[kind].model.model_fields["spec"].annotation
    assert spec is not None
    model = spec.model_fields[resources].annotation
    assert field in {info.alias for info in model.model_fields.values()}


@pytest.mark.parametrize("kind", list(JobKind))
def test_every_member_without_a_default_is_implemented(kind: JobKind) -> None:
    """mypy does not see a member of the Protocol that a kind has left out: its body would return None."""
    for name, member in vars(Workload).items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if name.startswith("_") or not inspect.isfunction(function):
            continue
        if inspect.getsource(function).rstrip().endswith("..."):
            assert name in vars(WORKLOADS[kind]), name


def test_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(ValueError, match="'EvaluateJob' is not a valid JobKind"):
        workload(fine_tune().model_copy(update={"kind": "EvaluateJob"}))


@dataclass(frozen=True)
class SumCase:
    name: str
    job: Job
    metrics: dict[int, dict[str, float]]
    expect: dict[str, float] | None


SUMS = [
    SumCase(
        name="rank 0 speaks for all",
        job=fine_tune(),
        metrics={0: {"loss": 2.0}, 1: {"loss": 9.0}},
        expect={"loss": 2.0},
    ),
    SumCase(
        name="rank 0 is missing",
        job=fine_tune(),
        metrics={1: {"loss": 9.0}},
        expect=None,
    ),
    SumCase(
        name="shards are added",
        job=generate(shards=2),
        metrics={0: {"rows": 3.0}, 1: {"rows": 4.0, "failed": 1.0}},
        expect={"rows": 7.0, "failed": 1.0},
    ),
    SumCase(
        name="scores of all outputs are not added",
        job=generate(shards=3),
        metrics={0: {"rows": 3.0, "scoredRows": 2.0}, 1: {"rows": 4.0, "bleu": 40.0}, 2: {"rows": 1.0, "bleu": 40.0}},
        expect={"rows": 8.0, "scoredRows": 2.0, "bleu": 40.0},
    ),
    SumCase(
        name="a shard is missing",
        job=generate(shards=2),
        metrics={1: {"rows": 4.0}},
        expect=None,
    ),
]


@pytest.mark.parametrize("case", SUMS, ids=lambda case: case.name)
def test_final_metrics(case: SumCase) -> None:
    assert workload(case.job).final_metrics(case.metrics) == case.expect


def test_progress_of_a_generation_counts_the_outputs_of_the_whole_job() -> None:
    shard = {"luthier_generate_rows": 90.0, "luthier_generate_max_rows": 100.0}
    dataset = PREPARED.dataset.model_copy(update={"rows": 300, "outputs": 900})
    prepared = PREPARED.model_copy(update={"dataset": dataset})
    job = generate(shards=9).model_copy(update={"status": JobStatus(prepared=prepared)})
    progress = workload(job).progress({3: shard}, None)
    assert progress is not None
    assert (progress.rows, progress.max_rows, progress.percent) == (90, 900, 10)
