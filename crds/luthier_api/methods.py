"""The methods of training and the quantisations, one row each.

The API's types, its CEL rules, the docs and the trainer's checks are drawn from these rows. Imports no torch: what a
method does stands in `luthier_trainer`, and tests on both sides hold that each row has an implementation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

Strategy = Literal["auto", "ddp", "zero1", "zero2", "zero2-offload", "zero3", "zero3-offload"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
UNSHARDED: tuple[Strategy, ...] = ("auto", "ddp", "zero1", "zero2", "zero2-offload")
"""Strategies that keep a whole copy of the model's weights on each GPU."""

ParameterPrecision = Literal["fp32", "bf16"]

QuantizationType = Literal["nf4", "fp4", "int8"]


@dataclass(frozen=True)
class QuantizationInfo:
    """A type in which the frozen weights of linear layers rest."""

    title: str
    """As pages and model cards call it."""
    bits: int
    """Of one weight, without the scales beside it."""
    bits_with_scales: float
    """Of one weight, with its part of the scales."""
    strategies: tuple[Strategy, ...]
    """Those that work with such weights."""
    cpu_multiple: int = 1
    """What the widths of a model have to be a multiple of, for bitsandbytes' kernels on CPU."""


# Double quantisation: a scale of 8 bits for 64 weights, and one of 32 bits for 256 scales.
DOUBLE_QUANT_BITS = 4 + 8 / 64 + 32 / (64 * 256)

QUANTIZATIONS: Mapping[QuantizationType, QuantizationInfo] = {
    # DeepSpeed's ZeRO-3 cannot shard the packed weights of bitsandbytes.
    "nf4": QuantizationInfo(
        title="4-bit NormalFloat (NF4)",
        bits=4,
        bits_with_scales=DOUBLE_QUANT_BITS,
        strategies=UNSHARDED,
        cpu_multiple=64,  # bitsandbytes 0.50
    ),
    "fp4": QuantizationInfo(
        title="4-bit float (FP4)",
        bits=4,
        bits_with_scales=DOUBLE_QUANT_BITS,
        strategies=UNSHARDED,
        cpu_multiple=64,
    ),
    "int8": QuantizationInfo(
        title="8-bit integer (LLM.int8)",
        bits=8,
        bits_with_scales=8,  # one scale of 32 bits a row: nothing beside thousands of weights
        strategies=("auto", "ddp"),  # DeepSpeed with bitsandbytes' 8-bit layers has not been tried
    ),
}

MethodType = Literal["full", "lora", "qlora"]


@dataclass(frozen=True)
class MethodInfo:
    """A method of training: which weights learn, and what its result can be used for."""

    title: str
    """As pages and model cards call it."""
    adapter: bool
    """The result is an adapter beside a frozen model; otherwise it is a whole model."""
    mergeable: bool = False
    """The adapter can be merged into its base: `model.job` and GenerateJobs over texts do so."""
    weighted: bool = False
    """The adapter can be added with a weight other than 1 (`adapters[].weight` of a GenerateJob)."""
    quantizations: tuple[QuantizationType, ...] = ()
    """Types in which the frozen model may rest (`model.quantization.type`)."""
    quantization: QuantizationType | None = None
    """The type in which the frozen model rests unless `model.quantization` says so: part of the method's name."""
    strategies: tuple[Strategy, ...] = STRATEGIES
    """Those that the method works with. A quantisation may allow fewer."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Path in the spec → default, of the other fields that belong to it; None: no default."""

    @cached_property
    def fields(self) -> Mapping[str, Any]:
        """Path in the spec → default, of all fields that belong to the method. Other methods refuse them."""
        if not self.quantizations:
            return self.options
        default = {"type": self.quantization} if self.quantization else None
        return {**self.options, "model.quantization": default}


LORA_OPTIONS = {
    "method.rank": 16,
    "method.alpha": 32,
    "method.dropout": 0.0,
    "method.targetModules": ["all-linear"],
    "method.rslora": False,
    "method.dora": False,
    "method.rankPattern": None,
    "method.alphaPattern": None,
    "method.layers": None,
    "method.initLoraWeights": None,
    "method.bias": "none",
    "method.modulesToSave": None,
    "training.optimizerOptions.loraplusLrRatio": None,
}

METHODS: Mapping[MethodType, MethodInfo] = {
    "full": MethodInfo(
        title="full fine-tuning",
        adapter=False,
        options={"model.config": None, "training.parameterPrecision": "fp32"},
    ),
    "lora": MethodInfo(
        title="LoRA",
        adapter=True,
        mergeable=True,
        weighted=True,
        quantizations=("nf4", "fp4", "int8"),
        options=LORA_OPTIONS,
    ),
    "qlora": MethodInfo(
        title="QLoRA",
        adapter=True,
        mergeable=True,
        weighted=True,
        quantizations=("nf4",),
        quantization="nf4",
        strategies=UNSHARDED,
        options=LORA_OPTIONS,
    ),
}
