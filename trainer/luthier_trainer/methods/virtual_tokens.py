"""Checks of virtual tokens against a model: whether they learn, and whether padding then changes nothing.

Not every architecture works with PEFT's way to put them before a text. A classifier that answers at the last token, for
example, takes that of the padding, because it finds the end of a text by the ids of tokens, which it does not get.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_api.method import Method
from luthier_api.tasks import TASKS
from luthier_trainer.methods.prompts import VirtualTokens
from luthier_trainer.methods.table import FAMILIES
from luthier_trainer.models.inspect import MODEL, max_positions, skeleton
from luthier_trainer.runtime.failure import Failure

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

FIELD = "spec.method.type"
FEW = 3  # virtual tokens of the small model
SHORT, LONG = 5, 9  # tokens of its rows
LIMIT = 1e-3
"""The largest difference that is only rounding, as a share of the largest number, in fp32."""


def check(config: PreTrainedConfig, task: str, method: Method, max_length: int) -> None:
    """Check that a model with this configuration works with virtual tokens. Raises Failure if not.

    `max_length`: tokens of the longest row.
    """
    if not isinstance(FAMILIES[method.type], VirtualTokens):
        return
    limit = max_positions(config)
    if limit is not None and max_length + method.virtual_tokens > limit:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"spec.method.virtualTokens: {method.virtual_tokens} virtual tokens and training.maxLength: {max_length} do"
            f" not fit: the model has {limit} positions (max_position_embeddings); set maxLength to at most"
            f" {max(limit - method.virtual_tokens, 0)}, or fewer virtual tokens",
        )
    if trouble := cannot(config, task, method):
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{FIELD}: {method.type} does not work with {config.model_type} for {task}: {trouble}; use lora, or another"
            " model",
        )


def cannot(config: PreTrainedConfig, task: str, method: Method) -> str | None:
    """Return why a small model with this configuration does not learn as it should; None if it does."""
    try:
        return _tried(config, task, method)
    except Exception as error:  # each architecture fails in its own way
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _tried(config: PreTrainedConfig, task: str, method: Method) -> str | None:
    import torch

    from luthier_trainer.methods.apply import with_method
    from luthier_trainer.models.heads import heads_of
    from luthier_trainer.models.isolation import small_model

    heads = heads_of(skeleton(config, task, MODEL), task)
    few = method.model_copy(update={"virtual_tokens": FEW, "encoder_hidden_size": None})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = with_method(small_model(config, task), few, TASKS[task].peft_task_type, heads, deepspeed=False)
        model.config.pad_token_id = 0
        model.eval()
        ids = torch.tensor([[*range(11, 11 + SHORT), *[0] * (LONG - SHORT)], [*range(11, 11 + LONG)]])
        mask = (ids != 0).long()
        together = model(input_ids=ids, attention_mask=mask).logits
        with torch.no_grad():
            alone = model(input_ids=ids[:1, :SHORT], attention_mask=mask[:1, :SHORT]).logits[0]
    beside = together[0][: len(alone)].detach()
    difference = float((beside - alone).abs().max() / alone.abs().max().clamp(min=1e-6))
    if not difference < LIMIT:
        return f"what it answers to a text depends on the padding after it (by {difference:.2g})"
    together.square().sum().backward()
    without = [name for name, weight in model.named_parameters() if weight.requires_grad and _is_still(weight.grad)]
    if without:
        return f"its answers do not depend on what learns ({without[0]})"
    return None


def _is_still(gradient: torch.Tensor | None) -> bool:
    return gradient is None or not bool(gradient.abs().sum() > 0)
