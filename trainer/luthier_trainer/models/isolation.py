"""Determines whether a model can keep the documents of a packed row apart, by running a small model of its kind.

transformers lets no document attend to another one if the positions begin again at 0 in each of them. But a state that
is carried from token to token (Mamba, RWKV), a convolution, or positions that a model counts itself (BLOOM, OPT) do not
look at these positions, and none of these models raises an error or a warning. So a model with the same configuration,
but few and narrow layers, is compared here: documents in a row, and alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_trainer.models.inspect import auto_class
from luthier_trainer.runtime.failure import Failure

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

LIMIT = 1e-5
"""The largest difference that is only rounding, in standard deviations of the logits, in fp32.

Measured with small models of all causal architectures of transformers 5.23: documents that are kept apart differ by at
most 2e-6 from the same documents alone, others by at least 1e-3.
"""
DOCUMENTS = ((11, 12, 13, 14, 15, 16, 17, 18, 19), (21, 22, 23, 24, 25, 26, 27), (31, 32, 33, 34, 35))
"""Token ids. They are longer than `SLIDING_WINDOW`, and of different lengths."""
OTHER = 41  # another token id
LAYERS = 8
LARGEST = 30_000_000  # weights; a model that stays larger has widths with names that `SIZES` does not have
SLIDING_WINDOW = 4

SIZES: dict[str, int] = {
    "vocab_size": 64,
    "vocab_size_per_layer_input": 64,
    "n_words": 64,
    # Widths
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim", "lru_width"), 32),
    **dict.fromkeys(("attention_hidden_size", "hidden_size_per_layer_input"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "d_ff", "decoder_ffn_dim", "ffn_hidden_size"), 64),
    **dict.fromkeys(("intermediate_size_mlp", "dense_intermediate_size"), 64),
    # Attention
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "n_heads", "num_heads"), 2),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_size", "d_kv", "v_head_dim", "global_head_dim"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim"), 16),
    "qk_head_dim": 32,
    "rotary_dim": 8,
    # Experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    # States
    **dict.fromkeys(("mamba_n_heads", "linear_num_key_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
}
"""Fields of configurations of transformers that are made small, and their values."""
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")


def check(config: PreTrainedConfig, task: str, field: str) -> None:
    """Check that the documents of a packed row do not influence each other. Raises Failure if they do.

    `field`: the field of the spec that asks for this.
    """
    kind = config.model_type
    try:
        differences = leaks(small_model(config, task))
    except Exception as error:  # each architecture fails in its own way, for example without keyword position_ids
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise _refused(field, f"a small {kind} could not be tried with packed rows ({what})") from error
    if max(differences) > LIMIT:
        raise _refused(
            field,
            f"{kind} does not keep the rows apart that share what it reads: its logits move by"
            f" {max(differences):.2g} of their standard deviation",
        )


def _refused(field: str, reason: str) -> Failure:
    return Failure(
        ExitCode.INVALID_SPEC,
        f"{field}: isolated: {reason}. Use none and set groupByLength: true, which saves most of the padding; or use"
        " concatenate, if the model may see across rows; or choose another model",
    )


def leaks(model: PreTrainedModel) -> tuple[float, float]:
    """Return how far logits move, in standard deviations: (of documents in a row compared with alone, of the later
    documents when a token of the first one changes).
    """
    import torch

    alone = torch.cat([logits(model, [document]) for document in DOCUMENTS])
    first, *others = DOCUMENTS
    together = logits(model, DOCUMENTS)
    changed = logits(model, [(OTHER, *first[1:]), *others])
    scale = alone.std()
    differences = (together - alone, (changed - together)[len(first) :])
    # NaN counts as a difference.
    moved = [float((d.abs().max() / scale).nan_to_num(torch.inf)) for d in differences]
    return moved[0], moved[1]


def logits(model: PreTrainedModel, documents: Sequence[Sequence[int]], **more: Any) -> torch.Tensor:
    """Return the logits of documents in one row, float64 [tokens, vocabulary]: the inputs are those of training.

    `more`: further inputs.
    """
    import torch

    ids = [token for document in documents for token in document]
    positions = [position for document in documents for position in range(len(document))]
    with torch.inference_mode():
        outputs = model(
            input_ids=torch.tensor([ids]),
            position_ids=torch.tensor([positions]),
            use_cache=False,
            return_dict=True,
            **more,
        )
    return outputs.logits[0].double()


def small_model(config: PreTrainedConfig, task: str) -> PreTrainedModel:
    """Return a model of the class that `config` names, with its options, but with small layers and random weights.

    Raises ValueError if it stays large; architectures may raise other exceptions for sizes that do not fit them.
    """
    import torch

    data = config.to_dict()
    data.pop("quantization_config", None)
    small = type(config).from_dict(_smaller(data))
    with torch.device("meta"):
        size = sum(weight.numel() for weight in auto_class(task).from_config(copy.deepcopy(small)).parameters())
    if size > LARGEST:
        raise ValueError(f"it has {size} weights")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = auto_class(task).from_config(small)
        for weight in _matrices(model):
            # As new models begin, some would add nothing of their attention to a token.
            weight.normal_(std=0.1)
    return model.eval()


def _matrices(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    return (weight.data for weight in model.parameters() if weight.dim() > 1)


def _smaller(data: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a configuration with small values, also in the configurations within it."""
    small = {name: _smaller(value) if name.endswith("_config") and value else value for name, value in data.items()}
    # In fp32: in the 16 bits that most configurations name, logits move by rounding alone.
    for name in ("dtype", "torch_dtype"):
        small.pop(name, None)
    small |= {name: value for name, value in SIZES.items() if data.get(name)}
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if name in small:
            small[name] = 0
    for name in ("sliding_window", "attention_chunk_size"):
        if data.get(name):
            small[name] = SLIDING_WINDOW
    depth = next((data[name] for name in DEPTHS if data.get(name)), LAYERS)
    if depth > LAYERS:
        small |= {name: LAYERS for name in DEPTHS if data.get(name)}
        small = {name: _first_layers(value, depth) for name, value in small.items()}
    return small


def _first_layers(value: Any, depth: int) -> Any:
    """Return a field of a configuration of `depth` layers without its items for the layers from `LAYERS` on."""
    if isinstance(value, list) and len(value) == depth:
        return value[:LAYERS]
    if isinstance(value, dict) and value and all(str(key).isdigit() for key in value):
        return {key: item for key, item in value.items() if int(key) < LAYERS}
    return value
