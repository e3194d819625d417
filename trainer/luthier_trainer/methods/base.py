"""What a family of methods is: which tensors learn beside a frozen model, as data for PEFT."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from luthier_api.finetune import Method

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True)
class Surroundings:
    """What of the model and its task a configuration of PEFT depends on."""

    task_type: str | None
    """PEFT's name of the task."""
    whole: list[str]
    """Modules that are trained entirely beside the adapters, such as a new head."""
    experts: Iterable[str] = ()
    """Names of parameters that hold the weights of several experts: no modules, so PEFT wants them apart."""

    @property
    def excluded(self) -> str | None:
        """A pattern of modules that get no adapter: all-linear would include heads that are trained whole, which PEFT
        refuses.
        """
        return rf"(.*\.)?({'|'.join(map(re.escape, self.whole))})(\..*)?" if self.whole else None


class AdapterFamily(Protocol):
    """Methods whose result is an adapter."""

    def config(self, method: Method, around: Surroundings) -> PeftConfig:
        """PEFT's configuration for a model."""

    def sizes(self, method: Method, shape: tuple[int, int]) -> list[int]:
        """Elements of each tensor that one module gets, whose weight has `shape`: outputs × inputs."""
