"""Modules that are trained whole beside adapters because the job names them (`method.modulesToSave`), or get none."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from luthier_api.exitcodes import ExitCode
from luthier_api.method import Method
from luthier_trainer.methods.old_names import present_names
from luthier_trainer.models.inspect import MODEL, skeleton, tied_modules
from luthier_trainer.runtime.failure import Failure

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

FIELD = "spec.method.modulesToSave"


def named(name: str, asked: str) -> bool:
    """Return whether `asked` is the name of the module `name`, or the end of it."""
    return name == asked or name.endswith(f".{asked}")


def whole_modules(model: torch.nn.Module, method: Method, heads: list[str]) -> list[str]:
    """Return the full names of the modules that are trained whole: `heads`, and those that the method names.

    Of nested modules, only the outermost is returned.
    """
    asked = [new for name in method.modules_to_save or [] for new in present_names(model, name, FIELD)]
    names = {name for name, _ in model.named_modules() if any(named(name, end) for end in asked)} | {*heads}
    return sorted(name for name in names if not any(name.startswith(f"{other}.") for other in names))


def without_adapters(model: torch.nn.Module) -> Sequence[str]:
    """Return the full names of the modules of `model` that get no adapter, as the model itself says."""
    return getattr(model, "without_adapters", ())


def check(config: PreTrainedConfig, task: str, method: Method, quantised: bool) -> None:
    """Check that each module that the method names can be trained whole. Raises Failure if one cannot.

    `quantised`: whether the frozen weights of linear modules rest in few bits.
    """
    model = skeleton(config, task, MODEL)
    modules = dict(model.named_modules())
    for i, asked in enumerate(method.modules_to_save or []):
        ends = present_names(model, asked, FIELD)
        found = {name: module for name, module in modules.items() if any(named(name, end) for end in ends)}
        trouble = _trouble(model, found, asked, ends, method, quantised)
        if trouble:
            raise Failure(ExitCode.INVALID_SPEC, f"{FIELD}[{i}]: {trouble}")


def _trouble(
    model: PreTrainedModel,
    found: dict[str, torch.nn.Module],
    asked: str,
    ends: list[str],
    method: Method,
    quantised: bool,
) -> str | None:
    """Return why the modules `found`, which the name `asked` means, cannot be trained whole; None if they can.

    `ends`: the present names of what is asked for.
    """
    import torch

    known = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if _is_leaf(module)})
    if not found:
        near = difflib.get_close_matches(asked, known, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"the model has no module {asked!r} (it has: {', '.join(known)}).{hint}"
    lists = (torch.nn.ModuleList, torch.nn.ModuleDict)  # PEFT cannot copy these
    if any(isinstance(module, lists) or not list(module.parameters()) for module in found.values()):
        return f"{asked!r} is no module with weights of its own; name one of: {', '.join(known)}"
    shared = tied_modules(model)
    if both := next((name for name in shared for outer in found if f"{name}.".startswith(f"{outer}.")), None):
        return (
            f"{both} has the same weights as {shared[both]}, and PEFT would train a copy of one of them alone; leave it"
            " out, or use method.type: full"
        )
    if any(end in (method.target_modules or []) for end in ends):
        return f"{asked!r} is in targetModules, too, and what is trained whole gets no adapter; remove one of them"
    last = model.get_output_embeddings()
    inner = [m for module in found.values() for m in module.modules() if isinstance(m, torch.nn.Linear)]
    if quantised and any(module is not last for module in inner):
        return f"{asked!r} is quantised, and weights of few bits cannot be trained; use method.type: lora"
    return None


def _is_leaf(module: torch.nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))
