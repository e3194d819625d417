"""token-classification: the entities in each text, with their positions.

The labels of tokens become entities by the rules of the pipeline of transformers, which are called and not repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel, TokenClassificationPipeline
from transformers.pipelines.token_classification import AggregationStrategy

from luthier_api.generate import GenerateJobSpec
from luthier_trainer.generation.engines.answering import AnsweringEngine
from luthier_trainer.generation.engines.reading import Piece, Read
from luthier_trainer.generation.records import ValueRecords, keys_of
from luthier_trainer.generation.samples import Sample

VALUES = ("entities",)


class TokenEngine(AnsweringEngine):
    """Reads texts, and writes the entities in them."""

    records: ClassVar[ValueRecords] = ValueRecords(
        keys=keys_of("token-classification", VALUES, ("tokens", "truncated")), values=VALUES
    )
    needs_positions: ClassVar[bool] = True

    def __init__(self, spec: GenerateJobSpec, model: PreTrainedModel, processor: Path, batch_size: int) -> None:
        super().__init__(spec, model, processor, batch_size)
        # A model with a map of devices, which a quantised one has, takes no other.
        device = None if getattr(model, "hf_device_map", None) else model.device
        self.pipeline = TokenClassificationPipeline(model=model, tokenizer=self.tokenizer, device=device)

    def text_of(self, sample: Sample) -> str | None:
        divided = self.spec.entities.stride is not None and self.limit is not None
        return None if divided else str(sample.cells["text"])

    def read(self, sample: Sample) -> Read:
        text, stride = sample.cells["text"], self.spec.entities.stride
        if stride is None or self.limit is None:
            return self.whole_text(text)
        encoding = self.tokenizer(
            text,
            truncation=True,
            max_length=self.limit,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        parts = [
            {name: values[i] for name, values in encoding.items() if name != "overflow_to_sample_mapping"}
            for i in range(len(encoding["input_ids"]))
        ]
        tokens = len(self.tokenizer(text, verbose=False)["input_ids"])
        pieces = [Piece(self.model_inputs(part), {"encoding": part}) for part in parts]
        return Read(pieces, {"tokens": tokens, "truncated": False})

    def answers(self, outputs: Any, pieces: Sequence[Piece]) -> Sequence[torch.Tensor]:
        logits = outputs.logits.float().cpu()  # [pieces, length, labels]
        return [one[: piece.length] for one, piece in zip(logits, pieces, strict=True)]

    def values(self, sample: Sample, pieces: Sequence[Piece], answers: Sequence[torch.Tensor]) -> dict[str, Any]:
        text = sample.cells["text"]
        parts = [self._part(text, piece, logits) for piece, logits in zip(pieces, answers, strict=True)]
        found = self.pipeline.postprocess(parts, AggregationStrategy(self.spec.entities.aggregation))
        return {
            "entities": [
                {
                    "label": entity["entity_group"] if "entity_group" in entity else entity["entity"],
                    "score": float(entity["score"]),
                    "word": entity["word"],
                    "start": int(entity["start"]),
                    "end": int(entity["end"]),
                }
                for entity in found
            ]
        }

    def _part(self, text: str, piece: Piece, logits: torch.Tensor) -> dict[str, Any]:
        """Return what the pipeline of transformers has of a piece after the model has read it."""
        ids = list(piece.inputs["input_ids"])
        special = self.tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)
        return {
            "logits": logits[None],
            "sentence": text,
            "input_ids": torch.tensor([ids]),
            "offset_mapping": torch.tensor([piece.about["encoding"]["offset_mapping"]]),
            "special_tokens_mask": torch.tensor([special]),
        }
