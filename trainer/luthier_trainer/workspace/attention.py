"""How attention is computed where the spec leaves it open. Imports no torch."""

from __future__ import annotations

from luthier_api.finetune import FineTuneJobSpec
from luthier_api.run import Attention


def planned(spec: FineTuneJobSpec, attention: Attention | None) -> tuple[str | None, list[str]]:
    """(implementation, why) of a job. `attention`: what the model can, None if that is not known or not asked.

    transformers gives `sdpa` a mask of maxLength² entries for packed rows, with which torch takes a slower kernel.
    """
    if attention is None:
        return None, []
    training = spec.training
    if training.attention != "auto":
        return training.attention, []
    if training.packing != "isolated" or not spec.resources.gpus_per_node:
        return attention.default, []
    trouble = attention.cannot_varlen
    if training.precision == "fp32":
        trouble = "FlashAttention computes in 16 bits, and precision is fp32"
    if trouble:
        return attention.default, [f"attention: {attention.default}, with a mask for packed rows, because {trouble}"]
    return "varlen", ["attention: varlen, with which packed rows need no mask"]
