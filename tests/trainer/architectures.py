"""Every architecture with a causal language model, as small as its configuration allows: for tests that hold for all of
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from trainer.generating import generate_run, sample
from trainer.sentencepieces import write_llama
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from luthier_trainer.generation.engines.text import TextEngine
from luthier_trainer.generation.hardware import Hardware

VOCABULARY = 512
WEIGHT = 8  # times that of a new model, so that texts depend on their prompts
NEW_TOKENS = 6
LARGEST = 30_000_000  # weights; what stays larger is made of parts that these fields do not reach (images, sound)

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "embedding_size": 32,
    "word_embed_proj_dim": 32,
    # Width and depth, by their many names.
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "attention_hidden_size": 32,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "decoder_layers": 2,
    "encoder_layers": 2,
    # Attention.
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_head": 2,
    "n_heads": 2,
    "num_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_attention_heads": 2,
    "head_dim": 16,
    "attention_head_size": 16,
    "d_kv": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 128,
    "attention_types": [[["global", "local"], 1]],
    # Feed-forward layers and experts.
    "intermediate_size": 64,
    "n_inner": 64,
    "ffn_dim": 64,
    "d_ff": 64,
    "decoder_ffn_dim": 64,
    "encoder_ffn_dim": 64,
    "ffn_hidden_size": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_layer_freq": 1,
    "zero_expert_num": 0,
    "num_hash_layers": 0,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    # Recurrent layers.
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "state_size": 8,
    "expand": 2,
    "lru_width": 32,
    # Positions.
    "max_position_embeddings": 256,
    "n_positions": 256,
    "context_length": 256,
}

SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_hidden_layers": 8},
    "bamba": {"attn_layer_indices": [1]},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8, "n_head": 4},
    "jamba": {"num_hidden_layers": 8},
    "kimi_linear": {"num_hidden_layers": 8},
    "lfm3": {"num_hidden_layers": 4},
    "mamba2": {"num_heads": 4, "n_groups": 1},
    "qwen3_5_moe_text": {"num_hidden_layers": 4},
    "qwen3_5_text": {"num_hidden_layers": 4},
    "qwen3_next": {"num_hidden_layers": 4},
    "recurrent_gemma": {"num_hidden_layers": 4},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "attn_layers": ["local", "local"],
        "local_attn_chunk_length": 16,
    },
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
    # Encoders that can be told to look back only.
    **{
        kind: {"is_decoder": True}
        for kind in (
            "bert",
            "bert-generation",
            "big_bird",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
            "megatron-bert",
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roc_bert",
            "roformer",
            "xlm-roberta",
            "xlm-roberta-xl",
        )
    },
}
"""Where two layers lack a kind of layer that the architecture cannot do without, or sizes have to fit each other."""


def architectures() -> list[str]:
    """All of transformers' types of models that have a causal language model."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """A configuration of few and narrow layers. Raises whatever the architecture raises where these sizes do not fit
    it.
    """
    config_class: Any = CONFIG_MAPPING[model_type]
    aliases = dict(getattr(config_class, "attribute_map", {}))
    known = {f.name for f in fields(config_class)} | set(aliases)
    given = {
        name: value for name, value in {**SMALL, **SPECIAL.get(model_type, {}), **changes}.items() if name in known
    }
    for alias, name in aliases.items():
        if name in given:
            given.pop(alias, None)
    return config_class(**given)


def tiny_model_of(model_type: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model with weights by `seed`, ready to run. Raises ValueError when it is larger than `LARGEST`."""
    config = tiny_config(model_type, **changes)
    with torch.device("meta"):
        size = sum(
            weight.numel()
            for weight in AutoModelForCausalLM.from_config(tiny_config(model_type, **changes)).parameters()
        )
    if size > LARGEST:
        raise ValueError(f"{size} weights")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    return model.eval()


def save_tiny(model_type: str, folder: Path, **changes: Any) -> PreTrainedModel:
    """A tiny model of an architecture, with Llama 2's kind of tokenizer, in a folder; the model as transformers loads
    it from there.
    """
    model = tiny_model_of(model_type, **changes)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(WEIGHT)
        # New models have zeros for padding, which some recurrences do not notice; models that were trained have not.
        model.get_input_embeddings().weight[0].normal_(std=0.02 * WEIGHT, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder)
    write_llama(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def engine_of(folder: Path, batch_size: int) -> TextEngine:
    """Our engine over the model in `folder`, for greedy texts of `NEW_TOKENS`."""
    run = generate_run(
        folder,
        [{"prompt": "a"}],
        task="text-generation",
        model={"path": str(folder)},
        text={"maxNewTokens": NEW_TOKENS},
        batchSize=batch_size,
    )
    return TextEngine(run.spec, folder, folder, [], Hardware("cpu", "fp32"), batch_size)


def texts(engine: TextEngine, prompts: Sequence[str]) -> list[str | None]:
    """What the engine writes, in batches as `generate` puts them together."""
    samples = [sample(prompt, row=row, settings=engine.settings) for row, prompt in enumerate(prompts)]
    made = {output.sample.row: output.text for outputs in engine.work(samples) for output in outputs}
    return [made[sample.row] for sample in samples]


def alone(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new: int) -> str:
    """What transformers writes after one prompt without padding."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    # Fresh settings: those of BART force an end at the last token.
    ends = model.generation_config.eos_token_id, tokenizer.eos_token_id
    model.generation_config = GenerationConfig(
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=sorted({e for e in ends if isinstance(e, int)}),
        pad_token_id=0,
    )
    made = model.generate(input_ids=ids)[0]
    model.generation_config.eos_token_id = ends[0]
    before, text = (tokenizer.decode(tokens, skip_special_tokens=True) for tokens in (ids[0], made))
    assert text.startswith(before)
    return text[len(before) :]
