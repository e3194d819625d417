"""IA3 (arXiv:2205.05638): a learnt factor for each output, or each input, of some linear modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from luthier_api.exitcodes import ExitCode
from luthier_api.method import Method
from luthier_trainer.methods.base import AdapterFamily, Surroundings
from luthier_trainer.models.inspect import ALL_LINEAR
from luthier_trainer.runtime.failure import Failure

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig

TARGETS = "spec.method.targetModules"


class Ia3(AdapterFamily):
    """One vector a module. Those of `method.feedforwardModules` multiply the inputs."""

    def resolved(self, method: Method, model: torch.nn.Module) -> Method:
        """Return the method with the modules of PEFT's table. Raises Failure if it lacks the architecture."""
        if method.target_modules is not None:
            return method
        from peft.utils import constants

        kind = getattr(getattr(model, "config", None), "model_type", "")
        targets = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(kind)
        if targets is None:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{TARGETS}: PEFT has no usual modules of {kind} for ia3; name those of keys, values and the second"
                f" matrix of the feed-forward block (and the last in feedforwardModules), or {ALL_LINEAR}",
            )
        inner = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[kind]
        return method.model_copy(update={"target_modules": list(targets), "feedforward_modules": list(inner)})

    def config(self, method: Method, around: Surroundings) -> PeftConfig:
        from peft import IA3Config

        targets = method.target_modules
        return IA3Config(
            target_modules=ALL_LINEAR if targets == [ALL_LINEAR] else list(targets),
            feedforward_modules=list(method.feedforward_modules or []),
            task_type=around.task_type,
            modules_to_save=around.whole or None,
            exclude_modules=around.excluded,
        )

    def shapes(self, method: Method, name: str, shape: tuple[int, int]) -> list[tuple[int, ...]]:
        outputs, inputs = shape
        # As PEFT decides it, which compares without the dot before the name.
        return [(1, inputs) if name.endswith(tuple(method.feedforward_modules or ())) else (outputs, 1)]


def check(method: Method, adapted: list[str]) -> None:
    """Raise Failure if a module of `feedforwardModules` is none of those with factors, whose names are `adapted`."""
    for i, inner in enumerate(method.feedforward_modules or []):
        if not any(f".{name}".endswith(f".{inner}") for name in adapted):
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"spec.method.feedforwardModules[{i}]: no module with factors has a name that ends with {inner!r} (they"
                f" end with: {', '.join(sorted({name.rpartition('.')[2] for name in adapted}))})",
            )
