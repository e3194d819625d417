"""The outputs of a GenerateJob as the inputs of another one."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from trainer.generating import IMAGE, generate_run, generate_shards, result_lines, sample

from luthier_api.exitcodes import ExitCode
from luthier_api.run import GenerateRun
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.generation.engines.images import ImageEngine
from luthier_trainer.generation.ledger import Shard
from luthier_trainer.generation.samples import Output
from luthier_trainer.prepare.generation_rows import read_inputs
from luthier_trainer.prepare.main import main as prepare
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.workspace.prepared import read_prepared

SPEC: dict[str, Any] = {"task": "text-generation", "text": {"maxNewTokens": 3}}
ROWS = [
    {"prompt": "A class", "id": "first"},
    {"prompt": "An import " * 200, "id": "long"},
    {"prompt": "A function is", "id": "last"},
]
Follow = Callable[..., GenerateRun]


@pytest.fixture
def made(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GenerateRun:
    """A job of two shards. Its second row is too long."""
    run = generate_run(tmp_path / "texts", ROWS, model={"path": str(tiny_model)}, shards=2, **SPEC)
    generate_shards(run, monkeypatch, prepare)
    return run


@pytest.fixture
def follow(made: GenerateRun, tmp_path: Path) -> Follow:
    """A job that goes on from the texts of the other one."""

    def run(name: str, **columns: Any) -> GenerateRun:
        inputs = {"job": "texts", "columns": {"prompt": "text", **columns}}
        following = generate_run(tmp_path / name, [], model={"path": str(made.spec.model.path)}, inputs=inputs, **SPEC)
        return following.model_copy(update={"sources": {"GenerateJob/texts": made.workspace}})

    return run


def test_each_output_is_a_row(made: GenerateRun, follow: Follow, monkeypatch: pytest.MonkeyPatch) -> None:
    run = follow("next", id="id", carry=["prompt"])
    generate_shards(run, monkeypatch, prepare)
    outputs, lines = result_lines(made), result_lines(run)
    assert [line["error"] is None for line in lines] == [True, False, True]
    assert "texts could not make it: prompt: " in lines[1]["error"]
    assert [line["prompt"] for line in lines[::2]] == [line["text"] for line in outputs[::2]]
    assert [line["input"] for line in lines] == [{"prompt": line["prompt"]} for line in outputs]
    assert lines[0]["id"] == "first"
    dataset = read_prepared(run).dataset
    assert (dataset.source, dataset.rows) == ("GenerateJob texts", 3)


def test_all_other_columns_are_carried(made: GenerateRun, follow: Follow) -> None:
    run = follow("next")
    prepare(run)
    first = json.loads(Path(read_prepared(run).dataset_path).read_text().splitlines()[0])
    output = result_lines(made)[0]
    assert first["input"].keys() == output.keys() - {"text", "seed", "error"}
    assert {name: first["input"][name] for name in ("newTokens", "sha256")} == {
        name: output[name] for name in ("newTokens", "sha256")
    }
    assert first["seed"] == output["seed"]


def test_outputs_that_were_made_again_are_noticed(made: GenerateRun, follow: Follow) -> None:
    run = follow("next")
    prepare(run)
    revision = read_prepared(run).dataset.revision
    result = WorkspaceFolder(Path(made.workspace)).result
    table = result / "shard-00000-of-00002.jsonl"
    before = table.read_bytes()
    table.write_bytes(before.replace(b'"row": 0', b'"row": 7'))
    with pytest.raises(Failure, match=r"spec\.inputs\.job: .* has changed"):
        prepare(run)
    with pytest.raises(Failure, match=r"shard-00000-of-00002.jsonl of GenerateJob texts is not as") as damaged:
        prepare(follow("damaged"))
    assert damaged.value.code is ExitCode.STORAGE_ERROR
    table.write_bytes(before)
    prepare(follow("again"))
    assert read_prepared(follow("again")).dataset.revision == revision
    (result / "shard-00001-of-00002.MANIFEST.json").unlink()
    with pytest.raises(Failure, match=r"has not left the outputs of all its shards") as unfinished:
        prepare(follow("unfinished"))
    assert unfinished.value.code is ExitCode.NOT_FOUND


def test_images_are_inputs(tmp_path: Path) -> None:
    """Of all shards, if they are as they were written."""
    folder = WorkspaceFolder(tmp_path / "lutes")
    for i in range(2):
        content = io.BytesIO()
        Image.new("RGB", (8, 8), (i, 0, 0)).save(content, "PNG")
        shard = Shard(folder, i, 2, ImageEngine.records, range(i, i + 1), {"task": "text-to-image"}, "here")
        shard.resume()
        shard.append([Output(sample("a lute", row=i, settings=IMAGE, number=i), file=content.getvalue, suffix="png")])
        shard.finish({"rows": 1, "failedRows": 0})
    digests = [json.loads(path.read_text())["sha256"] for path in sorted(folder.result.glob("*/metadata.jsonl"))]

    def read(name: str) -> list[dict[str, Any]]:
        inputs = {"job": "lutes", "columns": {"image": "file_name"}}
        spec = {"task": "image-classification", "model": {"path": "/model"}}
        run = generate_run(tmp_path / name, [], inputs=inputs, **spec)
        run = run.model_copy(update={"sources": {"GenerateJob/lutes": str(folder.root)}})
        return list(read_inputs(run, tmp_path / name / "cache")[0])

    assert [row["image"] for row in read("whole")] == digests
    (changed,) = folder.result.glob("shard-00001-of-00002/images/*/*.png")
    (other,) = folder.result.glob("shard-00000-of-00002/images/*/*.png")
    changed.unlink()
    changed.write_bytes(other.read_bytes())
    assert ["error" in row for row in read("changed")] == [False, True]
