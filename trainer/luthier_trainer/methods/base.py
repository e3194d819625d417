"""The protocol of a family of adapter methods: which tensors are trained beside a frozen model, as data for PEFT."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from luthier_api.method import Method

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig

SOME_STEPS = 1000  # where a model is only measured, and how long it would be trained is not known


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
    steps: int = SOME_STEPS
    """Optimiser steps of the training."""
    without: Sequence[str] = ()
    """Modules that get no adapter (`whole.without_adapters`)."""

    @property
    def excluded(self) -> str | None:
        """A pattern of modules that get no adapter; None if there are none.

        Without it, all-linear would include heads whose own weights are trained, which PEFT refuses.
        """
        names = [*self.whole, *self.without]
        return rf"(.*\.)?({'|'.join(map(re.escape, names))})(\..*)?" if names else None


class Course(Protocol):
    """What a method does while the model learns, beside the steps of the optimiser."""

    def penalty(self) -> torch.Tensor:
        """Return what is added to the loss of a step, a scalar."""
        ...

    def after_update(self, step: int) -> None:
        """Do what follows an update of the weights, while their gradients are there. `step`: from 1."""
        ...

    def state(self) -> dict[str, torch.Tensor]:
        """Return what a checkpoint has to hold beside weights and optimiser, by name."""
        ...

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from the `state` of a checkpoint."""
        ...

    def finish(self) -> None:
        """Prepare the model for its result to be saved."""
        ...


class AdapterFamily(ABC):
    """Methods whose result is an adapter. What a family has in its own way, it overrides."""

    saves_all = False
    """Whether a checkpoint holds what learns as it is. What PEFT saves is then another form of it, for use alone."""
    state_weight_bytes = 0
    """Bytes that are kept for each weight that learns, beside the weight, its gradient and the optimiser's state."""

    def resolved(self, method: Method, model: torch.nn.Module) -> Method:
        """Return the method with what the job leaves out, and the architecture decides. Raises Failure if it cannot."""
        return method

    @abstractmethod
    def config(self, method: Method, around: Surroundings) -> PeftConfig:
        """Return PEFT's configuration for a model."""

    def shapes(self, method: Method, name: str, shape: tuple[int, int]) -> list[tuple[int, ...]]:
        """Return the shape of each tensor added to the module `name`, whose weight has `shape` [outputs, inputs]."""
        return []

    def beside(self, method: Method, model: Any, task_type: str | None) -> list[tuple[int, ...]]:
        """Return the shape of each tensor that learns beside the modules of `model`."""
        return []

    def begin(self, adapted: Any, method: Method, tokenizer: Any) -> None:
        """Give adapters the values that they begin with, where PEFT's are others. The values depend on torch's seed."""
        return

    def course(self, adapted: Any, method: Method) -> Course | None:
        """Return what the method does while the model learns; None for nothing."""
        return None
