"""Arrow files as `datasets` and others write them, and folders that were copied from another machine."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy
import PIL.Image
import pyarrow
import pyarrow.feather
import pytest

from luthier_api.dataset import TrainingData
from luthier_trainer.data.load import Loader, Rows
from luthier_trainer.runtime.failure import Failure

TABLE = pyarrow.table({"n": range(2500), "text": [f"text {i}" for i in range(2500)], "label": ["a", "b"] * 1250})


def load(*files: Path, columns: tuple[str, ...] = ("text", "label"), **dataset: Any) -> Rows:
    source = TrainingData.model_validate({"files": [str(path) for path in files], **dataset})
    cache = files[0].parent / "cache-of-luthier"
    return Loader(source, "spec.dataset", cache, columns=columns, others=False).split(source.split, "split")


def write_stream(table: pyarrow.Table, path: Path) -> None:
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


@dataclass(frozen=True)
class Written:
    name: str
    file: str
    write: Callable[[pyarrow.Table, Path], Any]


WRITTEN = [
    Written("a stream", "x.arrow", write_stream),
    Written("a file with a footer", "x.feather", lambda t, p: pyarrow.feather.write_feather(t, str(p))),
    Written("compressed", "x.arrow", lambda t, p: pyarrow.feather.write_feather(t, str(p), compression="zstd")),
    Written(
        "dictionaries",
        "x.arrow",
        lambda t, p: write_stream(t.set_column(2, "label", t["label"].dictionary_encode()), p),
    ),
    Written(
        "views of strings",
        "x.arrow",
        lambda t, p: write_stream(t.set_column(1, "text", t["text"].cast(pyarrow.string_view())), p),
    ),
]


@pytest.mark.parametrize("case", WRITTEN, ids=lambda case: case.name)
def test_an_arrow_file_is_read(case: Written, tmp_path: Path) -> None:
    case.write(TABLE, tmp_path / case.file)
    rows = load(tmp_path / case.file)
    assert rows.data.to_dict() == TABLE.select(["text", "label"]).to_pydict()
    assert rows.names == ("n", "text", "label")
    assert rows.texts == ("text", "label")


def test_a_copied_folder_of_save_to_disk_is_its_rows(tmp_path: Path) -> None:
    datasets.Dataset(TABLE).save_to_disk(str(tmp_path / "made"), num_shards=3)
    shutil.copytree(tmp_path / "made", tmp_path / "copied")
    shutil.rmtree(tmp_path / "made")
    rows = load(tmp_path / "copied", split="train[10:]")
    assert rows.data["text"][:] == TABLE["text"].to_pylist()[10:]
    assert len(rows.origins) == 3
    assert rows.place(2489) == "row 2499, counted from 0 (row 832 of data-00002-of-00003.arrow)"


def test_a_copied_cache_of_datasets_is_read_by_its_files(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(TABLE, tmp_path / "x.parquet")
    cached = datasets.load_dataset("parquet", data_files=str(tmp_path / "x.parquet"), cache_dir=str(tmp_path / "cache"))
    folder = Path(cached["train"].cache_files[0]["filename"]).parent
    shutil.copytree(folder, tmp_path / "copied")
    shutil.rmtree(tmp_path / "cache")
    assert load(tmp_path / "copied" / "*-train*.arrow").data["text"][:] == TABLE["text"].to_pylist()
    with pytest.raises(Failure, match=r"It is a folder: name its files, .* of a cache of `datasets`, .*/\*-train"):
        load(tmp_path / "copied")


def test_images_of_a_saved_dataset_are_images(tmp_path: Path) -> None:
    images = [PIL.Image.fromarray(numpy.full((4, 4, 3), shade, dtype=numpy.uint8)) for shade in (0, 200)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])})
    datasets.Dataset.from_dict({"image": images, "label": [0, 1]}, features=features).save_to_disk(str(tmp_path / "x"))
    rows = load(tmp_path / "x", columns=("image", "label"))
    assert rows.images == ("image",)
    assert rows.data.features["label"].names == ["dark", "light"]
    assert [numpy.asarray(image).mean() for image in rows.data["image"]] == [0, 200]


def _dict(folder: Path) -> None:
    datasets.DatasetDict({"train": datasets.Dataset(TABLE), "test": datasets.Dataset(TABLE)}).save_to_disk(str(folder))


def _without_a_shard(folder: Path) -> None:
    datasets.Dataset(TABLE).save_to_disk(str(folder), num_shards=2)
    (folder / "data-00001-of-00002.arrow").unlink()


def _without_description(folder: Path) -> None:
    datasets.Dataset(TABLE).save_to_disk(str(folder))
    (folder / "state.json").write_text("{}")


def _cut_short(path: Path) -> None:
    write_stream(TABLE, path)
    path.write_bytes(path.read_bytes()[:-5000])


@dataclass(frozen=True)
class Refused:
    name: str
    file: str
    write: Callable[[Path], None]
    message: str


REFUSED = [
    Refused(
        name="several splits",
        file="x",
        write=_dict,
        message="spec.dataset.files[0]: x holds the splits train, test. Name one of them, such as x/train; others can",
    ),
    Refused(
        name="a file is missing",
        file="x",
        write=_without_a_shard,
        message="spec.dataset.files[0]: x lacks data-00001-of-00002.arrow, which its state.json names",
    ),
    Refused(
        name="no description",
        file="x",
        write=_without_description,
        message="spec.dataset.files[0]: x looks like a folder of save_to_disk, but KeyError",
    ),
    Refused(
        name="cut short",
        file="x.arrow",
        write=_cut_short,
        message="spec.dataset.files: x.arrow cannot be read as arrow:",
    ),
    Refused(
        name="no Arrow",
        file="x.arrow",
        write=lambda path: path.write_text("text,label\na,b\n"),
        message="spec.dataset.files: x.arrow cannot be read as arrow:",
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_what_is_damaged_is_refused(case: Refused, tmp_path: Path) -> None:
    case.write(tmp_path / case.file)
    with pytest.raises(Failure) as failure:
        load(tmp_path / case.file)
    assert failure.value.message.replace(f"{tmp_path}/", "").startswith(case.message)
