"""The optimisers, one row each, by transformers' names (`optim`); muon is torch's. Imports no torch.

What an optimiser cannot do is refused at apply, from its row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from luthier_api.methods import METHODS, STRATEGIES, MethodType, ParameterPrecision, Strategy
from luthier_api.schedules import SCHEDULES, ScheduleName

OptimizerName = Literal[
    "adamw_torch_fused",
    "adamw_8bit",
    "paged_adamw_8bit",
    "adafactor",
    "lion_32bit",
    "lion_8bit",
    "muon",
    "schedule_free_adamw",
]

UNDIVIDED: tuple[Strategy, ...] = ("auto", "ddp")
"""Strategies that leave each tensor whole. DeepSpeed joins all weights into one vector and divides it: an optimiser
that looks at matrices would see none, and bitsandbytes' blocks of 8-bit states would not be those of the tensors. FSDP
leaves each process some rows of each tensor.
"""


@dataclass(frozen=True)
class OptimizerInfo:
    """An optimiser, and what it works with."""

    about: str
    """For people: what it is, and what it costs."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Name in `training.optimizerOptions` → default."""
    strategies: tuple[Strategy, ...] = UNDIVIDED
    methods: tuple[MethodType, ...] = tuple(METHODS)
    schedules: tuple[ScheduleName, ...] = tuple(SCHEDULES)
    parameters: tuple[ParameterPrecision, ...] = ("fp32",)
    """Types of the weights that it can change (`training.parameterPrecision`)."""
    bitsandbytes: bool = False
    """Whether its code is in bitsandbytes, which the trainer imports only where it is needed."""

    @property
    def fields(self) -> Mapping[str, Any]:
        """Path in the spec → default, of the fields that belong to the optimiser. Others refuse them."""
        return {f"training.optimizerOptions.{name}": default for name, default in self.options.items()}


ADAM_OPTIONS = {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8}
LORAPLUS = {"loraplusLrRatio": None}
"""For AdamW, with which LoRA+ is derived and measured, and for which PEFT has code."""
LION_OPTIONS = {"beta1": 0.9, "beta2": 0.99}  # of the paper, arXiv:2302.06675

OPTIMIZERS: Mapping[OptimizerName, OptimizerInfo] = {
    "adamw_torch_fused": OptimizerInfo(
        about="AdamW of torch: 8 bytes of state a weight, 4 with parameterPrecision bf16",
        options=ADAM_OPTIONS | LORAPLUS,
        strategies=STRATEGIES,
        parameters=("fp32", "bf16"),
    ),
    "adamw_8bit": OptimizerInfo(
        about="AdamW of bitsandbytes: 2 bytes of state a weight, 8 for embeddings and tensors below 4,096 weights",
        options=ADAM_OPTIONS | LORAPLUS,
        parameters=("fp32", "bf16"),
        bitsandbytes=True,
    ),
    "paged_adamw_8bit": OptimizerInfo(
        about="the same, with states that move to the memory of the host when a GPU runs out",
        options=ADAM_OPTIONS | LORAPLUS,
        parameters=("fp32", "bf16"),
        bitsandbytes=True,
    ),
    "adafactor": OptimizerInfo(about="a row and a column of state a matrix; with learningRate, without momentum"),
    "lion_32bit": OptimizerInfo(
        about="Lion of bitsandbytes: 4 bytes of state a weight; learningRate a third to a tenth of AdamW's",
        options=LION_OPTIONS,
        bitsandbytes=True,
    ),
    "lion_8bit": OptimizerInfo(about="the same with 1 byte of state a weight", options=LION_OPTIONS, bitsandbytes=True),
    "muon": OptimizerInfo(
        about=(
            "Muon of torch for the matrices of hidden layers (4 bytes of state a weight), AdamW for embeddings, heads"
            " and vectors. Updates are scaled as arXiv:2502.16982 has it, so that learningRate is that of AdamW"
        ),
        options={"momentum": 0.95, **ADAM_OPTIONS},
        methods=("full",),  # a factor of an adapter is not the matrix whose update Muon makes orthogonal
    ),
    "schedule_free_adamw": OptimizerInfo(
        about="AdamW that averages the weights instead of lowering the learning rate (arXiv:2405.15682): 8 bytes",
        options=ADAM_OPTIONS,
        schedules=("constant",),  # it has the warm-up in itself
    ),
}
