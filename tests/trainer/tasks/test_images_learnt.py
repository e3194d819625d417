"""image-classification over real images: what is learnt, by which architectures and methods, and whether that is what
is delivered.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from prepared_workspace import loaded, without_the_machine
from safetensors.torch import load_file, save_file
from trainer.digits import RESNET, SIDE, VIT, save_model, write_digits
from trainer.preparing import prepared
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    CLIPConfig,
    ConvNextV2Config,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    EfficientNetConfig,
    SiglipConfig,
    SwinConfig,
    ViTImageProcessor,
)

from luthier_api.run import FineTuneRun
from luthier_trainer.models.merge import merge
from luthier_trainer.prepare.main import main
from luthier_trainer.publish import model_card
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.training import main as train
from luthier_trainer.workspace.prepared import read_prepared

MakeRun = Callable[..., FineTuneRun]
DIGITS = [str(n) for n in range(10)]
SWIN = SwinConfig(
    image_size=SIDE, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4, drop_path_rate=0.1
)


def accuracy(model: Any, processor: Any, rows: Dataset) -> float:
    """Measured with plain transformers."""
    with torch.no_grad():
        pixels = processor(images=[row["pixel_values"].convert("RGB") for row in rows], return_tensors="pt")
        answers = model.eval()(**pixels).logits.argmax(dim=1)
    return float((answers == torch.tensor(rows["labels"])).float().mean())


DEIT = DeiTConfig(
    **{
        k: v
        for k, v in VIT.to_dict().items()
        if k
        in (
            "image_size",
            "patch_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "initializer_range",
        )
    }
)


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
    model = loaded(
        "image-classification", path, ["a", "b", "c"], ViTImageProcessor(size={"height": SIDE, "width": SIDE})
    )
    assert torch.allclose(answers(model.model), before)
    assert model.new_modules == ["cls_classifier", "distillation_classifier"]


def loss(model: Any, processor: Any, rows: Dataset) -> float:
    """Likewise."""
    with torch.no_grad():
        pixels = processor(images=[row["pixel_values"].convert("RGB") for row in rows], return_tensors="pt")
        return torch.nn.functional.cross_entropy(model.eval()(**pixels).logits, torch.tensor(rows["labels"])).item()


def learn_to_read_digits(run: FineTuneRun) -> None:
    """Train all weights, and hold that the result reads held-out digits as well as it says."""
    _, data = prepared(run)
    metrics = train.main(run).metrics or {}
    assert metrics["accuracy"] > 0.7 > 0.2 > metrics["majorityShare"]
    assert "tokens" not in metrics
    result = Path(run.workspace) / "result"
    model, processor = (
        AutoModelForImageClassification.from_pretrained(result),
        AutoImageProcessor.from_pretrained(result),
    )
    assert model.config.id2label == dict(enumerate(DIGITS))
    assert accuracy(model, processor, data["eval"]) == pytest.approx(metrics["accuracy"])


@pytest.mark.slow
def test_all_weights_of_a_resnet_learn_to_read_digits(classify: MakeRun, tmp_path: Path) -> None:
    learn_to_read_digits(classify(model={"path": str(save_model(tmp_path / "model", RESNET))}))


WIDTHS: dict[str, Any] = {
    "image_size": SIDE,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@dataclass(frozen=True)
class IdleCase:
    name: str
    config: Any
    method: str
    notice: str


IDLE = [
    IdleCase(
        name="dinov2",
        config=Dinov2Config(**WIDTHS),
        method="full",
        notice="1 of its weights have no part in this task and stay as they are: dinov2.embeddings.mask_token",
    ),
    IdleCase(
        name="clip",
        config=CLIPConfig(vision_config=WIDTHS),
        method="full",
        notice="2 of its weights have no part",
    ),
    IdleCase(
        name="siglip",
        config=SiglipConfig(vision_config=WIDTHS),
        method="full",
        notice="11 of its weights have no part",
    ),
    IdleCase(
        name="siglip",
        config=SiglipConfig(vision_config=WIDTHS),
        method="lora",
        notice="11 of its weights have no part",
    ),
    IdleCase(
        name="two heads",
        config=None,
        method="lora",
        notice="",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", IDLE, ids=lambda case: f"{case.name}, {case.method}")
def test_what_is_loaded_is_what_was_measured(
    case: IdleCase, classify: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where a model has weights of another task, and where the base has a head for as many labels."""
    model = save_model(tmp_path / "model", case.config) if case.config else two_heads(tmp_path / "model", DIGITS[::-1])
    run = classify(model={"path": str(model)}, method={"type": case.method}, training={"maxSteps": 3})
    _, data = prepared(run)
    metrics = train.main(run).metrics or {}
    assert case.notice in capsys.readouterr().out
    made = load_as_the_card_says(run, Path(run.workspace) / "result")
    assert loss(made["model"], made["processor"], data["eval"]) == pytest.approx(metrics["evalLoss"], abs=1e-4)


def load_as_the_card_says(run: FineTuneRun, result: Path) -> dict[str, Any]:
    """What the lines of the model card make."""
    lines = model_card.card(run, read_prepared(run), result).split("```python\n")[1].split("```")[0]
    made: dict[str, Any] = {}
    exec(lines.replace(f'"{run.name}"', repr(str(result))), made)
    return made


@pytest.mark.slow
def test_an_adapter_on_what_all_weights_of_a_vit_have_learnt(classify: MakeRun, tmp_path: Path) -> None:
    """The first job tells ten digits apart, its model's head is for them; the second asks for five of them, with rows
    of its own.
    """
    first = classify("first")
    learn_to_read_digits(first)
    few = write_digits(tmp_path / "few", [5, 6, 7, 8, 9], each=30, skip=40)
    second = classify(
        "second",
        {"first": first.workspace},
        model={"job": "first"},
        method={"type": "lora"},
        dataset={"files": [str(few)]},
    )
    _, data = prepared(second)
    metrics = train.main(second).metrics or {}
    assert metrics["accuracy"] > 0.7 > 0.4 > metrics["majorityShare"]
    result = Path(second.workspace) / "result"
    config = json.loads((result / "adapter_config.json").read_text())
    assert config["auto_mapping"]["base_model_class"] == "ViTForImageClassification"

    made = load_as_the_card_says(second, result)
    assert made["model"].config.id2label == {i: str(n) for i, n in enumerate(range(5, 10))}
    assert accuracy(made["model"], made["processor"], data["eval"]) == pytest.approx(metrics["accuracy"])

    merged = merge(
        Path(read_prepared(second).model_path), result, tmp_path / "merged", ["5", "6", "7", "8", "9"], "spec.model.job"
    )
    whole = AutoModelForImageClassification.from_pretrained(merged)
    assert accuracy(whole, made["processor"], data["eval"]) == pytest.approx(metrics["accuracy"])
    assert whole.config.id2label == {i: str(n) for i, n in enumerate(range(5, 10))}


def test_an_adapter_without_the_head_that_its_base_lacks(
    classify: MakeRun, digits: Path, vit: Path, tmp_path: Path
) -> None:
    """A new one would stay, and answer by chance."""
    run = classify(method={"type": "lora"}, training={"maxSteps": 1})
    main(run)
    train.main(run)
    result = Path(run.workspace) / "result"
    weights = {
        name: weight
        for name, weight in load_file(result / "adapter_model.safetensors").items()
        if "classifier" not in name
    }
    save_file(weights, result / "adapter_model.safetensors")
    with pytest.raises(
        Failure,
        match=r"spec.model.job: neither the adapter nor its base model .* has classifier.bias, classifier.weight",
    ):
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


@pytest.mark.slow
@pytest.mark.parametrize(("method", "precision"), [("full", "fp32"), ("full", "bf16"), ("lora", "fp32")])
def test_a_model_of_16_bits_is_delivered_as_one(method: str, precision: str, classify: MakeRun, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", SWIN)
    AutoModelForImageClassification.from_pretrained(model).to(torch.bfloat16).save_pretrained(model)
    run = classify(
        model={"path": str(model)}, method={"type": method}, training={"maxSteps": 3, "precision": precision}
    )
    main(run)
    assert (train.main(run).metrics or {})["evalLoss"] < 4
    if method == "full":
        assert AutoModelForImageClassification.from_pretrained(Path(run.workspace) / "result").dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("config", [RESNET, SWIN], ids=["resnet", "swin"])
def test_a_resumed_training_is_the_same(config: Any, classify: MakeRun, tmp_path: Path) -> None:
    """With statistics of batches, with chance, and with weights that have other names in files; in the middle of the
    second epoch.
    """
    run = classify(
        model={"path": str(save_model(tmp_path / "model", config))},
        training={"maxSteps": 16, "saveSteps": 13, "logSteps": 1},
    )
    main(run)
    first, workspace = train.main(run).metrics or {}, Path(run.workspace)
    shutil.rmtree(workspace / "result")
    shutil.rmtree(workspace / "checkpoints" / "checkpoint-16")
    again = train.main(run).metrics or {}
    assert without_the_machine(again) == without_the_machine(first)


@dataclass(frozen=True)
class ArchitectureCase:
    name: str
    config: Any
    side: int  # pixels
    method: str


ARCHITECTURES = [
    ArchitectureCase(
        name="convnextv2",
        config=ConvNextV2Config(image_size=SIDE, patch_size=2, hidden_sizes=[16, 32], depths=[1, 1], num_stages=2),
        side=SIDE,
        method="lora",
    ),
    ArchitectureCase(
        name="swin",
        config=SWIN,
        side=SIDE,
        method="lora",
    ),
    ArchitectureCase(
        name="efficientnet",
        config=EfficientNetConfig(image_size=64, hidden_dim=128, width_coefficient=0.1, depth_coefficient=0.1),
        side=64,
        method="full",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", ARCHITECTURES, ids=lambda case: case.name)
def test_other_architectures_learn(case: ArchitectureCase, classify: MakeRun, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", case.config, size={"height": case.side, "width": case.side})
    run = classify(model={"path": str(model)}, method={"type": case.method}, training={"maxSteps": 4})
    main(run)
    metrics = train.main(run).metrics or {}
    assert metrics["lastLoss"] < 4
