"""Rows at which an engine fails: each becomes the record of an error, and the others are made.

When an engine raises while it works on several samples, those that are left are divided into halves until the one that
it fails at is alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from luthier_trainer.generation.samples import Output, Sample

if TYPE_CHECKING:
    from luthier_trainer.generation.engines.base import Engine

CAUGHT = (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError)
"""Exceptions that one row can cause. Those of devices, volumes and memory are others (RuntimeError, OSError)."""
MOST = 3  # rows at which an engine may fail before it has made an output: with more, the rows are not the cause


class Poisoned:
    """Works on samples, and counts those at which the engine failed."""

    def __init__(self) -> None:
        self.made = self.failed = 0

    def worked(self, engine: Engine, samples: Sequence[Sample]) -> Iterator[list[Output]]:
        """Yield the outputs of all samples, as the engine yields them. Raises what the engine raises at too many."""
        left = {sample.key: sample for sample in samples}
        try:
            for outputs in engine.work(samples):
                for output in outputs:
                    del left[output.sample.key]
                self.made += len(outputs)
                yield outputs
        except CAUGHT as error:
            rest = list(left.values())
            if len(rest) > 1:
                yield from self.worked(engine, rest[: len(rest) // 2])
                yield from self.worked(engine, rest[len(rest) // 2 :])
                return
            self.failed += 1
            if not rest or (not self.made and self.failed > MOST):
                raise
            message = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            yield [Output(rest[0], error=message)]
