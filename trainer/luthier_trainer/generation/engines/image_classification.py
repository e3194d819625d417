"""image-classification: the scores of a model's labels for each image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from luthier_trainer.generation.engines.classification import VALUES, label_values
from luthier_trainer.generation.engines.looking import LookingEngine
from luthier_trainer.generation.records import ValueRecords, keys_of
from luthier_trainer.generation.samples import Output, Sample


class ImageClassificationEngine(LookingEngine):
    """Looks at images, and writes the scores of their labels."""

    records: ClassVar[ValueRecords] = ValueRecords(keys=keys_of("image-classification", VALUES), values=VALUES)

    @torch.inference_mode()
    def look(self, samples: Sequence[Sample], pixels: torch.Tensor) -> list[Output]:
        logits = self.model(pixel_values=pixels).logits.float().cpu()  # [batch_size, labels]
        settings = self.spec.classify
        return [
            Output(sample, values=label_values(of_image, self.model.config, settings.top_k, settings.threshold))
            for sample, of_image in zip(samples, logits[: len(samples)], strict=True)
        ]
