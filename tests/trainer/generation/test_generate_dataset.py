"""The outputs of a GenerateJob as a dataset: its card's own command reads every row of it, with its types."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from hub.server import Running
from PIL import Image
from trainer.generating import generate_run, prepare_by_hand

from luthier_api.run import GenerateRun
from luthier_api.variables import Variables
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.generation.ledger import Shard
from luthier_trainer.generation.samples import Output, Sample
from luthier_trainer.publish import dataset_fields, model_card
from luthier_trainer.publish import main as publish
from luthier_trainer.workspace.prepared import read_prepared

REPO = "luthier/lutes"
SETTINGS: dict[str, Any] = {"model": {"source": "m", "revision": None}, "adapters": [], "guidance": 5.0, "batchSize": 4}


def picture(row: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (row, 0, 0)).save(file, "png")
    return file.getvalue()


def text(row: int, **columns: Any) -> Output:
    return Output(
        Sample(row, 0, f"prompt {row}", None, row, columns or None),
        {"finishReason": "stop", "promptTokens": 2, "newTokens": 1},
        text=f"text {row}",
    )


def image(row: int, negative: str | None = None, **columns: Any) -> Output:
    return Output(Sample(row, 0, f"prompt {row}", negative, row, columns or None), image=picture(row), suffix="png")


def error(row: int) -> Output:
    return Output(Sample(row, 0, f"prompt {row}", None, row), error="too long")


# Form, task, outputs of each shard.
FORMS: list[tuple[str, str, list[list[Output]]]] = [
    ("texts", "text-generation", [[text(0), text(2)], [text(1)]]),
    ("texts, the last with an error", "text-generation", [[text(0), text(2)], [text(1), error(3)]]),
    ("texts, the first shard with errors alone", "text-generation", [[error(0)], [text(1)]]),
    (
        "other columns, empty in the first shard",
        "text-generation",
        [
            [text(0, id=None, score=1, tags=[], about={"by": None})],
            [text(1, id="a", score=0.5, tags=["b"], about={"by": "c"})],
        ],
    ),
    ("images", "text-to-image", [[image(0), image(2)], [image(1)]]),
    ("one image a shard", "text-to-image", [[image(0)], [image(1)], [image(2)]]),
    (
        "images, a negative prompt in the last row",
        "text-to-image",
        [[image(0), image(2)], [image(1), image(3, "rain")]],
    ),
    ("images, one row with an error", "text-to-image", [[image(0), error(2)], [image(1, id=7)]]),
    ("no image", "text-to-image", [[error(0)], [error(1)]]),
]


@pytest.mark.parametrize(("form", "task", "shards"), FORMS, ids=[f[0] for f in FORMS])
def test_the_command_of_the_card_reads_the_dataset(
    form: str, task: str, shards: list[list[Output]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished(tmp_path / "job", task, shards)
    result = WorkspaceFolder(tmp_path / "job").result
    (result / "README.md").write_text(model_card.card(run, read_prepared(run), result))
    # `datasets` takes a folder of that name for the repository.
    (tmp_path / REPO).parent.mkdir()
    (tmp_path / REPO).symlink_to(result, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    rows = run_command(result / "README.md", tmp_path)
    check(rows, [output for shard in shards for output in shard])


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
    for i, outputs in enumerate(shards):
        shard = Shard(WorkspaceFolder(workspace), i, len(shards), {"task": task, **SETTINGS}, "here")
        shard.resume([output.sample for output in outputs])
        shard.append(outputs)
        shard.finish({"rows": len(outputs), "failedRows": shard.failed})
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
        assert (row["prompt"], row["seed"], row["error"], row["settings"]["guidance"]) == (
            sample.prompt,
            sample.seed,
            output.error,
            5.0,
        )
        assert {name: value for name, value in (row["input"] or {}).items() if value is not None} == {
            name: value for name, value in (sample.input or {}).items() if value is not None
        }
        if "text" in row:
            assert row["text"] == output.text
        else:
            assert row["negativePrompt"] == sample.negative_prompt
        if output.image:
            assert row["image"].getpixel((0, 0)) == (sample.row, 0, 0)


KINDS: list[tuple[str, list[Any], Any]] = [
    ("null at first", [None, "a"], "string"),
    ("whole, then not", [1, 0.5], "float64"),
    ("a list, empty at first", [[], [1]], ["int64"]),
    ("a field that comes late", [{"a": 1}, {"b": True}], {"a": "int64", "b": "bool"}),
    ("of two kinds", [1, "a"], "string"),
]


@pytest.mark.parametrize(("case", "values", "expect"), KINDS, ids=[k[0] for k in KINDS])
def test_types_hold_for_all_lines(case: str, values: list[Any], expect: Any) -> None:
    assert dataset_fields.kind_of_lines({"x": value} for value in values) == {"x": expect}
