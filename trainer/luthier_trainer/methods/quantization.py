"""The types in which frozen weights rest: rows of `luthier_api.methods.QUANTIZATIONS` as settings of bitsandbytes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch
from transformers import BitsAndBytesConfig

from luthier_api.methods import QuantizationType


def four_bits(kind: QuantizationType, compute: torch.dtype) -> BitsAndBytesConfig:
    """4 bits a weight, with scales that are quantised in turn, as QLoRA has it. Products are computed in `compute`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def eight_bits(kind: QuantizationType, compute: torch.dtype) -> BitsAndBytesConfig:
    """8 bits a weight. Activations with outliers are multiplied in fp16, whatever the precision of the computation."""
    # bitsandbytes 0.50 would say so in each multiplication.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return BitsAndBytesConfig(load_in_8bit=True)


SETTINGS: Mapping[QuantizationType, Callable[[QuantizationType, torch.dtype], BitsAndBytesConfig]] = {
    "nf4": four_bits,
    "fp4": four_bits,
    "int8": eight_bits,
}


def settings(kind: QuantizationType, precision: str) -> BitsAndBytesConfig:
    """What transformers wants to know to quantise a model while it loads it, for a computation in `precision`."""
    return SETTINGS[kind](kind, torch.float16 if precision == "fp16" else torch.bfloat16)
