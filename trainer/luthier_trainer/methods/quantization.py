"""The quantised types of frozen weights: rows of `luthier_api.methods.QUANTIZATIONS` as settings of bitsandbytes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch
from transformers import BitsAndBytesConfig

from luthier_api.methods import QuantizationType


def four_bits(kind: QuantizationType, compute: torch.dtype) -> BitsAndBytesConfig:
    """Return settings for 4 bits per weight with quantised scales, as in QLoRA. `compute`: the dtype of products."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def eight_bits(kind: QuantizationType, compute: torch.dtype) -> BitsAndBytesConfig:
    """Return settings for 8 bits per weight. Outlier activations are always multiplied in fp16, not in `compute`."""
    # bitsandbytes 0.50 would print a warning about it in each multiplication.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return BitsAndBytesConfig(load_in_8bit=True)


SETTINGS: Mapping[QuantizationType, Callable[[QuantizationType, torch.dtype], BitsAndBytesConfig]] = {
    "nf4": four_bits,
    "fp4": four_bits,
    "int8": eight_bits,
}


def settings(kind: QuantizationType, precision: str) -> BitsAndBytesConfig:
    """Return the settings with which transformers quantises a model on loading. `precision`: fp32, bf16 or fp16."""
    return settings_for(kind, torch.float16 if precision == "fp16" else torch.bfloat16)


def settings_for(kind: QuantizationType, compute: torch.dtype) -> BitsAndBytesConfig:
    """Return the same for products in `compute`."""
    return SETTINGS[kind](kind, compute)
