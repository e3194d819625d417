"""What each field decides, and what is drawn from it."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
from cases.api import FINE_TUNE, GENERATE, Change, Document, changed

from luthier_api.base import ApiModel, once_for_each
from luthier_api.decides import (
    CIRCUMSTANCES,
    LIFE_CYCLE,
    Changes,
    marked_paths,
    marks,
    result_part,
    run_part,
    urgent_part,
)
from luthier_api.kinds import KINDS, parse_job
from luthier_api.marks import digests
from luthier_api.status import Checkpoint, JobStatus


class Unmarked(ApiModel):
    marked: Annotated[int, LIFE_CYCLE] = 1
    forgotten: int = 1


def test_a_field_without_a_mark_is_an_error_by_name() -> None:
    with pytest.raises(
        TypeError, match=r"^Unmarked\.forgotten: mark it with what it decides: RESULT, PLACE, LAYOUT, CIRCUM"
    ):
        marks(Unmarked)


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_of_a_spec_has_a_mark(kind: Any) -> None:
    assert len(marks(KINDS[kind].spec)) == len(KINDS[kind].spec.model_fields)


@pytest.mark.parametrize("kind", KINDS)
def test_a_field_with_a_mark_of_its_own_lies_in_a_block_that_never_changes(kind: Any) -> None:
    """Of such a block the rules compare each other field. Of other blocks they compare the whole."""
    paths = marked_paths(KINDS[kind].spec)
    inner = [path for path in paths if "." in path]
    assert [path for path in inner if paths[path.partition(".")[0]].value.changes is not Changes.NEVER] == []
    assert [path for path in inner if path.count(".") > 1] == []
    assert [path for path in inner if paths[path].value.in_run != paths[path.partition(".")[0]].value.in_run] == []


@dataclass(frozen=True)
class Case:
    name: str
    base: Document
    change: Change
    in_result: bool
    """Whether prepared data, checkpoints and outputs are those of another job then."""
    in_run: bool
    """Whether the run config is another then."""


CASES = [
    Case(
        name="what is learnt",
        base=FINE_TUNE,
        change={"spec.training.learningRate": 0.5},
        in_result=True,
        in_run=True,
    ),
    Case(
        name="how processes share the work",
        base=FINE_TUNE,
        change={"spec.strategy": "zero2"},
        in_result=False,
        in_run=True,
    ),
    Case(
        name="how many processes there are",
        base=FINE_TUNE,
        change={"spec.resources.nodes": 2},
        in_result=True,
        in_run=True,
    ),
    Case(
        name="how memory is spent",
        base=FINE_TUNE,
        change={"spec.training.microBatchSize": 2, "spec.training.gradientCheckpointing": True},
        in_result=False,
        in_run=True,
    ),
    Case(
        name="the memory of a pod",
        base=FINE_TUNE,
        change={"spec.resources.memory": "8Gi"},
        in_result=False,
        in_run=True,
    ),
    Case(
        name="the cores of a shard",
        base=GENERATE,
        change={"spec.resources.cpu": 4},
        in_result=False,
        in_run=True,
    ),
    Case(
        name="how often a checkpoint is saved, and how many are kept",
        base=FINE_TUNE,
        change={"spec.training.saveSteps": 7, "spec.training.keepCheckpoints": 1},
        in_result=False,
        in_run=True,
    ),
    Case(
        name="how often the loss is reported",
        base=FINE_TUNE,
        change={"spec.training.logSteps": 7},
        in_result=False,
        in_run=True,
    ),
    Case(
        name="when the model is evaluated",
        base=FINE_TUNE,
        change={"spec.dataset.evalFraction": 0.1, "spec.training.evalSteps": 7},
        in_result=True,
        in_run=True,
    ),
    Case(
        name="where the pods run",
        base=GENERATE,
        change={"spec.scheduling.nodeSelector": {"gpu": "h100"}},
        in_result=False,
        in_run=True,
    ),
    Case(
        name="where data lies",
        base=GENERATE,
        change={"spec.volumes": [{"claimName": "data", "mountPath": "/data"}]},
        in_result=False,
        in_run=True,
    ),
    Case(
        name="how outputs are dealt out to shards",
        base=GENERATE,
        change={"spec.shards": 2},
        in_result=True,
        in_run=True,
    ),
    Case(
        name="one row among others",
        base=GENERATE,
        change={"spec.inputs.rows": [{"prompt": "a lute", "seed": 7}]},
        in_result=True,
        in_run=True,
    ),
    Case(
        name="where the result is published",
        base=GENERATE,
        change={"spec.hub": {"repo": "org/lutes", "tokenSecretRef": {"name": "hf"}}},
        in_result=False,
        in_run=True,
    ),
    Case(
        name="how often a shard is started again",
        base=GENERATE,
        change={"spec.retriesPerShard": 9},
        in_result=False,
        in_run=False,
    ),
    Case(
        name="when the job rests, ends and goes",
        base=FINE_TUNE,
        change={
            "spec.suspend": True,
            "spec.planOnly": True,
            "spec.activeDeadlineSeconds": 60,
            "spec.ttlSecondsAfterFinished": 60,
            "spec.restarts": {"max": 9},
            "spec.retry": 1,
        },
        in_result=False,
        in_run=False,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_a_field_decides(case: Case) -> None:
    before, after = (parse_job(document).spec for document in (case.base, changed(case.base, case.change)))
    assert before != after
    assert (result_part(before) != result_part(after)) == case.in_result
    assert (run_part(before) != run_part(after)) == case.in_run


@dataclass(frozen=True)
class DigestCase:
    name: str
    base: Document
    change: Change
    expect: set[str]
    """Paths of the fields that make a failed job resume."""


DIGESTS = [
    DigestCase(
        name="what decides the result",
        base=FINE_TUNE,
        change={"spec.training.epochs": 3},
        expect=set(),
    ),
    DigestCase(
        name="a default that is written out",
        base=FINE_TUNE,
        change={"spec.training.logSteps": 10, "spec.scheduling": {"tolerations": []}, "spec.retry": 0},
        expect=set(),
    ),
    DigestCase(
        name="fields inside of blocks",
        base=FINE_TUNE,
        change={"spec.training.microBatchSize": 2, "spec.resources.memory": "8Gi", "spec.restarts": {"max": 9}},
        expect={"training.microBatchSize", "resources.memory", "restarts"},
    ),
    DigestCase(
        name="of a GenerateJob",
        base=GENERATE,
        change={"spec.retriesPerShard": 9, "spec.scheduling": {"queueName": "team-a"}, "spec.retry": 1},
        expect={"retriesPerShard", "scheduling", "retry"},
    ),
    DigestCase(
        name="the life cycle",
        base=GENERATE,
        change={"spec.suspend": True, "spec.ttlSecondsAfterFinished": 60},
        expect=set(),
    ),
]


@pytest.mark.parametrize("case", DIGESTS, ids=lambda case: case.name)
def test_what_makes_a_failed_job_resume(case: DigestCase) -> None:
    before, after = (digests(parse_job(document).spec) for document in (case.base, changed(case.base, case.change)))
    assert {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)} == case.expect


def test_a_block_of_circumstances_is_left_out_whole() -> None:
    class Block(ApiModel):
        size: Annotated[int, CIRCUMSTANCES] = 1

    class Spec(ApiModel):
        block: Annotated[Block, CIRCUMSTANCES] = Block()

    assert result_part(Spec()) == {}


@dataclass(frozen=True)
class StatusCase:
    name: str
    before: dict[str, Any]
    after: dict[str, Any]
    waits: bool


STATUSES = [
    StatusCase(
        name="another step",
        before={"progress": {"step": 1}},
        after={"progress": {"step": 2}},
        waits=True,
    ),
    StatusCase(
        name="another checkpoint",
        before={"checkpoint": {"step": 1}},
        after={"checkpoint": {"step": 2}},
        waits=True,
    ),
    StatusCase(
        name="another message",
        before={"conditions": [{"type": "A", "status": "True", "reason": "R", "message": "1"}]},
        after={"conditions": [{"type": "A", "status": "True", "reason": "R", "message": "2"}]},
        waits=True,
    ),
    StatusCase(
        name="another reason",
        before={"conditions": [{"type": "A", "status": "True", "reason": "R"}]},
        after={"conditions": [{"type": "A", "status": "True", "reason": "S"}]},
        waits=False,
    ),
    StatusCase(
        name="another restart",
        before={"restarts": 0},
        after={"restarts": 1},
        waits=False,
    ),
]


@pytest.mark.parametrize("case", STATUSES, ids=lambda case: case.name)
def test_a_status_is_written_at_once_or_may_wait(case: StatusCase) -> None:
    assert (urgent_part(case.before, JobStatus) == urgent_part(case.after, JobStatus)) is case.waits


class Remembered:
    """What `once_for_each` keeps."""


def test_what_follows_from_an_object_is_kept_as_long_as_the_object() -> None:
    remembered = once_for_each(lambda checkpoint: Remembered())
    one, equal = Checkpoint(step=1), Checkpoint(step=1)
    assert remembered(one) is remembered(one)
    assert remembered(one) is not remembered(equal)
    kept = weakref.ref(remembered(one))
    assert kept()
    del one
    gc.collect()
    assert kept() is None
