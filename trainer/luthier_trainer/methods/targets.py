"""`method.targetModules` as names of the model: of regular expressions, of old names, and of what the job leaves out.

PEFT takes one expression instead of a list of names, and then refuses `layers`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from luthier_api.exitcodes import ExitCode
from luthier_api.method import Method
from luthier_trainer.methods.experts import TARGETS, leaves, linear_modules
from luthier_trainer.methods.lora import layer_of, matching
from luthier_trainer.methods.old_names import NAME, present_names
from luthier_trainer.methods.table import FAMILIES
from luthier_trainer.methods.whole import whole_modules, without_adapters
from luthier_trainer.models.inspect import ALL_LINEAR
from luthier_trainer.runtime.failure import Failure

if TYPE_CHECKING:
    import torch


def expanded(method: Method, model: torch.nn.Module, heads: list[str]) -> Method:
    """Return the method with names instead of expressions, which mean linear modules as all-linear does.

    An expression is one of Python for the end of a name. What is trained whole, such as the modules in `heads`, gets no
    adapter. What the job leaves out is what the family of the method takes for the architecture. Raises Failure if an
    expression is none, or means no module.
    """
    method = renamed(FAMILIES[method.type].resolved(method, model), model)
    if all(NAME.fullmatch(target) for target in method.target_modules or []):
        return method
    without = [*whole_modules(model, method, heads), *without_adapters(model)]
    linear = [name for name in linear_modules(model) if not any(f"{name}.".startswith(f"{o}.") for o in without)]
    where = ""
    if method.layers is not None:
        # PEFT 0.21 gives an adapter to a module whose whole name is listed, whatever its layer is.
        linear = [name for name in linear if layer_of(name) in method.layers]
        where = f"of layers {', '.join(map(str, method.layers))} "
    targets, more = list(method.target_modules), list[str]()
    for i, target in enumerate(method.target_modules):
        if NAME.fullmatch(target):
            continue
        try:
            meant = [name for name in linear if matching([target], name)]
        except re.error as error:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{TARGETS}[{i}]: {target!r} is neither a name nor a regular expression of Python: {error}",
            ) from None
        if not meant:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{TARGETS}[{i}]: no linear module {where}has a name that ends with {target!r} (they end with:"
                f" {', '.join(leaves(linear))})",
            )
        # The others come last, so that each target keeps the index that messages name.
        targets[i], *others = meant
        more += others
    return method.model_copy(update={"target_modules": list(dict.fromkeys([*targets, *more]))})


def renamed(method: Method, model: torch.nn.Module) -> Method:
    """Return the method with the present names of modules that had others in earlier versions of transformers."""
    names = [
        new
        for target in method.target_modules or []
        for new in ([target] if target == ALL_LINEAR else present_names(model, target, TARGETS))
    ]
    if names == (method.target_modules or []):
        return method
    return method.model_copy(update={"target_modules": list(dict.fromkeys(names))})
