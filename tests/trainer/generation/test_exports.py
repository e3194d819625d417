"""Outputs in other forms than lines: the same bytes for any number of shards, and what `load_dataset` reads of them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image
from trainer.generating import IMAGE, TEXT, generate_run, prepare_by_hand, sample

from luthier_api.outputs import LINES, OUTPUT_FORMATS, OutputFormat
from luthier_api.run import GenerateRun
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.generation.engines.table import engine_class
from luthier_trainer.generation.exports import parts
from luthier_trainer.generation.exports.table import WRITERS, deliver, move
from luthier_trainer.generation.ledger import Shard
from luthier_trainer.generation.rows import span_of_shard
from luthier_trainer.generation.samples import Output
from luthier_trainer.publish import main as publish
from luthier_trainer.workspace.prepared import read_prepared


def png(row: int) -> bytes:
    """An image whose colour is the number of its row."""
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (row, 0, 0)).save(content, "PNG")
    return content.getvalue()


def image(row: int, **more: Any) -> Output:
    return Output(
        sample(f"prompt {row}", row=row, settings=IMAGE, number=row, **more), file=lambda: png(row), suffix="png"
    )


def text(row: int, **more: Any) -> Output:
    facts = {"finishReason": "stop", "promptTokens": 2, "newTokens": row}
    return Output(sample(f"prompt {row}", row=row, settings=TEXT, number=row, **more), facts, text=f"text {row} ü")


def error(row: int, settings: Any) -> Output:
    return Output(sample(f"prompt {row}", row=row, settings=settings, number=row), error="too long")


IMAGES = [image(0, input={"a": 1}), image(1, negative="rain"), error(2, IMAGE), image(3, input={"a": "x"}), image(4)]
TEXTS = [
    text(0),
    error(1, TEXT),
    text(2, input={"n": 2, "tags": ["a", "b"]}),
    text(3, overrides={"stop": ["."]}),
    text(4),
]


def delivered(
    workspace: Path, task: str, form: OutputFormat, outputs: list[Output], shards: int
) -> tuple[GenerateRun, dict[str, str]]:
    """A finished job, and the SHA-256 of each of its files in this form."""
    given = {"task": task, "model": {"path": "/models/m"}, "shards": shards, "outputs": {"format": form}}
    run = generate_run(workspace, [{"prompt": f"prompt {i}"} for i in range(len(outputs))], **given)
    prepare_by_hand(run)
    folder = WorkspaceFolder(workspace)
    for index in range(shards):
        span = span_of_shard(len(outputs), shards, index)
        shard = Shard(folder, index, shards, engine_class(run.spec.task).records, span, {"task": task}, "here")
        shard.resume()
        shard.append([outputs[i] for i in span])
        shard.finish({"rows": len(span), "failedRows": shard.failed})
    deliver(run, read_prepared(run), folder, 0)
    return run, digests(folder.result / "data")


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def loaded(run: GenerateRun, folder: Path) -> datasets.Dataset:
    """What `load_dataset` reads of what is published, by the card, without the lines."""
    folder.mkdir()
    publish.stage(run, publish.verified_files(run), folder)
    assert not list(folder.glob("shard-*"))
    found: datasets.Dataset = datasets.load_dataset(str(folder), split="train", cache_dir=str(folder.parent / "cache"))
    return found


@dataclass(frozen=True)
class Case:
    name: str
    task: str
    form: OutputFormat
    outputs: list[Output]


CASES = [
    Case(name="texts as Parquet", task="text-generation", form="parquet", outputs=TEXTS),
    Case(name="images as Parquet", task="text-to-image", form="parquet", outputs=IMAGES),
    Case(name="images as WebDataset", task="text-to-image", form="webdataset", outputs=IMAGES),
]


@pytest.mark.parametrize("part", [10**9, 1000], ids=["one file", "several files"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_files_are_the_same_for_any_number_of_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case, part: int
) -> None:
    """And `load_dataset` reads all that the lines say, with types."""
    monkeypatch.setattr(parts, "PART_BYTES", part)
    run, files = delivered(tmp_path / "1", case.task, case.form, case.outputs, shards=1)
    for shards in (2, 3):
        assert delivered(tmp_path / str(shards), case.task, case.form, case.outputs, shards)[1] == files
    assert sum(name.startswith("train-") for name in files) == 1 if part > 1000 else len(files) > 1
    found = list(loaded(run, tmp_path / "published"))
    records = engine_class(run.spec.task).records
    lines = [
        json.loads(line)
        for line in (tmp_path / "1/result" / records.table("shard-00000-of-00001")).read_text().splitlines()
    ]
    if case.form == "webdataset":
        failed = [line for line in lines if line["error"] is not None]
        assert [
            json.loads(line) for line in (tmp_path / "1/result/data/failed.jsonl").read_text().splitlines()
        ] == failed
        lines = [line for line in lines if line["error"] is None]
        assert [row["__key__"] for row in found] == [Path(line["file_name"]).stem for line in lines]
        pictures, found = [row["png"] for row in found], [row["json"] for row in found]
    else:
        pictures = [row.get("image") for row in found]
    for line, row, picture in zip(lines, found, pictures, strict=True):
        for name in line.keys() - {"file_name", "input", "settings"}:
            assert row[name] == line[name], name
        assert plain(row["input"]) == plain(line["input"])
        if line.get("file_name"):
            assert picture.getpixel((0, 0)) == (line["row"], 0, 0)


def test_images_keep_the_bytes_of_their_files(tmp_path: Path) -> None:
    """With all that a file says of itself, such as how it was made."""
    from pyarrow import parquet

    expect = [png(output.sample.row) for output in IMAGES if output.file]
    delivered(tmp_path / "p", "text-to-image", "parquet", IMAGES, 2)
    rows = parquet.read_table(next((tmp_path / "p/result/data").glob("*.parquet"))).to_pylist()
    assert [row["image"]["bytes"] for row in rows if row["image"]] == expect
    delivered(tmp_path / "w", "text-to-image", "webdataset", IMAGES, 2)
    with tarfile.open(next((tmp_path / "w/result/data").glob("*.tar"))) as archive:
        found = [archive.extractfile(entry) for entry in archive if entry.name.endswith(".png")]
        assert [file.read() for file in found if file] == expect


def plain(value: Any) -> Any:
    """Without what is null, and with all values as text: the outputs have `a` as a number and as a text."""
    return {name: str(one) for name, one in (value or {}).items() if one is not None}


def test_columns_have_types(tmp_path: Path) -> None:
    texts = loaded(delivered(tmp_path / "t", "text-generation", "parquet", TEXTS, 2)[0], tmp_path / "texts").features
    assert texts["newTokens"] == datasets.Value("int64")
    assert texts["input"]["tags"] == datasets.List(datasets.Value("string"))
    images = loaded(delivered(tmp_path / "i", "text-to-image", "parquet", IMAGES, 2)[0], tmp_path / "images").features
    assert images["image"] == datasets.Image()
    assert images["input"]["a"] == datasets.Value("string")
    archives = loaded(
        delivered(tmp_path / "w", "text-to-image", "webdataset", IMAGES, 2)[0], tmp_path / "tars"
    ).features
    assert archives["png"] == datasets.Image()
    assert archives["json"]["negativePrompt"] == datasets.Value("string")


def test_outputs_are_delivered_once(tmp_path: Path) -> None:
    """Until a file is missing, cut, or of other outputs."""
    run, files = delivered(tmp_path, "text-generation", "parquet", TEXTS, 2)
    folder, (name, *_) = WorkspaceFolder(tmp_path), files
    path = folder.result / "data" / name

    def again() -> bool:
        """Whether the file is written again."""
        before = path.stat().st_ino if path.exists() else 0
        deliver(run, read_prepared(run), folder, 1)
        assert digests(folder.result / "data") == files
        return path.stat().st_ino != before

    assert not again()
    path.write_bytes(b"cut")
    assert again()
    path.unlink()
    assert again()
    assert not list(folder.result.glob(".data-*"))
    (folder.result / "data.MANIFEST.json").unlink()
    assert again()


def test_two_shards_may_deliver_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one puts its folder there just before ours."""
    partial, target = tmp_path / ".data-0", tmp_path / "data"
    rename = os.rename

    def late(source: Path, place: Path) -> None:
        monkeypatch.setattr(os, "rename", rename)
        place.mkdir()
        (place / "theirs").touch()
        rename(source, place)

    partial.mkdir()
    (partial / "ours").touch()
    monkeypatch.setattr(os, "rename", late)
    move(partial, target)
    assert [path.name for path in target.iterdir()] == ["ours"]


def test_few_rows_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyarrow import parquet as files

    from luthier_trainer.generation.exports import parquet

    monkeypatch.setattr(parquet, "GROUP_ROWS", 2)
    run, _ = delivered(tmp_path, "text-generation", "parquet", TEXTS, 2)
    (path,) = (WorkspaceFolder(Path(run.workspace)).result / "data").iterdir()
    found = files.ParquetFile(path)
    assert [found.metadata.row_group(i).num_rows for i in range(found.num_row_groups)] == [2, 2, 1]


def test_each_form_of_outputs_has_a_writer() -> None:
    assert {*WRITERS} == {*OUTPUT_FORMATS} - {LINES}
