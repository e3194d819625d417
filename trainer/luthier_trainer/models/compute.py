"""Counts what a model multiplies, on the meta device or on any other, for `workspace.flops`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from luthier_api.run import Compute

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SLIDING, FULL = "sliding_attention", "full_attention"  # `layer_types` of transformers' configurations
ORIGINAL = ".original_module."  # PEFT keeps a module there whose trained copy is used instead
ATTENTION_OPERATORS = ("scaled_dot_product", "flash_attention", "efficient_attention", "bmm", "baddbmm")


def of_tokens(model: torch.nn.Module, config: PreTrainedConfig, length: float) -> Compute:
    """Return what each token of `model` is multiplied with, as its weights are marked now.

    Adapters that `model` has are counted as its own weights. `length`: tokens of a row, on average over all tokens.
    """
    text = config.get_text_config()
    looked_up = _looked_up(model)
    chosen = _chosen_experts(text)
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    head = getattr(output, "weight", None)
    multiplied = learning = 0.0
    for name, weight in model.named_parameters():
        if ORIGINAL in f".{name}." or id(weight) in looked_up:
            continue
        share = chosen if "expert" in name and "shared" not in name else 1.0
        multiplied += size(weight) * share
        learning += size(weight) * share * weight.requires_grad
    full, near, window = attention_widths(text)
    return Compute(
        multiplied=round(multiplied),
        learning=round(learning),
        head=size(head) if head is not None else 0,
        attention_width=full,
        window_width=near,
        window=window,
        causal=is_causal(config, model),
        length=length,
    )


def of_images(model: torch.nn.Module, inputs: Mapping[str, Any]) -> Compute:
    """Return the multiply-adds of one forward pass of a model on the meta device. `inputs`: of a batch of one image.

    Of the weights, the share that learns is taken as that of the multiply-adds.
    """
    by_operator = count_operations(lambda: model(**inputs))
    products = sum(n for name, n in by_operator.items() if any(kind in name for kind in ATTENTION_OPERATORS))
    multiplied = (sum(by_operator.values()) - products) // 2
    weights = [(size(weight), weight.requires_grad) for weight in model.parameters()]
    share = sum(n for n, learns in weights if learns) / max(sum(n for n, _ in weights), 1)
    return Compute(unit="row", multiplied=multiplied, learning=round(multiplied * share), attention_macs=products // 2)


def count_operations(forward: Callable[[], Any]) -> dict[str, int]:
    """Return operator → floating-point operations of what `forward` computes, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward()
    return {str(operator): int(count) for operator, count in counter.get_flop_counts()["Global"].items()}


def attention_widths(config: Any) -> tuple[int, int, int | None]:
    """Return (width of all layers with attention over the row, of those with a window, tokens of the window).

    `config`: of a language model. Layers that mix tokens in another way (state spaces, linear attention) count none.
    """
    heads = next((n for name in ("num_attention_heads", "n_head", "num_heads") if (n := getattr(config, name, 0))), 0)
    if not heads:
        return 0, 0, None
    if (queries := getattr(config, "qk_head_dim", None)) and (values := getattr(config, "v_head_dim", None)):
        width = heads * (queries + values) // 2  # multi-head latent attention
    else:
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or [SLIDING if window else FULL] * config.num_hidden_layers
    return width * kinds.count(FULL), width * kinds.count(SLIDING), window


def is_causal(config: PreTrainedConfig, model: torch.nn.Module) -> bool:
    """Return whether a token attends only to those before it: no encoder's, whose name does not end so."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if config.is_encoder_decoder:
        return False
    if "ForCausalLM" in type(model).__name__ or "LMHead" in type(model).__name__:
        return True
    # BERT and its like are in that table, too, and are decoders only where their configuration says so.
    return config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not hasattr(config, "is_decoder")


def size(weight: torch.Tensor) -> int:
    """Return the number of weights in a tensor, also of one that DeepSpeed has sharded or bitsandbytes has packed."""
    if hasattr(weight, "ds_numel"):
        return int(weight.ds_numel)
    packed = getattr(weight, "quant_state", None)
    return prod(packed.shape) if packed is not None else weight.numel()


def _looked_up(model: torch.nn.Module) -> set[int]:
    """Return the ids of the weights of embeddings that no other module multiplies with."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    shared = {
        id(weight)
        for module in model.modules()
        if not isinstance(module, torch.nn.Embedding)
        for weight in module.parameters(recurse=False)
    }
    return tables - shared


def _chosen_experts(config: Any) -> float:
    """Return the share of the experts that a token is sent to; 1 without experts."""
    chosen = next((n for name in ("num_experts_per_tok", "moe_topk") if (n := getattr(config, name, None))), None)
    there = next(
        (
            n
            for name in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
            if (n := getattr(config, name, None))
        ),
        None,
    )
    return chosen / there if isinstance(chosen, int) and isinstance(there, int) else 1.0
