"""LoRA files for images, in the forms that trainers write: what each module gains, by its own alpha, and what is
refused.

Expected weights are computed here, module by module, from the numbers that went into the file: W + weight * alpha /
rank * up @ down, and the formulas of LoHa, LoKr and DoRA element by element. Names are held against diffusers'
conversion of whole checkpoints.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch.nn import functional
from trainer.generating import generate_run
from trainer.small_sdxl import pipeline

from luthier_api.exitcodes import ExitCode
from luthier_trainer.generation import lora
from luthier_trainer.generation.encoding import About
from luthier_trainer.generation.engines.images import ImageEngine
from luthier_trainer.generation.hardware import Hardware
from luthier_trainer.models.loranames import Names, Rows, _weighted, ldm_blocks, ldm_name
from luthier_trainer.prepare.main import main
from luthier_trainer.runtime.failure import Failure

# diffusers and numpy 2 talk about each other.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

Tensors = dict[str, torch.Tensor]
Place = tuple[str, str]
"""Part of the pipeline, and module in it."""
PARTS = ("unet", "text_encoder", "text_encoder_2")
FIELD = "spec.adapters[0].path"

ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
CONVOLUTION = "down_blocks.1.resnets.0.conv1"
SHORTCUT = "up_blocks.1.resnets.0.conv_shortcut"


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionXLPipeline:
    return pipeline()


@pytest.fixture(scope="module")
def models(pipe: StableDiffusionXLPipeline) -> dict[str, Any]:
    return {part: getattr(pipe, part) for part in PARTS}


@pytest.fixture(scope="module")
def names(models: dict[str, Any]) -> Names:
    return Names(models)


def numbers(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed + math.prod(size)))


def gains(models: dict[str, Any], names: Names, *adapters: tuple[Path, float]) -> dict[Place, torch.Tensor]:
    """What `fuse` adds to the weights that it changes; the models are left as they were. Biases are at
    "<module>.bias".
    """
    kept = {part: {k: v.clone() for k, v in model.state_dict().items()} for part, model in models.items()}
    lora.fuse(models, [(lora.read(path, names, FIELD), weight) for path, weight in adapters])
    found = {}
    for part, model in models.items():
        for key, value in model.state_dict().items():
            if not torch.equal(value, kept[part][key]):
                found[part, key.removesuffix(".weight")] = value - kept[part][key]
        model.load_state_dict(kept[part])
    return found


def assert_gains(found: dict[Place, torch.Tensor], expected: dict[Place, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for place, gain in expected.items():
        torch.testing.assert_close(
            found[place], gain, rtol=1e-4, atol=1e-5, msg=lambda text, place=place: f"{place}: {text}"
        )


# Linear modules of each part; a rank and an alpha of its own for each, as files that were resized have them.
LINEAR: dict[Place, tuple[int, float]] = {
    ("unet", f"{ATTENTION}.to_q"): (4, 1.0),
    ("unet", f"{ATTENTION}.to_out.0"): (2, 4.0),
    ("unet", "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"): (8, 2.0),
    ("unet", "up_blocks.0.attentions.1.proj_in"): (4, 8.0),
    ("unet", "up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k"): (3, 3.0),
    ("text_encoder", "encoder.layers.0.self_attn.q_proj"): (4, 16.0),
    ("text_encoder", "encoder.layers.2.mlp.fc1"): (4, 2.0),
    ("text_encoder_2", "text_model.encoder.layers.1.self_attn.out_proj"): (2, 1.0),
}
LDM = {
    f"{ATTENTION}.to_q": "input_blocks.3.1.transformer_blocks.0.attn1.to_q",
    f"{ATTENTION}.to_out.0": "input_blocks.3.1.transformer_blocks.0.attn1.to_out.0",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj": "middle_block.1.transformer_blocks.0.ff.net.0.proj",
    "up_blocks.0.attentions.1.proj_in": "output_blocks.1.1.proj_in",
    "up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k": "output_blocks.1.1.transformer_blocks.0.attn2.to_k",
}
KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
OLD_CLIP = {"q_proj": "to_q", "out_proj": "to_out"}


def with_text_model(part: str, module: str) -> str:
    """As transformers named the modules of both encoders before version 5."""
    return module if part == "unet" or module.startswith("text_model.") else f"text_model.{module}"


def peft_name(part: str, module: str, side: str) -> str:
    return f"{part}.{with_text_model(part, module)}.lora_{'A' if side == 'down' else 'B'}.weight"


def peft_default_name(part: str, module: str, side: str) -> str:
    return f"{part}.{module}.lora_{'A' if side == 'down' else 'B'}.default.weight"


def old_diffusers_name(part: str, module: str, side: str) -> str:
    if ".attn" in module:
        stem, _, last = module.removesuffix(".0").rpartition(".")
        return f"unet.{stem}.processor.{last}_lora.{side}.weight"
    if part == "unet":
        return f"unet.{module}.lora.{side}.weight"
    stem, _, last = with_text_model(part, module).rpartition(".")
    return (
        f"{part}.{stem}.{OLD_CLIP[last]}_lora.{side}.weight"
        if last in OLD_CLIP
        else f"{part}.{stem}.{last}.lora_linear_layer.{side}.weight"
    )


def kohya_name(part: str, module: str, side: str) -> str:
    return KOHYA[part] + with_text_model(part, module).replace(".", "_") + f".lora_{side}.weight"


def kohya_ldm_name(part: str, module: str, side: str) -> str:
    return kohya_name(part, LDM.get(module, module), side)


@dataclass(frozen=True)
class DialectCase:
    name: str
    tensor_name: Callable[[str, str, str], str]  # of part, module and side
    has_alpha: bool  # a tensor of its own


DIALECTS = [
    DialectCase(
        name="diffusers, PEFT's names",
        tensor_name=peft_name,
        has_alpha=False,
    ),
    DialectCase(
        name="PEFT's names of an adapter",
        tensor_name=peft_default_name,
        has_alpha=False,
    ),
    DialectCase(
        name="diffusers before 0.22",
        tensor_name=old_diffusers_name,
        has_alpha=False,
    ),
    DialectCase(
        name="kohya, diffusers' blocks",
        tensor_name=kohya_name,
        has_alpha=True,
    ),
    DialectCase(
        name="kohya, LDM's blocks",
        tensor_name=kohya_ldm_name,
        has_alpha=True,
    ),
    DialectCase(
        name="kohya without alpha",
        tensor_name=kohya_ldm_name,
        has_alpha=False,
    ),
]


@pytest.mark.parametrize("case", DIALECTS, ids=lambda case: case.name)
def test_each_module_gains_what_its_file_says(
    models: dict[str, Any], names: Names, tmp_path: Path, case: DialectCase
) -> None:
    file, expected = {}, {}
    for (part, module), (rank, alpha) in LINEAR.items():
        outputs, inputs = models[part].get_submodule(module).weight.shape
        up, down = numbers(outputs, rank), numbers(rank, inputs, seed=1)
        file |= {case.tensor_name(part, module, "down"): down, case.tensor_name(part, module, "up"): up}
        if case.has_alpha:
            file[case.tensor_name(part, module, "down").replace("lora_down.weight", "alpha")] = torch.tensor(alpha)
        expected[part, module] = 0.5 * (alpha / rank if case.has_alpha else 1.0) * up @ down
    save_file(file, tmp_path / "x.safetensors")
    assert_gains(gains(models, names, (tmp_path / "x.safetensors", 0.5)), expected)


def test_names_are_those_of_the_whole_checkpoint() -> None:
    """The UNet of Stable Diffusion XL: diffusers' converter of LDM checkpoints names all its modules as our table
    does.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            layers_per_block=2,
            sample_size=128,
            use_linear_projection=True,
            attention_head_dim=(5, 10, 20),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            cross_attention_dim=2048,
        )
    blocks, table = ldm_blocks(unet), Names({"unet": unet})
    ldm = {module: ldm_name(module, blocks) for module in _weighted(unet)}
    checkpoint = {
        f"model.diffusion_model.{name}.{kind}": module for module, name in ldm.items() for kind in ("weight", "bias")
    }
    converted = convert_ldm_unet_checkpoint(checkpoint, unet.config)
    assert {key.rpartition(".")[0]: module for key, module in converted.items()} == {module: module for module in ldm}
    for module, name in ldm.items():
        for written in (module, str(name)):
            place = table.find("lora_unet_" + written.replace(".", "_"))
            assert place is not None
            assert (place.part, place.rows) == ("unet", (Rows(module),))


def test_a_convolution_gains_the_composition_of_its_factors(
    models: dict[str, Any], names: Names, tmp_path: Path
) -> None:
    """LoCon, and its Tucker form: by what the three convolutions do to an image, one after the other."""
    outputs, inputs, *kernel = models["unet"].get_submodule(CONVOLUTION).weight.shape
    image = numbers(1, inputs, 9, 9)
    for mid in (False, True):
        up = numbers(outputs, 4, 1, 1)
        middle, down = (
            (numbers(4, 4, *kernel), numbers(4, inputs, 1, 1)) if mid else (None, numbers(4, inputs, *kernel))
        )
        key = "lora_unet_input_blocks_3_0_in_layers_2"
        file = {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.alpha": torch.tensor(2.0)}
        file |= {f"{key}.lora_mid.weight": middle} if middle is not None else {}
        save_file(file, tmp_path / "x.safetensors")
        found = gains(models, names, (tmp_path / "x.safetensors", 1.0))
        assert set(found) == {("unet", CONVOLUTION)}
        stages = functional.conv2d(image, down, padding=0 if mid else 1)
        stages = functional.conv2d(stages, middle, padding=1) if middle is not None else stages
        expected = 2 / 4 * functional.conv2d(stages, up)
        torch.testing.assert_close(
            functional.conv2d(image, found["unet", CONVOLUTION], padding=1), expected, rtol=1e-4, atol=1e-4
        )


def dora(base: torch.Tensor, added: torch.Tensor, magnitudes: torch.Tensor, of: str) -> torch.Tensor:
    """W' - W, vector by vector, as the paper has it: each keeps its new direction and gets its magnitude."""
    directions, changed = base + added, torch.empty_like(base)
    for i, magnitude in enumerate(magnitudes.flatten()):
        place = (i,) if of == "outputs" else (slice(None), i)
        changed[place] = magnitude * directions[place] / directions[place].pow(2).sum().sqrt()
    return changed - base


@dataclass(frozen=True)
class Kind:
    """Tensors for `module` (outputs × inputs), by the ends of their names, and what it gains at weight 1."""

    name: str
    module: str
    tensors: Callable[[torch.Tensor], Tensors]
    gain: Callable[[torch.Tensor, Tensors], torch.Tensor]
    place: str = ""
    """Of the gain, where it is no weight."""


def factors(base: torch.Tensor, rank: int = 4) -> Tensors:
    outputs, inputs, *kernel = base.shape
    up = numbers(outputs, rank, *[1] * len(kernel))
    return {
        "lora_up.weight": up,
        "lora_down.weight": numbers(rank, inputs, *kernel, seed=1),
        "alpha": torch.tensor(2.0),
    }


def lora_gain(base: torch.Tensor, t: Tensors) -> torch.Tensor:
    return (2 / 4 * t["lora_up.weight"].flatten(1) @ t["lora_down.weight"].flatten(1)).reshape(base.shape)


def elementwise(base: torch.Tensor, entry: Callable[[int, int], float]) -> torch.Tensor:
    return torch.tensor([[float(entry(o, i)) for i in range(base.shape[1])] for o in range(base.shape[0])])


def loha(base: torch.Tensor) -> Tensors:
    outputs, inputs = base.shape
    pairs = {
        f"hada_w{n}_{s}": numbers(*((outputs, 3) if s == "a" else (3, inputs)), seed=n) for n in (1, 2) for s in "ab"
    }
    return pairs | {"alpha": torch.tensor(1.5)}


def loha_gain(base: torch.Tensor, t: Tensors) -> torch.Tensor:
    def half(n: int, o: int, i: int) -> float:
        return sum(float(t[f"hada_w{n}_a"][o, r]) * float(t[f"hada_w{n}_b"][r, i]) for r in range(3))

    return elementwise(base, lambda o, i: 1.5 / 3 * half(1, o, i) * half(2, o, i))


def lokr(base: torch.Tensor) -> Tensors:
    outputs, inputs = base.shape
    return {
        "lokr_w1": numbers(4, 2),
        "lokr_w2_a": numbers(outputs // 4, 2),
        "lokr_w2_b": numbers(2, inputs // 2),
        "alpha": torch.tensor(1.0),
    }


def lokr_gain(base: torch.Tensor, t: Tensors) -> torch.Tensor:
    (rows, columns), second = (base.shape[0] // 4, base.shape[1] // 2), t["lokr_w2_a"] @ t["lokr_w2_b"]
    return elementwise(base, lambda o, i: 1 / 2 * t["lokr_w1"][o // rows, i // columns] * second[o % rows, i % columns])


def whole_lokr(base: torch.Tensor) -> Tensors:
    """Without a rank: its alpha is one that no one divides by."""
    return {
        "lokr_w1": numbers(4, 2),
        "lokr_w2": numbers(base.shape[0] // 4, base.shape[1] // 2),
        "alpha": torch.tensor(1e10),
    }


def whole_lokr_gain(base: torch.Tensor, t: Tensors) -> torch.Tensor:
    rows, columns = t["lokr_w2"].shape
    return elementwise(base, lambda o, i: t["lokr_w1"][o // rows, i // columns] * t["lokr_w2"][o % rows, i % columns])


def tucker_lokr(base: torch.Tensor) -> Tensors:
    """Of a convolution: the second factor is itself three convolutions, among ranks the one with pixels."""
    outputs, inputs, *kernel = base.shape
    return {
        "lokr_w1": numbers(4, 2),
        "lokr_w2_a": numbers(3, outputs // 4),
        "lokr_w2_b": numbers(3, inputs // 2),
        "lokr_t2": numbers(3, 3, *kernel),
    }


def tucker_lokr_gain(base: torch.Tensor, t: Tensors) -> torch.Tensor:
    def second(y: int, x: int) -> torch.Tensor:
        return t["lokr_w2_a"].T @ t["lokr_t2"][..., y, x] @ t["lokr_w2_b"]

    pixels = [
        [whole_lokr_gain(base, {"lokr_w1": t["lokr_w1"], "lokr_w2": second(y, x)}) for x in range(3)] for y in range(3)
    ]
    return torch.stack([torch.stack(row, -1) for row in pixels], -2)


def doha(base: torch.Tensor) -> Tensors:
    return loha(base) | {"dora_scale": numbers(base.shape[0], 1).abs()}


ATTENTION_Q = f"{ATTENTION}.to_q"
NORM = "down_blocks.1.resnets.0.norm1"
KINDS = [
    Kind("LoRA", ATTENTION_Q, factors, lora_gain),
    Kind("LoRA of a 1×1 convolution", SHORTCUT, factors, lora_gain),
    Kind("LoRA of a 1×1 convolution on a linear layer", ATTENTION_Q, lambda w: factors(w[..., None, None]), lora_gain),
    Kind("LoHa", ATTENTION_Q, loha, loha_gain),
    Kind("LoKr", ATTENTION_Q, lokr, lokr_gain),
    Kind("LoKr without a rank", ATTENTION_Q, whole_lokr, whole_lokr_gain),
    Kind("LoKr of a convolution, by Tucker", CONVOLUTION, tucker_lokr, tucker_lokr_gain),
    Kind("the difference itself", ATTENTION_Q, lambda w: {"diff": numbers(*w.shape)}, lambda w, t: t["diff"]),
    Kind("the difference of a norm", NORM, lambda w: {"w_norm": numbers(*w.shape)}, lambda w, t: t["w_norm"]),
    Kind(
        "the difference of a bias",
        NORM,
        lambda w: {"diff_b": numbers(*w.shape)},
        lambda w, t: t["diff_b"],
        place=f"{NORM}.bias",
    ),
    Kind(
        "DoRA of LyCORIS, for outputs",
        ATTENTION_Q,
        lambda w: factors(w) | {"dora_scale": numbers(w.shape[0], 1).abs()},
        lambda w, t: dora(w, lora_gain(w, t), t["dora_scale"], "outputs"),
    ),
    Kind(
        "DoRA of LyCORIS, for inputs",
        ATTENTION_Q,
        lambda w: factors(w) | {"dora_scale": numbers(1, w.shape[1]).abs()},
        lambda w, t: dora(w, lora_gain(w, t), t["dora_scale"], "inputs"),
    ),
    Kind(
        "DoRA of LyCORIS, a convolution",
        CONVOLUTION,
        lambda w: factors(w) | {"dora_scale": numbers(w.shape[0], 1, 1, 1).abs()},
        lambda w, t: dora(w, lora_gain(w, t), t["dora_scale"], "outputs"),
    ),
    Kind(
        "DoRA of PEFT",
        ATTENTION_Q,
        lambda w: factors(w) | {"lora_magnitude_vector.weight": numbers(w.shape[0]).abs()},
        lambda w, t: dora(w, lora_gain(w, t), t["lora_magnitude_vector.weight"], "outputs"),
    ),
    Kind("DoRA of LoHa", ATTENTION_Q, doha, lambda w, t: dora(w, loha_gain(w, t), t["dora_scale"], "outputs")),
]


@pytest.mark.parametrize("kind", KINDS, ids=[k.name for k in KINDS])
def test_kinds_by_their_formulas(models: dict[str, Any], names: Names, tmp_path: Path, kind: Kind) -> None:
    base = models["unet"].get_submodule(kind.module).weight.detach()
    tensors = kind.tensors(base)
    save_file(
        {f"unet.{kind.module}.{end}": tensor.contiguous() for end, tensor in tensors.items()},
        tmp_path / "x.safetensors",
    )
    expected = kind.gain(base, tensors)
    for weight in (1.0, 0.25, -1.0):
        assert_gains(
            gains(models, names, (tmp_path / "x.safetensors", weight)),
            {("unet", kind.place or kind.module): weight * expected},
        )
    assert gains(models, names, (tmp_path / "x.safetensors", 0.0)) == {}


def test_two_adapters_add_up_in_any_order(models: dict[str, Any], names: Names, tmp_path: Path) -> None:
    """Also DoRA, which depends on the weights it is added to: those are the model's own."""
    base = models["unet"].get_submodule(ATTENTION_Q).weight.detach()
    both = [factors(base), factors(base) | {"dora_scale": numbers(base.shape[0], 1).abs()}]
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for path, tensors in zip(paths, both, strict=True):
        save_file({f"unet.{ATTENTION_Q}.{end}": tensor for end, tensor in tensors.items()}, path)
    expected = 0.5 * lora_gain(base, both[0]) + 0.75 * dora(
        base, lora_gain(base, both[1]), both[1]["dora_scale"], "outputs"
    )
    adapters = list(zip(paths, (0.5, 0.75), strict=True))
    for order in (adapters, adapters[::-1]):
        assert_gains(gains(models, names, *order), {("unet", ATTENTION_Q): expected})


@dataclass(frozen=True)
class ConfigurationCase:
    name: str
    options: dict[str, Any]


CONFIGURATIONS = [
    ConfigurationCase(
        name="alpha",
        options={"lora_alpha": 16},
    ),
    ConfigurationCase(
        name="rank-stabilised",
        options={"lora_alpha": 16, "use_rslora": True},
    ),
    ConfigurationCase(
        name="an alpha for some modules",
        options={"lora_alpha": 4, "alpha_pattern": {"attn1.to_q": 1, "attn2.to_v": 8}},
    ),
    ConfigurationCase(
        name="a rank for some modules",
        options={"lora_alpha": 4, "rank_pattern": {"attn1.to_q": 2}},
    ),
    ConfigurationCase(
        name="DoRA",
        options={"lora_alpha": 8, "use_dora": True},
    ),
]


@pytest.mark.parametrize("case", CONFIGURATIONS, ids=lambda case: case.name)
def test_a_configuration_in_the_file_counts(
    pipe: StableDiffusionXLPipeline, models: dict[str, Any], names: Names, tmp_path: Path, case: ConfigurationCase
) -> None:
    """As diffusers itself writes and fuses such a file."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft.utils import get_peft_model_state_dict

    trained = copy.deepcopy(pipe.unet)
    trained.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], **case.options))
    for i, (key, weight) in enumerate(trained.named_parameters()):
        if "lora_" in key:
            weight.data = numbers(*weight.shape, seed=i).abs() / 4
    written = {"unet_lora_layers": get_peft_model_state_dict(trained), **_collate_lora_metadata({"unet": trained})}
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, **written)
    other = StableDiffusionXLPipeline(**pipe.components | {"unet": copy.deepcopy(pipe.unet)}, add_watermarker=False)
    own = pipe.unet.state_dict()
    other.load_lora_weights(tmp_path)
    other.fuse_lora()
    other.unload_lora_weights()
    expected = {
        ("unet", key.removesuffix(".weight")): weight - own[key]
        for key, weight in other.unet.state_dict().items()
        if not torch.equal(weight, own[key])
    }
    assert len(expected) == 16
    assert_gains(gains(models, names, (tmp_path / "pytorch_lora_weights.safetensors", 1.0)), expected)


def test_peft_s_own_folder(
    pipe: StableDiffusionXLPipeline, models: dict[str, Any], names: Names, tmp_path: Path
) -> None:
    """An adapter of the UNet as PEFT saves and merges it; its configuration lies beside."""
    config = LoraConfig(
        r=4, lora_alpha=16, target_modules=["to_q", "conv1"], alpha_pattern={"conv1": 2}, init_lora_weights=False
    )
    model = get_peft_model(copy.deepcopy(pipe.unet), config)
    model.save_pretrained(tmp_path)
    own = pipe.unet.state_dict()
    merged = model.merge_and_unload().state_dict()
    expected = {
        ("unet", key.removesuffix(".weight")): merged[key] - own[key]
        for key in own
        if not torch.equal(merged[key], own[key])
    }
    assert len(expected) == 16
    assert_gains(gains(models, names, (tmp_path / "adapter_model.safetensors", 1.0)), expected)


def complete() -> Tensors:
    """A sound file for one module of 16 × 16, which the cases below spoil."""
    return {f"unet.{ATTENTION_Q}.{end}": tensor for end, tensor in factors(torch.empty(16, 16)).items()}


@dataclass(frozen=True)
class Refusal:
    name: str
    message: str
    """Behind the field and the file's name."""
    add: Tensors = field(default_factory=dict)
    drop: str = ""
    metadata: dict[str, str] = field(default_factory=dict)


SD15 = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
REFUSALS = [
    Refusal(
        name="a module that the model does not have",
        add={f"{SD15}.lora_up.weight": numbers(320, 4), f"{SD15}.lora_down.weight": numbers(4, 320)},
        metadata={"ss_base_model_version": "sd_v1"},
        message=(
            "has 5 tensors, of which 2 belong to no module of this model, or are of a kind that is not known:"
            f" {SD15}.lora_down.weight, {SD15}.lora_up.weight. Adding the others alone would be another adapter. The"
            " file says that it was trained for sd_v1. LoRA, LoHa, LoKr and DoRA for Stable Diffusion XL can be used"
        ),
    ),
    Refusal(
        name="a kind that is not known",
        add={f"unet.{ATTENTION_Q}.oft_blocks": numbers(4, 4, 4)},
        message="has 4 tensors, of which 1 belong to no module",
    ),
    Refusal(
        name="an embedding that was trained beside it",
        add={"bundle_emb.ink.string_to_param.*": numbers(2, 32)},
        message=(
            "has 4 tensors, of which 1 belong to no module of this model, or are of a kind that is not known:"
            " bundle_emb.ink.string_to_param.*"
        ),
    ),
    Refusal(
        name="another width",
        add={f"unet.{ATTENTION_Q}.lora_up.weight": numbers(320, 4)},
        message=f"does not fit the model: unet.{ATTENTION_Q} is 16 × 16 there, and 320 × 16 in the file",
    ),
    Refusal(
        name="ranks that differ",
        add={f"unet.{ATTENTION_Q}.lora_up.weight": numbers(16, 8)},
        message=f"the tensors for unet.{ATTENTION_Q} do not fit together",
    ),
    Refusal(
        name="half of it",
        drop=f"unet.{ATTENTION_Q}.lora_up.weight",
        message=f"has alpha and down for unet.{ATTENTION_Q}, which is no whole LoRA, LoHa or LoKr",
    ),
    Refusal(
        name="two tensors for one role",
        add={f"lora_unet_{LDM[ATTENTION_Q].replace('.', '_')}.alpha": torch.tensor(1.0)},
        message=f"has unet.{ATTENTION_Q}.alpha and another tensor for the same module, unet.{ATTENTION_Q}",
    ),
    Refusal(
        name="NaN",
        add={f"unet.{ATTENTION_Q}.lora_up.weight": torch.full((16, 4), torch.nan)},
        message=f"unet.{ATTENTION_Q}.lora_up.weight holds values that are not finite (NaN or infinite)",
    ),
    Refusal(
        name="a magnitude of another width",
        add={f"unet.{ATTENTION_Q}.dora_scale": numbers(8, 1)},
        message=f"dora_scale of unet.{ATTENTION_Q} is 8 × 1, and the module 16 × 16",
    ),
    Refusal(
        name="a DoRA without its magnitude",
        metadata={"lora_adapter_metadata": json.dumps({"unet.use_dora": True, "unet.lora_alpha": 2})},
        message=f"is a DoRA by its configuration, and has no magnitude for unet.{ATTENTION_Q}",
    ),
    Refusal(
        name="another alpha in its configuration",
        metadata={"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 8})},
        message=f"says two things of alpha for unet.{ATTENTION_Q}: 2 in a tensor and 8 in its configuration",
    ),
    Refusal(
        name="an adapter to weights that were changed first",
        metadata={"lora_adapter_metadata": json.dumps({"unet.init_lora_weights": "pissa"})},
        message="was begun by pissa, which changes the weights of the model too",
    ),
    Refusal(
        name="a pattern that is none",
        metadata={"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 2, "unet.alpha_pattern": {"(": 1}})},
        message="has an alpha_pattern that is no pattern, '('",
    ),
    Refusal(
        name="a bias where there is none",
        add={f"unet.{ATTENTION_Q}.lora_B.bias": numbers(16)},
        message=f"has a bias of 16 numbers for unet.{ATTENTION_Q}, which has none",
    ),
]


@pytest.mark.parametrize("case", REFUSALS, ids=[r.name for r in REFUSALS])
def test_what_is_not_used_whole_is_refused(models: dict[str, Any], names: Names, tmp_path: Path, case: Refusal) -> None:
    path = tmp_path / "style.safetensors"
    save_file(
        {key: tensor for key, tensor in (complete() | case.add).items() if key != case.drop},
        path,
        metadata=case.metadata,
    )
    with pytest.raises(Failure) as failure:
        lora.read(path, names, FIELD)
    assert failure.value.code is ExitCode.INVALID_SPEC
    assert failure.value.message.startswith(f"{FIELD}: style.safetensors {case.message}"), failure.value.message


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 170543052\n")


def unfit(path: Path) -> None:
    save_file(complete() | {f"unet.{ATTENTION_Q}.lora_up.weight": numbers(320, 4)}, path)


@dataclass(frozen=True)
class FoundInPrepareCase:
    name: str
    spoil: Callable[[Path], object]
    message: str


FOUND_IN_PREPARE = [
    FoundInPrepareCase(
        name="cut short",
        spoil=cut,
        message="is cut short: it has",
    ),
    FoundInPrepareCase(
        name="a pointer of git-lfs",
        spoil=pointer,
        message="is a pointer of git-lfs",
    ),
    FoundInPrepareCase(
        name="of another model",
        spoil=unfit,
        message="does not fit the model",
    ),
]


@pytest.mark.parametrize("case", FOUND_IN_PREPARE, ids=lambda case: case.name)
def test_prepare_finds_it(case: FoundInPrepareCase, sdxl: Path, tmp_path: Path) -> None:
    save_file(complete(), tmp_path / "style.safetensors")
    run = generate_run(
        tmp_path / "job",
        [{"prompt": "a lute"}],
        task="text-to-image",
        model={"path": str(sdxl)},
        adapters=[{"path": str(tmp_path)}],
    )
    case.spoil(tmp_path / "style.safetensors")
    with pytest.raises(Failure, match=rf"spec\.adapters\[0\]\.path: .*style\.safetensors {case.message}") as failure:
        main(run)
    assert failure.value.code is ExitCode.INVALID_SPEC


def test_the_engine_draws_with_the_sum(sdxl: Path, tmp_path: Path) -> None:
    save_file(complete(), tmp_path / "style.safetensors")
    given = {
        "task": "text-to-image",
        "model": {"path": str(sdxl)},
        "adapters": [{"path": str(tmp_path), "weight": 0.5}],
    }
    run = generate_run(tmp_path / "job", [{"prompt": "a lute"}], **given)
    about = About({}, "here")
    engine = ImageEngine(run.spec, sdxl, [tmp_path / "style.safetensors"], Hardware("cpu", "bf16"), 1, about)
    own = UNet2DConditionModel.from_pretrained(sdxl / "unet").get_submodule(ATTENTION_Q).weight.detach()
    expected = (own + 0.5 * lora_gain(own, factors(own))).bfloat16()  # rounded once, after the sum
    assert torch.equal(engine.pipe.unet.get_submodule(ATTENTION_Q).weight, expected)
