"""What a checkpoint holds of a method whose result is another form of what learns, or that does more than learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from luthier_api.exitcodes import ExitCode
from luthier_api.method import Method
from luthier_trainer.methods.base import AdapterFamily
from luthier_trainer.runtime.failure import Failure

FILE = "learning.safetensors"
WEIGHT, COURSE = "weight:", "course:"  # beginnings of the names of tensors


class MethodState:
    """The tensors that learn, as they are, and what the method keeps beside them."""

    def __init__(self, family: AdapterFamily, model: Any, method: Method) -> None:
        """`model`: with its adapters."""
        self._model = model
        self.course = family.course(model, method)
        """What the method does while the model learns; None for nothing."""

    def _learning(self) -> dict[str, torch.Tensor]:
        return {name: weight for name, weight in self._model.named_parameters() if weight.requires_grad}

    def save(self, folder: Path) -> None:
        """Write the tensors into the folder of a checkpoint."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{WEIGHT}{name}": weight.detach() for name, weight in self._learning().items()}
        if self.course is not None:
            tensors |= {f"{COURSE}{name}": tensor for name, tensor in self.course.state().items()}
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, folder / FILE)

    def load(self, folder: Path) -> None:
        """Go on from the checkpoint in `folder`. Raises Failure(TRAINING_ERROR) if it holds other weights."""
        tensors = load_file(folder / FILE)
        saved = {name.removeprefix(WEIGHT): tensor for name, tensor in tensors.items() if name.startswith(WEIGHT)}
        learning = self._learning()
        if saved.keys() != learning.keys():
            others = sorted(saved.keys() ^ learning.keys())
            raise Failure(
                ExitCode.TRAINING_ERROR, f"{folder / FILE}: it holds other weights than learn, among them {others[0]}"
            )
        with torch.no_grad():
            for name, weight in learning.items():
                weight.copy_(saved[name])
        if self.course is not None:
            kept = {name.removeprefix(COURSE): tensor for name, tensor in tensors.items() if name.startswith(COURSE)}
            self.course.restore(kept)
