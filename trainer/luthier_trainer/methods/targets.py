"""Regular expressions in `method.targetModules`: they are replaced by the names of the modules that they mean.

PEFT takes one expression instead of a list of names, and then refuses `layers`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from luthier_api.exitcodes import ExitCode
from luthier_api.method import Method
from luthier_trainer.methods.experts import TARGETS, leaves, linear_modules
from luthier_trainer.methods.lora import layer_of, matching
from luthier_trainer.methods.whole import whole_modules
from luthier_trainer.runtime.failure import Failure

if TYPE_CHECKING:
    import torch

NAME = re.compile(r"[\w.-]+")


def expanded(method: Method, model: torch.nn.Module, heads: list[str]) -> Method:
    """Return the method with names instead of expressions, which mean linear modules as all-linear does.

    An expression is one of Python for the end of a name. What is trained whole, such as the modules in `heads`, gets no
    adapter. Raises Failure if an expression is none, or means no module.
    """
    if all(NAME.fullmatch(target) for target in method.target_modules):
        return method
    whole = whole_modules(model, method, heads)
    linear = [name for name in linear_modules(model) if not any(f"{name}.".startswith(f"{outer}.") for outer in whole)]
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
