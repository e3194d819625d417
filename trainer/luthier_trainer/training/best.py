"""Which evaluation was the best, and whether evaluations have stopped getting better.

Both follow from the history in `trainer_state.json` alone, which each checkpoint holds. An attempt that resumes
therefore knows the same as the one before, and no counter can be lost. The rules are those of transformers'
`_determine_best_metric` and `EarlyStoppingCallback`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from luthier_api.tasks import EVAL_LOSS, TrainingTask
from luthier_api.training import EarlyStopping, Training

History = Sequence[dict[str, Any]]
"""`TrainerState.log_history` of transformers."""


@dataclass(frozen=True)
class Evaluation:
    """The value of the metric after a step."""

    step: int
    value: float


@dataclass(frozen=True)
class Choice:
    """What a training does with its evaluations."""

    metric: str
    """As the status has it: evalLoss, accuracy, ..."""
    higher: bool
    """Whether more of it is better."""
    load: bool
    """Whether the weights of the best evaluation are delivered."""
    stopping: EarlyStopping | None

    @classmethod
    def of(cls, training: Training, task: TrainingTask) -> Choice | None:
        """Return what `training` asks for; None if it compares no evaluations."""
        if not training.load_best_model and training.early_stopping is None:
            return None
        metric = training.metric or EVAL_LOSS
        better = {own.name: own.better for own in task.metrics}.get(metric, "lower")
        return cls(metric, better == "higher", training.load_best_model, training.early_stopping)

    @property
    def key(self) -> str:
        """Return the name of the metric in the history."""
        return "eval_loss" if self.metric == EVAL_LOSS else f"eval_{self.metric}"

    def evaluations(self, history: History) -> list[Evaluation]:
        """Return the evaluations of trained weights, in order. The one before the first step is none of them."""
        return [
            Evaluation(entry["step"], entry[self.key]) for entry in history if entry["step"] > 0 and self.key in entry
        ]

    def best(self, evaluations: Iterable[Evaluation]) -> Evaluation | None:
        """Return the best evaluation, the first of equal ones; None if there is none."""
        found = None
        for evaluation in evaluations:
            if found is None or self._is_better(evaluation.value, found.value):
                found = evaluation
        return found

    def without_improvement(self, history: History) -> int:
        """Return how many of the latest evaluations in a row were not better than all before by the threshold."""
        assert self.stopping is not None
        in_a_row, best = 0, None
        for evaluation in self.evaluations(history):
            value = evaluation.value
            better = best is None or self._is_better(value, best)
            improved = better and (best is None or abs(value - best) > self.stopping.threshold)
            in_a_row = 0 if improved else in_a_row + 1
            best = value if better else best
        return in_a_row

    def has_stopped(self, history: History) -> bool:
        """Return whether the training ends early after this history."""
        return self.stopping is not None and self.without_improvement(history) >= self.stopping.patience

    def why_stopped(self, history: History, steps: int) -> str:
        """Return the sentence for the status of a training, planned for `steps` steps, that has ended early."""
        assert self.stopping is not None
        evaluations = self.evaluations(history)
        best = self.best(evaluations)
        assert best is not None
        by = f" by more than {self.stopping.threshold:g}" if self.stopping.threshold else ""
        return (
            f"spec.training.earlyStopping: stopped early at step {evaluations[-1].step} of {steps}: {self.key} has not"
            f" improved{by} for {self.stopping.patience} evaluations (best {best.value:.6g} at step {best.step})"
        )

    def why_chosen(self, chosen: Evaluation, history: History) -> str:
        """Return the sentence for the status that names the weights which are delivered."""
        text = (
            f"spec.training.loadBestModel: the result has the weights of step {chosen.step}, with {self.metric}"
            f" {chosen.value:.6g}"
        )
        last = self.evaluations(history)[-1]
        if last.step != chosen.step:
            text += f"; at the end, step {last.step}, it was {last.value:.6g}"
        before = next((entry[self.key] for entry in history if entry["step"] == 0 and self.key in entry), None)
        if before is not None and self._is_better(before, chosen.value):
            text += f". Before the training it was better, {before:.6g}"
        return text

    def _is_better(self, value: float, other: float) -> bool:
        return value > other if self.higher else value < other
