"""image-classification over real images: what `prepare` makes of folders and tables, how each mistake is told, and what is learnt."""

from __future__ import annotations

import copy
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, load_from_disk
from datasets import Image as ImageFeature
from peft import AutoPeftModel
from PIL import Image
from prepared_workspace import image_data, pod, prepared_run
from safetensors.torch import load_file, save_file
from trainer.digits import RESNET, SIDE, VIT, save_model, write_digits
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    CLIPConfig,
    ConvNextV2Config,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    EfficientNetConfig,
    LevitConfig,
    MobileViTConfig,
    SiglipConfig,
    SwinConfig,
    ViTImageProcessor,
)

from luthier_api.exitcodes import ExitCode
from luthier_api.run import FineTuneRun
from luthier_trainer import modelcard, train
from luthier_trainer.ending import Failure
from luthier_trainer.merging import merge
from luthier_trainer.prepare import main
from luthier_trainer.prepared import read_prepared
from luthier_trainer.tasks.image_classification import ImageClassification

MakeRun = Callable[..., FineTuneRun]
DIGITS = [str(n) for n in range(10)]
SWIN = SwinConfig(image_size=SIDE, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4, drop_path_rate=0.1)


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
    ("no such column", lambda t, d: {"columns": {"image": "photo"}},
     f'{ROWS}.columns.image: no column "photo" in digits (columns: image, label). Did you mean "image"?'),
    ("a label that is none", lambda t, d: flat(t / "flat"),
     f'{ROWS}.columns.label: all 3 rows of flat have the label "flat"; two classes at least are needed'),
    ("an image that is cut", lambda t, d: with_file(t / "pets", "4/cut.png", cut(d)),
     f"{ROWS}.columns.image: 1 images of pets cannot be used (the first: row 4, "),
    ("no image at all", lambda t, d: with_file(t / "pets", "3/text.png", b"hello"), "cannot identify image file"),
    ("a row without an image", lambda t, d: {"files": [table(t, [(Image.new("L", (9, 9)), "1"), (None, "2")])], "format": "parquet", "columns": COLUMNS},
     f"{ROWS}.columns.image: 1 images of rows.parquet cannot be used (the first: row 1, which has none). Replace or remove them"),
    ("a column of text", lambda t, d: {"files": [table(t, [(Image.new("L", (9, 9)), "1")])], "format": "parquet", "columns": COLUMNS | {"image": "digit"}},
     f'{ROWS}.columns.image: column "digit" of rows.parquet holds int64, not images (columns of images: picture)'),
    ("one class alone", lambda t, d: {"files": [str(d / "3"), str(d / "3")]},
     f'{ROWS}.columns.label: all 40 rows of 3 have the label "3"; two'),
    ("an image beside the classes", lambda t, d: {"files": [str(layout(t / "pets", *TWO, "more.png"))]},
     "pets/more.png lies in no folder below "),
    ("splits for classes", lambda t, d: {"files": [str(layout(t / "pets", "train/cat/1.png", "train/dog/1.png", "test/cat/1.png"))]},
     "pets/test/cat/1.png lies in test/cat below "),
    ("a class that is a link", lambda t, d: {"files": [str(linked(t / "pets"))]}, "pets/cow is a link to a folder, which is not followed; "),
    ("images of a telephone", lambda t, d: with_file(t / "pets", "3/photo.HEIC", b"ftypheic"),
     "pets are of a format that is not read here (the first: "),
    ("an archive", lambda t, d: with_file(t / "pets", "3/more.zip", b"PK"), "pets/3/more.zip). Convert them to JPEG or PNG, unpack them"),
    ("no images in it", lambda t, d: {"files": [str(layout(t / "pets", "a/1.txt"))]}, f"{ROWS}.files: there are no images in "),
    ("16 bits", lambda t, d: {"files": [unlike(t, drawn("I;16", [90, 65535]))], "format": "parquet", "columns": COLUMNS},
     "cannot be used (the first: row 1, its values are from 90 to 65535, and would be cut off at 0 and 255; save it with 8 bits a channel)"),
    ("from 0 to 1", lambda t, d: {"files": [unlike(t, drawn("F", [0.25, 0.75]))], "format": "parquet", "columns": COLUMNS},
     "row 1, its values are from 0.25 to 0.75, and would be"),
    ("black on nothing", lambda t, d: {"files": [unlike(t, drawn("LA", [(0, 0), (0, 255)]))], "format": "parquet", "columns": COLUMNS},
     "row 1, it is drawn in its transparency alone, which a model does not see; put it on a background)"),
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


LAYOUTS: list[tuple[str, Callable[[Path], list[str]], list[str], str]] = [
    # name, scratch folder → files; labels, and what is said
    ("names of all kinds", lambda t: [str(layout(t / "st[a]r *", "__background__/1.PNG", "ü 2/x.1.png", "10/1.png", "9/1.jpeg", ".trash/2.png"))],
     ["9", "10", "__background__", "ü 2"], ""),
    ("several folders", lambda t: [str(layout(t / "a", *TWO)), str(layout(t / "far" / "b", "dog/2.png", "cow/1.png"))], ["cat", "cow", "dog"], ""),
    ("a folder for each class", lambda t: [str(layout(t / "pets", *TWO) / "*")], ["cat", "dog"], ""),
    ("other files", lambda t: [str(layout(t / "pets", *TWO, "cat/1.xml", "cat/._1.png", "LICENSE"))], ["cat", "dog"],
     "pets are no images by their suffix, and are left out (1 without suffix, 1 .xml)"),
    ("an empty class", lambda t: [str((layout(t / "pets", *TWO) / "cow").mkdir() or t / "pets")], ["cat", "dog"], "pets/cow is empty, and no class"),
    ("a link that leads nowhere", lambda t: [str((layout(t / "pets", *TWO) / ".old").symlink_to("/nowhere") or t / "pets")], ["cat", "dog"], ""),
    ("some in the metadata", lambda t: [str((layout(t / "pets", *TWO, "dog/2.png") / "metadata.csv").write_text(
        "file_name,label\ncat/1.png,a\ndog/1.png,b\n") and t / "pets")], ["a", "b"], "1 images are in no row of the metadata, and are left out"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "files", "labels", "said"), LAYOUTS, ids=[x[0] for x in LAYOUTS])
def test_what_counts_in_a_folder(
    name: str, files: Callable[[Path], list[str]], labels: list[str], said: str, classify: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = classify(dataset={"files": files(tmp_path), "evalFraction": None})
    record, data = prepared(run)
    assert record.dataset.labels == labels
    assert set(data["train"]["labels"]) == set(range(len(labels)))
    output = capsys.readouterr().out
    assert said in output if said else "spec.dataset" not in output


def test_images_are_looked_at_as_they_are_shown(classify: MakeRun, tmp_path: Path) -> None:
    """A palette, few bits in many, and what is half transparent are nothing to refuse; what is turned is turned."""
    odd = [drawn("P", [0, 1]), drawn("I", [0, 255]), drawn("F", [0, 255]), drawn("LA", [(9, 0), (0, 255)]), drawn("CMYK", [(0, 0, 0, 0), (9, 9, 9, 9)])]
    path = table(tmp_path, [(image, str(i % 2)) for i, image in enumerate(odd)])
    _, data = prepared(classify(dataset={"files": [path], "format": None, "columns": COLUMNS, "evalFraction": None}))
    assert [row["pixel_values"].convert("RGB").size for row in data["train"]] == [(2, 1)] * len(odd)


TINY_LEVIT = LevitConfig(
    image_size=64, hidden_sizes=[16, 32, 48], depths=[1, 1, 1], num_attention_heads=[1, 2, 3], key_dim=[8, 8, 8], architectures=["LevitForImageClassification"],
)  # fmt: skip

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
    ("recomputing what counts", MobileViTConfig(image_size=64), {"size": {"height": 64, "width": 64}}, {"training": {"gradientCheckpointing": True}},
     "spec.training.gradientCheckpointing: mobilevit keeps statistics of its batches, and would count each twice; remove it, or use a smaller"),
    ("a processor that fails", VIT, {"image_mean": [0.5, 0.5]}, {},
     "spec.model: its image processor (ViTImageProcessorPil) fails: "),
    ("one image in the last batch", TINY_LEVIT, {"size": {"height": 64, "width": 64}}, {"training": {"batchSize": 8}, "dataset": {"evalFraction": None, "split": "train[:89]"}},
     "spec.training.microBatchSize: levit cannot learn from a batch of one image, and with 89 rows there is one in each epoch;"),
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


DEIT = DeiTConfig(**{k: v for k, v in VIT.to_dict().items() if k in ("image_size", "patch_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                                                     "num_attention_heads", "initializer_range")})  # fmt: skip


def two_heads(folder: Path, labels: list[str]) -> Path:
    """A model whose answer is the mean of two heads, for such labels."""
    torch.manual_seed(1)
    config = copy.deepcopy(DEIT)
    config.id2label, config.label2id = dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}
    model = DeiTForImageClassificationWithTeacher(config)
    torch.nn.init.normal_(model.cls_classifier.weight)
    torch.nn.init.normal_(model.distillation_classifier.weight)
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


def answers(model: Any) -> torch.Tensor:
    """Logits [1, labels], in the order of the labels' names."""
    with torch.no_grad():
        logits = model.eval()(torch.linspace(-1, 1, 3 * SIDE * SIDE).reshape(1, 3, SIDE, SIDE)).logits
    return logits[:, [i for i, _ in sorted(model.config.id2label.items(), key=lambda item: item[1])]]


def test_two_heads_change_their_order_together(tmp_path: Path) -> None:
    path = two_heads(tmp_path, ["c", "a", "b"])
    before = answers(AutoModelForImageClassification.from_pretrained(path))
    model, whole = ImageClassification().load_model(str(path), ["a", "b", "c"])
    assert torch.allclose(answers(model), before)
    assert whole == ["cls_classifier", "distillation_classifier"]


def loss(model: Any, processor: Any, rows: Dataset) -> float:
    """Likewise."""
    with torch.no_grad():
        pixels = processor(images=[row["pixel_values"].convert("RGB") for row in rows], return_tensors="pt")
        return torch.nn.functional.cross_entropy(model.eval()(**pixels).logits, torch.tensor(rows["labels"])).item()


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


WIDTHS: dict[str, Any] = {"image_size": SIDE, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
IDLE: list[tuple[str, Any, str, str]] = [
    # name, configuration, method, what has no part
    ("dinov2", Dinov2Config(**WIDTHS), "full", "1 of its weights have no part in this task and stay as they are: dinov2.embeddings.mask_token"),
    ("clip", CLIPConfig(vision_config=WIDTHS), "full", "2 of its weights have no part"),
    ("siglip", SiglipConfig(vision_config=WIDTHS), "full", "11 of its weights have no part"),
    ("siglip", SiglipConfig(vision_config=WIDTHS), "lora", "11 of its weights have no part"),
    ("two heads", None, "lora", ""),
]  # fmt: skip


@pytest.mark.parametrize(("name", "config", "method", "said"), IDLE, ids=[f"{x[0]}, {x[2]}" for x in IDLE])
def test_what_is_loaded_is_what_was_measured(
    name: str, config: Any, method: str, said: str, classify: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where a model has weights of another task, and where the base has a head for as many labels."""
    model = save_model(tmp_path / "model", config) if config else two_heads(tmp_path / "model", DIGITS[::-1])
    run = classify(model={"path": str(model)}, method={"type": method}, training={"maxSteps": 3})
    _, data = prepared(run)
    metrics = train.main(run).metrics or {}
    assert said in capsys.readouterr().out
    made = load_as_the_card_says(run, Path(run.workspace) / "result")
    assert loss(made["model"], made["processor"], data["eval"]) == pytest.approx(metrics["evalLoss"], abs=1e-4)


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


def test_an_adapter_without_the_head_that_its_base_lacks(classify: MakeRun, digits: Path, vit: Path, tmp_path: Path) -> None:
    """A new one would stay, and answer by chance."""
    run = classify(method={"type": "lora"}, training={"maxSteps": 1})
    main(run)
    train.main(run)
    result = Path(run.workspace) / "result"
    weights = {name: weight for name, weight in load_file(result / "adapter_model.safetensors").items() if "classifier" not in name}
    save_file(weights, result / "adapter_model.safetensors")
    with pytest.raises(Failure, match=r"spec.model.job: neither the adapter nor its base model .* has classifier.bias, classifier.weight"):
        merge(vit, result, tmp_path / "merged", [*DIGITS, "none"], "spec.model.job")


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


@pytest.mark.parametrize(("method", "precision"), [("full", "fp32"), ("full", "bf16"), ("lora", "fp32")])
def test_a_model_of_16_bits_is_delivered_as_one(method: str, precision: str, classify: MakeRun, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", SWIN)
    AutoModelForImageClassification.from_pretrained(model).to(torch.bfloat16).save_pretrained(model)
    run = classify(model={"path": str(model)}, method={"type": method}, training={"maxSteps": 3, "precision": precision})
    main(run)
    assert (train.main(run).metrics or {})["evalLoss"] < 4
    if method == "full":
        assert AutoModelForImageClassification.from_pretrained(Path(run.workspace) / "result").dtype == torch.bfloat16


@pytest.mark.parametrize("config", [RESNET, SWIN], ids=["resnet", "swin"])
def test_a_resumed_training_is_the_same(config: Any, classify: MakeRun, tmp_path: Path) -> None:
    """With statistics of batches, with chance, and with weights that have other names in files; in the middle of the second epoch."""
    run = classify(model={"path": str(save_model(tmp_path / "model", config))}, training={"maxSteps": 16, "saveSteps": 13, "logSteps": 1})
    main(run)
    first, workspace = train.main(run).metrics or {}, Path(run.workspace)
    shutil.rmtree(workspace / "result")
    shutil.rmtree(workspace / "checkpoints" / "checkpoint-16")
    again = train.main(run).metrics or {}
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in first.items() if k != "seconds"}


def test_two_processes_measure_what_they_deliver(tmp_path: Path) -> None:
    """Each has statistics of its own batches; those of the first are in the result."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rows, base = image_data(), save_model(tmp_path / "model", RESNET)
    run = prepared_run(
        tmp_path / "job", base, rows, ["a", "b"], port=port, task="image-classification", resources={"processesPerNode": 2}, training={"maxSteps": 4}
    )
    with pod(run, tmp_path / "pod") as processes:
        assert processes.wait(240) == 0, (tmp_path / "pod/log").read_text()[-3000:]
    result = tmp_path / "job/result"
    model, processor = AutoModelForImageClassification.from_pretrained(result), AutoImageProcessor.from_pretrained(result)
    assert loss(model, processor, rows["eval"]) == pytest.approx(json.loads((result / "metrics.json").read_text())["evalLoss"], abs=1e-5)


ARCHITECTURES: list[tuple[str, Any, int, str]] = [
    # name, configuration, pixels of a side, method
    ("convnextv2", ConvNextV2Config(image_size=SIDE, patch_size=2, hidden_sizes=[16, 32], depths=[1, 1], num_stages=2), SIDE, "lora"),
    ("swin", SWIN, SIDE, "lora"),
    ("efficientnet", EfficientNetConfig(image_size=64, hidden_dim=128, width_coefficient=0.1, depth_coefficient=0.1), 64, "full"),
]


@pytest.mark.parametrize(("name", "config", "side", "method"), ARCHITECTURES, ids=[a[0] for a in ARCHITECTURES])
def test_other_architectures_learn(name: str, config: Any, side: int, method: str, classify: MakeRun, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", config, size={"height": side, "width": side})
    run = classify(model={"path": str(model)}, method={"type": method}, training={"maxSteps": 4})
    main(run)
    metrics = train.main(run).metrics or {}
    assert metrics["lastLoss"] < 4
