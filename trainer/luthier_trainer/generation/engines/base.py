"""The protocol of an engine of generation, which covers one task from its model to the lines of its outputs."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import ClassVar, Protocol

from luthier_api.run import GenerateRun, PreparedRecord
from luthier_trainer.generation.hardware import Hardware
from luthier_trainer.generation.records import RecordForm
from luthier_trainer.generation.samples import Output, Sample


class Engine(Protocol):
    """Makes the outputs of one task, in batches of one size."""

    records: ClassVar[RecordForm]
    """The form in which its outputs are stored."""
    batch_size: int
    """Number of outputs that are computed together."""

    @classmethod
    def load(cls, run: GenerateRun, prepared: PreparedRecord, hardware: Hardware, batch_size: int) -> Engine:
        """Return the engine with its model on the device. Raises Failure if it or an adapter cannot be loaded."""

    def problem(self, sample: Sample) -> str | None:
        """Return why this sample can never be made; None if it can. This does not run the model, so it is fast."""

    def group(self, sample: Sample) -> Hashable:
        """Return the group of a sample. Samples of one group may share a batch; its batches have one shape."""

    def make(self, samples: Sequence[Sample]) -> list[Output]:
        """Return the outputs of 1 to `batch_size` samples of one group, in the same order."""
