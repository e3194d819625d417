"""The figures of a finished run, from its history."""

from __future__ import annotations

import math
from typing import Any

import pytest
from transformers import TrainerState

from luthier_trainer.training.result import final_metrics

NAN, INF = math.nan, math.inf
HISTORIES: list[tuple[str, list[dict[str, Any]], dict[str, float]]] = [
    # name, history, figures
    (
        "reports are weighed by their steps",
        [{"step": 1, "loss": 4.0}, {"step": 4, "loss": 2.0}],
        {"trainLoss": 2.5, "lastLoss": 2.0},
    ),
    (
        "a report that was no number",
        [{"step": 1, "loss": 4.0}, {"step": 3, "loss": NAN}, {"step": 4, "loss": 2.0}],
        {"trainLoss": 3.0, "lastLoss": 2.0},
    ),
    ("nothing but those", [{"step": 1, "loss": NAN}], {}),
    (
        "an evaluation that was none",
        [
            {"step": 0, "eval_loss": 3.0},
            {"step": 1, "loss": 1.0},
            {"step": 1, "eval_loss": INF, "eval_perplexity": INF},
        ],
        {"trainLoss": 1.0, "lastLoss": 1.0, "evalLossBefore": 3.0},
    ),
]


@pytest.mark.parametrize(("name", "history", "figures"), HISTORIES, ids=[h[0] for h in HISTORIES])
def test_only_finite_figures(name: str, history: list[dict[str, Any]], figures: dict[str, float]) -> None:
    state = TrainerState(global_step=4, num_input_tokens_seen=10, log_history=history)
    assert final_metrics(state, 2.0) == {"steps": 4.0, "tokens": 10.0, "seconds": 2.0} | figures
