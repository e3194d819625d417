"""What classifiers predict, and how much each class counts: the block `classification`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from luthier_api.base import ApiModel, Rule
from luthier_api.marks import For, by_table

Problem = Literal["single", "multi-label", "regression"]


@dataclass(frozen=True)
class ProblemInfo:
    """A kind of answer for a whole text."""

    problem_type: str
    """transformers' name of it, in the configuration of the result."""
    metrics: tuple[str, ...]
    """Those metrics of the task that an evaluation tells."""
    better: tuple[str, ...]
    """Those of them that rate the model."""


PROBLEMS: Mapping[str, ProblemInfo] = {
    "single": ProblemInfo(
        problem_type="single_label_classification",
        metrics=("accuracy", "f1Macro", "majorityShare"),
        better=("accuracy", "f1Macro"),
    ),
    "multi-label": ProblemInfo(
        problem_type="multi_label_classification",
        metrics=("accuracy", "f1Micro", "f1Macro"),
        better=("accuracy", "f1Micro", "f1Macro"),
    ),
    "regression": ProblemInfo(
        problem_type="regression",
        metrics=("mse", "mae", "pearson"),
        better=("mse", "mae", "pearson"),
    ),
}
SINGLE = "!has(self{0}.problem) || self{0}.problem == 'single'"
"""CEL: each row has one class."""
Weights = Annotated[dict[str, Annotated[float, Field(gt=0, le=1000)]], Field(min_length=1, max_length=256)]


class Classification(ApiModel):
    """What a classifier predicts, and how much each class counts."""

    problem: Annotated[Problem, For("task")] = by_table()
    """What is predicted of a row. single: one of several classes. multi-label: any number of classes; the column label
    holds a list of names, which may be empty. regression: a number.
    """
    balanced: bool = False
    """Let each class count alike in the loss, however many rows it has: a row counts rows / (classes × rows of its
    class). The status shows the weights. evalLoss counts each row alike.
    """
    class_weights: Weights | None = None
    """How much a row counts in the loss, by its class; 1 for classes that are not named. evalLoss counts rows alike."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!self.balanced || !has(self.classWeights)",
            "classification: balanced computes the weights that classWeights would name; remove one of them",
        ),
        Rule(
            f"{SINGLE.format('')} || !self.balanced && !has(self.classWeights)",
            "classification.problem: classes are weighted where each row has one; remove balanced and classWeights, or"
            " use problem: single",
        ),
    )


def of_problems() -> Iterator[Rule]:
    """Yield the rules between the problem of a text-classification and other blocks of the spec."""
    single = f"!has(self.classification) || {SINGLE.format('.classification')}"
    for field, unused in (
        ("training.labelSmoothing", "!has(self.training.labelSmoothing)"),
        ("dataset.mergeLabels", "!has(self.dataset.mergeLabels) || !self.dataset.mergeLabels"),
    ):
        yield Rule(
            f"{single} || {unused}",
            f"spec.{field}: belongs to rows with one class each; remove it, or use problem: single",
        )
    is_problem = {
        name: f"has(self.classification) && has(self.classification.problem) && self.classification.problem == '{name}'"
        for name in PROBLEMS
    }
    is_problem["single"] = f"({single})"
    for name, problem in PROBLEMS.items():
        metrics = ["evalLoss", *problem.better]
        yield Rule(
            "self.task != 'text-classification' || !has(self.training.metric) ||"
            f" !({is_problem[name]}) || self.training.metric in {metrics}",
            f"spec.training.metric: classification.problem {name} has {', '.join(metrics)}; choose one of these",
        )
