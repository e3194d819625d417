"""What the engines have in common that answer with one pass of a model over the texts that they read."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from luthier_trainer.generation.engines.reading import Piece, ReadingEngine
from luthier_trainer.generation.samples import Output, Sample


class AnsweringEngine(ReadingEngine):
    """Answers to texts, `batch_size` pieces at a time."""

    @abstractmethod
    def answers(self, outputs: Any, pieces: Sequence[Piece]) -> Sequence[torch.Tensor]:
        """Return for each piece what the task needs of the outputs of the model, without what belongs to padding."""

    @abstractmethod
    def values(self, sample: Sample, pieces: Sequence[Piece], answers: Sequence[torch.Tensor]) -> dict[str, Any]:
        """Return the values of a sample's line. `answers`: one for each of `pieces`, fp32 on the CPU."""

    def make(self, samples: Sequence[Sample]) -> list[Output]:
        """Return the outputs of samples of one group, in the same order."""
        read = [self.read_once(sample) for sample in samples]
        length = self.group(samples[0])
        assert isinstance(length, int)
        every = [piece for one in read for piece in one.pieces]
        answers = iter(self.answered(every, length))
        outputs = []
        for sample, one in zip(samples, read, strict=True):
            values = self.values(sample, one.pieces, [next(answers) for _ in one.pieces])
            outputs.append(Output(sample, dict(one.facts), values=values))
            del self.found[sample.key]
        return outputs

    def answered(self, pieces: Sequence[Piece], length: int) -> Iterator[torch.Tensor]:
        """Yield the answer of the model to each piece, computed in batches of one shape [batch_size, length]."""
        for first in range(0, len(pieces), self.batch_size):
            batch = pieces[first : first + self.batch_size]
            answers = self.forward([*batch, *[batch[0]] * (self.batch_size - len(batch))], length)
            yield from answers[: len(batch)]

    @torch.inference_mode()
    def forward(self, pieces: Sequence[Piece], length: int) -> Sequence[torch.Tensor]:
        return self.answers(self.model(**self.batch(pieces, length)), pieces)
