"""A complete Stable Diffusion XL of a few megabytes, made from configurations: what `from_pretrained` gets from the
Hub, without a Hub.

Its images are noise; its shapes, files and code paths are those of the real one. `python tests/trainer/small_sdxl.py
FOLDER` writes one.
"""

from __future__ import annotations

import sys
from pathlib import Path
from pydoc_data.topics import topics

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

VOCABULARY = 1000
WIDTH = 32  # of the text encoders; the UNet reads both side by side
TIME_WIDTH = 8  # of each of the six numbers for size and crop that SDXL is told
UNIT = 2  # pixels of a latent's side; 8 in the real one


def tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer, trained on Python's language reference."""
    letters = sorted(ByteLevel.alphabet())
    entries = ["<|startoftext|>", "<|endoftext|>", *letters, *[letter + "</w>" for letter in letters]]
    empty = CLIPTokenizer(vocab={entry: i for i, entry in enumerate(entries)}, merges=[], model_max_length=77)
    return empty.train_new_from_iterator((text for _, text in sorted(topics.items())), VOCABULARY, show_progress=False)


def text_encoder_config(tokens: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=WIDTH,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=WIDTH,
        hidden_act="gelu",
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )


def pipeline(seed: int = 0) -> StableDiffusionXLPipeline:
    """The pipeline, with weights made from `seed`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            sample_size=16,
            in_channels=4,
            out_channels=4,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=TIME_WIDTH,
            transformer_layers_per_block=(1, 1),
            projection_class_embeddings_input_dim=6 * TIME_WIDTH + WIDTH,
            cross_attention_dim=2 * WIDTH,
        )
        vae = AutoencoderKL(
            block_out_channels=[16, 32],
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            sample_size=32,
            norm_num_groups=4,
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            scaling_factor=0.13025,
        )
        tokens = tokenizer()
        config = text_encoder_config(tokens)
        first, second = CLIPTextModel(config), CLIPTextModelWithProjection(config)
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokens,
        tokenizer_2=tokens,
        unet=unet,
        scheduler=scheduler,
        add_watermarker=False,
    )


def write_small_sdxl(folder: Path, seed: int = 0) -> Path:
    """The pipeline's folder, as a repository on the Hub would hold it."""
    pipeline(seed).save_pretrained(folder)
    return folder


def write_small_refiner(folder: Path, seed: int = 3) -> Path:
    """The folder of a refiner for it: the second text encoder alone, and an aesthetic score in place of the size."""
    xl = pipeline(seed)
    own = {"cross_attention_dim": WIDTH, "projection_class_embeddings_input_dim": 5 * TIME_WIDTH + WIDTH}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel.from_config(dict(xl.unet.config) | own)
    StableDiffusionXLImg2ImgPipeline(
        vae=xl.vae,
        text_encoder=None,
        text_encoder_2=xl.text_encoder_2,
        tokenizer=None,
        tokenizer_2=xl.tokenizer_2,
        unet=unet,
        scheduler=xl.scheduler,
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


def write_small_sd(folder: Path, seed: int = 0) -> Path:
    """The folder of a Stable Diffusion 1.5: one text encoder, and no sizes that the UNet is told."""
    xl = pipeline(seed)
    told = ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel.from_config(
            dict(xl.unet.config) | dict.fromkeys(told) | {"cross_attention_dim": WIDTH}
        )
    StableDiffusionPipeline(
        vae=xl.vae,
        text_encoder=xl.text_encoder,
        tokenizer=xl.tokenizer,
        unet=unet,
        scheduler=xl.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def write_small_lora(folder: Path, seed: int = 1, text_encoder: bool = False) -> Path:
    """A LoRA adapter for it, of the kind that diffusers' training scripts save, with weights large enough to be
    seen.
    """
    pipe = pipeline()
    layers = {}
    parts = {"unet": (pipe.unet, ["to_q", "to_k", "to_v", "to_out.0"])}
    if text_encoder:
        parts["text_encoder"] = (pipe.text_encoder, ["q_proj", "v_proj"])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, (model, targets) in parts.items():
            model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets))
            for key, weight in model.named_parameters():
                if "lora_" in key:
                    torch.nn.init.normal_(weight, std=0.5)
            layers[f"{name}_lora_layers"] = get_peft_model_state_dict(model)
    StableDiffusionXLPipeline.save_lora_weights(folder, **layers)
    return folder


if __name__ == "__main__":
    print(write_small_sdxl(Path(sys.argv[1])))
