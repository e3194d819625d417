"""image-classification over real images: what `prepare` makes of folders and tables, and how each mistake is told."""

from __future__ import annotations

import shutil
from collections.abc import Callable
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
    """A folder with an image, each another one, at each of the paths in it."""
    for i, name in enumerate(images):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (i * 20, 0, 0)).save(folder / name, format="PNG")
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
MISTAKES: list[tuple[str, Callable[[Path, Path], dict[str, Any]], str]] = [
    # name, (scratch folder, digits) → fields of the dataset, message
    (
        "no such column",
        lambda t, d: {"columns": {"image": "photo"}},
        f'{ROWS}.columns.image: no column "photo" in digits (columns: image, label). Did you mean "image"?',
    ),
    (
        "a label that is none",
        lambda t, d: flat(t / "flat"),
        f'{ROWS}.columns.label: all 3 rows of flat have the label "flat"; two classes at least are needed',
    ),
    (
        "an image that is cut",
        lambda t, d: with_file(t / "pets", "4/cut.png", cut(d)),
        f"{ROWS}.columns.image: 1 images of pets cannot be used. The first is row 4, counted from 0: ",
    ),
    ("no image at all", lambda t, d: with_file(t / "pets", "3/text.png", b"hello"), "cannot identify image file"),
    (
        "a row without an image",
        lambda t, d: {
            "files": [table(t, [(Image.new("L", (9, 9)), "1"), (None, "2")])],
            "format": "parquet",
            "columns": COLUMNS,
        },
        (
            f"{ROWS}.columns.image: 1 images of rows.parquet cannot be used. The first is row 1, counted from 0"
            " (rows.parquet): there is none. Replace or remove them"
        ),
    ),
    (
        "a column of text",
        lambda t, d: {
            "files": [table(t, [(Image.new("L", (9, 9)), "1")])],
            "format": "parquet",
            "columns": COLUMNS | {"image": "digit"},
        },
        f'{ROWS}.columns.image: column "digit" of rows.parquet holds int64, not images (columns of images: picture)',
    ),
    (
        "one class alone",
        lambda t, d: {"files": [str(d / "3"), str(d / "3")]},
        f'{ROWS}.columns.label: all 40 rows of 3 have the label "3"; two',
    ),
    (
        "an image beside the classes",
        lambda t, d: {"files": [str(layout(t / "pets", *TWO, "more.png"))]},
        "pets/more.png lies in no folder below ",
    ),
    (
        "splits for classes",
        lambda t, d: {"files": [str(layout(t / "pets", "train/cat/1.png", "train/dog/1.png", "test/cat/1.png"))]},
        "pets/test/cat/1.png lies in test/cat below ",
    ),
    (
        "a class that is a link",
        lambda t, d: {"files": [str(linked(t / "pets"))]},
        "pets/cow is a link to a folder, which is not followed; ",
    ),
    (
        "images of a telephone",
        lambda t, d: with_file(t / "pets", "3/photo.HEIC", b"ftypheic"),
        "pets are of a format that is not read here (the first: ",
    ),
    (
        "an archive",
        lambda t, d: with_file(t / "pets", "3/more.zip", b"PK"),
        "pets/3/more.zip). Convert them to JPEG or PNG, unpack them",
    ),
    (
        "no images in it",
        lambda t, d: {"files": [str(layout(t / "pets", "a/1.txt"))]},
        f"{ROWS}.files: there are no images in ",
    ),
    (
        "16 bits",
        lambda t, d: {"files": [unlike(t, drawn("I;16", [90, 65535]))], "format": "parquet", "columns": COLUMNS},
        (
            "cannot be used. The first is row 1, counted from 0 (rows.parquet): its values are from 90 to 65535, and"
            " would be cut off at 0 and 255; save it with 8 bits a channel"
        ),
    ),
    (
        "from 0 to 1",
        lambda t, d: {"files": [unlike(t, drawn("F", [0.25, 0.75]))], "format": "parquet", "columns": COLUMNS},
        "row 1, counted from 0 (rows.parquet): its values are from 0.25 to 0.75, and would be",
    ),
    (
        "black on nothing",
        lambda t, d: {"files": [unlike(t, drawn("LA", [(0, 0), (0, 255)]))], "format": "parquet", "columns": COLUMNS},
        (
            "row 1, counted from 0 (rows.parquet): it is drawn in its transparency alone, which a model does not see;"
            " put it on a background"
        ),
    ),
    ("measured on what is learnt", lambda t, d: {"evalFraction": None, "evalFiles": [str(d)]}, f"{ROWS}.evalFiles: "),
    (
        "measured on a part of what is learnt",
        lambda t, d: {"evalFraction": None, "evalFiles": [str(d / "3")]},
        "/3 lies in ",
    ),
    (
        "a class that was never learnt",
        lambda t, d: {
            "files": [str(write_digits(t / "two", [1, 2]))],
            "evalFraction": None,
            "evalFiles": [str(write_digits(t / "three", [1, 3]))],
        },
        f"{ROWS}.columns.label: three has labels that the training rows do not have: 3 (theirs: 1, 2)",
    ),
]


@pytest.mark.parametrize(("name", "dataset", "message"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_dataset_that_does_not_fit(
    name: str,
    dataset: Callable[[Path, Path], dict[str, Any]],
    message: str,
    classify: MakeRun,
    digits: Path,
    tmp_path: Path,
) -> None:
    assert message in failure(classify(dataset=dataset(tmp_path, digits)))


LAYOUTS: list[tuple[str, Callable[[Path], list[str]], list[str], str]] = [
    # name, scratch folder → files; labels, and what is said
    (
        "names of all kinds",
        lambda t: [
            str(layout(t / "st[a]r *", "__background__/1.PNG", "ü 2/x.1.png", "10/1.png", "9/1.jpeg", ".trash/2.png"))
        ],
        ["9", "10", "__background__", "ü 2"],
        "",
    ),
    (
        "several folders",
        lambda t: [str(layout(t / "a", *TWO)), str(layout(t / "far" / "b", "dog/2.png", "cow/1.png"))],
        ["cat", "cow", "dog"],
        "",
    ),
    ("a folder for each class", lambda t: [str(layout(t / "pets", *TWO) / "*")], ["cat", "dog"], ""),
    (
        "other files",
        lambda t: [str(layout(t / "pets", *TWO, "cat/1.xml", "cat/._1.png", "LICENSE"))],
        ["cat", "dog"],
        "pets are no images by their suffix, and are left out (1 without suffix, 1 .xml)",
    ),
    (
        "an empty class",
        lambda t: [str((layout(t / "pets", *TWO) / "cow").mkdir() or t / "pets")],
        ["cat", "dog"],
        "pets/cow is empty, and no class",
    ),
    (
        "a link that leads nowhere",
        lambda t: [str((layout(t / "pets", *TWO) / ".old").symlink_to("/nowhere") or t / "pets")],
        ["cat", "dog"],
        "",
    ),
    (
        "some in the metadata",
        lambda t: [
            str(
                (layout(t / "pets", *TWO, "dog/2.png") / "metadata.csv").write_text(
                    "file_name,label\ncat/1.png,a\ndog/1.png,b\n"
                )
                and t / "pets"
            )
        ],
        ["a", "b"],
        "1 images are in no row of the metadata, and are left out",
    ),
]


@pytest.mark.parametrize(("name", "files", "labels", "said"), LAYOUTS, ids=[x[0] for x in LAYOUTS])
def test_what_counts_in_a_folder(
    name: str,
    files: Callable[[Path], list[str]],
    labels: list[str],
    said: str,
    classify: MakeRun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = classify(dataset={"files": files(tmp_path), "evalFraction": None})
    record, data = prepared(run)
    assert record.dataset.labels == labels
    assert set(data["train"]["labels"]) == set(range(len(labels)))
    output = capsys.readouterr().out
    assert said in output if said else "spec.dataset" not in output


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

MODELS: list[tuple[str, Any, dict[str, Any], dict[str, Any], str]] = [
    # name, configuration, its processor, fields of the spec, message
    (
        "images of another size",
        VIT,
        {"size": {"height": 32, "width": 32}},
        {},
        (
            "spec.model: its image processor makes tensors of 3 × 32 × 32, which the model does not take: Input image"
            " size (32*32) doesn't match model (16*16)."
        ),
    ),
    (
        "images of whatever size",
        RESNET,
        {"do_resize": False},
        {},
        (
            "spec.model: its image processor makes tensors of 3 × 48 × 96 and of 3 × 80 × 64 from images of other"
            " shapes, which form no batch;"
        ),
    ),
    (
        "adapters beside statistics",
        RESNET,
        {},
        {"method": {"type": "lora"}},
        (
            "spec.method.type: resnet keeps statistics of its batches (resnet.embedder.embedder.normalization), which"
            " change in training and which no adapter"
        ),
    ),
    (
        "spreading what counts",
        RESNET,
        {},
        {"strategy": "zero3", "resources": {"gpusPerNode": 0, "processesPerNode": 2}},
        (
            "spec.strategy: resnet keeps statistics of its batches, which ZeRO-3 does not spread; use ddp or zero2 for"
            " such a model"
        ),
    ),
    (
        "recomputing what cannot be",
        RESNET,
        {},
        {"training": {"gradientCheckpointing": True}},
        (
            "spec.training.gradientCheckpointing: resnet cannot recompute its activations; remove it, or use a smaller"
            " microBatchSize"
        ),
    ),
    (
        "recomputing what counts",
        MobileViTConfig(image_size=64),
        {"size": {"height": 64, "width": 64}},
        {"training": {"gradientCheckpointing": True}},
        (
            "spec.training.gradientCheckpointing: mobilevit keeps statistics of its batches, and would count each"
            " twice; remove it, or use a smaller"
        ),
    ),
    (
        "a processor that fails",
        VIT,
        {"image_mean": [0.5, 0.5]},
        {},
        "spec.model: its image processor (ViTImageProcessorPil) fails: ",
    ),
    (
        "one image in the last batch",
        TINY_LEVIT,
        {"size": {"height": 64, "width": 64}},
        {"training": {"batchSize": 8}, "dataset": {"evalFraction": None, "split": "train[:89]"}},
        (
            "spec.training.microBatchSize: levit cannot learn from a batch of one image, and with 89 rows there is one"
            " in each epoch;"
        ),
    ),
    (
        "a module that is not there",
        VIT,
        {},
        {"method": {"type": "lora", "targetModules": ["querry"]}},
        "spec.method.targetModules[0]: the model has no module 'querry'",
    ),
    (
        "the head",
        VIT,
        {},
        {"method": {"type": "lora", "targetModules": ["classifier"]}},
        "spec.method.targetModules[0]: 'classifier' is the head, which is trained whole in any case; leave it out",
    ),
]


@pytest.mark.parametrize(("name", "config", "processor", "spec", "message"), MODELS, ids=[m[0] for m in MODELS])
def test_a_model_that_does_not_fit(
    name: str,
    config: Any,
    processor: dict[str, Any],
    spec: dict[str, Any],
    message: str,
    classify: MakeRun,
    tmp_path: Path,
) -> None:
    model = save_model(tmp_path / "model", config, **processor)
    assert failure(classify(model={"path": str(model)}, **spec)).startswith(message)


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
