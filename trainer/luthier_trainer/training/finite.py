"""Numbers that are not finite (NaN, infinite) end as Diverged. They are never written into a checkpoint or a result.

`resilience` withholds updates and looks at the weights before each save, `callbacks` looks at losses, `result` at the
files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from luthier_api.exitcodes import ExitCode
from luthier_trainer.models.inspect import counts
from luthier_trainer.runtime.failure import Failure

SHOWN = 3  # names of weights in a message


def finite(tensor: torch.Tensor) -> torch.Tensor:
    """Whether all elements are finite, as a tensor of one boolean where `tensor` is: nothing waits for the device."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()  # torch 2.13 has no norms of 8-bit floats
    # The largest magnitude, which is NaN if one element is. Unlike torch.isfinite it needs no memory beside the tensor.
    return torch.isfinite(torch.linalg.vector_norm(tensor.detach(), ord=float("inf")))


def nonfinite_names(tensors: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """Names of the tensors with an element that is not finite."""
    checks = [(name, finite(tensor)) for name, tensor in tensors]
    return [name for name, check in checks if not check.item()]


def changing_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What training changes: weights that learn (of ZeRO-3's this process's share), and statistics of batches."""
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            yield name, getattr(weight, "ds_tensor", weight)
    for name, module in model.named_modules():
        if counts(module):  # other buffers are constants, and may be masks of minus infinity
            yield from module.named_buffers(name, recurse=False)


def diverged(cause: str, saved: Path | None, step: int) -> Failure:
    """The failure of a run that has diverged. `cause` begins with a field. `saved` is the newest good checkpoint, if
    there is one.
    """
    if saved is None:
        kept = f"No checkpoint was saved before, so all {step} steps are lost."
    else:
        kept = f"The newest good checkpoint is {saved}; the steps after it are lost."
    return Failure(ExitCode.DIVERGED, f"{cause}. {kept} Lower learningRate, raise warmupSteps, or look for broken rows")


def check_weights(loop: Any) -> None:
    """Raise Failure(DIVERGED) on all ranks when a weight that training changes is not finite on one of them."""
    names = nonfinite_names(changing_weights(loop.model))
    if not loop.ranks.any(bool(names)):
        return
    found = (
        f"{len(names)} weights of the model, among them {', '.join(names[:SHOWN])},"
        if names
        else "weights on other processes"
    )
    step = loop.state.global_step
    raise diverged(
        f"spec.training.learningRate: {found} are not finite numbers at step {step} and were not saved",
        loop.saved,
        step,
    )
