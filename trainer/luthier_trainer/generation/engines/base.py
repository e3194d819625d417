"""What an engine of generation is: everything about one task, from its model to the lines of its outputs."""

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
    """The form in which its outputs are kept."""
    batch_size: int
    """Outputs that are computed at once."""

    @classmethod
    def load(cls, run: GenerateRun, prepared: PreparedRecord, hardware: Hardware, batch_size: int) -> Engine:
        """The engine with its model on the device. Raises Failure."""

    def problem(self, sample: Sample) -> str | None:
        """Why this sample can never be made; None when it can. Cheap: the model is not run."""

    def group(self, sample: Sample) -> Hashable:
        """Samples of one group may share a batch: then its shapes do not depend on who else is in it."""

    def make(self, samples: Sequence[Sample]) -> list[Output]:
        """The outputs of one to `batch_size` samples of one group, in their order."""
