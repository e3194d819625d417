"""The protocol of a family of adapter methods: which tensors are trained beside a frozen model, as data for PEFT."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from luthier_api.method import Method

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True)
class Surroundings:
    """The properties of a model and its task on which PEFT's configuration depends."""

    task_type: str | None
    """The name of the task in PEFT; None if PEFT has none."""
    whole: list[str]
    """Modules that are trained entirely beside the adapters, such as a new head."""
    experts: Iterable[str] = ()
    """Names of parameters with the weights of several experts. They are no modules, so PEFT takes them separately."""
    tokens: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Name of a module with a row for each token → the tokens whose rows are trained beside the adapters."""
    linear: Iterable[str] = ()
    """Names of the linear modules, which all-linear stands for."""

    @property
    def excluded(self) -> str | None:
        """A pattern of modules that get no adapter; None if there are none.

        Without it, all-linear would include heads whose own weights are trained, which PEFT refuses.
        """
        return rf"(.*\.)?({'|'.join(map(re.escape, self.whole))})(\..*)?" if self.whole else None


class AdapterFamily(Protocol):
    """Methods whose result is an adapter."""

    def config(self, method: Method, around: Surroundings) -> PeftConfig:
        """Return PEFT's configuration for a model."""

    def shapes(self, method: Method, name: str, shape: tuple[int, int]) -> list[tuple[int, ...]]:
        """Return the shape of each tensor added to the module `name`, whose weight has `shape` [outputs, inputs]."""
