"""text-classification: the scores of a model's labels for each text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from luthier_trainer.generation.engines.answering import AnsweringEngine
from luthier_trainer.generation.engines.reading import Piece, Read
from luthier_trainer.generation.records import ValueRecords, keys_of
from luthier_trainer.generation.samples import Sample

VALUES = ("label", "labels", "scores")


class ClassificationEngine(AnsweringEngine):
    """Reads texts, and writes the scores of their labels."""

    records: ClassVar[ValueRecords] = ValueRecords(
        keys=keys_of("text-classification", VALUES, ("tokens", "truncated")), values=VALUES
    )

    def text_of(self, sample: Sample) -> str:
        return str(sample.cells["text"])

    def read(self, sample: Sample) -> Read:
        return self.whole_text(self.text_of(sample))

    def answers(self, outputs: Any, pieces: Sequence[Piece]) -> Sequence[torch.Tensor]:
        return list(outputs.logits.float().cpu())  # [labels] each

    def values(self, sample: Sample, pieces: Sequence[Piece], answers: Sequence[torch.Tensor]) -> dict[str, Any]:
        return label_values(answers[0], self.model.config, self.spec.classify.top_k, self.spec.classify.threshold)


def label_values(logits: torch.Tensor, config: Any, top_k: int | None, threshold: float) -> dict[str, Any]:
    """Return the label or labels of a row, and the scores of the `top_k` first labels, highest first.

    `logits`: [labels]. What a score is follows from the model's configuration, as in the pipeline of transformers: a
    number as it is for regressions, the sigmoid where a row has any number of labels, or else the softmax over them.
    """
    several, number = (config.problem_type == kind for kind in ("multi_label_classification", "regression"))
    scores = scores_of(logits, config)
    ranked = sorted(range(len(scores)), key=lambda i: -scores[i])
    names: Mapping[int, str] = config.id2label
    return {
        "label": None if several or number else names[ranked[0]],
        "labels": [names[i] for i in ranked if scores[i] >= threshold] if several else None,
        "scores": [{"label": names[i], "score": scores[i]} for i in ranked[:top_k]],
    }


def scores_of(logits: torch.Tensor, config: Any) -> list[float]:
    """Return the score of each label."""
    if config.problem_type == "regression":
        scores = logits
    elif config.problem_type == "multi_label_classification" or len(logits) == 1:
        scores = logits.sigmoid()
    else:
        scores = logits.softmax(-1)
    found: list[float] = scores.tolist()
    return found
