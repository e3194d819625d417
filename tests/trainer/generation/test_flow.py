"""Stable Diffusion 3 and FLUX: images are those of diffusers' pipelines, and depend on nothing but their row."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from trainer.generating import generate_run, generate_shards, image_engine, result_lines, sample

from luthier_api.exitcodes import ExitCode
from luthier_api.task_settings import ImageSettings
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.generation.engines.images import ImageEngine
from luthier_trainer.generation.hardware import Hardware
from luthier_trainer.generation.image_memory import Part, Work, parts_of
from luthier_trainer.prepare import main as prepare
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.failure import Failure
from trainer import measured_memory, small_flow

# diffusers and numpy 2 talk about each other.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

KINDS: dict[str, Callable[[], Any]] = {
    "sd3": small_flow.sd3,
    "sd3 without T5": lambda: small_flow.sd3(with_t5=False),
    "flux dev": small_flow.flux,
    "flux schnell": lambda: small_flow.flux(guided=False),
}
SMALL = {"width": 32, "height": 32, "steps": 2, "guidance": 4.0}
ROWS = [{"prompt": "a lute on a bench", "seed": 7}, {"prompt": "two lutes"}, {"prompt": "strings " * 9}]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a kind → the folder of its pipeline. Read-only."""
    root = tmp_path_factory.mktemp("flow")

    def folder(kind: str) -> Path:
        path = root / kind.replace(" ", "-")
        return path if path.exists() else small_flow.write(KINDS[kind](), path)

    return folder


def images(
    workspace: Path, model: Path, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]], **spec: Any
) -> list[dict[str, Any]]:
    """The lines of a job, each with the `pixels` of its image."""
    given = {"task": "text-to-image", "model": {"path": str(model)}, "batchSize": 2, **spec}
    run = generate_run(workspace, rows, **given | {"image": SMALL | spec.get("image", {})})
    generate_shards(run, monkeypatch, prepare.main)
    result = WorkspaceFolder(workspace).result
    return [
        line
        | {
            "pixels": pixels(next(result.glob(f"shard-*/{line['file_name']}")).read_bytes())
            if line["file_name"]
            else None
        }
        for line in result_lines(run)
    ]


def pixels(file: bytes | Image.Image) -> numpy.ndarray:
    """An image as numbers from 0 to 255, [height, width, 3]."""
    return numpy.asarray(Image.open(io.BytesIO(file)) if isinstance(file, bytes) else file).astype(int)


def plain(model: Path) -> Any:
    """The pipeline as diffusers loads it."""
    index = json.loads((model / "model_index.json").read_text())
    absent = {name: None for name in ("text_encoder_3", "tokenizer_3") if index.get(name) == [None, None]}
    pipe = DiffusionPipeline.from_pretrained(model, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any, prompt: str, seed: int, **more: Any) -> numpy.ndarray:
    given = {"num_inference_steps": 2, "guidance_scale": 4.0, "width": 32, "height": 32, **more}
    if getattr(pipe.transformer.config, "guidance_embeds", None) is False:
        given |= {"max_sequence_length": 256}  # as the card of FLUX.1 schnell says
    return pixels(pipe(prompt, generator=torch.Generator().manual_seed(seed), **given).images[0])


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_what_diffusers_draws(
    kind: str, models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each alone, to the rounding of 8 bits; and the same bits with other neighbours, in another order and shard."""
    rows = [dict(row) for row in ROWS]
    if kind.startswith("sd3"):
        rows[1]["negativePrompt"] = "rain"
    found, pipe = images(tmp_path / "one", models(kind), monkeypatch, rows), plain(models(kind))
    for line in found:
        more = {"negative_prompt": line["negativePrompt"]} if line["negativePrompt"] else {}
        expect = drawn(pipe, line["prompt"], line["seed"], **more)
        assert abs(line["pixels"] - expect).max() <= 1
        assert abs(line["pixels"] - drawn(pipe, line["prompt"], line["seed"] + 1, **more)).max() > 1
    other = images(tmp_path / "two", models(kind), monkeypatch, rows[::-1], shards=2)
    assert [line["sha256"] for line in other] == [line["sha256"] for line in found[::-1]]


@dataclass(frozen=True)
class AsDiffusers:
    name: str
    kind: str
    image: dict[str, Any]
    call: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)
    """Changes of its configuration that mean the same."""
    same_as_before: bool = False


AS_DIFFUSERS = [
    AsDiffusers("guidance is an input", "flux dev", {"guidance": 0.5}, call={"guidance_scale": 0.5}),
    AsDiffusers("guidance is nothing", "flux schnell", {"guidance": 9.0}, same_as_before=True),
    AsDiffusers("no guidance", "sd3", {"guidance": 1.0}, call={"guidance_scale": 1.0}),
    AsDiffusers("other sizes, other steps", "flux dev", {"width": 64}, call={"width": 64}),
    *(
        AsDiffusers(
            f"{sigmas} with {kind}",
            kind,
            {"scheduler": "euler", "sigmas": sigmas, "steps": 4},
            call={"num_inference_steps": 4},
            scheduler={f"use_{sigmas}_sigmas": True},
        )
        for kind, sigmas in (("sd3", "karras"), ("flux dev", "exponential"), ("flux dev", "beta"))
    ),
]


@pytest.mark.parametrize("case", AS_DIFFUSERS, ids=lambda case: case.name)
def test_settings_do_what_they_do_in_diffusers(case: AsDiffusers, models: Callable[[str], Path]) -> None:
    pipe, settings = plain(models(case.kind)), SMALL | case.image
    before = drawn(pipe, "a lute", 7, **{name: value for name, value in case.call.items() if name != "guidance_scale"})
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, **case.scheduler)
    expect = drawn(pipe, "a lute", 7, **case.call)
    given = sample("a lute", settings=ImageSettings.model_validate(settings))
    (output,) = image_engine(models(case.kind), settings).make([given])
    assert output.file
    assert abs(pixels(output.file()) - expect).max() <= 1
    if not case.same_as_before and case.image.keys() != {"width"}:
        assert abs(pixels(output.file()) - before).max() > 1


def test_guidance_in_some_of_the_steps(models: Callable[[str], Path]) -> None:
    """With a scale of 1, diffusers' pipeline counts nothing but the prompt."""

    class ByHand(StableDiffusion3Pipeline):
        step = 0

        @property
        def guidance_scale(self) -> float:
            return 4.0 if self.step < 2 else 1.0

        def next_step(self, step: int, *given: Any) -> dict[str, Any]:
            self.step = step + 1
            return {}

    settings = SMALL | {"steps": 4, "guidanceEnd": 0.5}
    given = sample("a lute", settings=ImageSettings.model_validate(settings))
    engine = image_engine(models("sd3"), settings, batch_size=1)
    (output,) = engine.make([given])
    pipe = ByHand.from_pretrained(models("sd3"))
    more = {"num_inference_steps": 4, "callback_on_step_end": ByHand.next_step}
    expect = drawn(pipe, "a lute", 7, **more)
    assert output.file
    assert abs(pixels(output.file()) - expect).max() <= 1
    assert abs(pixels(output.file()) - drawn(plain(models("sd3")), "a lute", 7, num_inference_steps=4)).max() > 1


@pytest.mark.parametrize("kind", ["sd3", "flux dev"])
def test_adapters_are_what_diffusers_makes_of_them(
    kind: str, models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = small_flow.write_lora(KINDS[kind](), tmp_path / "lora")
    adapters = [{"path": str(lora), "weight": 0.5}]
    (line,) = images(tmp_path / "job", models(kind), monkeypatch, ROWS[:1], adapters=adapters)
    pipe = plain(models(kind))
    without = drawn(pipe, line["prompt"], 7)
    pipe.load_lora_weights(lora, adapter_name="lute")
    pipe.set_adapters("lute", 0.5)
    assert abs(line["pixels"] - drawn(pipe, line["prompt"], 7)).max() <= 1
    assert abs(line["pixels"] - without).max() > 1


def test_an_adapter_by_the_names_of_the_authors_is_refused(models: Callable[[str], Path], tmp_path: Path) -> None:
    file = tmp_path / "kohya.safetensors"
    weights = {f"lora_unet_double_blocks_0_img_attn_qkv.lora_{end}.weight": torch.ones(2, 2) for end in ("up", "down")}
    save_file(weights, file)
    adapters = [{"path": str(tmp_path)}]
    model = {"path": str(models("flux dev"))}
    run = generate_run(tmp_path / "job", ROWS[:1], task="text-to-image", model=model, image=SMALL, adapters=adapters)
    with pytest.raises(Failure, match=r"2 belong to no module.*for example by diffusers' load_lora_weights"):
        prepare.main(run)


@dataclass(frozen=True)
class Refused:
    name: str
    kind: str
    message: str
    image: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)
    spec: dict[str, Any] = field(default_factory=dict)
    row: dict[str, Any] = field(default_factory=dict)


REFUSED = [
    Refused(
        "a sampler of noise",
        "sd3",
        "spec.image.scheduler: dpm++2m cannot sample from this model, which learned a flow; choose default or euler",
        image={"scheduler": "dpm++2m"},
    ),
    Refused(
        "spacing",
        "flux dev",
        "spec.image.timestepSpacing: the steps of a flow follow from the size of the image; remove it",
        image={"scheduler": "euler", "timestepSpacing": "trailing"},
    ),
    Refused(
        "rescaled guidance",
        "sd3",
        "spec.image.guidanceRescale: has no effect on Stable Diffusion 3 and FLUX; remove it",
        image={"guidanceRescale": 0.7},
    ),
    Refused(
        "slices of attention",
        "flux dev",
        "spec.image.attentionSlicing: has no effect on Stable Diffusion 3 and FLUX; remove it",
        image={"attentionSlicing": True},
    ),
    Refused(
        "guidance in some steps of a model that reads it",
        "flux dev",
        "spec.image.guidanceStart, guidanceEnd: this model reads the guidance as an input",
        image={"guidanceEnd": 0.5},
    ),
    Refused(
        "more than the positions",
        "sd3",
        "spec.image.width: 72 is more than the 64 pixels for which this model has positions; set 64 or less",
        image={"width": 72},
    ),
    Refused(
        "noise without a seed",
        "sd3",
        "spec.model: its scheduler is FlowMatchEulerDiscreteScheduler with stochastic_sampling; of flows only a plain",
        scheduler={"stochastic_sampling": True},
    ),
    Refused(
        "images of images",
        "sd3",
        "spec.model.path: StableDiffusion3Pipeline is not supported here; supported: StableDiffusionXLPipeline, Stable",
        spec={"task": "image-to-image"},
        row={"initImage": "IMAGE"},
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_what_is_refused(case: Refused, models: Callable[[str], Path], tmp_path: Path) -> None:
    model = models(case.kind)
    if case.scheduler:
        model = tmp_path / "model"
        shutil.copytree(models(case.kind), model)
        config = json.loads((models(case.kind) / "scheduler" / "scheduler_config.json").read_text())
        (model / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | case.scheduler))
    spec = {"task": "text-to-image", "model": {"path": str(model)}, "image": SMALL | case.image, **case.spec}
    Image.new("RGB", (32, 32)).save(tmp_path / "image.png")
    row = {"prompt": "a lute"} | {name: str(tmp_path / "image.png") for name in case.row}
    with pytest.raises(Failure) as failure:
        prepare.main(generate_run(tmp_path / "job", [row], **spec))
    assert failure.value.code is ExitCode.INVALID_SPEC
    assert failure.value.message.startswith(case.message)


@dataclass(frozen=True)
class Long:
    name: str
    kind: str
    row: dict[str, Any]
    error: str | None
    long_prompts: str = "refuse"
    notice: str | None = None


LONG = [
    Long(
        "CLIP cannot, T5 can",
        "flux dev",
        {"prompt": "a b " * 40},
        "the prompt has 5 tokens more than the text encoders read; shorten it, or set image.longPrompts: chunk",
        notice="spec.inputs.columns.prompt: 1 of 2 are longer than the 75 tokens that the text encoders read",
    ),
    Long("CLIP reads the beginning, T5 all", "flux dev", {"prompt": "a b " * 40}, None, "chunk"),
    Long(
        "neither can",
        "flux schnell",
        {"prompt": "a b " * 80},
        "the prompt has 65 tokens more than the text encoders read; shorten it",
        "chunk",
        notice="spec.inputs.columns.prompt: 1 of 2 are longer than the 255 tokens that the text encoders read",
    ),
    Long(
        "of a negative prompt",
        "sd3",
        {"prompt": "a lute", "negativePrompt": "a b " * 80},
        "the negative prompt has 85 tokens more than the text encoders read; shorten it",
        notice="spec.inputs.columns.negativePrompt: 1 of 1 are longer than the 75 tokens that the text encoders read",
    ),
    Long(
        "a negative prompt that nothing reads",
        "flux dev",
        {"prompt": "a lute", "negativePrompt": "rain"},
        "negativePrompt: FLUX reads none, because its guidance is an input of the model; remove it",
        notice="spec.inputs.columns.negativePrompt: FLUX reads none; the outputs of 1 rows that have one",
    ),
]


@pytest.mark.parametrize("case", LONG, ids=lambda case: case.name)
def test_prompts_are_read_to_their_end_or_refused(
    case: Long, models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notices.forget()
    rows, image = [{"prompt": "a lute"}, case.row], {"longPrompts": case.long_prompts, "steps": 1, "guidance": 1.5}
    good, found = images(tmp_path / "job", models(case.kind), monkeypatch, rows, image=image)
    assert good["error"] is None
    assert found["error"] == case.error
    told = [text for text in notices.given() if "spec.inputs" in text]
    assert [text[: len(case.notice or "")] for text in told] == ([case.notice] if case.notice else [])
    if case.error is None:
        expect = drawn(
            plain(models(case.kind)), case.row["prompt"], found["seed"], num_inference_steps=1, guidance_scale=1.5
        )
        assert abs(found["pixels"] - expect).max() <= 1


def test_prompts_of_several_parts(models: Callable[[str], Path]) -> None:
    """Stable Diffusion 3 reads what CLIP makes of each part, and then what T5 makes of the whole text."""
    settings = SMALL | {"longPrompts": "chunk"}
    given = sample("x " * 80, settings=ImageSettings.model_validate(settings))
    engine = image_engine(models("sd3"), settings)
    assert engine.group(given) == ("", 2)
    found = engine.prompts_for(given).arguments([given])
    parts = [engine.pipe.encode_prompt(text, text, "x " * 80)[0::2] for text in ("x " * 75, "x " * 5)]
    expect = torch.cat([parts[0][0][:, :77], parts[1][0][:, :77], parts[0][0][:, 77:]], dim=1)
    torch.testing.assert_close(found["prompt_embeds"], expect, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["pooled_prompt_embeds"], parts[0][1], rtol=1e-4, atol=1e-5)


def test_guidance_without_effect_is_said(models: Callable[[str], Path], tmp_path: Path) -> None:
    notices.forget()
    model = {"path": str(models("flux schnell"))}
    for guidance, said in ((4.0, 1), (1.0, 0)):
        notices.forget()
        image = SMALL | {"guidance": guidance}
        prepare.main(generate_run(tmp_path / f"{said}", ROWS[:1], task="text-to-image", model=model, image=image))
        assert [text.startswith("spec.image.guidance: this model was distilled") for text in notices.given()] == [
            True
        ] * said


@pytest.mark.parametrize("with_adapter", [False, True])
def test_parts_that_overflow_in_fp16_stay_in_fp32(
    with_adapter: bool, models: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of T5, as transformers loads it, and the VAE."""
    adapters = [small_flow.write_lora(small_flow.sd3(), tmp_path) / "pytorch_lora_weights.safetensors"] * with_adapter
    given = [{"path": str(path)} for path in adapters]
    model = {"path": str(models("sd3"))}
    spec = generate_run(tmp_path, ROWS[:1], task="text-to-image", model=model, image=SMALL, adapters=given).spec
    about = image_engine(models("sd3"), SMALL).about
    pipe = ImageEngine(spec, models("sd3"), adapters, Hardware("cpu", "fp16"), 1, about).pipe
    types = {name: weight.dtype for name, weight in pipe.text_encoder_3.named_parameters()}
    assert {name for name, dtype in types.items() if dtype == torch.float32} == {n for n in types if ".wo." in n}
    assert {pipe.vae.dtype, pipe.transformer.dtype, pipe.text_encoder.dtype} == {torch.float32, torch.float16}


@pytest.mark.parametrize(("kind", "passes"), [("sd3", 2), ("flux dev", 1)])
@torch.no_grad()
def test_memory(kind: str, passes: int, models: Callable[[str], Path]) -> None:
    """All weights; and a step, in which guidance is another image with Stable Diffusion 3, and none with FLUX."""
    folder = models(kind)
    stored = sum(2 * weight.numel() for file in folder.glob("*/*.safetensors") for weight in load_file(file).values())
    image = ImageSettings.model_validate(SMALL)

    def parts(images: int, guided: bool) -> dict[str, Part]:
        work = Work(images, 32, 32, guided, torch.bfloat16, encodes=False)
        return parts_of(folder, image, work, "spec.model")

    whole = parts(2, guided=True)
    assert sum(part.weights for part in whole.values()) == pytest.approx(stored, rel=0.02)
    assert whole["transformer"].held == parts(2 * passes, guided=False)["transformer"].held
    assert parts(8, guided=True)["transformer"].held > 2 * whole["transformer"].held
    transformer = {"sd3": SD3Transformer2DModel, "flux dev": FluxTransformer2DModel}[kind].from_pretrained(
        folder / "transformer"
    )
    real = measured_memory.peak_of(lambda: transformer(**inputs_of_a_step(transformer, 2 * passes)))
    held = parts_of(folder, image, Work(2, 32, 32, True, torch.float32, encodes=False), "spec.model")[
        "transformer"
    ].held
    assert held == pytest.approx(real, rel=0.15)


def inputs_of_a_step(transformer: Any, rows: int) -> dict[str, Any]:
    """What diffusers' pipelines give the model for images of 32 pixels."""
    config = transformer.config
    given = {
        "timestep": torch.full((rows,), 0.5),
        "pooled_projections": torch.randn(rows, config.pooled_projection_dim),
    }
    if hasattr(config, "guidance_embeds"):
        texts = torch.randn(rows, 512, config.joint_attention_dim)
        patches = torch.randn(rows, 64, config.in_channels)
        ids = {"txt_ids": torch.zeros(512, 3), "img_ids": torch.zeros(64, 3), "guidance": torch.full((rows,), 4.0)}
        return given | ids | {"hidden_states": patches, "encoder_hidden_states": texts}
    texts = torch.randn(rows, 77 + 256, config.joint_attention_dim)
    return given | {"hidden_states": torch.randn(rows, config.in_channels, 16, 16), "encoder_hidden_states": texts}
