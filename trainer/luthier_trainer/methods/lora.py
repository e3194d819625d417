"""LoRA: two small matrices beside each linear layer. QLoRA is LoRA on a model with quantised weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from luthier_api.finetune import Method
from luthier_trainer.methods.base import Surroundings
from luthier_trainer.models.inspect import ALL_LINEAR

if TYPE_CHECKING:
    from peft import PeftConfig


class Lora:
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
            target_modules=ALL_LINEAR if targets == [ALL_LINEAR] else list(targets),
            target_parameters=sorted(experts) or None,
            task_type=around.task_type,
            modules_to_save=around.whole or None,
            exclude_modules=around.excluded,
        )

    def shapes(self, method: Method, shape: tuple[int, int]) -> list[tuple[int, ...]]:
        outputs, inputs = shape
        return [(outputs, method.rank), (method.rank, inputs)]
