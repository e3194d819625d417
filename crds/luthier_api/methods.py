"""The methods of training and the quantisations, one row each.

The API's types, its CEL rules, the docs and the trainer's checks are drawn from these rows. Imports no torch: what a
method does stands in `luthier_trainer`, and tests on both sides hold that each row has an implementation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

Strategy = Literal["auto", "ddp", "zero1", "zero2", "zero2-offload", "zero3", "zero3-offload", "fsdp"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
UNSHARDED: tuple[Strategy, ...] = ("auto", "ddp", "zero1", "zero2", "zero2-offload")
"""Strategies that keep a whole copy of the model's weights on each GPU."""

DIVIDE_WEIGHTS: tuple[Strategy, ...] = ("zero3", "zero3-offload", "fsdp")
"""Strategies with which each process has a part of each weight."""

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
    why: str = ""
    """Why it works with these strategies alone."""


PACKED = "ZeRO-3 cannot divide the packed weights of bitsandbytes, and FSDP has not been proven with them"
# Double quantisation: a scale of 8 bits for 64 weights, and one of 32 bits for 256 scales.
DOUBLE_QUANT_BITS = 4 + 8 / 64 + 32 / (64 * 256)

QUANTIZATIONS: Mapping[QuantizationType, QuantizationInfo] = {
    "nf4": QuantizationInfo(
        title="4-bit NormalFloat (NF4)",
        bits=4,
        bits_with_scales=DOUBLE_QUANT_BITS,
        strategies=UNSHARDED,
        cpu_multiple=64,  # bitsandbytes 0.50
        why=PACKED,
    ),
    "fp4": QuantizationInfo(
        title="4-bit float (FP4)",
        bits=4,
        bits_with_scales=DOUBLE_QUANT_BITS,
        strategies=UNSHARDED,
        cpu_multiple=64,
        why=PACKED,
    ),
    "int8": QuantizationInfo(
        title="8-bit integer (LLM.int8)",
        bits=8,
        bits_with_scales=8,  # one scale of 32 bits a row: nothing beside thousands of weights
        strategies=("auto", "ddp"),
        why="neither DeepSpeed nor FSDP has been proven with bitsandbytes' 8-bit layers",
    ),
}

MethodType = Literal["full", "bitfit", "lora", "qlora", "adalora", "ia3", "prompt", "p-tuning", "prefix"]
Packing = Literal["none", "isolated", "concatenate"]
PACKINGS: tuple[Packing, ...] = get_args(Packing)


@dataclass(frozen=True)
class MethodInfo:
    """A method of training: which weights learn, and what its result can be used for."""

    title: str
    """As pages and model cards call it."""
    adapter: bool
    """The result is an adapter beside a frozen model; otherwise it is a whole model."""
    peft_type: str | None = None
    """PEFT's name of such adapters."""
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
    packings: tuple[Packing, ...] = PACKINGS
    """Values of `training.packing` that the method works with."""
    recomputes: bool = True
    """Whether activations can be recomputed (`training.gradientCheckpointing`)."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Path in the spec → default, of the other fields that belong to it; None: no default."""
    why: Mapping[str, str] = field(default_factory=dict)
    """Name of `quantizations`, `strategies`, `packings`, `recomputes` or `mergeable` → why it is restricted."""

    @cached_property
    def fields(self) -> Mapping[str, Any]:
        """Path in the spec → default, of all fields that belong to the method. Other methods refuse them."""
        if not self.quantizations:
            return self.options
        default = {"type": self.quantization} if self.quantization else None
        return {**self.options, "model.quantization": default}


NEW_TOKENS: Mapping[str, Any] = {
    "model.tokenizer": None,
    "model.resizeEmbeddings": False,
    "model.addSpecialTokens": None,
}
"""Fields of the methods that can train rows of the embedding for new tokens."""
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
    **NEW_TOKENS,
}
UNDIVIDED: tuple[Strategy, ...] = ("auto", "ddp")
"""Strategies that divide nothing."""
SMALL = "what learns is too small for DeepSpeed to save memory, and neither it nor FSDP has been proven with them"
PROMPT_OPTIONS = {"method.virtualTokens": 20}
PROMPT_LIMITS: Mapping[str, str] = {
    "strategies": SMALL,
    "packings": "PEFT (0.21) puts the virtual tokens before a row once, so that documents after the first lack them",
    "mergeable": "virtual tokens are no part of the base's weights",
}

METHODS: Mapping[MethodType, MethodInfo] = {
    "full": MethodInfo(
        title="full fine-tuning",
        adapter=False,
        options={
            "model.config": None,
            "training.parameterPrecision": "fp32",
            "method.layers": None,
            "method.freeze": None,
            **NEW_TOKENS,
        },
        why={"quantizations": "weights in few bits cannot be trained"},
    ),
    "bitfit": MethodInfo(
        title="BitFit",
        adapter=False,
        why={"quantizations": "the result is a whole model, and bitsandbytes (0.50) rounds the biases of its modules"},
    ),
    "lora": MethodInfo(
        title="LoRA",
        adapter=True,
        peft_type="LORA",
        mergeable=True,
        weighted=True,
        quantizations=("nf4", "fp4", "int8"),
        options=LORA_OPTIONS,
    ),
    "qlora": MethodInfo(
        title="QLoRA",
        adapter=True,
        peft_type="LORA",
        mergeable=True,
        weighted=True,
        quantizations=("nf4",),
        quantization="nf4",
        strategies=UNSHARDED,
        options=LORA_OPTIONS,
        why={
            "quantizations": "it is the name of LoRA on a base in nf4; lora allows the others",
            "strategies": PACKED,
        },
    ),
    "adalora": MethodInfo(
        title="AdaLoRA",
        adapter=True,
        peft_type="ADALORA",
        mergeable=True,
        quantizations=("nf4", "fp4", "int8"),
        strategies=UNDIVIDED,
        options={
            "method.rank": 8,
            "method.initialRank": 12,
            "method.alpha": 32,
            "method.dropout": 0.0,
            "method.targetModules": ["all-linear"],
            "method.layers": None,
            "method.initialFraction": 0.1,
            "method.finalFraction": 0.3,
            "method.orthogonalWeight": 0.5,
            "method.modulesToSave": None,
        },
        why={
            "strategies": "ranks are chosen by gradients after the update, which DeepSpeed has freed by then, and FSDP"
            " divides"
        },
    ),
    "ia3": MethodInfo(
        title="IA3",
        adapter=True,
        peft_type="IA3",
        mergeable=True,
        quantizations=("nf4", "fp4", "int8"),
        strategies=UNDIVIDED,
        options={
            "method.targetModules": None,
            "method.feedforwardModules": None,
            "method.modulesToSave": None,
        },
        why={"strategies": SMALL},
    ),
    "prompt": MethodInfo(
        title="prompt tuning",
        adapter=True,
        peft_type="PROMPT_TUNING",
        quantizations=("nf4", "fp4", "int8"),
        strategies=UNDIVIDED,
        packings=("none", "concatenate"),
        options={**PROMPT_OPTIONS, "method.promptText": None, "method.promptInit": None},
        why=PROMPT_LIMITS,
    ),
    "p-tuning": MethodInfo(
        title="p-tuning",
        adapter=True,
        peft_type="P_TUNING",
        quantizations=("nf4", "fp4", "int8"),
        strategies=UNDIVIDED,
        packings=("none", "concatenate"),
        options={**PROMPT_OPTIONS, "method.encoder": "mlp", "method.encoderHiddenSize": None},
        why=PROMPT_LIMITS,
    ),
    "prefix": MethodInfo(
        title="prefix tuning",
        adapter=True,
        peft_type="PREFIX_TUNING",
        quantizations=("nf4", "fp4", "int8"),
        strategies=UNDIVIDED,
        packings=("none", "concatenate"),
        recomputes=False,
        options={
            **PROMPT_OPTIONS,
            "method.promptText": None,
            "method.promptInit": None,
            "method.projection": False,
            "method.encoderHiddenSize": None,
        },
        why={**PROMPT_LIMITS, "recomputes": "PEFT (0.21) gives the prefix as a cache, which is lost when recomputed"},
    ),
}
"""Method → its row."""

BY_PEFT_TYPE: Mapping[str, MethodInfo] = {info.peft_type: info for info in METHODS.values() if info.peft_type}
"""PEFT's name of a kind of adapters → the method; of those with the same name, any one."""

COMPARED: tuple[MethodType, ...] = ("full", "lora", "qlora")
"""Methods of the tasks of TRL, whose trainers switch an adapter off, or read the weights of a head, by LoRA's rules."""
OF_HEADS: tuple[MethodType, ...] = ("full", "bitfit", "lora", "qlora", "adalora", "ia3")
"""Methods of the tasks whose answers belong to positions of the input, before which virtual tokens would shift them."""
OF_TEXTS: tuple[MethodType, ...] = (*OF_HEADS, "prompt", "p-tuning", "prefix")
"""Methods of the tasks that read texts and answer with a text or a class."""
OF_IMAGES: tuple[MethodType, ...] = ("full", "bitfit", "lora", "adalora", "ia3")
"""Methods of the tasks that read images, which have no embedding of tokens."""
OF_AUDIO: tuple[MethodType, ...] = OF_IMAGES
"""Methods of the tasks that hear audio, likewise."""
