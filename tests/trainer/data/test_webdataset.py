"""Archives of WebDataset: the same rows as folders of images, and what is wrong with an archive."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy
import pytest
from hub.server import Running
from PIL import Image
from trainer.preparing import prepared

from luthier_api.dataset import TrainingData
from luthier_api.run import FineTuneRun, GenerateRun
from luthier_trainer.data.load import Loader, Rows
from luthier_trainer.prepare.generation import read_inputs
from luthier_trainer.prepare.main import main
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.tasks.images import unusable

MakeRun = Callable[..., FineTuneRun]
Members = Mapping[str, bytes | str] | list[tuple[str, bytes | str]]


def png(value: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(file, "png")
    return file.getvalue()


def tar(members: Members) -> bytes:
    """An archive, as Python's tarfile writes it. A name may be there twice."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members.items() if isinstance(members, Mapping) else members:
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def linked() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        info = tarfile.TarInfo("1.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/elsewhere/1.png"
        archive.addfile(info)
    return file.getvalue()


def load(folder: Path, archives: Mapping[str, bytes], columns: tuple[str, ...], **dataset: Any) -> Rows:
    for name, content in archives.items():
        (folder / name).write_bytes(content)
    source = TrainingData.model_validate({"files": [str(folder / name) for name in archives], **dataset})
    return Loader(source, "spec.dataset", folder / "cache", columns=columns, others=False).split("train", "split")


def digits_in(archive: Path, digits: Path, labels: list[str]) -> None:
    """Write an archive of images in the order of their folders."""
    paths = [path for label in labels for path in sorted((digits / label).iterdir())]
    members: list[tuple[str, bytes | str]] = []
    for path in paths:
        key = f"{path.parent.name}/{path.stem}"
        members += [(f"{key}.png", path.read_bytes()), (f"{key}.cls", f"{path.parent.name}\n")]
    archive.write_bytes(tar(members))


def test_the_rows_of_archives_are_those_of_the_folder(digits: Path, classify: MakeRun, tmp_path: Path) -> None:
    """Two archives, not in the order of their names, through all of `prepare`."""
    digits_in(tmp_path / "b.tar", digits, list("01234"))
    digits_in(tmp_path / "a.tar", digits, list("56789"))
    files = [str(tmp_path / "b.tar"), str(tmp_path / "a.tar")]
    of_folder, expected = prepared(classify("folder"))
    of_archives, found = prepared(classify("archives", dataset={"files": files, "format": None}))
    assert of_archives.dataset.labels == of_folder.dataset.labels == list("0123456789")
    assert [origin.path for origin in of_archives.origins if origin.field == "spec.dataset.files"] == files
    assert len({origin.digest for origin in of_archives.origins}) == len(of_archives.origins)
    for split in ("train", "eval"):
        assert found[split]["labels"] == expected[split]["labels"]
        for one, other in zip(found[split]["pixel_values"], expected[split]["pixel_values"], strict=True):
            numpy.testing.assert_array_equal(numpy.array(one), numpy.array(other))


@dataclass(frozen=True)
class ReadCase:
    name: str
    members: Members
    columns: tuple[str, ...]
    expect: list[tuple[Any, ...]]  # of images, their names
    notices: list[str] = field(default_factory=list)


READ = [
    ReadCase(
        name="image and label",
        members={"1.jpg": png(), "1.cls": " cat\n", "2.jpg": png(), "2.cls": "007"},
        columns=("image", "label"),
        expect=[("cat", "1.jpg"), ("007", "2.jpg")],
    ),
    ReadCase(
        name="columns by extension, in capitals in the archive",
        members={"1.JPG": png(), "1.Cls": "cat"},
        columns=("jpg", "cls"),
        expect=[("cat", "1.JPG")],
    ),
    ReadCase(
        name="photographs of several kinds, and a folder with a dot",
        members={"v1.0/1.jpg": png(), "v1.0/1.txt": "a", "./v1.0/2.png": png(), "./v1.0/2.txt": "b\n"},
        columns=("image", "text"),
        expect=[("a", "v1.0/1.jpg"), ("b\n", "v1.0/2.png")],
    ),
    ReadCase(
        name="members that are not neighbours",
        members={"1.png": png(), "2.png": png(), "2.txt": "b", "1.txt": "a"},
        columns=("image", "text"),
        expect=[("a", "1.png"), ("b", "2.png")],
    ),
    ReadCase(
        name="an image beside another, by its whole extension",
        members={"1.png": png(), "1.seg.png": png(), "1.cls": "a"},
        columns=("seg.png", "cls"),
        expect=[("a", "1.seg.png")],
    ),
    ReadCase(
        name="fields of JSON",
        members={"1.webp": png(), "1.json": '{"caption": "a", "width": 4}', "2.webp": png(), "2.json": '{"width": 5}'},
        columns=("image", "caption"),
        expect=[("a", "1.webp"), (None, "2.webp")],
    ),
    ReadCase(
        name="a member goes before a field of JSON",
        members={"1.png": png(), "1.txt": "member", "1.json": '{"text": "field", "label": "a"}'},
        columns=("image", "text", "label"),
        expect=[("a", "member", "1.png")],
    ),
    ReadCase(
        name="texts alone",
        members={"1.txt": "a", "2.txt": "b"},
        columns=("text",),
        expect=[("a",), ("b",)],
    ),
    ReadCase(
        name="images alone",
        members={"1.png": png(), "2.png": png()},
        columns=("image",),
        expect=[("1.png",), ("2.png",)],
    ),
    ReadCase(
        name="members of no sample",
        members={"README": "x", "._1.png": "x", "__MACOSX/1.png": "x", "1.png": png(), "1.cls": "a"},
        columns=("image", "label"),
        expect=[("a", "1.png")],
        notices=["3 members of x.tar are in no sample, because their names do not have the form KEY.COLUMN, and are"],
    ),
    ReadCase(
        name="members that are not needed, and not always there",
        members={"1.png": png(), "1.cls": "a", "1.npy": b"\xff", "2.png": png(), "2.cls": "b"},
        columns=("image", "label"),
        expect=[("a", "1.png"), ("b", "2.png")],
        notices=['1 samples have no member "npy", which others have, and which this job does not read. The first is'],
    ),
]


@pytest.mark.parametrize("case", READ, ids=lambda case: case.name)
def test_archives_that_are_read(case: ReadCase, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = load(tmp_path, {"x.tar": tar(case.members)}, case.columns).data
    for name, feature in data.features.items():
        if isinstance(feature, datasets.Image):
            data = data.cast_column(name, datasets.Image(decode=False))
    rows = [tuple(cell["path"] if isinstance(cell, dict) else cell for cell in row.values()) for row in data]
    assert rows == case.expect
    told = capsys.readouterr().out
    assert all(text in told for text in case.notices)
    assert told.count("spec.dataset.files: ") == len(case.notices)


ONE = {"1.png": png(), "1.cls": "a", "2.png": png(), "2.cls": "b"}
WHOLE = tar(ONE)
"""Each member has a header of 512 bytes and a block of 512: 2.cls is at 3072, and the archive ends at 4096."""


@dataclass(frozen=True)
class RefusedCase:
    name: str
    archive: bytes
    message: str  # after the field and the archive
    columns: tuple[str, ...] = ("image", "label")


REFUSED = [
    RefusedCase(
        name="truncated in a member",
        archive=WHOLE[:2600],
        message=" cannot be read as webdataset: it is no tar archive, damaged or truncated (unexpected end of data).",
    ),
    RefusedCase(
        name="truncated in a header",
        archive=WHOLE[:3200],
        message=" cannot be read as webdataset: it is damaged: there is no valid header of a member at byte 3072. Copy",
    ),
    RefusedCase(
        name="truncated between two members",
        archive=WHOLE[:2048],
        message=" cannot be read as webdataset: it is truncated: the end of the archive is missing after byte 2048.",
    ),
    RefusedCase(
        name="a header with a wrong byte",
        archive=WHOLE[:2050] + b"x" + WHOLE[2051:],
        message=" cannot be read as webdataset: it is damaged: there is no valid header of a member at byte 2048. Copy",
    ),
    RefusedCase(
        name="two archives in one file",
        archive=WHOLE + tar({"3.png": png(), "3.cls": "c"}),
        message=" cannot be read as webdataset: more follows the end of the archive at byte 4096, and would not be",
    ),
    RefusedCase(
        name="compressed",
        archive=gzip.compress(WHOLE),
        message=" cannot be read as webdataset: it is compressed with gzip, and archives are read only uncompressed.",
    ),
    RefusedCase(
        name="without members",
        archive=tar({}),
        message=" cannot be read as webdataset: it has no samples; the name of a member has the form KEY.COLUMN",
    ),
    RefusedCase(
        name="of no bytes",
        archive=b"",
        message=" is empty",
    ),
    RefusedCase(
        name="no archive",
        archive=b"text" * 1000,
        message=" cannot be read as webdataset: it is no tar archive, damaged or truncated (",
    ),
    RefusedCase(
        name="a link",
        archive=linked(),
        message=" cannot be read as webdataset: its member 1.png is no regular file. Write the archive again with the",
    ),
    RefusedCase(
        name="two samples with one key",
        archive=tar([*ONE.items(), ("1.png", png())]),
        message=' cannot be read as webdataset: the sample "1" has two members "png" (1.png, and 1.png).',
    ),
    RefusedCase(
        name="two members that differ in capitals",
        archive=tar({"1.png": png(), "1.PNG": png()}),
        message=' cannot be read as webdataset: the sample "1" has two members "png" (1.PNG, and 1.png).',
    ),
    RefusedCase(
        name="a text that is none",
        archive=tar({**ONE, "2.cls": b"\xff"}),
        message=' cannot be read as webdataset: 2.cls of the sample "2" is not UTF-8: invalid start byte at byte 0.',
    ),
    RefusedCase(
        name="JSON that is none",
        archive=tar({"1.png": png(), "1.json": "{"}),
        message=' cannot be read as webdataset: 1.json of the sample "1" cannot be read as JSON: Expecting property',
    ),
    RefusedCase(
        name="JSON that is no object",
        archive=tar({"1.png": png(), "1.json": "[1]"}),
        message=' cannot be read as webdataset: 1.json of the sample "1" holds no JSON object, whose fields would be',
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_archives_that_are_refused(case: RefusedCase, tmp_path: Path) -> None:
    with pytest.raises(Failure) as failure:
        load(tmp_path, {"x.tar": case.archive}, case.columns)
    assert failure.value.message.startswith(f"spec.dataset.files: {tmp_path}/x.tar{case.message}")


def test_samples_without_a_member_are_refused_by_key(tmp_path: Path) -> None:
    second = tar({"3.png": png(), "3.cls": "a", "4.png": png()})
    with pytest.raises(Failure) as failure:
        load(tmp_path, {"a.tar": WHOLE, "b.tar": second}, ("image", "label"))
    assert failure.value.message == (
        'spec.dataset.files: 1 samples have no member "cls" (column "label"), which others have. The first is "4" of'
        f" {tmp_path}/b.tar. Add the member, or remove the sample"
    )


def test_rows_are_named_by_archive_and_key(tmp_path: Path) -> None:
    """Images are decoded by the task, which names the member and the row."""
    rows = load(tmp_path, {"a.tar": WHOLE, "b.tar": tar({"1.png": b"\x89PNG", "1.cls": "a"})}, ("image", "label"))
    stored = rows.data.cast_column("image", datasets.Image(decode=False))
    ((row, why),) = unusable(stored, "image")
    assert rows.place(row) == 'row 2, counted from 0 (sample "1" of b.tar)'
    assert why.startswith("1.png: cannot identify image file")


@dataclass(frozen=True)
class MistakeCase:
    name: str
    members: Members
    message: str
    dataset: dict[str, Any] = field(default_factory=dict)


MISTAKES = [
    MistakeCase(
        name="two images in a sample",
        members={"1.png": png(), "1.jpg": png(), "1.cls": "a"},
        message='spec.dataset.columns.image: no column "image" in x.tar (columns: png, jpg, cls, label). Name the one',
    ),
    MistakeCase(
        name="an image that cannot be decoded",
        members={**ONE, "2.png": b"\x89PNG"},
        message=(
            "spec.dataset.columns.image: 1 images of x.tar cannot be used. The first is row 1, counted from 0 (sample"
            ' "2" of x.tar): 2.png: cannot identify image file'
        ),
    ),
    MistakeCase(
        name="a column of text for the images",
        members=ONE,
        dataset={"columns": {"image": "cls"}},
        message='spec.dataset.columns.image: column "cls" of x.tar holds string, not images (columns of images: png,',
    ),
]


@pytest.mark.parametrize("case", MISTAKES, ids=lambda case: case.name)
def test_mistakes_that_the_task_finds(case: MistakeCase, classify: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar(case.members))
    dataset = {"files": [str(tmp_path / "x.tar")], "format": "webdataset", "evalFraction": None} | case.dataset
    with pytest.raises(Failure) as failure:
        main(classify(dataset=dataset))
    assert failure.value.message.startswith(case.message)


def test_archives_of_addresses_and_of_the_hub(hub: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read as those of a volume: `datasets` would take the sample without a label for a row."""
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.url)  # read once, when `datasets` is imported
    (tmp_path / "archives").mkdir()
    (tmp_path / "archives" / "train.tar").write_bytes(WHOLE)
    commit = hub.store.seed("dataset", "org/whole", tmp_path / "archives").oid
    address = f"{hub.url}/datasets/org/whole/resolve/{commit}/train.tar"
    for source in ({"id": "org/whole"}, {"files": [address]}):
        loader = Loader(
            TrainingData.model_validate(source), "spec.dataset", tmp_path / "c", columns=("image", "cls"), others=False
        )
        rows = loader.split("train", "split").data
        assert (rows["cls"][:], [image.size for image in rows["image"]]) == (["a", "b"], [(4, 4)] * 2)
    (tmp_path / "archives" / "train.tar").write_bytes(tar({**ONE, "3.png": png()}))
    hub.store.seed("dataset", "org/part", tmp_path / "archives")
    source = TrainingData.model_validate({"id": "org/part"})
    with pytest.raises(Failure, match=r'^spec\.dataset\.id: 1 samples have no member "cls" \(column "label"\)'):
        Loader(source, "spec.dataset", tmp_path / "c", columns=("image", "label"), others=False).split("train", "split")


def test_prompts_are_not_read_from_archives(make_generate_run: Callable[..., GenerateRun], tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar({"1.txt": "a"}))
    inputs = {"dataset": {"files": [str(tmp_path / "x.tar")]}, "columns": {"prompt": "text"}}
    with pytest.raises(Failure, match="archives of WebDataset are read by FineTuneJobs only"):
        read_inputs(make_generate_run(inputs=inputs), tmp_path / "cache")


def test_images_with_captions(make_run: MakeRun, sdxl: Path, tmp_path: Path) -> None:
    captions = [f"lute number {i}" for i in range(4)]
    members: dict[str, bytes | str] = {}
    for i, caption in enumerate(captions):
        members |= {f"{i}.png": png(i), f"{i}.txt": caption}
    (tmp_path / "x.tar").write_bytes(tar(members))
    job = {"task": "text-to-image", "model": {"path": str(sdxl)}, "image": {"resolution": 32}}
    dataset = {"files": [str(tmp_path / "x.tar")], "format": "webdataset"}
    _, data = prepared(make_run(**job, dataset=dataset, method={"type": "lora"}))
    assert data["train"]["caption"][:] == captions
    assert [image.getpixel((0, 0)) for image in data["train"]["pixel_values"]] == [(i, 0, 0) for i in range(4)]


def test_texts_beside_images(make_run: MakeRun, tmp_path: Path) -> None:
    """A task of texts reads `txt` or fields of `json`, and no image."""
    members = {f"{i}.json": json.dumps({"text": f"lute number {i}"}) for i in range(8)}
    (tmp_path / "x.tar").write_bytes(tar({**members, **{f"{i}.jpg": b"none" for i in range(8)}}))
    record, _ = prepared(make_run(dataset={"files": [str(tmp_path / "x.tar")]}))
    assert record.dataset.rows == 8


def test_a_stream_has_no_archives(make_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar({"1.txt": "a"}))
    with pytest.raises(Failure, match=r"spec\.dataset\.streaming: files of the format webdataset are not streamed"):
        main(make_run(dataset={"files": [str(tmp_path / "x.tar")], "streaming": True}, training={"maxSteps": 1}))
