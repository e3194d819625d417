"""zero-shot-classification: which labels of the job suit a text, by a model of natural language inference.

For each label the model reads the text and a sentence with the label, and says whether the one entails the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from luthier_api.exitcodes import ExitCode
from luthier_api.generate import GenerateJobSpec
from luthier_trainer.generation.engines.answering import AnsweringEngine
from luthier_trainer.generation.engines.reading import Piece, Read
from luthier_trainer.generation.records import ValueRecords, keys_of
from luthier_trainer.generation.samples import Sample
from luthier_trainer.runtime.failure import Failure

VALUES = ("label", "labels", "scores")


class ZeroShotEngine(AnsweringEngine):
    """Reads texts, and writes the scores of the labels of the job."""

    records: ClassVar[ValueRecords] = ValueRecords(
        keys=keys_of("zero-shot-classification", VALUES, ("tokens", "truncated")), values=VALUES
    )

    @classmethod
    def check(
        cls, spec: GenerateJobSpec, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, field: str
    ) -> None:
        """Check that a label of the model is entailment. Raises Failure if none is."""
        if config.num_labels < 2 or entailment(config) is None:
            names = ", ".join(list(config.id2label.values())[:5])
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{field}: none of its labels ({names}) is entailment; choose a model of"
                " natural language inference (MNLI), or name its labels under id2label in its config.json",
            )

    def read(self, sample: Sample) -> Read:
        settings = self.spec.zero_shot
        assert settings.labels is not None, "the API requires them"
        read = [self.whole_text(sample.cells["text"], settings.hypothesis.format(name)) for name in settings.labels]
        if problem := next((one.problem for one in read if one.problem), None):
            return Read([], problem=problem)
        facts = {
            "tokens": max(one.facts["tokens"] for one in read),
            "truncated": any(one.facts["truncated"] for one in read),
        }
        return Read([one.pieces[0] for one in read], facts)

    def answers(self, outputs: Any, pieces: Sequence[Piece]) -> Sequence[torch.Tensor]:
        return list(outputs.logits.float().cpu())  # [labels of the model] each

    def values(self, sample: Sample, pieces: Sequence[Piece], answers: Sequence[torch.Tensor]) -> dict[str, Any]:
        settings, logits = self.spec.zero_shot, torch.stack(list(answers))  # [labels of the job, labels of the model]
        yes = entailment(self.model.config)
        assert yes is not None, "`check` has seen to it"
        assert settings.labels is not None, "the API requires them"
        if settings.multi_label or len(logits) == 1:
            no = -1 if yes == 0 else 0  # the contradiction, where transformers looks for it
            scores = logits[:, [no, yes]].softmax(-1)[:, 1].tolist()
        else:
            scores = logits[:, yes].softmax(-1).tolist()
        ranked = sorted(zip(settings.labels, scores, strict=True), key=lambda one: -one[1])
        several = settings.multi_label
        return {
            "label": None if several else ranked[0][0],
            "labels": [name for name, score in ranked if score >= settings.threshold] if several else None,
            "scores": [{"label": name, "score": score} for name, score in ranked],
        }


def entailment(config: Any) -> int | None:
    """Return the model's label for a text that entails the sentence after it; None if there is none."""
    return next((number for number, name in config.id2label.items() if name.lower().startswith("entail")), None)
