"""The ledger of a shard: what an attempt takes over from the one before, and what lies in `result/` at the end."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from luthier_api.tasks import GENERATION_TASKS, GenerateTask
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.generation import ledger as shards
from luthier_trainer.generation.engines.table import ENGINES, engine_class
from luthier_trainer.generation.ledger import Shard, shard_manifest
from luthier_trainer.generation.main import batches
from luthier_trainer.generation.records import image_folder
from luthier_trainer.generation.samples import Output, Sample, padded
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.heartbeat import HEARTBEAT_FILE, STARTING_FILE
from luthier_trainer.runtime.run_folder import run_dir

SETTINGS = {"task": "text-to-image", "guidance": 5.0, "steps": 2}
SAMPLES = [Sample(0, 0, "a lute", None, 7), Sample(0, 1, "a lute", None, 8), Sample(1, 0, "two lutes", "rain", 9)]


def opened(tmp_path: Path, settings: dict[str, Any] = SETTINGS) -> Shard:
    return Shard(WorkspaceFolder(tmp_path), 0, 1, engine_class(settings["task"]).records, settings, "here")


def output(sample: Sample) -> Output:
    """An image for row 0, an error for row 1."""
    return (
        Output(sample, error="too dark")
        if sample.row == 1
        else Output(sample, file=lambda: b"image %d" % sample.seed, suffix="png")
    )


def written(tmp_path: Path) -> Shard:
    shard = opened(tmp_path)
    assert shard.resume(SAMPLES) == SAMPLES
    shard.append([output(s) for s in SAMPLES])
    return shard


def cut_last_line(shard: Shard) -> None:
    shard.ledger.write_bytes(shard.ledger.read_bytes()[:-20])


def cut_last_newline(shard: Shard) -> None:
    shard.ledger.write_bytes(shard.ledger.read_bytes()[:-1])


def lose_first_image(shard: Shard) -> None:
    (shard.folder.shards / shard.own / "images/0000/000000-00.png").unlink()


def cut_first_image(shard: Shard) -> None:
    (shard.folder.shards / shard.own / "images/0000/000000-00.png").write_bytes(b"im")


def spoil_first_image(shard: Shard) -> None:
    """As long as before."""
    (shard.folder.shards / shard.own / "images/0000/000000-00.png").write_bytes(b"imagE 7")


def repeat_first_line(shard: Shard) -> None:
    shard.ledger.write_bytes(shard.ledger.read_bytes() + shard.ledger.read_bytes().splitlines(keepends=True)[0])


def spoil_middle_line(shard: Shard) -> None:
    lines = shard.ledger.read_bytes().splitlines(keepends=True)
    shard.ledger.write_bytes(lines[0] + b"\0" * 40 + b"\n" + lines[2])


@dataclass(frozen=True)
class DamageCase:
    name: str
    damage: Callable[[Shard], None]
    expect: list[int]


DAMAGE = [
    DamageCase(
        name="nothing",
        damage=lambda s: None,
        expect=[],
    ),
    DamageCase(
        name="torn last line",
        damage=cut_last_line,
        expect=[2],
    ),
    DamageCase(
        name="last line without its end",
        damage=cut_last_newline,
        expect=[2],
    ),
    DamageCase(
        name="an image is gone",
        damage=lose_first_image,
        expect=[0],
    ),
    DamageCase(
        name="an image is short",
        damage=cut_first_image,
        expect=[0],
    ),
    DamageCase(
        name="an image is another of the same size",
        damage=spoil_first_image,
        expect=[0],
    ),
    DamageCase(
        name="a line is there twice",
        damage=repeat_first_line,
        expect=[],
    ),
    DamageCase(
        name="a block of zeros",
        damage=spoil_middle_line,
        expect=[1],
    ),
    DamageCase(
        name="the ledger is gone",
        damage=lambda s: s.ledger.unlink(),
        expect=[0, 1, 2],
    ),
]


@pytest.mark.parametrize("case", DAMAGE, ids=lambda case: case.name)
def test_resume(tmp_path: Path, case: DamageCase) -> None:
    case.damage(written(tmp_path))
    shard = opened(tmp_path)
    assert shard.resume(SAMPLES) == [SAMPLES[i] for i in case.expect]
    shard.append([output(SAMPLES[i]) for i in case.expect])
    lines = [json.loads(line) for line in shard.ledger.read_text().splitlines()]
    assert sorted((line["row"], line["sample"]) for line in lines) == [(0, 0), (0, 1), (1, 0)]
    assert (len(shard.done), shard.failed, shard.first_error) == (3, 1, "row 1: too dark")


def replaced(index: int, **facts: Any) -> list[Sample]:
    return [Sample(**{**vars(s), **facts}) if i == index else s for i, s in enumerate(SAMPLES)]


@dataclass(frozen=True)
class OtherJobCase:
    name: str
    samples: list[Sample]  # of the job as it is now
    settings: dict[str, Any]
    left: list[int]  # samples that have no line of an earlier job
    reason: str


OTHER_JOBS = [
    OtherJobCase(
        name="another prompt",
        samples=replaced(1, prompt="an oud"),
        settings=SETTINGS,
        left=[1],
        reason="1 because the row has another prompt",
    ),
    OtherJobCase(
        name="another seed",
        samples=replaced(0, seed=70),
        settings=SETTINGS,
        left=[0],
        reason="1 because the row has another seed",
    ),
    OtherJobCase(
        name="no negative prompt any more",
        samples=replaced(2, negative_prompt=None),
        settings=SETTINGS,
        left=[2],
        reason="1 because the row has another negativePrompt",
    ),
    OtherJobCase(
        name="a negative prompt",
        samples=replaced(0, negative_prompt="rain"),
        settings=SETTINGS,
        left=[0],
        reason="1 because the row has another negativePrompt",
    ),
    OtherJobCase(
        name="fewer rows",
        samples=SAMPLES[:1],
        settings=SETTINGS,
        left=[],
        reason="2 because no such row is asked for any more",
    ),
    OtherJobCase(
        name="another setting",
        samples=SAMPLES,
        settings=SETTINGS | {"steps": 3},
        left=[0, 1, 2],
        reason="3 because steps was 2 and is 3",
    ),
    OtherJobCase(
        name="one setting less",
        samples=SAMPLES,
        settings={"task": "text-to-image", "guidance": 5.0},
        left=[0, 1, 2],
        reason="3 because steps was 2 and is null",
    ),
]


@pytest.mark.parametrize("case", OTHER_JOBS, ids=lambda case: case.name)
def test_lines_of_another_job_do_not_count(tmp_path: Path, case: OtherJobCase) -> None:
    written(tmp_path)
    notices.forget()
    shard = opened(tmp_path, case.settings)
    assert shard.resume(case.samples) == [case.samples[i] for i in case.left]
    assert set(shard.done) == {s.key for s in case.samples} - {case.samples[i].key for i in case.left}
    count = case.reason.partition(" ")[0]
    assert notices.given() == [
        f"spec: {count} of 3 outputs that an earlier attempt left in shard-00000-of-00001.jsonl are not used:"
        f" {case.reason}"
    ]


def test_a_line_cut_by_a_kill_is_no_news(tmp_path: Path) -> None:
    cut_last_line(written(tmp_path))
    notices.forget()
    opened(tmp_path).resume(SAMPLES)
    assert notices.given() == []


def test_outputs_are_checked_before_the_first_heartbeat(tmp_path: Path) -> None:
    """The model is loaded afterwards, which may take longer than an output."""
    written(tmp_path)
    for name in (STARTING_FILE, HEARTBEAT_FILE):
        (run_dir() / name).unlink(missing_ok=True)
    opened(tmp_path).resume(SAMPLES)
    assert (run_dir() / STARTING_FILE).exists()
    assert not (run_dir() / HEARTBEAT_FILE).exists()


def test_other_columns_that_changed_cost_no_output(tmp_path: Path) -> None:
    written(tmp_path)
    shard = opened(tmp_path)
    assert shard.resume(replaced(0, input={"id": 5})) == []
    shard.finish({})
    assert [line["input"] for line in table(shard)] == [{"id": 5}, None, None]


def test_lines_of_two_pods_become_one_that_fits_the_image(tmp_path: Path) -> None:
    """The pod of a lost node writes on: its line comes last, and either pod's image is the one that is there."""
    for last in (b"image 7", b"IMAGE 7"):
        folder = tmp_path / last.decode()
        shard = written(folder)
        shard.append([Output(SAMPLES[0], file=lambda: b"IMAGE 7", suffix="png")])
        image = shard.folder.shards / shard.own / "images/0000/000000-00.png"
        image.write_bytes(last)
        shard.ledger.write_bytes(shard.ledger.read_bytes() + b'{"row": 0, "sam')
        shard.finish({})
        lines = table(shard)
        assert [(line["row"], line["sample"]) for line in lines] == [(0, 0), (0, 1), (1, 0)]
        assert lines[0]["sha256"] == hashlib.sha256(last).hexdigest()
        assert (folder / "result" / shard.own / lines[0]["file_name"]).read_bytes() == last


def table(shard: Shard) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (shard.folder.result / shard.own / "metadata.jsonl").read_text().splitlines()]


def test_every_task_has_an_engine() -> None:
    assert set(ENGINES) == set(GENERATION_TASKS)


@pytest.mark.parametrize("task", ENGINES)
def test_every_line_of_a_task_has_the_same_keys(task: GenerateTask, tmp_path: Path) -> None:
    shard = opened(tmp_path, {"task": task})
    good = {"text": "a", "file": lambda: b"i", "suffix": "png"}
    shard.append([Output(SAMPLES[0], **good), Output(SAMPLES[1], error="too long")])
    lines = [tuple(json.loads(line)) for line in shard.ledger.read_text().splitlines()]
    assert lines == [shard.records.keys] * 2


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "a volume without hard links"])
def test_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(shards.os, "link", refuse)
    shard = written(tmp_path)
    metrics = {"rows": 3.0, "seconds": 5.0}
    assert shard.finish(metrics) == metrics
    result, manifest = tmp_path / "result", json.loads(shard_manifest(shard.folder, 0, 1).read_text())
    assert [f["path"] for f in manifest["files"]] == [
        "shard-00000-of-00001/metadata.jsonl",
        "shard-00000-of-00001/images/0000/000000-00.png",
        "shard-00000-of-00001/images/0000/000000-01.png",
    ]
    for file in manifest["files"]:
        content = (result / file["path"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file["size"], file["sha256"])
    found = {str(p.relative_to(result)) for p in result.rglob("*") if p.is_file()}
    assert found == {f["path"] for f in manifest["files"]} | {"shard-00000-of-00001.MANIFEST.json"}
    # Asked again, a complete shard says what it said.
    assert shard.finish({"rows": 3.0, "seconds": 0.0}) == metrics
    # And one that lost an image of its result while it had no manifest puts it back.
    shard.open_result()
    (result / "shard-00000-of-00001/images/0000/000000-01.png").unlink()
    assert shard.finish(metrics) == metrics
    assert (result / "shard-00000-of-00001/images/0000/000000-01.png").read_bytes() == b"image 8"


def test_an_image_made_again_leaves_the_result_alone(tmp_path: Path) -> None:
    shard = written(tmp_path)
    shard.finish({})
    shard.append([Output(SAMPLES[0], file=lambda: b"another", suffix="png")])
    assert (tmp_path / "result/shard-00000-of-00001/images/0000/000000-00.png").read_bytes() == b"image 7"


@pytest.mark.parametrize("per_prompt", [1, 8, 9, 1000])
def test_no_folder_holds_ten_thousand_images(per_prompt: int) -> None:
    files = Counter(image_folder(row, index) for row in range(2500) for index in range(per_prompt))
    assert max(files.values()) <= 8000
    assert image_folder(1234, 0) == "images/0001"


class Pairs:
    """An engine that puts at most two samples of one prompt together."""

    batch_size = 2

    def problem(self, sample: Sample) -> str | None:
        return None

    def group(self, sample: Sample) -> str:
        return sample.prompt

    def make(self, samples: Any) -> list[Output]:
        return [output(s) for s in samples]


def test_batches_hold_samples_of_one_group_and_each_once() -> None:
    samples = [Sample(i, 0, prompt, None, i) for i, prompt in enumerate("aabaabb")]
    assert [[s.row for s in batch] for batch in batches(Pairs(), samples)] == [[0, 1], [3, 4], [2, 5], [6]]


def test_padding_repeats_the_first() -> None:
    assert padded(SAMPLES[1:], 4) == [SAMPLES[1], SAMPLES[2], SAMPLES[1], SAMPLES[1]]
