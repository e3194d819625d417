"""How attention is computed, one row each, by transformers' names; varlen is torch's. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

AttentionName = Literal["auto", "eager", "sdpa", "flex_attention", "varlen", "flash_attention_2", "flash_attention_3"]


@dataclass(frozen=True)
class AttentionInfo:
    """An implementation of attention, and what it works with."""

    about: str
    """For people: what it is."""
    gpu: bool = False
    """Whether it works on GPUs only."""
    half: bool = False
    """Whether it computes in 16 bits only."""
    documents: bool = False
    """Whether it computes each document of a packed row for itself, and is told where they begin: no mask is made."""
    packed_only: bool = False
    """Whether it works with `training.packing: isolated` only."""
    compiles: bool = False
    """Whether torch compiles it in the pods of `run`, for which they need a compiler."""
    package: str | None = None
    """The package that it is in, if that is not torch."""


ATTENTIONS: Mapping[AttentionName, AttentionInfo] = {
    "auto": AttentionInfo(
        about="varlen for packed rows on GPUs, where the model can; else what transformers takes: sdpa, or eager"
    ),
    "eager": AttentionInfo(about="products and a softmax of their own: slow, with maxLength² numbers a head and row"),
    "sdpa": AttentionInfo(
        about="torch's scaled_dot_product_attention; with packing isolated it gets a mask of maxLength² entries a row"
    ),
    "flex_attention": AttentionInfo(
        about="torch's FlexAttention: a kernel that is compiled for the mask, which skips empty blocks of it",
        gpu=True,
        compiles=True,
    ),
    "varlen": AttentionInfo(
        about="torch's varlen_attn: FlashAttention over the rows that share maxLength, without a mask; from Ampere on",
        gpu=True,
        half=True,
        documents=True,
        packed_only=True,
    ),
    "flash_attention_2": AttentionInfo(
        about="the package flash_attn, if the image has it", gpu=True, half=True, documents=True, package="flash_attn"
    ),
    "flash_attention_3": AttentionInfo(
        about="the package flash_attn_interface, for Hopper, if the image has it",
        gpu=True,
        half=True,
        documents=True,
        package="flash_attn_interface",
    ),
}
