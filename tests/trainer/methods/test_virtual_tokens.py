"""Which architectures work with virtual tokens, and what `prepare` says of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from cases.methods import method_of
from transformers import BertConfig, GPT2Config, LlamaConfig, PreTrainedConfig, Qwen2Config

from luthier_trainer.methods import virtual_tokens
from luthier_trainer.runtime.failure import Failure

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
LLAMA = LlamaConfig(num_key_value_heads=2, **SIZES)
BERT = BertConfig(**SIZES)


@dataclass(frozen=True)
class Case:
    name: str
    config: PreTrainedConfig
    task: str
    method: str
    refused: str = ""
    max_length: int = 32


CASES = [
    *(
        Case(name=f"{method}: {config.model_type}", config=config, task="causal-lm", method=method)
        for method in ("prompt", "p-tuning", "prefix")
        for config in (
            LLAMA,
            Qwen2Config(num_key_value_heads=2, **SIZES),
            GPT2Config(vocab_size=64, n_embd=32, n_head=4, n_layer=2),
        )
    ),
    Case(name="prompt: bert classifies", config=BERT, task="text-classification", method="prompt"),
    Case(
        name="prompt: a decoder would answer at the padding",
        config=LLAMA,
        task="text-classification",
        method="prompt",
        refused="spec.method.type: prompt does not work with llama for text-classification: what it answers to a text"
        " depends on the padding after it",
    ),
    Case(
        name="positions",
        config=LLAMA,
        task="causal-lm",
        method="p-tuning",
        refused="spec.method.virtualTokens: 20 virtual tokens and training.maxLength: 45 do not fit: the model has 64"
        " positions (max_position_embeddings); set maxLength to at most 44, or fewer virtual tokens",
        max_length=45,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_architectures(case: Case) -> None:
    method = method_of(type=case.method)
    if not case.refused:
        virtual_tokens.check(case.config, case.task, method, case.max_length)
        return
    with pytest.raises(Failure) as failure:
        virtual_tokens.check(case.config, case.task, method, case.max_length)
    assert failure.value.message.startswith(case.refused)
