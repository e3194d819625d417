"""text-to-image: prepared, trained, stopped and resumed; the adapter gives the same images here and in diffusers."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_from_disk
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EDMEulerScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from prepared_workspace import logged, losses, without_the_machine
from safetensors import safe_open
from safetensors.torch import load_file
from trainer.generating import generate_run, generate_shards, result_lines
from trainer.small_sdxl import write_small_sdxl

from luthier_api.exitcodes import ExitCode
from luthier_api.run import FineTuneRun
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.generation import lora
from luthier_trainer.models.loranames import Names
from luthier_trainer.prepare import main as prepare
from luthier_trainer.publish.model_card import card
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.run_folder import run_dir
from luthier_trainer.tasks import kept_encodings
from luthier_trainer.tasks.diffusion import DiffusionTrainer
from luthier_trainer.training import main as train
from luthier_trainer.training.callbacks import Heartbeat
from luthier_trainer.workspace.plan import plan_training
from luthier_trainer.workspace.prepared import read_prepared

# diffusers and numpy 2 talk about each other.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

WEIGHTS, KOHYA = "pytorch_lora_weights.safetensors", "kohya_lora.safetensors"
ROWS, HELD_OUT, STEPS = 14, 4, 7  # an epoch of ten rows is three steps, the last one of two rows
METHOD = {"type": "lora", "rank": 4, "alpha": 8, "dropout": 0.1, "targetModules": [r".*to_(q|k|v)", "to_out.0"]}
Tensors = dict[str, torch.Tensor]
PICTURES = {"width": 32, "height": 32, "steps": 2}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images of several shapes, whose captions stand in metadata.jsonl. Read-only."""
    folder = tmp_path_factory.mktemp("pictures") / "lutes"
    folder.mkdir()
    lines = []
    for i in range(ROWS):
        colour = (20 * i % 256, 90, 200 - 10 * i)
        Image.new("RGB", (40 + 4 * i, 64), colour).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"lute number {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def job(root: Path, sdxl: Path, pictures: Path, **changes: Any) -> FineTuneRun:
    """A job over the pictures on CPU; keywords replace fields of its spec, those of `training` and `dataset` one by
    one.
    """
    training = {"batchSize": 4, "microBatchSize": 2, "maxSteps": STEPS, "learningRate": 3e-2, "logSteps": 1}
    dataset = {"files": [str(pictures)], "format": "imagefolder", "evalFraction": HELD_OUT / ROWS}
    spec = {
        "task": "text-to-image",
        "model": {"path": str(sdxl)},
        "method": METHOD,
        "image": {"resolution": 32},
        "resources": {"gpusPerNode": 0},
        **changes,
        "training": training | changes.get("training", {}),
        "dataset": dataset | changes.get("dataset", {}),
    }
    return FineTuneRun.model_validate(
        {"name": "style", "workspace": str(root), "metricsPort": 0, "rendezvousPort": 29517, "spec": spec}
    )


@dataclass(frozen=True)
class Trained:
    run: FineTuneRun
    metrics: dict[str, float]

    @property
    def result(self) -> Path:
        return WorkspaceFolder(Path(self.run.workspace)).result


@pytest.fixture(scope="module")
def trained(sdxl: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A job that ran without a stop."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTHIER_RUN_DIR", str(folder))
        run = job(folder / "style", sdxl, pictures)
        prepare.main(run)
        metrics = train.main(run).metrics
    assert metrics is not None
    return Trained(run, metrics)


def test_the_held_out_loss_falls(trained: Trained) -> None:
    assert trained.metrics["evalLoss"] < trained.metrics["evalLossBefore"]
    assert "tokens" not in trained.metrics
    assert not any(entry.get("padding_tokens") for entry in logged(trained.run)), "captions are no rows of tokens"


def test_an_interrupted_run_ends_with_the_same_weights(
    trained: Trained, sdxl: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Flag(Heartbeat):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:
                (run_dir() / "stop").touch()

    run = job(tmp_path / "style", sdxl, pictures)
    prepare.main(run)
    with monkeypatch.context() as patch:
        patch.setattr(train, "Heartbeat", Flag)
        message = train.main(run)
    (run_dir() / "stop").unlink()
    assert (message.code, message.step, message.saved) == (75, 4, True)

    metrics = train.main(run).metrics
    assert metrics is not None
    assert without_the_machine(metrics) == without_the_machine(trained.metrics)
    assert losses(run) == losses(trained.run)
    expect = load_file(trained.result / WEIGHTS)
    found = load_file(tmp_path / "style/result" / WEIGHTS)
    assert found.keys() == expect.keys()
    assert all(torch.equal(found[name], expect[name]) for name in expect)


def test_images_of_several_sizes(sdxl: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image comes once in an epoch, in micro-batches of one size, also in a run that was stopped in the second."""
    seen: list[tuple[float, list[int], torch.Size]] = []

    class Watch(Heartbeat):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == stop_at:
                (run_dir() / "stop").touch()

    def collected(self: DiffusionTrainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if model.training:
            seen.append((self.state.global_step, inputs["labels"].tolist(), inputs["pixel_values"].shape[2:]))
        return plain(self, model, inputs, *args, **kwargs)

    plain = DiffusionTrainer.compute_loss
    monkeypatch.setattr(DiffusionTrainer, "compute_loss", collected)
    monkeypatch.setattr(train, "Heartbeat", Watch)
    image = {"resolution": 32, "bucketStep": 8}
    spec = {"image": image, "training": {"maxSteps": None, "epochs": 2, "logSteps": 1, "saveSteps": 100}}
    run, stop_at = job(tmp_path / "whole", sdxl, pictures, **spec), -1
    prepare.main(run)
    rows = load_from_disk(read_prepared(run).dataset_path)["train"]
    sizes = Counter(tuple(bucket) for bucket in rows["bucket"])
    batches = sum(math.ceil(count / 2) for count in sizes.values())
    assert len(sizes) > 2
    assert any(count % 2 for count in sizes.values())
    assert read_prepared(run).plan.steps == 2 * math.ceil(batches / 2)
    said = [text for text in notices.given() if text.startswith("spec.image.bucketStep: 10 training rows have images")]
    assert len(said) == 1
    train.main(run)
    whole = seen.copy()
    assert all(tuple(size) == tuple(rows[row]["bucket"]) for _, of_batch, size in whole for row in of_batch)
    for begin in (0, batches):
        assert sorted(row for _, some, _ in whole[begin : begin + batches] for row in some) == list(range(10))

    seen.clear()
    stopped, stop_at = job(tmp_path / "stopped", sdxl, pictures, **spec), math.ceil(batches / 2)
    prepare.main(stopped)
    assert train.main(stopped).code == 75
    (run_dir() / "stop").unlink()
    other = stopped.spec.training.model_copy(update={"micro_batch_size": 1})
    smaller = stopped.model_copy(update={"spec": stopped.spec.model_copy(update={"training": other})})
    with pytest.raises(Failure, match=r"spec\.training\.microBatchSize"):
        train.main(smaller)
    stop_at = -1
    train.main(stopped)
    assert seen == whole
    assert losses(stopped) == losses(run)


def test_encodings_that_are_kept(
    trained: Trained, sdxl: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each image is encoded once, also by a run that was stopped meanwhile; the course is that without the cache."""
    encoded: list[int] = []

    def counted(self: AutoencoderKL, pixels: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        encoded.append(len(pixels))
        if len(encoded) == 3:
            (run_dir() / "stop").touch()
        return plain(self, pixels, *args, **kwargs)

    plain = AutoencoderKL.encode
    monkeypatch.setattr(kept_encodings, "ROWS_A_FILE", 4)
    run = job(tmp_path / "style", sdxl, pictures, image={"resolution": 32, "cacheEncodings": True})
    prepare.main(run)
    monkeypatch.setattr(AutoencoderKL, "encode", counted)
    assert train.main(run).code == 75
    (run_dir() / "stop").unlink()
    assert encoded == [1] * 4
    kept = WorkspaceFolder(Path(run.workspace)).prepared / "kept/encodings"
    (first,) = kept.glob("train-*.safetensors")
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)

    metrics = train.main(run).metrics
    assert encoded == [1] * (4 + ROWS), "with those of the broken file"
    assert metrics is not None
    assert losses(run) == pytest.approx(losses(trained.run), rel=1e-5)
    assert metrics["evalLoss"] == pytest.approx(trained.metrics["evalLoss"], rel=1e-5)
    expect, found = (load_file(folder / WEIGHTS) for folder in (trained.result, tmp_path / "style/result"))
    for name, weight in expect.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-4, msg=name)
    planned, plain_plan = read_prepared(run).plan, read_prepared(trained.run).plan
    size = sum(file.stat().st_size for file in kept.glob("*.safetensors"))
    assert (planned.data_bytes or 0) - (plain_plan.data_bytes or 0) == pytest.approx(size, rel=0.05)


def test_the_result_is_an_adapter_of_diffusers(trained: Trained) -> None:
    assert sorted(path.name for path in trained.result.iterdir()) == ["MANIFEST.json", KOHYA, "metrics.json", WEIGHTS]
    with safe_open(trained.result / WEIGHTS, "pt") as file:
        described = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (described["unet.r"], described["unet.lora_alpha"]) == (4, 8)
    assert described["unet.lora_dropout"] == 0, "diffusers would leave it switched on"
    assert "/" not in str(described["unet.base_model_name_or_path"]), "the path of a folder in a pod"


@dataclass(frozen=True)
class Reading:
    """A training of the text encoders, too."""

    name: str
    model: str
    parts: tuple[str, ...]
    targets: list[str]
    kohya: tuple[str, ...]
    """Some names of modules, as sd-scripts has them."""


READING = [
    Reading(
        name="Stable Diffusion XL",
        model="sdxl",
        parts=("unet", "text_encoder", "text_encoder_2"),
        targets=["all-linear"],
        kohya=(
            "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q",
            "lora_te1_text_model_encoder_layers_1_self_attn_q_proj",
            "lora_te2_text_model_encoder_layers_2_mlp_fc2",
        ),
    ),
    Reading(
        name="Stable Diffusion 1.5",
        model="sd",
        parts=("unet", "text_encoder"),
        targets=["to_q", "to_out.0", "q_proj", "out_proj"],
        kohya=(
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
            "lora_te_text_model_encoder_layers_2_self_attn_out_proj",
        ),
    ),
]


@dataclass(frozen=True)
class Read(Trained):
    case: Reading
    model: Path


@pytest.fixture(scope="module", params=READING, ids=lambda case: case.name)
def reading(request: pytest.FixtureRequest, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Read:
    """A job that has trained the text encoders, too."""
    case: Reading = request.param
    folder, model = tmp_path_factory.mktemp("reading"), request.getfixturevalue(case.model)
    image = {"resolution": 32, "trainTextEncoders": True}
    spec = {"method": METHOD | {"targetModules": case.targets}, "image": image, "training": {"maxSteps": 2}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTHIER_RUN_DIR", str(folder))
        run = job(folder / "style", model, pictures, dataset={"evalFraction": None}, **spec)
        prepare.main(run)
        metrics = train.main(run).metrics
    assert metrics is not None
    return Read(run, metrics, case, model)


def test_what_was_learnt_is_added_to_all_parts(reading: Read) -> None:
    """By the formula, W + alpha / rank · B A, against what `load_lora_weights` makes of the whole folder."""
    plain, loaded = (DiffusionPipeline.from_pretrained(reading.model) for _ in range(2))
    loaded.load_lora_weights(reading.result)
    loaded.fuse_lora(components=list(reading.case.parts))
    written = load_file(reading.result / WEIGHTS)
    found: dict[str, Tensors] = {part: dict(getattr(loaded, part).state_dict()) for part in reading.case.parts}
    learnt = [name.removesuffix(".lora_A.weight") for name in written if name.endswith(".lora_A.weight")]
    for place in learnt:
        first, second = (written[f"{place}.lora_{side}.weight"] for side in "AB")
        assert second.any(), f"{place} has not moved"
        part, _, module = place.partition(".")
        model = getattr(plain, part)
        if not hasattr(model, "text_model"):
            module = module.removeprefix("text_model.")
        expect = model.get_submodule(module).weight + 8 / 4 * second @ first
        torch.testing.assert_close(found[part][f"{module}.base_layer.weight"], expect, rtol=1e-5, atol=1e-6)
    assert {place.partition(".")[0] for place in learnt} == {*reading.case.parts}
    assert sum(name.endswith("base_layer.weight") for part in found.values() for name in part) == len(learnt)
    assert not any("text_encoder.text_model.encoder.layers.2" in name for name in learnt) or reading.case.model == "sd"


def test_what_learns_is_what_was_planned(reading: Read) -> None:
    record = read_prepared(reading.run)
    assert record.weights is not None
    assert record.weights.learning == sum(tensor.numel() for tensor in load_file(reading.result / WEIGHTS).values())


def test_the_same_with_names_of_kohya(reading: Read) -> None:
    written, same = load_file(reading.result / KOHYA), load_file(reading.result / WEIGHTS)
    modules = {name.partition(".")[0] for name in written}
    assert {*reading.case.kohya} <= modules
    assert all(written[f"{module}.alpha"].item() == 8 for module in modules)
    assert len(written) == 3 * len(modules) == 3 / 2 * len(same)
    pipe = DiffusionPipeline.from_pretrained(reading.model)
    names = Names({part: getattr(pipe, part) for part in reading.case.parts})
    changes = [lora.read(reading.result / name, names, "spec") for name in (KOHYA, WEIGHTS)]
    for first, second in zip(*(sorted(some, key=lambda c: str(c.place)) for some in changes), strict=True):
        (module,) = first.place.modules
        base = names.parts[first.place.part].get_submodule(module).weight
        assert first.place == second.place
        torch.testing.assert_close(first.weight(base), second.weight(base))


@pytest.mark.parametrize("reading", READING[:1], indirect=True, ids=lambda case: case.name)
def test_text_encoders_change_the_images(reading: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GenerateJob with the adapter makes the image of plain diffusers."""
    rows = [{"prompt": "a lute", "seed": 7}]
    spec = {"task": "text-to-image", "model": {"path": str(reading.model)}, "batchSize": 1, "image": PICTURES}
    run = generate_run(tmp_path / "drawn", rows, **spec, adapters=[{"job": "style"}])
    run = run.model_copy(update={"sources": {"style": reading.run.workspace}})
    (message,) = generate_shards(run, monkeypatch, prepare.main)
    assert message.code == 0
    (line,) = result_lines(run)
    (file,) = (tmp_path / "drawn/result").rglob(Path(line["file_name"]).name)
    pipe = DiffusionPipeline.from_pretrained(reading.model)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(reading.result)
    size = {"width": PICTURES["width"], "height": PICTURES["height"]}
    seed = torch.Generator().manual_seed(7)
    expect = pipe("a lute", num_inference_steps=2, guidance_scale=5.0, generator=seed, **size).images[0]
    assert (as_tensor(Image.open(io.BytesIO(file.read_bytes()))) - as_tensor(expect)).abs().max() <= 1


def test_images_are_those_of_plain_diffusers(
    trained: Trained, sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the adapter of the job, loaded by our GenerateJob, and by the pipeline's own `load_lora_weights`."""

    def drawn(name: str, **spec: Any) -> torch.Tensor:
        rows = [{"prompt": "a lute", "seed": 7}]
        given = {"task": "text-to-image", "model": {"path": str(sdxl)}, "batchSize": 1, "image": PICTURES} | spec
        run = generate_run(tmp_path / name, rows, **given)
        run = run.model_copy(update={"sources": {"style": trained.run.workspace}})
        (message,) = generate_shards(run, monkeypatch, prepare.main)
        assert message.code == 0
        (line,) = result_lines(run)
        (file,) = (tmp_path / name / "result").rglob(Path(line["file_name"]).name)
        return as_tensor(Image.open(io.BytesIO(file.read_bytes())))

    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(trained.result)
    expect = pipe(
        prompt="a lute",
        num_inference_steps=2,
        guidance_scale=5.0,
        width=32,
        height=32,
        generator=torch.Generator().manual_seed(7),
    ).images[0]
    with_adapter, without = drawn("with", adapters=[{"job": "style"}]), drawn("without")
    assert (with_adapter - as_tensor(expect)).abs().max() <= 1  # rounded to 8 bits
    assert (with_adapter - without).abs().max() > 1


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).int()


@pytest.mark.parametrize("use", ["model", "adapters"])
def test_texts_do_not_take_the_adapter(use: str, trained: Trained, tiny_model: Path, tmp_path: Path) -> None:
    spec: dict[str, Any] = {"task": "text-generation", "model": {"path": str(tiny_model)}}
    spec |= {"model": {"job": "style"}} if use == "model" else {"adapters": [{"job": "style"}]}
    run = generate_run(tmp_path / "texts", [{"prompt": "a lute"}], **spec)
    with pytest.raises(Failure, match=r"\.job: FineTuneJob style is an adapter for Stable Diffusion, which belongs"):
        prepare.main(run.model_copy(update={"sources": {"style": trained.run.workspace}}))


def test_another_base_model_is_refused(trained: Trained, tmp_path: Path) -> None:
    other = write_small_sdxl(tmp_path / "other", seed=5)
    spec = {"task": "text-to-image", "model": {"path": str(other)}, "adapters": [{"job": "style"}]}
    run = generate_run(tmp_path / "drawn", [{"prompt": "a lute"}], **spec)
    with pytest.raises(Failure, match=r"FineTuneJob style was trained on .*Set spec\.model to the former$"):
        prepare.main(run.model_copy(update={"sources": {"style": trained.run.workspace}}))


def test_card(trained: Trained) -> None:
    text = card(trained.run, read_prepared(trained.run), trained.result)
    for line in ("library_name: diffusers", "pipeline_tag: text-to-image", "pipe.load_lora_weights(", "lora (rank 4"):
        assert line in text


def edit(file: str, **changes: Any) -> Callable[[Path], object]:
    """Set fields of a JSON file of a pipeline."""

    def spoil(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def caption(text: str) -> Callable[[Path], object]:
    """Give the first image another caption."""

    def spoil(folder: Path) -> None:
        lines = (folder / "metadata.jsonl").read_text().splitlines()
        lines[0] = json.dumps({"file_name": "0.png", "text": text})
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")

    return spoil


def marked(*priors: Any) -> Callable[[Path], object]:
    """Say in metadata.jsonl which images are those of a class, in turn."""

    def spoil(folder: Path) -> None:
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        lines = [json.dumps(row | {"class": priors[i % len(priors)]}) for i, row in enumerate(rows)]
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")

    return spoil


def of_edm(folder: Path) -> None:
    """A scheduler whose noise has no betas, as that of Playground v2.5."""
    EDMEulerScheduler().save_pretrained(folder / "scheduler")
    edit("model_index.json", scheduler=["diffusers", "EDMEulerScheduler"])(folder)


def refining(folder: Path) -> None:
    """A UNet with new weights that is told five numbers of an image instead of six."""
    config = dict(UNet2DConditionModel.load_config(folder / "unet"))
    config["projection_class_embeddings_input_dim"] -= config["addition_time_embed_dim"]
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")


@dataclass(frozen=True)
class Mistake:
    name: str
    message: str
    """How it begins."""
    pipeline: Callable[[Path], object] = lambda folder: None
    pictures: Callable[[Path], object] = lambda folder: None
    spec: dict[str, Any] = field(default_factory=dict)
    code: ExitCode = ExitCode.INVALID_SPEC


MISTAKES = [
    Mistake(
        name="a model of another kind",
        pipeline=edit("model_index.json", _class_name="FluxPipeline"),
        message="spec.model.path: FluxPipeline is not supported here; supported: StableDiffusionXLPipeline, Stable",
    ),
    Mistake(
        name="a pipeline without one of the text encoders",
        pipeline=edit("model_index.json", text_encoder=[None, None]),
        message="spec.model: the pipeline has no text_encoder; choose a base model of Stable Diffusion, not",
    ),
    Mistake(
        name="a UNet that takes fewer numbers about an image, as a refiner's does",
        pipeline=refining,
        message="spec.model: its UNet does not take what its VAE and its text encoders make: ",
    ),
    Mistake(
        name="a scheduler without betas",
        pipeline=of_edm,
        message="spec.model: its scheduler (EDMEulerScheduler, prediction_type epsilon) adds noise in another way",
    ),
    Mistake(
        name="a prediction that is not known",
        pipeline=edit("scheduler/scheduler_config.json", prediction_type="sample"),
        message="spec.model: its scheduler (EulerDiscreteScheduler, prediction_type sample) adds noise in another",
    ),
    Mistake(
        name="an adapter on a module that is not there",
        spec={"method": METHOD | {"targetModules": ["q_proj"]}},
        message="spec.method.targetModules[0]: the model has no module 'q_proj' (it has: ",
    ),
    Mistake(
        name="text encoders that would not learn",
        spec={"image": {"resolution": 32, "trainTextEncoders": True}},
        message="spec.method.targetModules: none of them is in the text_encoder, which would not learn; add q_proj,",
    ),
    Mistake(
        name="an adapter on an embedding of a text encoder",
        spec={
            "image": {"resolution": 32, "trainTextEncoders": True},
            "method": METHOD | {"targetModules": ["to_q", "q_proj", "token_embedding"]},
        },
        message="spec.method.targetModules: text_encoder.embeddings.token_embedding is an embedding, and diffusers",
    ),
    Mistake(
        name="an image that cannot be read",
        pictures=lambda folder: (folder / "3.png").write_bytes(b"no image"),
        message="spec.dataset.columns.image: 1 images of lutes cannot be used. The first is row 3",
        code=ExitCode.INVALID_DATASET,
    ),
    Mistake(
        name="a caption that is blank",
        pictures=caption(" "),
        message='spec.dataset.columns.text: column "text" of lutes is blank in 1 of 14 rows. The first is',
        code=ExitCode.INVALID_DATASET,
    ),
    Mistake(
        name="a column of the class that is not there",
        spec={"dataset": {"columns": {"prior": "class"}}},
        message='spec.dataset.columns.prior: no column "class" in',
        code=ExitCode.INVALID_DATASET,
    ),
    Mistake(
        name="an image of which is not said whether it shows the class",
        pictures=marked(True, False, None),
        spec={"dataset": {"columns": {"prior": "class"}}},
        message='spec.dataset.columns.prior: column "class" of lutes is neither true nor false in 4 of 14 rows. The',
        code=ExitCode.INVALID_DATASET,
    ),
    Mistake(
        name="images of the class alone",
        pictures=marked(True),
        spec={"dataset": {"columns": {"prior": "class"}}},
        message="spec.dataset.columns.prior: is true, so that nothing is to be learnt, in all 10 training rows; mark",
        code=ExitCode.INVALID_DATASET,
    ),
    Mistake(
        name="a column of captions that is not there",
        spec={"dataset": {"columns": {"text": "prompt"}}},
        message='spec.dataset.columns.text: no column "prompt" in',
        code=ExitCode.INVALID_DATASET,
    ),
    Mistake(
        name="folders of classes, which have no captions",
        pictures=lambda folder: (folder / "metadata.jsonl").unlink(),
        message='spec.dataset.columns.text: no column "text" in',
        code=ExitCode.INVALID_DATASET,
    ),
]


@pytest.mark.parametrize("case", MISTAKES, ids=lambda case: case.name)
def test_mistakes_end_in_prepare(case: Mistake, sdxl: Path, pictures: Path, tmp_path: Path) -> None:
    model, data = (Path(shutil.copytree(source, tmp_path / source.name)) for source in (sdxl, pictures))
    case.pipeline(model)
    case.pictures(data)
    with pytest.raises(Failure) as refused:
        prepare.main(job(tmp_path / "style", model, data, **case.spec))
    assert str(refused.value).startswith(case.message)
    assert refused.value.code == case.code


def test_images_of_a_class_are_learnt_beside_the_others(sdxl: Path, pictures: Path, tmp_path: Path) -> None:
    """Five images to learn, and nine of the class: nine pairs, as `index % number` of DreamBooth's dataset."""
    data = Path(shutil.copytree(pictures, tmp_path / "pictures"))
    marked(True, False, True)(data)
    columns, training = {"prior": "class"}, {"maxSteps": 1, "batchSize": 2, "microBatchSize": 1}
    run = job(tmp_path / "style", sdxl, data, dataset={"columns": columns, "evalFraction": None}, training=training)
    prepare.main(run)
    (said,) = [text for text in notices.given() if text.startswith("spec.dataset.columns.prior")]
    assert "5 images are learnt beside 9 of the class: 9 rows in an epoch" in said
    found = load_from_disk(read_prepared(run).dataset_path)["train"]
    learnt, of_class = [1, 4, 7, 10, 13], [0, 2, 3, 5, 6, 8, 9, 11, 12]
    assert found["caption"][:] == [f"lute number {learnt[i % 5]}" for i in range(9)]
    assert found["prior_caption"][:] == [f"lute number {i}" for i in of_class]
    assert [row["prior_pixel_values"].size[0] for row in found] == [40 + 4 * i for i in of_class]
    metrics = train.main(run).metrics
    assert metrics is not None
    assert metrics["trainLoss"] > 1.5, "the sum of two losses of about 1"


def test_a_long_caption_is_noticed(sdxl: Path, pictures: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(pictures, tmp_path / "pictures"))
    caption("lute " * 200)(data)
    prepare.main(job(tmp_path / "style", sdxl, data))
    (found,) = [text for text in notices.given() if text.startswith("spec.dataset.columns.text")]
    assert "1 of the 10 captions of split train are longer than the 77 tokens that the text encoders read" in found
    assert 'of "lute lute lute' in found


def test_what_is_planned(sdxl: Path, pictures: Path, tmp_path: Path, trained: Trained) -> None:
    """Space by what was saved, and few large images in a forward pass of a GPU."""
    plan = read_prepared(trained.run).plan
    written = sum((trained.result / name).stat().st_size for name in (WEIGHTS, KOHYA))
    assert plan.result_bytes == pytest.approx(written, rel=0.5)
    run = job(tmp_path / "gpu", sdxl, pictures, resources={"gpusPerNode": 1}, image={"resolution": 1024})
    training = run.spec.training.model_copy(update={"micro_batch_size": None, "batch_size": 16})
    planned = plan_training(run.spec.model_copy(update={"training": training}), 100, None)
    assert planned.micro_batch_size == 2
    assert "images of 1024 × 1024 pixels are large for a GPU" in planned.reasons[0]
