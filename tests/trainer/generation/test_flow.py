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
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from PIL import Image
from safetensors.torch import load_file, save_file
from trainer.generating import generate_run, generate_shards, image_engine, result_lines, sample

from luthier_api.exitcodes import ExitCode
from luthier_api.task_settings import ImageSettings
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.generation import lora
from luthier_trainer.generation.engines.images import ImageEngine
from luthier_trainer.generation.hardware import Hardware
from luthier_trainer.generation.image_memory import Part, Work, parts_of
from luthier_trainer.models.loranames import Names
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


DOUBLE, SINGLE, CLIP = (
    "lora_unet_double_blocks_0_",
    "lora_unet_single_blocks_0_",
    "lora_te1_text_model_encoder_layers_0_",
)
BLOCK, ALONE, WHOLE = "transformer.transformer_blocks.0.", "transformer.single_transformer_blocks.0.", slice(None)
EMBEDDERS = {"time_in": "timestep_embedder", "vector_in": "text_embedder", "guidance_in": "guidance_embedder"}
AUTHORS_OF_FLUX: dict[str, list[tuple[str, slice]]] = {
    f"{DOUBLE}img_attn_qkv": [(f"{BLOCK}attn.to_{name}", WHOLE) for name in "qkv"],
    f"{DOUBLE}txt_attn_qkv": [(f"{BLOCK}attn.add_{name}_proj", WHOLE) for name in "qkv"],
    f"{DOUBLE}img_attn_proj": [(f"{BLOCK}attn.to_out.0", WHOLE)],
    f"{DOUBLE}txt_attn_proj": [(f"{BLOCK}attn.to_add_out", WHOLE)],
    f"{DOUBLE}img_mlp_0": [(f"{BLOCK}ff.net.0.proj", WHOLE)],
    f"{DOUBLE}img_mlp_2": [(f"{BLOCK}ff.net.2", WHOLE)],
    f"{DOUBLE}txt_mlp_0": [(f"{BLOCK}ff_context.net.0.proj", WHOLE)],
    f"{DOUBLE}txt_mlp_2": [(f"{BLOCK}ff_context.net.2", WHOLE)],
    f"{DOUBLE}img_mod_lin": [(f"{BLOCK}norm1.linear", WHOLE)],
    f"{DOUBLE}txt_mod_lin": [(f"{BLOCK}norm1_context.linear", WHOLE)],
    f"{SINGLE}linear1": [*((f"{ALONE}attn.to_{name}", WHOLE) for name in "qkv"), (f"{ALONE}proj_mlp", WHOLE)],
    f"{SINGLE}linear2": [(f"{ALONE}proj_out", WHOLE)],
    f"{SINGLE}modulation_lin": [(f"{ALONE}norm.linear", WHOLE)],
    **{
        f"lora_unet_{name}_{end}_layer": [(f"transformer.time_text_embed.{module}.linear_{number}", WHOLE)]
        for name, module in EMBEDDERS.items()
        for number, end in ((1, "in"), (2, "out"))
    },
    "lora_unet_img_in": [("transformer.x_embedder", WHOLE)],
    "lora_unet_txt_in": [("transformer.context_embedder", WHOLE)],
    "lora_unet_final_layer_linear": [("transformer.proj_out", WHOLE)],
    # The authors' code splits its 64 outputs into a shift and a scale, diffusers' into a scale and a shift.
    "lora_unet_final_layer_adaLN_modulation_1": [
        ("transformer.norm_out.linear", slice(32, 64)),
        ("transformer.norm_out.linear", slice(0, 32)),
    ],
    f"{CLIP}self_attn_q_proj": [("text_encoder.encoder.layers.0.self_attn.q_proj", WHOLE)],
}
"""Module in files of kohya's sd-scripts → the modules of diffusers whose outputs it computes, in their order."""
NOT_IN_DIFFUSERS = (f"{SINGLE}linear1", "lora_unet_final_layer_linear", "lora_unet_final_layer_adaLN_modulation_1")
"""What diffusers 0.42 converts with the sizes of the large model, or without its alpha."""


def factors_of_kohya(pipe: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A file with every module, each with a rank and an alpha of its own; and what diffusers' modules gain by it."""
    drawn_by = torch.Generator().manual_seed(3)
    tensors: dict[str, torch.Tensor] = {}
    gains: dict[str, torch.Tensor] = {}
    for number, (name, modules) in enumerate(AUTHORS_OF_FLUX.items()):
        there = [(module, rows, pipe.get_submodule_of(module).weight) for module, rows in modules]
        rank, alpha = 2 + number % 3, 1.0 + number
        down = torch.randn(rank, there[0][2].shape[1], generator=drawn_by) / 8
        up = torch.randn(sum(len(weight[rows]) for _, rows, weight in there), rank, generator=drawn_by) / 8
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
        done = 0
        for module, rows, weight in there:
            gain = gains.setdefault(module, torch.zeros_like(weight))
            gain[rows] = alpha / rank * up[done : done + len(gain[rows])] @ down
            done += len(gain[rows])
    return tensors, gains


class Weights:
    """The models of a pipeline that adapters change, by the names of diffusers."""

    def __init__(self, pipe: Any) -> None:
        self.parts = {name: getattr(pipe, name) for name in ("transformer", "text_encoder")}

    def get_submodule_of(self, name: str) -> Any:
        part, _, module = name.partition(".")
        return self.parts[part].get_submodule(module)

    def state(self) -> dict[str, torch.Tensor]:
        return {
            f"{part}.{key}": value.clone()
            for part, model in self.parts.items()
            for key, value in model.state_dict().items()
        }


@pytest.mark.parametrize("names", ["kohya", "ComfyUI", "diffusers beside it"])
def test_adapters_of_flux_by_the_names_of_its_authors(names: str, tmp_path: Path) -> None:
    """W + weight * alpha / rank * up @ down, for every module; a second adapter names query, key and value alone."""
    weights = Weights(small_flow.flux())
    before = weights.state()
    tensors, gains = factors_of_kohya(weights)
    if names == "ComfyUI":
        dots = {"img_attn_qkv": "img_attn.qkv", "txt_mod_lin": "txt_mod.lin"}
        kept = {f"{DOUBLE}{name}" for name in dots}
        gains = {module: gains[module] for name in kept for module, _ in AUTHORS_OF_FLUX[name]}
        tensors = {
            key.replace(DOUBLE, "diffusion_model.double_blocks.0.").replace(name, dotted): value
            for name, dotted in dots.items()
            for key, value in tensors.items()
            if key.startswith(f"{DOUBLE}{name}")
        }
    save_file(tensors, tmp_path / "whole.safetensors")
    names_of = Names(weights.parts)
    adapters = [(lora.read(tmp_path / "whole.safetensors", names_of, "spec"), 0.5)]
    times = dict.fromkeys(gains, 0.5)
    if names == "diffusers beside it":
        more = {f"transformer_blocks.0.attn.to_q.lora_{end}.weight": torch.ones(32, 32) / 32 for end in "AB"}
        save_file(more, tmp_path / "alone.safetensors")
        adapters.insert(0, (lora.read(tmp_path / "alone.safetensors", names_of, "spec"), 2.0))
        gains[f"{BLOCK}attn.to_q"] = gains[f"{BLOCK}attn.to_q"] * 0.5 + 2.0 * torch.ones(32, 32) / 32
        times[f"{BLOCK}attn.to_q"] = 1.0
    lora.fuse(weights.parts, adapters)
    for key, value in weights.state().items():
        module, _, kind = key.rpartition(".")
        gain = times[module] * gains[module] if kind == "weight" and module in gains else 0.0
        torch.testing.assert_close(value, before[key] + gain, rtol=1e-5, atol=1e-6, msg=key)


def test_the_names_of_the_authors_are_as_diffusers_converts_them() -> None:
    """But for what diffusers knows of the large model alone, or forgets."""
    tensors, gains = factors_of_kohya(Weights(small_flow.flux()))
    left_out = {module for name in NOT_IN_DIFFUSERS for module, _ in AUTHORS_OF_FLUX[name]}
    expect = {name: gain for name, gain in gains.items() if name.startswith("transformer.") and name not in left_out}
    names = {key: key.partition(".")[0] for key in tensors}
    known = [key for key, name in names.items() if name.startswith("lora_unet_") and name not in NOT_IN_DIFFUSERS]
    converted = _convert_kohya_flux_lora_to_diffusers({key: tensors[key] for key in known})
    assert len(converted) == 2 * len(expect)
    for module, gain in expect.items():
        down, up = (
            next(
                value
                for key, value in converted.items()
                if f"transformer.{key}".endswith(f"{module}.lora_{end}.weight")
            )
            for end in "AB"
        )
        torch.testing.assert_close(up @ down, gain, rtol=1e-5, atol=1e-6)


@dataclass(frozen=True)
class Unread:
    name: str
    kind: str
    tensors: dict[str, torch.Tensor]
    message: str


def factors(name: str, outputs: int, inputs: int = 32) -> dict[str, torch.Tensor]:
    return {f"{name}.lora_up.weight": torch.ones(outputs, 2), f"{name}.lora_down.weight": torch.ones(2, inputs)}


UNREAD = [
    Unread(
        "of T5",
        "flux dev",
        factors("lora_te3_encoder_block_0_layer_0_SelfAttention_q", 32),
        r"2 belong to no module.*For FLUX adapters of the transformer and of CLIP can be used",
    ),
    Unread(
        "guidance, which schnell is not told",
        "flux schnell",
        factors("lora_unet_guidance_in_in_layer", 32, 256),
        r"2 belong to no module",
    ),
    Unread(
        "another size",
        "flux dev",
        factors(f"{SINGLE}linear1", 100),
        r"does not fit the model: transformer\.single_transformer_blocks\.0\.attn\.to_q \+ .*proj_mlp is 224 × 32"
        r" there, and 100 × 32 in the file",
    ),
    Unread(
        "query by two names",
        "flux dev",
        factors(f"{DOUBLE}img_attn_qkv", 96) | factors("lora_unet_transformer_blocks_0_attn_to_q", 32),
        r"so that a module has two changes",
    ),
    Unread(
        "Stable Diffusion 3",
        "sd3",
        factors("lora_unet_joint_blocks_0_x_block_attn_qkv", 96),
        r"2 belong to no module.*for example by diffusers' load_lora_weights",
    ),
]


@pytest.mark.parametrize("case", UNREAD, ids=lambda case: case.name)
def test_an_adapter_that_is_not_whole_for_this_model_is_refused(case: Unread, tmp_path: Path) -> None:
    file = tmp_path / "kohya.safetensors"
    save_file(case.tensors, file)
    with pytest.raises(Failure, match=case.message):
        lora.read(file, Names(Weights(KINDS[case.kind]()).parts), "spec.adapters[0]")


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
