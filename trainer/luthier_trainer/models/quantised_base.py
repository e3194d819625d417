"""Adapters that belong to a base in 4 bits, because they began by LoftQ, which their configuration says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_api.methods import QUANTIZATIONS
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.workspace.model_files import ADAPTER_CONFIG

if TYPE_CHECKING:
    import torch

LOFTQ = "loftq"  # of `initLoraWeights`, and PEFT's
SETTINGS = "loftq_config"  # PEFT's field for it, which it ignores when it loads an adapter
ARGUMENTS = "quantization_config"
"""Entry of `SETTINGS`: arguments of BitsAndBytesConfig, with which the base has to be loaded."""
DTYPE = "dtype"
"""Entry of `SETTINGS`: the dtype in which the base has to be loaded."""


def arguments_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the arguments of BitsAndBytesConfig for the base of an adapter with this configuration.

    None if it does not say that it belongs to a quantised base.
    """
    found: dict[str, Any] | None = (config.get(SETTINGS) or {}).get(ARGUMENTS)
    return found


def options_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that quantise the base of an adapter on the CPU as its training did.

    Empty if `arguments_of` is None.
    """
    from transformers import BitsAndBytesConfig

    arguments = arguments_of(config)
    if not arguments:
        return {}
    return {
        "dtype": config[SETTINGS][DTYPE],
        "quantization_config": BitsAndBytesConfig(**arguments),
        "device_map": {"": "cpu"},
    }


def check_rows(model: torch.nn.Module, field: str, remedy: str) -> None:
    """Check that bitsandbytes reads the weights of `model` right on a CPU. Raises Failure, with `remedy`, if not.

    Its kernels (0.50) take it that each row of 4 bits begins with a new block of weights, and otherwise compute with
    others, without an error.
    """
    multiple = QUANTIZATIONS["nf4"].cpu_multiple
    for name, module in model.named_modules():
        # Not imported, because other quantised models come here too.
        if type(module).__name__ == "Linear4bit" and module.in_features % multiple:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{field}: bitsandbytes (0.50) computes with wrong weights for {name} on a CPU, because its"
                f" {module.in_features} inputs are no multiple of {multiple}. {remedy}",
            )


def check_adapter(config: Mapping[str, Any], field: str) -> None:
    """Check that an adapter fits the plain base. Raises Failure if it began by LoftQ."""
    if not config.get(SETTINGS) and config.get("init_lora_weights") != LOFTQ:
        return
    kind = (arguments_of(config) or {}).get("bnb_4bit_quant_type", "4 bits")
    raise Failure(
        ExitCode.INVALID_SPEC,
        f"{field}: the adapter was begun by LoftQ ({ADAPTER_CONFIG}: {SETTINGS}) and fits its base in {kind} alone, and"
        " adapters are added to the plain weights. Name its FineTuneJob in spec.model.job instead, which merges it into"
        f" the weights in {kind}",
    )
