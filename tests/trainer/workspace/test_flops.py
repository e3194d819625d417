"""Floating-point operations: the table that was published for one model, and torch's own count of others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForSequenceClassification
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from luthier_api.run import Compute
from luthier_trainer.models.compute import of_images, of_tokens
from luthier_trainer.workspace.flops import attention, per_unit

LENGTH = 64
VOCABULARY = 300
LLAMA_8B = Compute(
    multiplied=7_504_924_672,
    head=525_336_576,
    learning=7_504_924_672,
    attention_width=32 * 4096,
    length=4096,
)
GIGA = 1e9


@dataclass(frozen=True)
class PublishedCase:
    name: str
    learning: int
    recomputed: bool
    hardware: float
    model: float


# Llama-3.1-8B with rows of 4,096 tokens. LoRA's adapters are left out.
PUBLISHED = [
    PublishedCase(name="full", learning=LLAMA_8B.learning, recomputed=False, model=48.3, hardware=48.3),
    PublishedCase(name="full, recomputed", learning=LLAMA_8B.learning, recomputed=True, model=48.3, hardware=63.3),
    PublishedCase(name="LoRA", learning=0, recomputed=False, model=33.2, hardware=33.2),
    PublishedCase(name="LoRA, recomputed", learning=0, recomputed=True, model=33.2, hardware=48.3),
]


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: case.name)
def test_operations_of_a_known_model(case: PublishedCase) -> None:
    found = per_unit(LLAMA_8B.model_copy(update={"learning": case.learning}), case.recomputed)
    assert (round(found.model / GIGA, 1), round(found.hardware / GIGA, 1)) == (case.model, case.hardware)


@dataclass(frozen=True)
class WindowCase:
    name: str
    length: int
    window: int | None
    causal: bool
    tokens: float
    """That one attends to, on average over the row."""


WINDOWS = [
    WindowCase(name="no window", length=100, window=None, causal=True, tokens=50),
    WindowCase(name="a window beyond the row", length=100, window=200, causal=True, tokens=50),
    WindowCase(name="a window", length=100, window=10, causal=True, tokens=9.5),
    WindowCase(name="an encoder", length=100, window=None, causal=False, tokens=100),
    WindowCase(name="an encoder with a window", length=100, window=10, causal=False, tokens=10),
]


@pytest.mark.parametrize("case", WINDOWS, ids=lambda case: case.name)
def test_attention_in_a_window(case: WindowCase) -> None:
    compute = Compute(multiplied=0, learning=0, window_width=1, window=case.window, causal=case.causal)
    assert attention(compute, case.length) == pytest.approx(2 * case.tokens)


@dataclass(frozen=True)
class CountedCase:
    name: str
    kind: str
    config: dict[str, Any]
    causal: bool = True
    auto: Any = AutoModelForCausalLM
    options: dict[str, Any] = field(default_factory=dict)


SMALL = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = SMALL | {"num_key_value_heads": 2}
COUNTED = [
    CountedCase(name="grouped queries", kind="llama", config=GROUPED),
    CountedCase(name="shared embedding", kind="gpt2", config={"n_embd": 96, "n_layer": 2, "n_head": 4}),
    CountedCase(name="windows", kind="gemma3_text", config=GROUPED | {"num_hidden_layers": 6, "sliding_window": 16}),
    CountedCase(
        name="experts",
        kind="mixtral",
        config=GROUPED,
        options={"experts_implementation": "eager"},  # torch counts no grouped product
    ),
    CountedCase(
        name="shared experts",
        kind="qwen2_moe",
        config=GROUPED
        | {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 128, "num_experts": 8}
        | {"num_experts_per_tok": 2, "decoder_sparse_step": 1},
        options={"experts_implementation": "eager"},
    ),
    CountedCase(
        name="encoder",
        kind="bert",
        config=SMALL | {"num_hidden_layers": 6},
        causal=False,
        auto=AutoModelForSequenceClassification,
    ),
]


@pytest.mark.parametrize("case", COUNTED, ids=lambda case: case.name)
def test_operations_are_those_that_torch_counts(case: CountedCase) -> None:
    config = CONFIG_MAPPING[case.kind](vocab_size=VOCABULARY, **case.config)
    model = case.auto.from_config(config, attn_implementation="eager", **case.options)
    compute = of_tokens(model, config, LENGTH)
    assert compute.causal == case.causal
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.randint(VOCABULARY, (1, LENGTH))).logits.sum().backward()
    # Attention without a kernel computes the whole square, also of what is masked.
    square = {
        "causal": False,
        "attention_width": compute.attention_width + compute.window_width,
        "window_width": 0,
    }
    predicted = LENGTH * per_unit(compute.model_copy(update=square), recomputed=False).model
    # The formula counts all weights alike, also vectors and those of BERT's pooler, which reads one token of a row.
    assert counter.get_total_flops() == pytest.approx(predicted, rel=0.05)


def test_operations_of_images() -> None:
    config = CONFIG_MAPPING["vit"](image_size=32, patch_size=8, **SMALL)
    with torch.device("meta"):
        bare = AutoModelForImageClassification.from_config(config)
        inputs = {"pixel_values": torch.empty(1, 3, 32, 32)}
    compute = of_images(bare, inputs)
    model = AutoModelForImageClassification.from_config(config, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        model(pixel_values=torch.zeros(1, 3, 32, 32)).logits.sum().backward()
    assert counter.get_total_flops() == pytest.approx(per_unit(compute, recomputed=False).model, rel=0.05)
