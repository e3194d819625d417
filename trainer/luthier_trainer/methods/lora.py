"""LoRA: two small matrices beside each linear layer. QLoRA is LoRA on a model with quantised weights."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from luthier_api.method import Method
from luthier_trainer.methods.base import AdapterFamily, Surroundings
from luthier_trainer.models.inspect import ALL_LINEAR

if TYPE_CHECKING:
    from peft import PeftConfig


class Lora(AdapterFamily):
    """Updates of rank `method.rank`, scaled by `method.alpha`."""

    def config(self, method: Method, around: Surroundings) -> PeftConfig:
        from peft import LoraConfig

        targets = method.target_modules
        # PEFT identifies such a parameter by the last two parts of its name.
        experts = {".".join(name.split(".")[-2:]) for name in around.experts if name.rpartition(".")[2] in targets}
        return LoraConfig(
            r=method.rank,
            lora_alpha=method.alpha,
            lora_dropout=method.dropout,
            target_modules=targets_of(method, around),
            target_parameters=sorted(experts) or None,
            task_type=around.task_type,
            modules_to_save=around.whole or None,
            exclude_modules=around.excluded,
            use_rslora=bool(method.rslora),
            use_dora=bool(method.dora),
            rank_pattern=dict(method.rank_pattern or {}),
            alpha_pattern=dict(method.alpha_pattern or {}),
            layers_to_transform=method.layers,
            bias=method.bias or "none",
            # What begins by the weights, `methods.initial` computes.
            init_lora_weights=True if begins_by_weights(method) else method.init_lora_weights or True,
            trainable_token_indices={name: list(tokens) for name, tokens in around.tokens.items()} or None,
        )

    def shapes(self, method: Method, name: str, shape: tuple[int, int]) -> list[tuple[int, ...]]:
        outputs, inputs = shape
        pattern = matching(method.rank_pattern or {}, name)
        rank = method.rank if pattern is None else method.rank_pattern[pattern]
        return [(outputs, rank), (rank, inputs), *([(outputs,)] if method.dora else [])]


def begins_by_weights(method: Method) -> bool:
    """Return whether what the adapters begin as is computed from the weights that they adapt."""
    return (method.init_lora_weights or "").startswith(("pissa", "olora", "loftq"))


def matching(patterns: Iterable[str], name: str) -> str | None:
    """Return the first of `patterns` that is PEFT's for the module `name`; None if there is none."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", name)), None)


def layer_of(name: str) -> int | None:
    """Return the number of the layer that the module `name` is in, as PEFT finds it; None if it is in none."""
    match = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", name)
    return int(match["idx"]) if match else None


def targets_of(method: Method, around: Surroundings) -> str | list[str]:
    """Return the modules that get adapters, as PEFT wants them named."""
    if method.target_modules != [ALL_LINEAR]:
        return list(method.target_modules)
    if method.layers is None:
        return ALL_LINEAR
    # PEFT 0.21 cannot restrict all-linear to layers.
    return sorted({name.rpartition(".")[2] for name in around.linear if layer_of(name) is not None})
