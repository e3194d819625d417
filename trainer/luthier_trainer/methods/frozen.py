"""Methods that train weights of the model itself: all of them, those of some layers, or the biases."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from luthier_api.exitcodes import ExitCode
from luthier_api.method import Method
from luthier_trainer.methods.lora import layer_of, matching
from luthier_trainer.methods.old_names import present_names
from luthier_trainer.models.inspect import MODEL, skeleton, tied_modules
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

FREEZE, LAYERS = "spec.method.freeze", "spec.method.layers"
SHOWN = 5  # names in a message


def learning(model: torch.nn.Module, method: Method, heads: list[str]) -> set[str]:
    """Return the names of the weights that learn. `heads`: modules that are trained whole in any case.

    Those that the architecture itself keeps as they are (the positions of Whisper's encoder) are not among them.
    """
    names = {name for name, weight in model.named_parameters() if weight.requires_grad}
    whole = {name for name in names if any(name.startswith(f"{head}.") for head in heads)}
    if method.type == "bitfit":
        return {name for name in names if name.rpartition(".")[2] == "bias"} | whole
    assert method.type == "full", method.type
    # By identity: a weight that two modules share is frozen with either of them.
    asleep = {id(w) for name in frozen_modules(model, method) for w in model.get_submodule(name).parameters()}
    left = {name for name, weight in model.named_parameters() if name in names and id(weight) not in asleep}
    if method.layers is not None:
        left = {name for name in left if (layer := layer_of(name)) is None or layer in method.layers}
    return left


def frozen_modules(model: torch.nn.Module, method: Method) -> list[str]:
    """Return the names of the modules that `method.freeze` means."""
    patterns = [new for pattern in method.freeze or [] for new in present_names(model, pattern, FREEZE)]
    return [name for name, _ in model.named_modules() if name and matching(patterns, name)]


def apply(model: PreTrainedModel, method: Method, heads: list[str]) -> None:
    """Exclude the weights of `model` that do not learn from training."""
    keep_fixed(model)
    names = learning(model, method, heads)
    for name, weight in model.named_parameters():
        if name not in names:
            weight.requires_grad_(False)


def keep_fixed(model: PreTrainedModel) -> None:
    """Exclude what the architecture itself keeps as it is, such as sinusoids of positions.

    `from_pretrained` (transformers 5.23) lets these learn, other than the same model before it was saved.
    """
    from luthier_trainer.models.heads import twin

    fixed = {name for name, weight in twin(model).named_parameters() if not weight.requires_grad}
    for name, weight in model.named_parameters():
        if name in fixed:
            weight.requires_grad_(False)


def check(config: PreTrainedConfig, task: str, method: Method) -> None:
    """Check that something learns, and that all that the method names exists. Raises Failure if not.

    Gives notice of modules that stay as they are because they share their weights with a frozen one.
    """
    from luthier_trainer.models.heads import heads_of

    model = skeleton(config, task, MODEL)
    heads = heads_of(model, task)
    modules = [name for name, _ in model.named_modules() if name]
    for i, pattern in enumerate(method.freeze or []):
        try:
            found = [name for name in modules if matching(present_names(model, pattern, FREEZE), name)]
        except re.error as error:
            raise Failure(
                ExitCode.INVALID_SPEC, f"{FREEZE}[{i}]: {pattern!r} is no regular expression of Python: {error}"
            ) from None
        if not found:
            known = sorted({name.rpartition(".")[2] for name in modules if not name.rpartition(".")[2].isdigit()})
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{FREEZE}[{i}]: the model has no module whose name ends with {pattern!r} (they end with:"
                f" {', '.join(known)})",
            )
    numbers = {layer for name, _ in model.named_parameters() if (layer := layer_of(name)) is not None}
    for i, layer in enumerate(method.layers or []):
        if layer not in numbers:
            there = f"0 to {max(numbers)}" if numbers else "none"
            raise Failure(ExitCode.INVALID_SPEC, f"{LAYERS}[{i}]: the model has no layer {layer} (layers: {there})")
    names = learning(model, method, heads)
    beside = [name for name in names if not any(name.startswith(f"{head}.") for head in heads)]
    if method.type == "bitfit" and not beside:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"spec.method.type: {config.model_type} has no biases, so that bitfit would train nothing of it; use lora",
        )
    if not names:
        raise Failure(ExitCode.INVALID_SPEC, f"{FREEZE}: no weight of the model would learn; name less")
    asleep = frozen_modules(model, method)
    shared = sorted(
        f"{other} with {name}"
        for name, other in tied_modules(model).items()
        if any(f"{name}.".startswith(f"{module}.") for module in asleep)
        and not any(f"{other}.".startswith(f"{module}.") for module in asleep)
    )
    if shared:
        notice(f"{FREEZE}: these stay as they are, too, because they share weights: {', '.join(shared[:SHOWN])}")
