"""The ledger of a shard: what an attempt takes over from the one before, and what lies in `result/` at the end."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from trainer.generating import IMAGE, sample

from luthier_api.exitcodes import ExitCode
from luthier_api.tasks import GENERATION_TASKS, GenerateTask
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.generation import ledger, result
from luthier_trainer.generation.engines.base import batches
from luthier_trainer.generation.engines.table import ENGINES, engine_class
from luthier_trainer.generation.ledger import Shard
from luthier_trainer.generation.records import image_folder
from luthier_trainer.generation.result import shard_manifest
from luthier_trainer.generation.samples import Output, Sample, padded
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.heartbeat import HEARTBEAT_FILE, STARTING_FILE
from luthier_trainer.runtime.run_folder import run_dir

SETTINGS = {"task": "text-to-image", "guidance": 5.0, "steps": 2}
SAMPLES = [
    sample("a lute", seed=7, row=0, index=0, number=0, settings=IMAGE),
    sample("a lute", seed=8, row=0, index=1, number=1, settings=IMAGE),
    sample("two lutes", seed=9, row=1, negative="rain", number=2, settings=IMAGE),
]


def opened(tmp_path: Path, settings: dict[str, Any] = SETTINGS) -> Shard:
    records = engine_class(settings["task"]).records
    return Shard(WorkspaceFolder(tmp_path), 0, 1, records, range(3), settings, "here")


def resumed(tmp_path: Path, settings: dict[str, Any] = SETTINGS) -> Shard:
    shard = opened(tmp_path, settings)
    shard.resume()
    return shard


def left(shard: Shard) -> list[Sample]:
    return [s for s in SAMPLES if s.number >= shard.first_left and not shard.is_there(s.number)]


def output(sample: Sample) -> Output:
    """An image for row 0, an error for row 1."""
    return (
        Output(sample, error="too dark")
        if sample.row == 1
        else Output(sample, file=lambda: b"image %d" % sample.seed, suffix="png")
    )


def written(tmp_path: Path) -> Shard:
    shard = resumed(tmp_path)
    assert left(shard) == SAMPLES
    shard.append([output(s) for s in SAMPLES])
    return shard


def journal(shard: Shard) -> Path:
    return shard.files / "journal.jsonl"


def cut_last_line(shard: Shard) -> None:
    journal(shard).write_bytes(journal(shard).read_bytes()[:-20])


def cut_last_newline(shard: Shard) -> None:
    journal(shard).write_bytes(journal(shard).read_bytes()[:-1])


def lose_first_image(shard: Shard) -> None:
    (shard.files / "images/0000/000000-00.png").unlink()


def cut_first_image(shard: Shard) -> None:
    (shard.files / "images/0000/000000-00.png").write_bytes(b"im")


def spoil_first_image(shard: Shard) -> None:
    """As long as before."""
    (shard.files / "images/0000/000000-00.png").write_bytes(b"imagE 7")


def repeat_first_line(shard: Shard) -> None:
    journal(shard).write_bytes(journal(shard).read_bytes() + journal(shard).read_bytes().splitlines(keepends=True)[0])


def spoil_middle_line(shard: Shard) -> None:
    lines = journal(shard).read_bytes().splitlines(keepends=True)
    journal(shard).write_bytes(lines[0] + b"\0" * 40 + b"\n" + lines[2])


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
        name="the journal is gone",
        damage=lambda s: journal(s).unlink(),
        expect=[0, 1, 2],
    ),
]


@pytest.mark.parametrize("sealed", [1000, 2, 1], ids=lambda size: f"segments of {size}")
@pytest.mark.parametrize("case", DAMAGE, ids=lambda case: case.name)
def test_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: DamageCase, sealed: int) -> None:
    case.damage(written(tmp_path))
    shard = resumed(tmp_path)
    assert left(shard) == [SAMPLES[i] for i in case.expect]
    # From here on with shorter segments: what is left moves into tables in the order of the outputs.
    monkeypatch.setattr(ledger, "SEGMENT", sealed)
    shard.append([output(s) for s in left(shard)])
    assert (shard.done, shard.failed, shard.first_error) == (3, 1, "row 1: too dark")
    shard.finish({"failedRows": 1})
    assert [(line["row"], line["sample"]) for line in table(shard)] == [(0, 0), (0, 1), (1, 0)]


@dataclass(frozen=True)
class OtherJobCase:
    name: str
    settings: dict[str, Any]
    reason: str


OTHER_JOBS = [
    OtherJobCase(
        name="another setting",
        settings=SETTINGS | {"steps": 3},
        reason="steps was 2 and is 3",
    ),
    OtherJobCase(
        name="one setting less",
        settings={"task": "text-to-image", "guidance": 5.0},
        reason="steps was 2 and is null",
    ),
]


@pytest.mark.parametrize("case", OTHER_JOBS, ids=lambda case: case.name)
def test_outputs_of_other_settings_do_not_count(tmp_path: Path, case: OtherJobCase) -> None:
    written(tmp_path)
    notices.forget()
    assert left(resumed(tmp_path, case.settings)) == SAMPLES
    assert notices.given() == [
        f"spec: 3 of 3 outputs that an earlier attempt left in shard-00000-of-00001 are not used: 3 because"
        f" {case.reason}"
    ]


def test_a_line_cut_by_a_kill_is_no_news(tmp_path: Path) -> None:
    cut_last_line(written(tmp_path))
    notices.forget()
    resumed(tmp_path)
    assert notices.given() == []


def test_outputs_are_checked_before_the_first_heartbeat(tmp_path: Path) -> None:
    """The model is loaded afterwards, which may take longer than an output."""
    written(tmp_path)
    for name in (STARTING_FILE, HEARTBEAT_FILE):
        (run_dir() / name).unlink(missing_ok=True)
    resumed(tmp_path)
    assert (run_dir() / STARTING_FILE).exists()
    assert not (run_dir() / HEARTBEAT_FILE).exists()


def test_a_pod_that_was_replaced_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pod on a lost node may go on writing beside the pod that replaces it, on another kind of GPU."""
    monkeypatch.setattr(ledger, "SEGMENT", 2)
    lost, other = resumed(tmp_path), resumed(tmp_path)
    other.append([output(SAMPLES[0])])
    lost.append([Output(SAMPLES[0], file=lambda: b"IMAGE 7", suffix="png")])
    other.append([output(s) for s in SAMPLES[1:]])
    other.finish({"failedRows": 1})
    with pytest.raises(Failure, match="another pod has taken over the shard"):
        lost.append([output(SAMPLES[1])])
    assert table(other)[0]["sha256"] == hashlib.sha256(b"image 7").hexdigest()
    assert (tmp_path / "result/shard-00000-of-00001" / table(other)[0]["file_name"]).read_bytes() == b"image 7"


def lose_an_image(shard: Shard) -> None:
    (shard.files / "images/0000/000000-01.png").unlink()


def spoil_the_table(shard: Shard) -> None:
    path = shard.files / "table.jsonl"
    path.write_bytes(path.read_bytes().replace(b"two lutes", b"two LUTES").replace(b'"sample": 1', b'"sample": 7'))


@pytest.mark.parametrize("damage", [lose_an_image, spoil_the_table])
def test_what_is_damaged_before_the_end_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Shard], None]
) -> None:
    monkeypatch.setattr(ledger, "SEGMENT", 1)
    shard = written(tmp_path)
    damage(shard)
    with pytest.raises(Failure, match="2 of 3 outputs of shard-00000-of-00001 are made again") as failure:
        shard.finish({"failedRows": 1})
    assert failure.value.code is ExitCode.STORAGE_ERROR
    shard = resumed(tmp_path)
    assert left(shard) == SAMPLES[1:]
    shard.append([output(s) for s in left(shard)])
    shard.finish({"failedRows": 1})
    assert [(line["row"], line["sample"]) for line in table(shard)] == [(0, 0), (0, 1), (1, 0)]


def table(shard: Shard) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for line in (shard.result.folder / shard.result.name / "metadata.jsonl").read_text().splitlines()
    ]


def test_every_task_has_an_engine() -> None:
    assert set(ENGINES) == set(GENERATION_TASKS)


@pytest.mark.parametrize("task", ENGINES)
def test_every_line_of_a_task_has_the_same_keys(task: GenerateTask, tmp_path: Path) -> None:
    shard = resumed(tmp_path, {"task": task})
    values = dict.fromkeys(getattr(shard.records, "values", ()), "a")
    good = {"text": "a", "values": values, "file": lambda: b"i", "suffix": "png"}
    samples = [replace(s, cells=dict.fromkeys(GENERATION_TASKS[task].columns, "a")) for s in SAMPLES]
    shard.append([Output(samples[0], **good), Output(samples[1], error="too long")])
    lines = [tuple(json.loads(line.partition("\t")[2])) for line in journal(shard).read_text().splitlines()]
    assert lines == [shard.records.keys] * 2


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "a volume without hard links"])
def test_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(result.os, "link", refuse)
    shard = written(tmp_path)
    metrics = {"rows": 3.0, "failedRows": 1.0}
    assert shard.result.metrics(range(3), shard.settings) is None
    shard.finish(metrics)
    found_in, manifest = tmp_path / "result", json.loads(shard_manifest(WorkspaceFolder(tmp_path), 0, 1).read_text())
    assert [f["path"] for f in manifest["files"]] == [
        "shard-00000-of-00001/metadata.jsonl",
        "shard-00000-of-00001/images/0000/000000-00.png",
        "shard-00000-of-00001/images/0000/000000-01.png",
    ]
    assert list(manifest["runs"].values()) == [{"settings": SETTINGS, "environment": "here"}]
    assert {line["run"] for line in table(shard)} == set(manifest["runs"])
    for file in manifest["files"]:
        content = (found_in / file["path"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file["size"], file["sha256"])
    found = {str(p.relative_to(found_in)) for p in found_in.rglob("*") if p.is_file()}
    assert found == {f["path"] for f in manifest["files"]} | {"shard-00000-of-00001.MANIFEST.json"}
    # Asked again, a complete shard says what it said.
    assert opened(tmp_path).result.metrics(range(3), shard.settings) == metrics
    assert opened(tmp_path).result.metrics(range(3), SETTINGS | {"steps": 3}) is None
    # And one that lost an image of its result while it had no manifest puts it back.
    shard.result.open()
    (found_in / "shard-00000-of-00001/images/0000/000000-01.png").unlink()
    resumed(tmp_path).finish(metrics)
    assert (found_in / "shard-00000-of-00001/images/0000/000000-01.png").read_bytes() == b"image 8"


def test_an_image_made_again_leaves_the_result_alone(tmp_path: Path) -> None:
    written(tmp_path).finish({"failedRows": 1})
    again = resumed(tmp_path, SETTINGS | {"steps": 3})
    again.append([Output(SAMPLES[0], file=lambda: b"another", suffix="png")])
    assert (tmp_path / "result/shard-00000-of-00001/images/0000/000000-00.png").read_bytes() == b"image 7"


@pytest.mark.parametrize("per_prompt", [1, 8, 9, 1000])
def test_no_folder_holds_ten_thousand_images(per_prompt: int) -> None:
    files = Counter(image_folder(row, index) for row in range(2500) for index in range(per_prompt))
    assert max(files.values()) <= 8000
    assert image_folder(1234, 0) == "images/0001"


def test_batches_hold_samples_of_one_group_and_each_once() -> None:
    samples = [sample(prompt, row=i) for i, prompt in enumerate("aabaabb")]
    assert [[s.row for s in batch] for batch in batches(samples, lambda s: s.prompt, 2)] == [
        [0, 1],
        [3, 4],
        [2, 5],
        [6],
    ]


def test_padding_repeats_the_first() -> None:
    assert padded(SAMPLES[1:], 4) == [SAMPLES[1], SAMPLES[2], SAMPLES[1], SAMPLES[1]]
