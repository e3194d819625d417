"""fill-mask: the likeliest tokens for each mask in a text."""

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

VALUES = ("filled", "tokens")


class MaskEngine(AnsweringEngine):
    """Reads texts with masks, and writes what may stand there."""

    records: ClassVar[ValueRecords] = ValueRecords(keys=keys_of("fill-mask", VALUES), values=VALUES)

    @classmethod
    def check(
        cls, spec: GenerateJobSpec, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, field: str
    ) -> None:
        """Check that the tokenizer has a mask. Raises Failure if not."""
        if tokenizer.mask_token_id is None:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{field}: its tokenizer ({type(tokenizer).__name__}) has no token for a mask; choose a model that was"
                " trained with masked tokens",
            )

    def text_of(self, sample: Sample) -> str:
        return str(sample.cells["text"])

    def read(self, sample: Sample) -> Read:
        read = self.whole_text(self.text_of(sample))
        if read.problem:
            return read
        mask = self.tokenizer.mask_token
        if self.tokenizer.mask_token_id not in read.pieces[0].inputs["input_ids"]:
            return Read([], problem=f"text: {mask} does not stand in it; write it where the model shall fill in a word")
        return Read(read.pieces)

    def answers(self, outputs: Any, pieces: Sequence[Piece]) -> Sequence[torch.Tensor]:
        return [self._at_masks(logits, piece) for logits, piece in zip(outputs.logits, pieces, strict=True)]

    def _at_masks(self, logits: torch.Tensor, piece: Piece) -> torch.Tensor:
        """Return the logits [masks, vocabulary] of the masks of a text, or of its first token if it has none."""
        ids = list(piece.inputs["input_ids"])
        at = [i for i, token in enumerate(ids) if token == self.tokenizer.mask_token_id] or [0]
        return logits[at].float().cpu()

    def values(self, sample: Sample, pieces: Sequence[Piece], answers: Sequence[torch.Tensor]) -> dict[str, Any]:
        scores, tokens = answers[0].softmax(-1).topk(min(self.spec.mask.top_k, answers[0].shape[-1]))
        found = [
            {"mask": mask, "token": self.tokenizer.decode([token]), "id": token, "score": score}
            for mask in range(len(scores))
            for token, score in zip(tokens[mask].tolist(), scores[mask].tolist(), strict=True)
        ]
        best = iter(tokens[:, 0].tolist())
        ids = [
            next(best) if token == self.tokenizer.mask_token_id else token for token in pieces[0].inputs["input_ids"]
        ]
        filled = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return {"filled": filled, "tokens": found}
