"""The figures of a finished run, from its history."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
from transformers import TrainerState

from luthier_trainer.training.result import PADDING, final_metrics

NAN, INF = math.nan, math.inf


@dataclass(frozen=True)
class Case:
    name: str
    history: list[dict[str, Any]]
    metrics: dict[str, float]


HISTORIES = [
    Case(
        name="reports are weighed by their steps",
        history=[{"step": 1, "loss": 4.0}, {"step": 4, "loss": 2.0}],
        metrics={"trainLoss": 2.5, "lastLoss": 2.0},
    ),
    Case(
        name="a report that was no number",
        history=[{"step": 1, "loss": 4.0}, {"step": 3, "loss": NAN}, {"step": 4, "loss": 2.0}],
        metrics={"trainLoss": 3.0, "lastLoss": 2.0},
    ),
    Case(
        name="padding, also of earlier attempts",
        history=[{"step": 2, "loss": 4.0, PADDING: 2.0}, {"step": 4, "loss": 2.0, PADDING: 4.0}],
        metrics={"trainLoss": 3.0, "lastLoss": 2.0, "paddingShare": 0.375},
    ),
    Case(
        name="nothing but those",
        history=[{"step": 1, "loss": NAN}],
        metrics={},
    ),
    Case(
        name="an evaluation that was none",
        history=[
            {"step": 0, "eval_loss": 3.0},
            {"step": 1, "loss": 1.0},
            {"step": 1, "eval_loss": INF, "eval_perplexity": INF},
        ],
        metrics={"trainLoss": 1.0, "lastLoss": 1.0, "evalLossBefore": 3.0},
    ),
]


@pytest.mark.parametrize("case", HISTORIES, ids=lambda case: case.name)
def test_only_finite_figures(case: Case) -> None:
    state = TrainerState(global_step=4, num_input_tokens_seen=10, log_history=case.history)
    assert (
        final_metrics(state, 2.0, ["perplexity"])
        == {
            "steps": 4.0,
            "tokens": 10.0,
            "paddingShare": 0.0,
            "seconds": 2.0,
        }
        | case.metrics
    )
