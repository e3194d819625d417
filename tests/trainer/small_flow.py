"""Complete pipelines of Stable Diffusion 3 and FLUX of a few megabytes, made from configurations, as `small_sdxl`."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from trainer.small_sdxl import WIDTH, text_encoder_config, tokenizer
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

T5_WIDTH = 2 * WIDTH  # at least that of two CLIPs side by side
CHANNELS = 4  # of a latent


def t5_tokenizer() -> T5Tokenizer:
    """T5's tokenizer, whose tokens are letters."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters = [(letter, -3.0) for letter in string.ascii_letters + string.digits + string.punctuation]
    return T5Tokenizer(vocab=[*special, *letters], extra_ids=0, model_max_length=512)


def t5(tokens: T5Tokenizer) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokens),
            d_model=T5_WIDTH,
            d_kv=8,
            d_ff=37,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=[16, 32],
        in_channels=3,
        out_channels=3,
        latent_channels=CHANNELS,
        sample_size=32,
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=True,
    )


def sd3(seed: int = 0, with_t5: bool = True) -> StableDiffusion3Pipeline:
    """A Stable Diffusion 3, with weights made from `seed`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=2 * WIDTH,
            pos_embed_max_size=16,
        )
        clip, letters = tokenizer(), t5_tokenizer()
        config = text_encoder_config(clip)
        return StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae(),
            text_encoder=CLIPTextModelWithProjection(config),
            tokenizer=clip,
            text_encoder_2=CLIPTextModelWithProjection(config),
            tokenizer_2=clip,
            text_encoder_3=t5(letters) if with_t5 else None,
            tokenizer_3=letters if with_t5 else None,
        )


def flux(seed: int = 0, guided: bool = True) -> FluxPipeline:
    """A FLUX.1 dev, or without guidance schnell, with weights made from `seed`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=4 * CHANNELS,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=guided,
        )
        clip, letters = tokenizer(), t5_tokenizer()
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if guided else 1.0, use_dynamic_shifting=guided),
            vae=vae(),
            text_encoder=CLIPTextModel(text_encoder_config(clip)),
            tokenizer=clip,
            text_encoder_2=t5(letters),
            tokenizer_2=letters,
            transformer=transformer,
        )


def write(pipe: Any, folder: Path) -> Path:
    """The folder of a pipeline, as a repository on the Hub would hold it."""
    pipe.save_pretrained(folder)
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace('"T5Tokenizer"', '"T5TokenizerFast"'))  # as repositories name it
    assert json.loads(index.read_text())
    return folder


def write_lora(pipe: Any, folder: Path, seed: int = 1) -> Path:
    """A LoRA adapter for a pipeline, of the kind that diffusers' training scripts save."""
    layers = {}
    for name, targets in (
        ("transformer", ["to_q", "to_k", "to_v", "to_out.0"]),
        ("text_encoder", ["q_proj", "v_proj"]),
    ):
        model = getattr(pipe, name)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model.add_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=targets))
            for key, weight in model.named_parameters():
                if "lora_" in key:
                    torch.nn.init.normal_(weight, std=0.3)
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(model)
    type(pipe).save_lora_weights(folder, **layers)
    return folder
