"""Published figures of memory and of numbers of weights, from configurations written by hand, against ours."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from luthier_api.method import Method
from luthier_trainer.methods.apply import with_method
from luthier_trainer.models.heads import heads_of
from luthier_trainer.training.utilisation import count_weights

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "docs"))
import memory_tables

MOST = 0.08  # of difference to a published figure, whose unit is uncertain by 2.4 %
LESS_WELL = {("mt0-xxl", "LoRA, ZeRO-3 with offload"): 0.13}
"""Cells that are planned less well, and why is not known: without dropout's masks of one byte, which a GPU has
confirmed, this one was within 0.07.
"""


def test_every_cell_of_the_readme_of_peft_is_planned_as_it_was_measured() -> None:
    cells = memory_tables.all_cells()
    assert len(cells) == 9
    for cell in cells:
        if cell.published is None:
            assert cell.planned > memory_tables.A100, cell
        else:
            assert cell.planned < memory_tables.A100, cell
            assert abs(memory_tables.error(cell)) < LESS_WELL.get((cell.model, cell.trained), MOST), cell


def test_the_page_has_the_tables_of_the_planner() -> None:
    """`python docs/memory_tables.py` draws them."""
    assert memory_tables.main(check=True) == 0


@dataclass(frozen=True)
class Count:
    name: str
    kind: str
    auto: str
    config: dict[str, Any]
    all_weights: int
    learning: int = 0
    """0: no method is applied."""
    method: dict[str, Any] = field(default_factory=dict)
    task: str = "causal-lm"


COUNTS = [
    Count(
        name="mt0-large, LoRA of rank 8",
        kind="mt5",
        auto="Seq2SeqLM",
        config=memory_tables.T5_V1_1 | {"vocab_size": 250_112, "d_model": 1024, "d_ff": 2816, "num_heads": 16},
        method={"rank": 8, "targetModules": ["q", "v"]},
        learning=2_359_296,
        all_weights=1_231_940_608,
    ),
    Count(
        name="LLaMA-7B, LoRA of rank 8 on q and v",
        kind="llama",
        auto="CausalLM",
        config={
            "vocab_size": 32_000,
            "hidden_size": 4096,
            "intermediate_size": 11_008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
        method={"rank": 8, "targetModules": ["q_proj", "v_proj"]},
        learning=4_194_304,
        all_weights=6_742_609_920,
    ),
    Count(
        name="ViT-base of Food-101, LoRA of rank 16, classifier trained whole",
        kind="vit",
        auto="ImageClassification",
        config={"num_labels": 101},
        method={"rank": 16, "targetModules": ["query", "value"]},
        learning=667_493,
        all_weights=86_543_818,
        task="image-classification",
    ),
    # Published with p-tuning, whose 300,288 weights come on top: Luthier does not have this method.
    Count(
        name="bloomz-560m",
        kind="bloom",
        auto="CausalLM",
        config={"vocab_size": 250_880, "hidden_size": 1024, "n_layer": 24, "n_head": 16},
        all_weights=559_514_880 - 300_288,
    ),
]


@pytest.mark.parametrize("case", COUNTS, ids=lambda case: case.name)
def test_published_numbers_of_weights_are_exact(case: Count) -> None:
    model = memory_tables.skeleton(case.kind, case.auto, case.config)
    if case.method:
        names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        targets = case.method["targetModules"]
        # transformers 5 calls ViT's q_proj and v_proj so; PEFT's example is older.
        given = [target if target in names else f"{target[0]}_proj" for target in targets]
        method = memory_tables.spec_of({"type": "lora", **case.method, "targetModules": given}).method
        assert isinstance(method, Method)
        with torch.device("meta"):
            model = with_method(model, method, None, heads_of(model, case.task), deepspeed=False)
        assert count_weights(model.parameters()) == (case.learning, case.all_weights)
    else:
        assert isinstance(model, transformers.PreTrainedModel)
        assert sum(weight.numel() for weight in model.parameters()) == case.all_weights
