"""What the engines have in common that look at images: a model with its image processor, and images as tensors.

An output has the same bits whatever its neighbours are: each image is processed alone, and all batches have one number
of images. The images of a batch are read and processed while the model computes the batch before it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Self

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from luthier_api.generate import GenerateJobSpec
from luthier_api.run import GenerateRun, PreparedRecord
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.generation.batching import needs_to_be_alone
from luthier_trainer.generation.engines.base import batches, read_ahead
from luthier_trainer.generation.hardware import Hardware
from luthier_trainer.generation.loading import load_with_adapters
from luthier_trainer.generation.pictures import Pictures
from luthier_trainer.generation.samples import Output, Sample, padded
from luthier_trainer.generation.writing import at_the_same_time
from luthier_trainer.models.processors import read_image_processor
from luthier_trainer.tasks import images

PROCESSOR = "processor"
"""Folder of the image processor in what `prepare` leaves."""


class LookingEngine(ABC):
    """Looks at images, `batch_size` at a time."""

    window_rows: ClassVar[int] = 0

    @classmethod
    def prepare(
        cls, spec: GenerateJobSpec, config: PreTrainedConfig, source: Path, field: str, folder: WorkspaceFolder
    ) -> None:
        """Check in `prepare` that the model suits the job, and save its image processor, which is in `source`.

        Raises Failure if it does not.
        """
        processor = read_image_processor(source, field)
        cls.check_pixels(config, images.shape_of(processor), spec.task)
        processor.save_pretrained(folder.prepared / PROCESSOR)

    @classmethod
    def check_pixels(cls, config: PreTrainedConfig, shape: tuple[int, ...], task: str) -> None:
        """Check that the model takes images of this shape, [channels, height, width]. Raises Failure if not."""
        images.check_pixels(config, shape, task)

    @classmethod
    def load(cls, run: GenerateRun, prepared: PreparedRecord, hardware: Hardware, batch_size: int) -> Self:
        """Return the engine with its model on the device. Raises Failure if it or an adapter cannot be loaded."""
        model = load_with_adapters(
            run.spec, Path(prepared.model_path), [Path(path) for path in prepared.adapter_paths], hardware
        )
        return cls(run.spec, model, WorkspaceFolder(Path(run.workspace)), batch_size)

    def __init__(self, spec: GenerateJobSpec, model: PreTrainedModel, folder: WorkspaceFolder, batch_size: int) -> None:
        self.spec, self.model = spec, model
        self.batch_size = 1 if needs_to_be_alone(model) else batch_size
        self.processor = read_image_processor(folder.prepared / PROCESSOR, "spec.model")
        self.pictures = Pictures(folder)

    @abstractmethod
    def look(self, samples: Sequence[Sample], pixels: torch.Tensor) -> list[Output]:
        """Return the outputs of 1 to `batch_size` samples of one group.

        `pixels`: [batch_size, channels, height, width], of which the first are those of the samples.
        """

    def expect(self, samples: Sequence[Sample]) -> None:  # noqa: B027 (there is nothing to do)
        """Do nothing: images are read a batch before they are looked at."""

    def problem(self, sample: Sample) -> str | None:
        """Return None: `prepare` has read all images."""
        return None

    def group(self, sample: Sample) -> Hashable:
        """Return the settings of a sample."""
        return sample.variant

    def work(self, samples: Sequence[Sample]) -> Iterator[list[Output]]:
        """Yield the outputs of all samples, a batch at a time."""
        parts = list(batches(samples, self.group, self.batch_size))
        for part, pixels in read_ahead(parts, self.pixels):
            yield self.look(part, pixels.to(self.model.device, self.model.dtype))

    def pixels(self, samples: Sequence[Sample]) -> torch.Tensor:
        """Return what the model reads of images, filled up to a batch: [batch_size, channels, height, width]."""
        made = at_the_same_time(self._pixels_of, [sample.cells["image"] for sample in samples])
        return torch.stack(padded(made, self.batch_size))

    def _pixels_of(self, name: str) -> torch.Tensor:
        pixels: torch.Tensor = self.processor(images=[self.pictures.opened(name)], return_tensors="pt")["pixel_values"]
        return pixels[0]
