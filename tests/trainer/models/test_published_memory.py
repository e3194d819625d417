"""Published figures of memory and of numbers of weights, from configurations written by hand, against ours."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from luthier_api.run import FineTuneRun
from luthier_trainer.prepare.estimate import Request, answer

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "docs"))
import memory_tables

MOST = 0.08  # of difference to a published figure, whose unit is uncertain by 2.4 %
LESS_WELL = {("mt0-xxl", "LoRA, ZeRO-3 with offload"): 0.13}
"""Cells that are planned less well, and why is not known: without dropout's masks of one byte, which a GPU has
confirmed, this one was within 0.07.
"""


@pytest.mark.slow
def test_every_cell_of_the_readme_of_peft_is_planned_as_it_was_measured() -> None:
    cells = memory_tables.all_cells()
    assert len(cells) == 9
    for cell in cells:
        if cell.published is None:
            assert cell.planned > memory_tables.A100, cell
        else:
            assert cell.planned < memory_tables.A100, cell
            assert abs(memory_tables.error(cell)) < LESS_WELL.get((cell.model, cell.trained), MOST), cell


@pytest.mark.slow
def test_the_page_has_the_tables_of_the_planner() -> None:
    """`python docs/memory_tables.py` draws them."""
    assert memory_tables.main(check=True) == 0


@dataclass(frozen=True)
class Count:
    name: str
    kind: str
    config: dict[str, Any]
    method: dict[str, Any]
    learning: int
    """Published, as `all_weights`, in which PEFT counts adapters, and copies of modules that are trained whole."""
    all_weights: int
    task: str = "causal-lm"
    notice: str = ""


COUNTS = [
    Count(
        name="LLaMA-7B, LoRA of rank 8 on q and v",
        kind="llama",
        config={
            "vocab_size": 32_000,
            "hidden_size": 4096,
            "intermediate_size": 11_008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
        method={"type": "lora", "rank": 8, "targetModules": ["q_proj", "v_proj"]},
        learning=4_194_304,
        all_weights=6_742_609_920,
    ),
    Count(
        name="mt0-large, LoRA of rank 8 on q and v",
        kind="mt5",
        config=memory_tables.T5_V1_1
        | {"vocab_size": 250_112, "d_model": 1024, "d_ff": 2816, "num_heads": 16, "tie_word_embeddings": False},
        method={"type": "lora", "rank": 8, "targetModules": ["q", "v"]},
        learning=2_359_296,
        all_weights=1_231_940_608,
        task="seq2seq",
    ),
    Count(
        name="ViT-base of Food-101, LoRA of rank 16, classifier trained whole",
        kind="vit",
        config={"num_labels": 101},
        method={"type": "lora", "rank": 16, "targetModules": ["query", "value"]},
        learning=667_493,
        all_weights=86_543_818,
        task="image-classification",
        notice="spec.method.targetModules: query is called q_proj in vit since transformers 5; these were taken",
    ),
    Count(
        name="bloomz-560m, p-tuning",
        kind="bloom",
        config={"vocab_size": 250_880, "hidden_size": 1024, "n_layer": 24, "n_head": 16},
        method={"type": "p-tuning", "virtualTokens": 20, "encoderHiddenSize": 128},
        learning=300_288,
        all_weights=559_514_880,
    ),
]


@pytest.mark.parametrize("case", COUNTS, ids=lambda case: case.name)
def test_a_plan_has_the_published_numbers_of_weights(case: Count, tmp_path: Path) -> None:
    """As `luthier plan -o json` prints it."""
    folder, scratch = tmp_path / "model", tmp_path / "scratch"
    scratch.mkdir()
    # Written as the Hub has it, because transformers corrects what a configuration says.
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": case.kind, **case.config}))
    given = {
        "task": case.task,
        "model": {"path": str(folder)},
        "dataset": {"files": ["/data"]},
        "method": case.method,
        "resources": {"gpusPerNode": 0},
    }
    run = FineTuneRun.model_validate({"name": "job", "workspace": str(tmp_path / "w"), "metricsPort": 0, "spec": given})
    found = answer(Request(run, config=None, rows=1000, classes={}), scratch)
    plan = found["plan"]
    assert plan["trainableParameters"] == case.learning
    assert plan["parameters"] + plan["trainableParameters"] == case.all_weights
    assert not case.notice or case.notice in found["notices"]
