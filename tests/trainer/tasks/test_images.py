"""image-classification over real images: what `prepare` makes of folders and tables, and how each mistake is told."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from trainer.digits import RESNET, VIT, save_model, write_digits
from trainer.preparing import prepared
from transformers import (
    LevitConfig,
    MobileViTConfig,
)

from luthier_api.exitcodes import ExitCode
from luthier_api.run import FineTuneRun
from luthier_trainer.prepare.main import main
from luthier_trainer.runtime.failure import Failure

MakeRun = Callable[..., FineTuneRun]
DIGITS = [str(n) for n in range(10)]


def failure(run: FineTuneRun) -> str:
    with pytest.raises(Failure) as caught:
        main(run)
    assert caught.value.code in (ExitCode.INVALID_DATASET, ExitCode.INVALID_SPEC)
    return caught.value.message


def test_a_folder_of_folders(classify: MakeRun, digits: Path, tmp_path: Path) -> None:
    """The names of the folders are the classes; the images are in the workspace afterwards, as they were."""
    pictures = shutil.copytree(digits, tmp_path / "pictures")
    record, data = prepared(classify(dataset={"files": [str(pictures)]}))
    assert (record.dataset.rows, record.dataset.eval_rows, record.dataset.tokens, record.dataset.labels) == (
        320,
        80,
        None,
        DIGITS,
    )
    shutil.rmtree(pictures)
    assert set(data["train"].column_names) == {"pixel_values", "labels"}
    seen = {(row["labels"], row["pixel_values"].tobytes()) for split in ("train", "eval") for row in data[split]}
    assert seen == {(int(p.parent.name), Image.open(p).tobytes()) for p in digits.rglob("*.png")}


def table(folder: Path, rows: list[tuple[Any, str | None]], **types: Any) -> str:
    """A parquet file of images and classes, as the Hub has them."""
    features = Features({"picture": ImageFeature(), "digit": ClassLabel(names=DIGITS)} | types)
    columns = {"picture": [image for image, _ in rows], "digit": [label for _, label in rows]}
    Dataset.from_dict(columns, features=features).to_parquet(folder / "rows.parquet")
    return str(folder / "rows.parquet")


COLUMNS = {"image": "picture", "label": "digit"}


def test_a_table_of_images(classify: MakeRun, tmp_path: Path) -> None:
    path = table(tmp_path, [(Image.new(mode, (9, 7)), str(i % 2)) for i, mode in enumerate(["RGB", "L", "RGBA", "P"])])
    record, data = prepared(
        classify(dataset={"files": [path], "format": None, "columns": COLUMNS, "evalFraction": None})
    )
    assert (record.dataset.rows, record.dataset.labels) == (4, DIGITS)
    assert data["train"]["labels"] == [0, 1, 0, 1]


def flat(folder: Path) -> dict[str, Any]:
    """Images that lie in no folder of a class."""
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (9, 9)).save(folder / f"{i}.png")
    return {"files": [str(folder)]}


def layout(folder: Path, *images: str) -> Path:
    """A folder with an image at each of the paths in it. No two are equal, also in folders of other names."""
    for i, name in enumerate(images):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (i * 20, sum(folder.name.encode()) % 256, 0)).save(folder / name, format="PNG")
    return folder


TWO = ("cat/1.png", "dog/1.png")


def linked(folder: Path) -> Path:
    (layout(folder, *TWO) / "cow").symlink_to(layout(folder.parent / "cows", "1.png"))
    return folder


def unlike(folder: Path, image: Image.Image) -> str:
    """A table of an image that looks like others, and of this one."""
    return table(folder, [(Image.new("L", (9, 9)), "1"), (image, "2")])


def drawn(mode: str, values: Any) -> Image.Image:
    image = Image.new(mode, (2, 1))
    image.putdata(values)
    return image


def with_file(folder: Path, name: str, content: bytes) -> dict[str, Any]:
    write_digits(folder, [3, 4], each=2)
    (folder / name).write_bytes(content)
    return {"files": [str(folder)]}


def cut(digits: Path) -> bytes:
    """An image whose end is missing."""
    return next(digits.rglob("*.png")).read_bytes()[:90]


ROWS = "spec.dataset"


@dataclass(frozen=True)
class MistakeCase:
    name: str
    dataset: Callable[[Path, Path], dict[str, Any]]  # from a scratch folder and the folder of digits
    message: str


MISTAKES = [
    MistakeCase(
        name="no such column",
        dataset=lambda t, d: {"columns": {"image": "photo"}},
        message=f'{ROWS}.columns.image: no column "photo" in digits (columns: image, label). Did you mean "image"?',
    ),
    MistakeCase(
        name="a label that is none",
        dataset=lambda t, d: flat(t / "flat"),
        message=f'{ROWS}.columns.label: all 3 rows of flat have the label "flat"; two classes at least are needed',
    ),
    MistakeCase(
        name="an image that is cut",
        dataset=lambda t, d: with_file(t / "pets", "4/cut.png", cut(d)),
        message=f"{ROWS}.columns.image: 1 images of pets cannot be used. The first is row 4, counted from 0: ",
    ),
    MistakeCase(
        name="no image at all",
        dataset=lambda t, d: with_file(t / "pets", "3/text.png", b"hello"),
        message="cannot identify image file",
    ),
    MistakeCase(
        name="a row without an image",
        dataset=lambda t, d: {
            "files": [table(t, [(Image.new("L", (9, 9)), "1"), (None, "2")])],
            "format": "parquet",
            "columns": COLUMNS,
        },
        message=(
            f"{ROWS}.columns.image: 1 images of rows.parquet cannot be used. The first is row 1, counted from 0"
            " (rows.parquet): there is none. Replace or remove them"
        ),
    ),
    MistakeCase(
        name="a column of text",
        dataset=lambda t, d: {
            "files": [table(t, [(Image.new("L", (9, 9)), "1")])],
            "format": "parquet",
            "columns": COLUMNS | {"image": "digit"},
        },
        message=(
            f'{ROWS}.columns.image: column "digit" of rows.parquet holds int64, not images (columns of images: picture)'
        ),
    ),
    MistakeCase(
        name="one class alone",
        dataset=lambda t, d: {"files": [str(d / "3"), str(d / "3")]},
        message=f'{ROWS}.columns.label: all 40 rows of 3 have the label "3"; two',
    ),
    MistakeCase(
        name="an image beside the classes",
        dataset=lambda t, d: {"files": [str(layout(t / "pets", *TWO, "more.png"))]},
        message="pets/more.png lies in no folder below ",
    ),
    MistakeCase(
        name="splits for classes",
        dataset=lambda t, d: {
            "files": [str(layout(t / "pets", "train/cat/1.png", "train/dog/1.png", "test/cat/1.png"))]
        },
        message="pets/test/cat/1.png lies in test/cat below ",
    ),
    MistakeCase(
        name="a class that is a link",
        dataset=lambda t, d: {"files": [str(linked(t / "pets"))]},
        message="pets/cow is a link to a folder, which is not followed; ",
    ),
    MistakeCase(
        name="images of a telephone",
        dataset=lambda t, d: with_file(t / "pets", "3/photo.HEIC", b"ftypheic"),
        message="pets are of a format that is not read here (the first: ",
    ),
    MistakeCase(
        name="an archive",
        dataset=lambda t, d: with_file(t / "pets", "3/more.zip", b"PK"),
        message="pets/3/more.zip). Convert them to JPEG or PNG, unpack them",
    ),
    MistakeCase(
        name="no images in it",
        dataset=lambda t, d: {"files": [str(layout(t / "pets", "a/1.txt"))]},
        message=f"{ROWS}.files: there are no images in ",
    ),
    MistakeCase(
        name="16 bits",
        dataset=lambda t, d: {
            "files": [unlike(t, drawn("I;16", [90, 65535]))],
            "format": "parquet",
            "columns": COLUMNS,
        },
        message=(
            "cannot be used. The first is row 1, counted from 0 (rows.parquet): its values are from 90 to 65535, and"
            " would be cut off at 0 and 255; save it with 8 bits a channel"
        ),
    ),
    MistakeCase(
        name="from 0 to 1",
        dataset=lambda t, d: {"files": [unlike(t, drawn("F", [0.25, 0.75]))], "format": "parquet", "columns": COLUMNS},
        message="row 1, counted from 0 (rows.parquet): its values are from 0.25 to 0.75, and would be",
    ),
    MistakeCase(
        name="black on nothing",
        dataset=lambda t, d: {
            "files": [unlike(t, drawn("LA", [(0, 0), (0, 255)]))],
            "format": "parquet",
            "columns": COLUMNS,
        },
        message=(
            "row 1, counted from 0 (rows.parquet): only its transparency varies, which a model does not see;"
            " put it on a background"
        ),
    ),
    MistakeCase(
        name="measured on what is learnt",
        dataset=lambda t, d: {"evalFraction": None, "evalFiles": [str(d)]},
        message=f"{ROWS}.evalFiles: ",
    ),
    MistakeCase(
        name="measured on a part of what is learnt",
        dataset=lambda t, d: {"evalFraction": None, "evalFiles": [str(d / "3")]},
        message="/3 lies in ",
    ),
    MistakeCase(
        name="a class that was never learnt",
        dataset=lambda t, d: {
            "files": [str(write_digits(t / "two", [1, 2]))],
            "evalFraction": None,
            "evalFiles": [str(write_digits(t / "three", [1, 3]))],
        },
        message=f"{ROWS}.columns.label: three has labels that the training rows do not have: 3 (theirs: 1, 2)",
    ),
]


@pytest.mark.parametrize("case", MISTAKES, ids=lambda case: case.name)
def test_a_dataset_that_does_not_fit(case: MistakeCase, classify: MakeRun, digits: Path, tmp_path: Path) -> None:
    assert case.message in failure(classify(dataset=case.dataset(tmp_path, digits)))


@dataclass(frozen=True)
class LayoutCase:
    name: str
    files: Callable[[Path], list[str]]  # written into a scratch folder
    labels: list[str]
    notice: str


LAYOUTS = [
    LayoutCase(
        name="names of all kinds",
        files=lambda t: [
            str(layout(t / "st[a]r *", "__background__/1.PNG", "ü 2/x.1.png", "10/1.png", "9/1.jpeg", ".trash/2.png"))
        ],
        labels=["9", "10", "__background__", "ü 2"],
        notice="",
    ),
    LayoutCase(
        name="several folders",
        files=lambda t: [str(layout(t / "a", *TWO)), str(layout(t / "far" / "b", "dog/2.png", "cow/1.png"))],
        labels=["cat", "cow", "dog"],
        notice="",
    ),
    LayoutCase(
        name="a folder for each class",
        files=lambda t: [str(layout(t / "pets", *TWO) / "*")],
        labels=["cat", "dog"],
        notice="",
    ),
    LayoutCase(
        name="other files",
        files=lambda t: [str(layout(t / "pets", *TWO, "cat/1.xml", "cat/._1.png", "LICENSE"))],
        labels=["cat", "dog"],
        notice="pets are no images by their suffix, and are left out (1 without suffix, 1 .xml)",
    ),
    LayoutCase(
        name="an empty class",
        files=lambda t: [str((layout(t / "pets", *TWO) / "cow").mkdir() or t / "pets")],
        labels=["cat", "dog"],
        notice="pets/cow is empty, and no class",
    ),
    LayoutCase(
        name="a link that leads nowhere",
        files=lambda t: [str((layout(t / "pets", *TWO) / ".old").symlink_to("/nowhere") or t / "pets")],
        labels=["cat", "dog"],
        notice="",
    ),
    LayoutCase(
        name="some in the metadata",
        files=lambda t: [
            str(
                (layout(t / "pets", *TWO, "dog/2.png") / "metadata.csv").write_text(
                    "file_name,label\ncat/1.png,a\ndog/1.png,b\n"
                )
                and t / "pets"
            )
        ],
        labels=["a", "b"],
        notice="1 images are in no row of the metadata, and are left out",
    ),
]


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name)
def test_what_counts_in_a_folder(
    case: LayoutCase, classify: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = classify(dataset={"files": case.files(tmp_path), "evalFraction": None})
    record, data = prepared(run)
    assert record.dataset.labels == case.labels
    assert set(data["train"]["labels"]) == set(range(len(case.labels)))
    output = capsys.readouterr().out
    assert case.notice in output if case.notice else "spec.dataset" not in output


def test_images_are_looked_at_as_they_are_shown(classify: MakeRun, tmp_path: Path) -> None:
    """A palette, few bits in many, and what is half transparent are nothing to refuse; what is turned is turned."""
    odd = [
        drawn("P", [0, 1]),
        drawn("I", [0, 255]),
        drawn("F", [0, 255]),
        drawn("LA", [(9, 0), (0, 255)]),
        drawn("CMYK", [(0, 0, 0, 0), (9, 9, 9, 9)]),
    ]
    path = table(tmp_path, [(image, str(i % 2)) for i, image in enumerate(odd)])
    _, data = prepared(classify(dataset={"files": [path], "format": None, "columns": COLUMNS, "evalFraction": None}))
    assert [row["pixel_values"].convert("RGB").size for row in data["train"]] == [(2, 1)] * len(odd)


TINY_LEVIT = LevitConfig(
    image_size=64,
    hidden_sizes=[16, 32, 48],
    depths=[1, 1, 1],
    num_attention_heads=[1, 2, 3],
    key_dim=[8, 8, 8],
    architectures=["LevitForImageClassification"],
)


@dataclass(frozen=True)
class ModelCase:
    name: str
    config: Any
    spec: dict[str, Any]
    message: str
    processor: dict[str, Any] = field(default_factory=dict)


MODELS = [
    ModelCase(
        name="images of another size",
        config=VIT,
        processor={"size": {"height": 32, "width": 32}},
        spec={},
        message=(
            "spec.model: its image processor makes tensors of 3 × 32 × 32, which the model does not take: Input image"
            " size (32*32) doesn't match model (16*16)."
        ),
    ),
    ModelCase(
        name="images of whatever size",
        config=RESNET,
        processor={"do_resize": False},
        spec={},
        message=(
            "spec.model: its image processor makes tensors of 3 × 48 × 96 and of 3 × 80 × 64 from images of other"
            " shapes, which form no batch;"
        ),
    ),
    ModelCase(
        name="adapters beside statistics",
        config=RESNET,
        spec={"method": {"type": "lora"}},
        message=(
            "spec.method.type: resnet keeps statistics of its batches (resnet.embedder.embedder.normalization), which"
            " change in training and which no adapter"
        ),
    ),
    ModelCase(
        name="spreading what counts",
        config=RESNET,
        spec={"strategy": "zero3", "resources": {"gpusPerNode": 0, "processesPerNode": 2}},
        message=(
            "spec.strategy: resnet keeps statistics of its batches, which ZeRO-3 does not spread; use ddp or zero2 for"
            " such a model"
        ),
    ),
    ModelCase(
        name="statistics in bf16",
        config=RESNET,
        spec={"training": {"parameterPrecision": "bf16", "precision": "bf16"}},
        message="spec.training.parameterPrecision: resnet keeps statistics of its batches, which bf16 is too coarse",
    ),
    ModelCase(
        name="recomputing what cannot be",
        config=RESNET,
        spec={"training": {"gradientCheckpointing": True}},
        message=(
            "spec.training.gradientCheckpointing: resnet cannot recompute its activations; remove it, or use a smaller"
            " microBatchSize"
        ),
    ),
    ModelCase(
        name="recomputing what counts",
        config=MobileViTConfig(image_size=64),
        processor={"size": {"height": 64, "width": 64}},
        spec={"training": {"gradientCheckpointing": True}},
        message=(
            "spec.training.gradientCheckpointing: mobilevit keeps statistics of its batches, and would count each"
            " twice; remove it, or use a smaller"
        ),
    ),
    ModelCase(
        name="a processor that fails",
        config=VIT,
        processor={"image_mean": [0.5, 0.5]},
        spec={},
        message="spec.model: its image processor (ViTImageProcessorPil) fails: ",
    ),
    ModelCase(
        name="one image in the last batch",
        config=TINY_LEVIT,
        processor={"size": {"height": 64, "width": 64}},
        spec={"training": {"batchSize": 8}, "dataset": {"evalFraction": None, "split": "train[:89]"}},
        message=(
            "spec.training.microBatchSize: levit cannot learn from a batch of one image, and with 89 rows there is one"
            " in each epoch;"
        ),
    ),
    ModelCase(
        name="a module that is not there",
        config=VIT,
        spec={"method": {"type": "lora", "targetModules": ["querry"]}},
        message="spec.method.targetModules[0]: the model has no module 'querry'",
    ),
    ModelCase(
        name="the head",
        config=VIT,
        spec={"method": {"type": "lora", "targetModules": ["classifier"]}},
        message=(
            "spec.method.targetModules[0]: 'classifier' is the head, which is trained whole in any case; leave it out"
        ),
    ),
]


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
def test_a_model_that_does_not_fit(case: ModelCase, classify: MakeRun, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", case.config, **case.processor)
    assert failure(classify(model={"path": str(model)}, **case.spec)).startswith(case.message)


def test_a_model_without_a_processor(classify: MakeRun, vit: Path, tmp_path: Path) -> None:
    model = shutil.copytree(vit, tmp_path / "model")
    (model / "preprocessor_config.json").unlink()
    assert failure(classify(model={"path": str(model)})).startswith(
        f"spec.model.path: {model} has no usable image processor (preprocessor_config.json)"
    )


def test_a_model_of_text(classify: MakeRun, tiny_model: Path) -> None:
    assert (
        failure(classify(model={"path": str(tiny_model)}))
        == "spec.model: architecture llama cannot do image-classification; choose another model or task"
    )


def test_the_images_of_a_job_are_known_again(classify: MakeRun, digits: Path, tmp_path: Path) -> None:
    pictures = shutil.copytree(digits, tmp_path / "pictures")
    run = classify(dataset={"files": [str(pictures)]})
    main(run)
    main(run)  # nothing has changed
    for path in pictures.rglob("*.png"):
        path.touch()  # as on a volume that is mounted anew
    main(run)
    (pictures / "7" / "more.png").write_bytes(next(pictures.rglob("3/*.png")).read_bytes())
    assert failure(run).startswith(f"spec.dataset.files: {pictures} has changed since this job was prepared")
