"""Pipelines of text-to-image in `prepare`: every mistake that configurations, headers and samplers can tell ends there;
and how weights are stored.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from hub.server import Running
from safetensors.torch import load_file, save_file
from trainer.generating import generate_run

from luthier_api.exitcodes import ExitCode
from luthier_trainer.generation import families, pipelines
from luthier_trainer.models.pipelines import MODELS, variant
from luthier_trainer.prepare.main import main
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.workspace.prepared import read_prepared

# diffusers and numpy 2 talk about each other.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

UNET = Path("unet", "diffusion_pytorch_model.safetensors")


@dataclass(frozen=True)
class Mistake:
    name: str
    message: str
    """How it begins; FOLDER stands for the pipeline's."""
    spoil: Callable[[Path], object] = lambda folder: None
    image: dict[str, Any] | None = None


def edit(file: str, **changes: Any) -> Callable[[Path], object]:
    """Fields of a JSON file set; None removes one."""

    def spoil(folder: Path) -> None:
        path = folder / file
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))

    return spoil


def drop_a_tensor(folder: Path) -> None:
    weights = load_file(folder / UNET)
    del weights["mid_block.attentions.0.proj_in.weight"]
    save_file(weights, folder / UNET)


def compiled(folder: Path) -> None:
    save_file({f"_orig_mod.{name}": tensor for name, tensor in load_file(folder / UNET).items()}, folder / UNET)


MISTAKES = [
    Mistake(
        name="weights that lack a tensor",
        spoil=drop_a_tensor,
        message=(
            "spec.model.path: the weights in FOLDER/unet lack 1 of the 212 tensors of UNet2DConditionModel:"
            " mid_block.attentions.0.proj_in.weight."
        ),
    ),
    Mistake(
        name="weights by other names",
        spoil=compiled,
        message=(
            "spec.model.path: the weights in FOLDER/unet lack 212 of the 212 tensors of UNet2DConditionModel:"
            " conv_in.weight, conv_in.bias,"
        ),
    ),
    Mistake(
        name="weights of another configuration",
        spoil=edit("unet/config.json", cross_attention_dim=48),
        message=(
            "spec.model.path: down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight in FOLDER/unet is (16,"
            " 64), and UNet2DConditionModel by its config.json wants (16, 48)"
        ),
    ),
    Mistake(
        name="no tokenizer",
        spoil=lambda folder: shutil.rmtree(folder / "tokenizer_2"),
        message="spec.model.path: FOLDER/tokenizer_2 has no usable tokenizer: ",
    ),
    Mistake(
        name="no sampler",
        spoil=lambda folder: shutil.rmtree(folder / "scheduler"),
        message="spec.model.path: FOLDER/scheduler has no usable scheduler: ",
    ),
    Mistake(
        name="no UNet",
        spoil=edit("model_index.json", unet=None),
        message="spec.model.path: model_index.json names no unet; choose a whole pipeline",
    ),
    Mistake(
        name="code of its own",
        spoil=edit("model_index.json", unet=["my_unet", "MyUNet"]),
        message=(
            "spec.model.path: model_index.json names my_unet.MyUNet, which is not there. Code of a repository is"
            " never run"
        ),
    ),
    Mistake(
        name="another pipeline",
        spoil=edit("model_index.json", _class_name="HunyuanDiTPipeline"),
        message=(
            "spec.model.path: HunyuanDiTPipeline is not supported here; supported: StableDiffusionXLPipeline,"
            " StableDiffusionPipeline, StableDiffusion3Pipeline, FluxPipeline"
        ),
    ),
    Mistake(
        name="more steps than LCM has",
        image={"scheduler": "lcm", "steps": 60},
        message="spec.image.steps: lcm cannot do 60 steps: ",
    ),
    Mistake(
        name="a sampler without the model's schedule",
        spoil=edit("scheduler/scheduler_config.json", rescale_betas_zero_snr=True, timestep_spacing="trailing"),
        image={"scheduler": "heun"},
        message="spec.image.scheduler: the model was trained with rescale_betas_zero_snr: True, which heun leaves out",
    ),
]


@pytest.mark.parametrize("case", MISTAKES, ids=[m.name for m in MISTAKES])
def test_a_mistake_ends_in_prepare(case: Mistake, sdxl: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sdxl, folder)
    case.spoil(folder)
    run = generate_run(
        tmp_path / "job",
        [{"prompt": "a lute"}],
        task="text-to-image",
        model={"path": str(folder)},
        image=case.image or {},
    )
    with pytest.raises(Failure) as failure:
        main(run)
    assert failure.value.code is ExitCode.INVALID_SPEC
    expected = case.message.replace("FOLDER", str(folder))
    assert failure.value.message[: len(expected)] == expected


def test_a_size_that_is_no_whole_number_of_latents(sdxl: Path) -> None:
    vae = StableDiffusionXLPipeline.from_pretrained(sdxl).vae
    vae.register_to_config(block_out_channels=[16] * 5)  # 16 pixels a latent
    spec = generate_run(
        Path("/"), [{"prompt": "-"}], task="text-to-image", model={"path": "/m"}, image={"width": 1000, "height": 1024}
    ).spec
    with pytest.raises(
        Failure, match=r"spec\.image\.width: 1000 is not a multiple of 16, as this model wants; set 992 or 1008"
    ):
        families.check_size(vae, spec.image)


@pytest.fixture(scope="module")
def halves(sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline in fp16: the UNet and an encoder in shards, the rest in one file each, as repositories have their
    variants.
    """
    folder = tmp_path_factory.mktemp("models") / "halves"
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl, dtype=torch.float16)
    pipe.save_pretrained(folder, variant="fp16")
    for name in ("unet", "text_encoder_2"):
        next((folder / name).glob("*.safetensors")).unlink()
        getattr(pipe, name).save_pretrained(folder / name, variant="fp16", max_shard_size="60KB")
        assert len(list((folder / name).glob("*.fp16-*-of-*.safetensors"))) > 1
        assert list((folder / name).glob("*.safetensors.index.fp16.json"))
    return folder


@pytest.mark.parametrize("source", ["path", "id"])
def test_half_precision_in_shards(source: str, sdxl: Path, halves: Path, hub: Running, tmp_path: Path) -> None:
    if source == "id":
        hub.store.seed("model", "org/halves", halves)
    model = {"id": "org/halves"} if source == "id" else {"path": str(halves)}
    run = generate_run(tmp_path / "job", [{"prompt": "a lute"}], task="text-to-image", model=model)
    main(run)
    loaded, whole = (
        pipelines.load(Path(read_prepared(run).model_path), torch.float32),
        StableDiffusionXLPipeline.from_pretrained(sdxl),
    )
    assert read_prepared(run).plan.parameters == sum(getattr(whole, name).num_parameters() for name in MODELS)
    for name in MODELS:
        for key, weight in getattr(whole, name).state_dict().items():
            assert torch.equal(getattr(loaded, name).state_dict()[key], weight.half().float()), (name, key)


def test_plain_weights_come_before_a_variant(sdxl: Path, tmp_path: Path) -> None:
    """Both lie in the folder; the parameters count once."""
    shutil.copytree(sdxl, tmp_path / "model")
    shutil.copy(sdxl / UNET, (tmp_path / "model" / UNET).with_suffix(".fp16.safetensors"))
    run = generate_run(
        tmp_path / "job", [{"prompt": "a lute"}], task="text-to-image", model={"path": str(tmp_path / "model")}
    )
    main(run)
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl)
    assert read_prepared(run).plan.parameters == sum(getattr(pipe, name).num_parameters() for name in MODELS)
    assert variant(tmp_path / "model" / "unet", "spec.model") is None


@pytest.mark.parametrize(("channels", "refused"), [(4, False), (8, True), (9, True)])
def test_a_unet_that_reads_more_than_a_latent(channels: int, refused: bool) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(in_channels=channels, block_out_channels=(32, 32, 32, 32))
        vae = AutoencoderKL(latent_channels=4)
    with pytest.raises(Failure, match=f"its UNet reads {channels} channels") if refused else nullcontext():
        families.UNET.check_model(unet, vae, "spec.model")
