"""image-classification over real images: what `prepare` makes of folders and tables, how each mistake is told, and what is learnt."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, load_from_disk
from datasets import Image as ImageFeature
from peft import AutoPeftModel
from PIL import Image
from trainer.digits import RESNET, SIDE, VIT, save_model, write_digits
from transformers import AutoImageProcessor, AutoModelForImageClassification, ConvNextV2Config, EfficientNetConfig, SwinConfig

from luthier_api.exitcodes import ExitCode
from luthier_api.run import FineTuneRun
from luthier_trainer import modelcard, train
from luthier_trainer.ending import Failure
from luthier_trainer.merging import merge
from luthier_trainer.prepare import main
from luthier_trainer.prepared import read_prepared

MakeRun = Callable[..., FineTuneRun]
DIGITS = [str(n) for n in range(10)]


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty images of each digit, in a folder of its name. Read-only: copy it to change it."""
    return write_digits(tmp_path_factory.mktemp("images") / "digits")


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "vit")


@pytest.fixture
def classify(make_run: MakeRun, digits: Path, vit: Path) -> MakeRun:
    """A run over the digits; fields of `dataset` and `training` are merged with what is there."""

    def make(name: str = "job", sources: dict[str, str] | None = None, **spec: Any) -> FineTuneRun:
        data = {"files": [str(digits)], "format": "imagefolder", "evalFraction": 0.2} | spec.pop("dataset", {})
        training = {"batchSize": 32, "maxSteps": 100, "learningRate": 3e-3, "logSteps": 50} | spec.pop("training", {})
        given = {"task": "image-classification", "model": {"path": str(vit)}, "method": {"type": "full"}} | spec
        return make_run(name, sources, **given, dataset={k: v for k, v in data.items() if v is not None}, training=training)

    return make


def prepared(run: FineTuneRun) -> tuple[Any, Any]:
    """(record, DatasetDict) after `prepare`."""
    main(run)
    record = read_prepared(run)
    return record, load_from_disk(record.dataset_path)


def failure(run: FineTuneRun) -> str:
    with pytest.raises(Failure) as caught:
        main(run)
    assert caught.value.code in (ExitCode.INVALID_DATASET, ExitCode.INVALID_SPEC)
    return caught.value.message


def test_a_folder_of_folders(classify: MakeRun, digits: Path, tmp_path: Path) -> None:
    """The names of the folders are the classes; the images are in the workspace afterwards, as they were."""
    pictures = shutil.copytree(digits, tmp_path / "pictures")
    record, data = prepared(classify(dataset={"files": [str(pictures)]}))
    assert (record.dataset.rows, record.dataset.eval_rows, record.dataset.tokens, record.dataset.labels) == (320, 80, None, DIGITS)
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
    record, data = prepared(classify(dataset={"files": [path], "format": None, "columns": COLUMNS, "evalFraction": None}))
    assert (record.dataset.rows, record.dataset.labels) == (4, DIGITS)
    assert data["train"]["labels"] == [0, 1, 0, 1]


def flat(folder: Path) -> dict[str, Any]:
    """Images that lie in no folder of a class."""
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (9, 9)).save(folder / f"{i}.png")
    return {"files": [str(folder)]}


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
    ("no such column", lambda t, d: {"columns": {"image": "photo"}},
     f'{ROWS}.columns.image: no column "photo" in digits (columns: image, label). Did you mean "image"?'),
    ("a label that is none", lambda t, d: flat(t / "flat"),
     f'{ROWS}.columns.label: no column "label" in flat (columns: image). Name the one that plays this role'),
    ("an image that is cut", lambda t, d: with_file(t / "pets", "4/cut.png", cut(d)),
     f"{ROWS}.columns.image: 1 images of pets cannot be read (the first: row 4, "),
    ("no image at all", lambda t, d: with_file(t / "pets", "3/text.png", b"hello"), "cannot identify image file"),
    ("a row without an image", lambda t, d: {"files": [table(t, [(Image.new("L", (9, 9)), "1"), (None, "2")])], "format": "parquet", "columns": COLUMNS},
     f"{ROWS}.columns.image: 1 images of rows.parquet cannot be read (the first: row 1, which has none). Replace or remove them"),
    ("a column of text", lambda t, d: {"files": [table(t, [(Image.new("L", (9, 9)), "1")])], "format": "parquet", "columns": COLUMNS | {"image": "digit"}},
     f'{ROWS}.columns.image: column "digit" of rows.parquet holds int64, not images (columns of images: picture)'),
    ("one class alone", lambda t, d: {"files": [str(d / "3"), str(d / "3")]}, f'{ROWS}.columns.label: no column "label"'),
    ("measured on what is learnt", lambda t, d: {"evalFraction": None, "evalFiles": [str(d)]}, f"{ROWS}.evalFiles: "),
    ("measured on a part of what is learnt", lambda t, d: {"evalFraction": None, "evalFiles": [str(d / "3")]},
     "/3 lies in "),
    ("a class that was never learnt", lambda t, d: {"files": [str(write_digits(t / "two", [1, 2]))], "evalFraction": None,
                                                    "evalFiles": [str(write_digits(t / "three", [1, 3]))]},
     f"{ROWS}.columns.label: three has labels that the training rows do not have: 3 (theirs: 1, 2)"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "dataset", "message"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_dataset_that_does_not_fit(
    name: str, dataset: Callable[[Path, Path], dict[str, Any]], message: str, classify: MakeRun, digits: Path, tmp_path: Path
) -> None:
    assert message in failure(classify(dataset=dataset(tmp_path, digits)))


MODELS: list[tuple[str, Any, dict[str, Any], dict[str, Any], str]] = [
    # name, configuration, its processor, fields of the spec, message
    ("images of another size", VIT, {"size": {"height": 32, "width": 32}}, {},
     "spec.model: its image processor makes tensors of 3 × 32 × 32, which the model does not take: Input image size (32*32) doesn't match model (16*16)."),
    ("images of whatever size", RESNET, {"do_resize": False}, {},
     "spec.model: its image processor makes tensors of 3 × 48 × 96 and of 3 × 80 × 64 from images of other shapes, which form no batch;"),
    ("adapters beside statistics", RESNET, {}, {"method": {"type": "lora"}},
     "spec.method.type: resnet keeps statistics of its batches (resnet.embedder.embedder.normalization), which change in training and which no adapter"),
    ("recomputing what cannot be", RESNET, {}, {"training": {"gradientCheckpointing": True}},
     "spec.training.gradientCheckpointing: resnet cannot recompute its activations; remove it, or use a smaller microBatchSize"),
    ("a module that is not there", VIT, {}, {"method": {"type": "lora", "targetModules": ["querry"]}},
     "spec.method.targetModules[0]: the model has no module 'querry'"),
    ("the head", VIT, {}, {"method": {"type": "lora", "targetModules": ["classifier"]}},
     "spec.method.targetModules[0]: 'classifier' is the head, which is trained whole in any case; leave it out"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "config", "processor", "spec", "message"), MODELS, ids=[m[0] for m in MODELS])
def test_a_model_that_does_not_fit(
    name: str, config: Any, processor: dict[str, Any], spec: dict[str, Any], message: str, classify: MakeRun, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model", config, **processor)
    assert failure(classify(model={"path": str(model)}, **spec)).startswith(message)


def test_a_model_without_a_processor(classify: MakeRun, vit: Path, tmp_path: Path) -> None:
    model = shutil.copytree(vit, tmp_path / "model")
    (model / "preprocessor_config.json").unlink()
    assert failure(classify(model={"path": str(model)})).startswith(f"spec.model.path: {model} has no usable image processor (preprocessor_config.json)")


def test_a_model_of_text(classify: MakeRun, tiny_model: Path) -> None:
    assert failure(classify(model={"path": str(tiny_model)})) == "spec.model: architecture llama cannot do image-classification; choose another model or task"


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


def accuracy(model: Any, processor: Any, rows: Dataset) -> float:
    """Measured with plain transformers."""
    with torch.no_grad():
        pixels = processor(images=[row["pixel_values"].convert("RGB") for row in rows], return_tensors="pt")
        answers = model.eval()(**pixels).logits.argmax(dim=1)
    return float((answers == torch.tensor(rows["labels"])).float().mean())


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_all_weights_learn_to_read_digits(config: Any, classify: MakeRun, tmp_path: Path) -> None:
    run = classify(model={"path": str(save_model(tmp_path / "model", config))})
    _, data = prepared(run)
    metrics = train.main(run).metrics or {}
    assert metrics["accuracy"] > 0.7 > 0.2 > metrics["majorityShare"]
    assert "tokens" not in metrics
    result = Path(run.workspace) / "result"
    model, processor = AutoModelForImageClassification.from_pretrained(result), AutoImageProcessor.from_pretrained(result)
    assert model.config.id2label == dict(enumerate(DIGITS))
    assert accuracy(model, processor, data["eval"]) == pytest.approx(metrics["accuracy"])


def load_as_the_card_says(run: FineTuneRun, result: Path) -> dict[str, Any]:
    """What the lines of the model card make."""
    lines = modelcard.card(run, read_prepared(run), result).split("```python\n")[1].split("```")[0]
    made: dict[str, Any] = {}
    exec(lines.replace(f'"{run.name}"', repr(str(result))), made)
    return made


def test_an_adapter_on_what_another_job_has_learnt(classify: MakeRun, tmp_path: Path) -> None:
    """The first job tells ten digits apart, its model's head is for them; the second asks for five of them, with rows of its own."""
    first = classify("first")
    main(first)
    train.main(first)
    few = write_digits(tmp_path / "few", [5, 6, 7, 8, 9], each=30, skip=40)
    second = classify("second", {"first": first.workspace}, model={"job": "first"}, method={"type": "lora"}, dataset={"files": [str(few)]})
    _, data = prepared(second)
    metrics = train.main(second).metrics or {}
    assert metrics["accuracy"] > 0.7 > 0.4 > metrics["majorityShare"]
    result = Path(second.workspace) / "result"
    config = json.loads((result / "adapter_config.json").read_text())
    assert config["auto_mapping"]["base_model_class"] == "ViTForImageClassification"

    made = load_as_the_card_says(second, result)
    assert isinstance(made["AutoPeftModel"], type(AutoPeftModel))
    assert accuracy(made["model"], made["processor"], data["eval"]) == pytest.approx(metrics["accuracy"])

    merged = merge(Path(read_prepared(second).model_path), result, tmp_path / "merged", ["5", "6", "7", "8", "9"], "spec.model.job")
    whole = AutoModelForImageClassification.from_pretrained(merged)
    assert accuracy(whole, made["processor"], data["eval"]) == pytest.approx(metrics["accuracy"])
    assert whole.config.id2label == {i: str(n) for i, n in enumerate(range(5, 10))}


def test_a_third_job_goes_on_from_the_adapter(classify: MakeRun, digits: Path, tmp_path: Path) -> None:
    first = classify("first", method={"type": "lora"}, training={"maxSteps": 2})
    main(first)
    train.main(first)
    third = classify("third", {"first": first.workspace}, model={"job": "first"})
    record, _ = prepared(third)
    assert record.model_path == f"{third.workspace}/prepared/model"
    model = AutoModelForImageClassification.from_pretrained(record.model_path)
    assert model.config.id2label == dict(enumerate(DIGITS))
    assert (Path(record.model_path) / "preprocessor_config.json").exists()


ARCHITECTURES: list[tuple[str, Any, int, str]] = [
    # name, configuration, pixels of a side, method
    ("convnextv2", ConvNextV2Config(image_size=SIDE, patch_size=2, hidden_sizes=[16, 32], depths=[1, 1], num_stages=2), SIDE, "lora"),
    ("swin", SwinConfig(image_size=SIDE, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4), SIDE, "lora"),
    ("efficientnet", EfficientNetConfig(image_size=64, hidden_dim=128, width_coefficient=0.1, depth_coefficient=0.1), 64, "full"),
]


@pytest.mark.parametrize(("name", "config", "side", "method"), ARCHITECTURES, ids=[a[0] for a in ARCHITECTURES])
def test_other_architectures_learn(name: str, config: Any, side: int, method: str, classify: MakeRun, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", config, size={"height": side, "width": side})
    run = classify(model={"path": str(model)}, method={"type": method}, training={"maxSteps": 4})
    main(run)
    metrics = train.main(run).metrics or {}
    assert metrics["lastLoss"] < 4
