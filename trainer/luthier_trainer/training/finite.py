"""Checks for numbers that are not finite (NaN or infinite). They are never written to a checkpoint or a result.

A run that has them ends with the exit code DIVERGED. `resilience` withholds updates and checks the weights before each
save, `callbacks` checks the losses, and `result` checks the files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from luthier_api.exitcodes import ExitCode
from luthier_trainer.models.inspect import counts
from luthier_trainer.runtime.failure import Failure

SHOWN = 3  # names of weights in a message


def finite(tensor: torch.Tensor) -> torch.Tensor:
    """Return whether all elements are finite, as a boolean tensor of shape [] on the device of `tensor`.

    The host does not wait for the device.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()  # torch 2.13 has no norms of 8-bit floats
    # The largest magnitude is NaN if any element is. Unlike torch.isfinite, the norm allocates no second tensor.
    return torch.isfinite(torch.linalg.vector_norm(tensor.detach(), ord=float("inf")))


def nonfinite_names(tensors: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """Return the names of the tensors that have an element that is not finite."""
    checks = [(name, finite(tensor)) for name, tensor in tensors]
    return [name for name, check in checks if not check.item()]


def changing_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and tensor of everything that training changes: trainable weights and batch statistics.

    Under ZeRO-3 and FSDP a weight is this process's shard of it.
    """
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            yield name, weight.to_local() if isinstance(weight, DTensor) else own_part(weight)
    for name, module in model.named_modules():
        if counts(module):  # other buffers are constants, for example masks that hold minus infinity
            yield from module.named_buffers(name, recurse=False)


def own_part(weight: torch.nn.Parameter) -> torch.Tensor:
    """Return what this process holds of a weight: under ZeRO-3 its shard, else all of it.

    DeepSpeed (0.19) fills the last shards up to the size of the others with whatever was in memory, NaN among it. These
    numbers are left out.
    """
    divided: Any = weight
    shard: torch.Tensor = getattr(divided, "ds_tensor", weight)
    if shard is weight:
        return weight
    left = divided.ds_numel - divided.ds_zero_partition_rank * shard.numel()
    return shard.flatten()[: max(left, 0)]


def diverged(cause: str, saved: Path | None, step: int) -> Failure:
    """Return the failure of a run that has diverged at `step`.

    `cause` begins with the path of a field of the spec. `saved`: the newest good checkpoint, or None.
    """
    if saved is None:
        kept = f"No checkpoint was saved before, so all {step} steps are lost."
    else:
        kept = f"The newest good checkpoint is {saved}; the steps after it are lost."
    return Failure(ExitCode.DIVERGED, f"{cause}. {kept} Lower learningRate, raise warmupSteps, or look for broken rows")


def check_weights(loop: Any) -> None:
    """Raise Failure(DIVERGED) on all ranks if a weight that training changes is not finite on one of them.

    `loop`: the trainer (`resilience.Resilient`).
    """
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
