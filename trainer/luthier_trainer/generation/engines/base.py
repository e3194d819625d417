"""The protocol of an engine of generation, which covers one task from its model to the lines of its outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar, Protocol, TypeVar

from luthier_api.run import GenerateRun, PreparedRecord
from luthier_trainer.generation.hardware import Hardware
from luthier_trainer.generation.records import RecordForm
from luthier_trainer.generation.samples import Output, Sample

Made = TypeVar("Made")


class Engine(Protocol):
    """Makes the outputs of one task."""

    records: ClassVar[RecordForm]
    """The form in which its outputs are stored."""
    batch_size: int
    """Number of outputs that are computed together, at most."""
    window_rows: ClassVar[int]
    """Samples that it likes to choose its batches from, where that is more than a few batches of them."""

    @classmethod
    def load(cls, run: GenerateRun, prepared: PreparedRecord, hardware: Hardware, batch_size: int) -> Engine:
        """Return the engine with its model on the device. Raises Failure if it or an adapter cannot be loaded."""

    def expect(self, samples: Sequence[Sample]) -> None:
        """Get ready for these samples, which are asked about and worked on next."""

    def problem(self, sample: Sample) -> str | None:
        """Return why this sample can never be made; None if it can. This does not run the model, so it is fast."""

    def work(self, samples: Sequence[Sample]) -> Iterator[list[Output]]:
        """Yield the outputs of all samples, some at a time and in any order. The caller stores them before it goes on.

        None of the samples has a problem. No more than `batch_size` of them are worked on at once.
        """


class Batched(ABC):
    """An engine whose batches begin and end together."""

    batch_size: int
    window_rows: ClassVar[int] = 0

    def expect(self, samples: Sequence[Sample]) -> None:  # noqa: B027 (few engines need it)
        """Do nothing: there is nothing that is faster for all samples together."""

    @abstractmethod
    def group(self, sample: Sample) -> Hashable:
        """Return the group of a sample. Samples of one group may share a batch; its batches have one shape.

        Samples with different settings (`Sample.variant`) are in different groups.
        """

    @abstractmethod
    def make(self, samples: Sequence[Sample]) -> list[Output]:
        """Return the outputs of 1 to `batch_size` samples of one group, in the same order."""

    def work(self, samples: Sequence[Sample]) -> Iterator[list[Output]]:
        """Yield the outputs of all samples, a batch at a time."""
        for batch in batches(samples, self.group, self.batch_size):
            yield self.make(batch)


def read_ahead(
    parts: Sequence[list[Sample]], read: Callable[[list[Sample]], Made]
) -> Iterator[tuple[list[Sample], Made]]:
    """Yield each part with what `read` makes of it. The next part is read while the caller works on one."""
    with ThreadPoolExecutor(1, thread_name_prefix="reading") as ahead:
        coming = [ahead.submit(read, part) for part in parts[:1]]
        for part, following in zip(parts, [*parts, None][1:], strict=True):
            made = coming.pop().result()
            if following is not None:
                coming.append(ahead.submit(read, following))
            yield part, made


def batches(samples: Sequence[Sample], group: Callable[[Sample], Hashable], batch_size: int) -> Iterator[list[Sample]]:
    """Yield batches of samples that belong to the same group.

    The groups are in the order of their first samples. The last batch of a group may be smaller.
    """
    groups: dict[Hashable, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(group(sample), []).append(sample)
    for members in groups.values():
        for first in range(0, len(members), batch_size):
            yield members[first : first + batch_size]
