"""The outputs of a GenerateJob as a dataset: its card's own command reads every row of it, with its types."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from hub.server import Running
from PIL import Image
from trainer.generating import IMAGE, generate_run, prepare_by_hand, sample

from luthier_api.run import GenerateRun
from luthier_api.variables import Variables
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.generation.engines.table import engine_class
from luthier_trainer.generation.kinds import kind_of, merged
from luthier_trainer.generation.ledger import Shard
from luthier_trainer.generation.samples import Output
from luthier_trainer.publish import main as publish
from luthier_trainer.publish import model_card
from luthier_trainer.workspace.prepared import read_prepared

REPO = "luthier/lutes"
SETTINGS: dict[str, Any] = {"model": {"source": "m", "revision": None}, "adapters": [], "guidance": 5.0, "batchSize": 4}


def picture(row: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (row, 0, 0)).save(file, "png")
    return file.getvalue()


def text(row: int, **columns: Any) -> Output:
    return Output(
        sample(f"prompt {row}", row=row, seed=row, input=columns or None),
        {"finishReason": "stop", "promptTokens": 2, "newTokens": 1},
        text=f"text {row}",
    )


def image(row: int, negative: str | None = None, **columns: Any) -> Output:
    made = sample(f"prompt {row}", row=row, seed=row, negative=negative, settings=IMAGE, input=columns or None)
    return Output(made, file=lambda: picture(row), suffix="png")


def error(row: int) -> Output:
    return Output(sample(f"prompt {row}", row=row, seed=row), error="too long")


@dataclass(frozen=True)
class FormCase:
    name: str
    task: str
    shards: list[list[Output]]


FORMS = [
    FormCase(
        name="texts",
        task="text-generation",
        shards=[[text(0), text(2)], [text(1)]],
    ),
    FormCase(
        name="texts, the last with an error",
        task="text-generation",
        shards=[[text(0), text(2)], [text(1), error(3)]],
    ),
    FormCase(
        name="texts, the first shard with errors alone",
        task="text-generation",
        shards=[[error(0)], [text(1)]],
    ),
    FormCase(
        name="other columns, empty in the first shard",
        task="text-generation",
        shards=[
            [text(0, id=None, score=1, tags=[], about={"by": None})],
            [text(1, id="a", score=0.5, tags=["b"], about={"by": "c"})],
        ],
    ),
    FormCase(
        name="images",
        task="text-to-image",
        shards=[[image(0), image(2)], [image(1)]],
    ),
    FormCase(
        name="one image a shard",
        task="text-to-image",
        shards=[[image(0)], [image(1)], [image(2)]],
    ),
    FormCase(
        name="images, a negative prompt in the last row",
        task="text-to-image",
        shards=[[image(0), image(2)], [image(1), image(3, "rain")]],
    ),
    FormCase(
        name="images, one row with an error",
        task="text-to-image",
        shards=[[image(0), error(2)], [image(1, id=7)]],
    ),
    FormCase(
        name="no image",
        task="text-to-image",
        shards=[[error(0)], [error(1)]],
    ),
]


@pytest.mark.parametrize("case", FORMS, ids=lambda case: case.name)
def test_the_command_of_the_card_reads_the_dataset(
    case: FormCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished(tmp_path / "job", case.task, case.shards)
    result = WorkspaceFolder(tmp_path / "job").result
    (result / "README.md").write_text(model_card.card(run, read_prepared(run), result))
    # `datasets` takes a folder of that name for the repository.
    (tmp_path / REPO).parent.mkdir()
    (tmp_path / REPO).symlink_to(result, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    rows = run_command(result / "README.md", tmp_path)
    check(rows, [output for shard in case.shards for output in shard])


def test_the_card_shows_texts(tmp_path: Path) -> None:
    run = finished(tmp_path / "job", "text-generation", [[error(0), text(1)], [text(2)]])
    card = model_card.card(run, read_prepared(run), WorkspaceFolder(tmp_path / "job").result)
    (shown,) = re.findall(r"## Samples\n\n```text\n(.*?)\n```", card, re.DOTALL)
    assert [json.loads(line)["text"] for line in shown.splitlines()] == ["text 1", "text 2"]


def test_a_shard_without_images_is_left_out_of_images(tmp_path: Path) -> None:
    """`datasets` takes a table that names no file for a mistake; its errors stay in the repository."""
    run = finished(tmp_path / "job", "text-to-image", [[image(0)], [error(1)]])
    front = yaml.safe_load(
        model_card.card(run, read_prepared(run), WorkspaceFolder(tmp_path / "job").result).split("---\n")[1]
    )
    assert front["configs"][0]["data_files"] == ["shard-00000-of-00002/**"]


def test_the_command_of_the_card_reads_the_repository(
    tmp_path: Path, hub: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = [[image(0), image(2)], [image(1), image(3, "rain"), error(5)]]
    run = finished(tmp_path / "job", "text-to-image", shards)
    monkeypatch.setenv(Variables.TOKEN, "hf_writer")
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.url)  # read once, when `datasets` is imported
    publish.main(run)
    card = WorkspaceFolder(tmp_path / "job").result / "README.md"
    card.write_text(model_card.card(run, read_prepared(run), card.parent))
    check(run_command(card, tmp_path), [output for shard in shards for output in shard])


def finished(workspace: Path, task: str, shards: list[list[Output]]) -> GenerateRun:
    """A job whose shards have these outputs."""
    rows = [{"prompt": f"prompt {i}"} for i in range(sum(map(len, shards)))]
    hub = {"repo": REPO, "tokenSecretRef": {"name": "hf", "key": "token"}}
    run = generate_run(workspace, rows, task=task, model={"path": "/models/m"}, shards=len(shards), hub=hub)
    prepare_by_hand(run)
    before = 0
    for i, outputs in enumerate(shards):
        span = range(before, before + len(outputs))
        records = engine_class(run.spec.task).records
        shard = Shard(WorkspaceFolder(workspace), i, len(shards), records, span, {"task": task, **SETTINGS}, "here")
        shard.resume()
        shard.append([replace(o, sample=replace(o.sample, number=before + j)) for j, o in enumerate(outputs)])
        shard.finish({"rows": len(outputs), "failedRows": shard.failed})
        before = span.stop
    return run


def run_command(card: Path, cache: Path) -> datasets.Dataset:
    """What the code in the card makes, with an empty cache."""
    (code,) = re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    load: Callable[..., Any] = datasets.load_dataset
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            datasets, "load_dataset", lambda *given, **options: load(*given, **options, cache_dir=str(cache / "cache"))
        )
        exec(code, names)
    return names["outputs"]


def check(rows: datasets.Dataset, outputs: list[Output]) -> None:
    """Every output has a row, with all that is said of it."""
    found = {row["row"]: row for row in rows}
    assert sorted(found) == sorted(output.sample.row for output in outputs)
    for output in outputs:
        row, sample = found[output.sample.row], output.sample
        assert (row["prompt"], row["seed"], row["error"]) == (sample.prompt, sample.seed, output.error)
        assert {name: value for name, value in (row["input"] or {}).items() if value is not None} == {
            name: value for name, value in (sample.input or {}).items() if value is not None
        }
        if "text" in row:
            assert row["text"] == output.text
        else:
            assert row["negativePrompt"] == sample.negative_prompt
        if output.file:
            assert row["image"].getpixel((0, 0)) == (sample.row, 0, 0)


@dataclass(frozen=True)
class KindCase:
    name: str
    values: list[Any]
    expect: Any


KINDS = [
    KindCase(
        name="null at first",
        values=[None, "a"],
        expect="string",
    ),
    KindCase(
        name="whole, then not",
        values=[1, 0.5],
        expect="float64",
    ),
    KindCase(
        name="a list, empty at first",
        values=[[], [1]],
        expect=["int64"],
    ),
    KindCase(
        name="a field that comes late",
        values=[{"a": 1}, {"b": True}],
        expect={"a": "int64", "b": "bool"},
    ),
    KindCase(
        name="of two kinds",
        values=[1, "a"],
        expect="string",
    ),
]


@pytest.mark.parametrize("case", KINDS, ids=lambda case: case.name)
def test_types_hold_for_all_lines(case: KindCase) -> None:
    assert reduce(merged, map(kind_of, case.values)) == case.expect
