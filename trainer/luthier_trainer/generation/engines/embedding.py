"""feature-extraction: a vector for each text, of the last hidden states of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy
import torch

from luthier_trainer.generation.engines.answering import AnsweringEngine
from luthier_trainer.generation.engines.reading import Piece, Read
from luthier_trainer.generation.records import ValueRecords, keys_of
from luthier_trainer.generation.samples import Sample

VALUES = ("embedding",)


class EmbeddingEngine(AnsweringEngine):
    """Reads texts, and writes a vector for each."""

    records: ClassVar[ValueRecords] = ValueRecords(
        keys=keys_of("feature-extraction", VALUES, ("tokens", "truncated")), values=VALUES
    )

    def text_of(self, sample: Sample) -> str:
        return str(sample.cells["text"])

    def read(self, sample: Sample) -> Read:
        return self.whole_text(self.text_of(sample))

    def answers(self, outputs: Any, pieces: Sequence[Piece]) -> Sequence[torch.Tensor]:
        states = outputs.last_hidden_state.float().cpu()  # [pieces, length, width]
        return [self._pooled(one[: piece.length]) for one, piece in zip(states, pieces, strict=True)]

    def _pooled(self, states: torch.Tensor) -> torch.Tensor:
        """Return the vector [width] of a text with the hidden states [tokens, width]."""
        pooling = self.spec.embedding.pooling
        if pooling == "mean":
            return states.mean(0)
        return states[{"cls": 0, "last": -1}[pooling]]

    def values(self, sample: Sample, pieces: Sequence[Piece], answers: Sequence[torch.Tensor]) -> dict[str, Any]:
        vector = torch.nn.functional.normalize(answers[0], dim=0) if self.spec.embedding.normalize else answers[0]
        # The shortest decimals that are these numbers in fp32: half as long as those of the same numbers in fp64.
        return {"embedding": [float(str(number)) for number in vector.numpy().astype(numpy.float32)]}
