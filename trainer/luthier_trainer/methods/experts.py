"""Checks for mixtures of experts, where transformers stores the weights of all experts of a layer in one parameter.

bitsandbytes quantises only linear modules, so it does not quantise these parameters. PEFT 0.21 adds adapters to them if
it gets their names, and in some architectures for all-linear. It then skips linear modules with the same name, for
example of a shared expert. `prepare` reports both cases in a notice, or refuses the job.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import FineTuneJobSpec
from luthier_api.methods import DIVIDE_WEIGHTS, QUANTIZATIONS, QuantizationType
from luthier_api.tasks import TASKS
from luthier_trainer.models import inspect
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

TARGETS = "spec.method.targetModules"
REST_BITS = 16  # bits of a weight that is not quantised, bf16 or fp16
LEAST_SHARE = 0.5  # share of quantised weights; below it, quantisation saves much less memory than users expect
GIB = 2**30
SHOWN = 5  # names in a message


def fused_experts(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return name → parameter that holds a matrix of all experts of a layer, mostly [experts, rows, columns]."""
    return {
        f"{name}.{own}".lstrip("."): weight
        for name, module in model.named_modules()
        if "Expert" in type(module).__name__
        for own, weight in module.named_parameters(recurse=False)
        if weight.ndim >= 2 and not own.endswith("bias")
    }


def leaves(names: Any) -> list[str]:
    """Return the last parts of dotted names, without duplicates."""
    return sorted({name.rpartition(".")[2] for name in names})


def quantised_weights(model: PreTrainedModel) -> int:
    """Return how many of the model's weights bitsandbytes quantises: those of linear modules, without heads."""
    import torch
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert

    from luthier_trainer.models.heads import HEADS

    kept = {*get_keys_to_not_convert(model), *HEADS}
    return sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if (type(module) is torch.nn.Linear or isinstance(module, Conv1D))
        and not any(f".{name}.".find(f".{k}.") >= 0 for k in kept)
    )


def check_quantised_share(config: PreTrainedConfig, task: str, kind: QuantizationType, field: str) -> None:
    """Give notice if only a small share of the weights would be quantised to `kind`.

    `field`: the field of the spec that asks for quantised weights. Raises Failure if the
    share is small because experts are not quantised.
    """
    model = inspect.skeleton(config, task, inspect.MODEL)
    weights = sum(weight.numel() for weight in model.parameters())
    quantised, experts = quantised_weights(model), sum(weight.numel() for weight in fused_experts(model).values())
    share = quantised / weights
    held = (quantised * QUANTIZATIONS[kind].bits_with_scales + (weights - quantised) * REST_BITS) / 8 / GIB
    figures = (
        f"{share:.0%} of the {weights:,} weights of {config.model_type} would be in {QUANTIZATIONS[kind].bits} bits,"
        f" about {held:,.1f} GiB on each GPU"
    )
    if not experts and share >= LEAST_SHARE:
        return
    if not experts:
        notice(f"{field}: {figures}; embeddings are not quantised")
        return
    reason = (
        f"The {experts / weights:.0%} that are experts stay in 16 bits: they are one parameter a layer, which"
        " bitsandbytes does not quantise"
    )
    if share >= LEAST_SHARE:
        notice(f"{field}: {figures}. {reason}")
        return
    raise Failure(
        ExitCode.INVALID_SPEC,
        f"{field}: {kind} would save little: {figures}. {reason}. Use method.type: lora without model.quantization,"
        f" which needs about {weights * REST_BITS / 8 / GIB:,.1f} GiB for the weights (shared between the GPUs with"
        " strategy zero3), or a smaller model",
    )


def check_adapters(config: PreTrainedConfig, spec: FineTuneJobSpec) -> None:
    """Add the adapters to a model without weights, and give notice of selected weights that get none.

    Models that are no mixture of experts, and methods that add nothing to modules, are not checked. Raises Failure if
    the adapters cannot be added.
    """
    model = inspect.skeleton(config, spec.task, inspect.MODEL)
    fused = fused_experts(model)
    if not fused or not spec.method.target_modules:
        return
    import torch
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer

    from luthier_trainer.methods.apply import with_method
    from luthier_trainer.models.heads import heads_of

    linear = linear_modules(model)
    whole = heads_of(model, spec.task)
    method = spec.method.model_copy(update={"dropout": 0.0})
    with torch.device("meta"):
        adapted = with_method(model, method, TASKS[spec.task].peft_task_type, whole, deepspeed=True)
    layers = {
        name: module for name, module in adapted.base_model.model.named_modules() if isinstance(module, BaseTunerLayer)
    }
    on_experts = {
        f"{name}.{m.parameter_name}".replace(".base_layer", "")
        for name, m in layers.items()
        if isinstance(m, ParamWrapper)
    } & fused.keys()
    targets = spec.method.target_modules
    everything = targets == [inspect.ALL_LINEAR]
    if not everything:
        left = set(adapted.peft_config["default"].target_modules or [])
        known = leaves([*linear, *fused])
        for i, target in enumerate(targets):
            if target in left and not any(f".{name}".endswith(f".{target}") for name in [*layers, *fused]):
                raise Failure(
                    ExitCode.INVALID_SPEC,
                    f"{TARGETS}[{i}]: the model has no module {target!r} (it has: {', '.join(known)})",
                )
    if on_experts and spec.method.dropout:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"spec.method.dropout: adapters on experts ({', '.join(leaves(on_experts))}) have no dropout. Set it to 0,"
            f" or name other modules in {TARGETS}",
        )
    if on_experts and spec.strategy in DIVIDE_WEIGHTS:
        title = "FSDP" if spec.strategy == "fsdp" else "ZeRO-3"
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"spec.strategy: {title} does not spread weights with adapters on experts ({', '.join(leaves(on_experts))};"
            f" peft issue 2916). Use ddp or zero2, or name other modules in {TARGETS}",
        )
    asked = {**linear, **fused}
    if not everything:
        asked = {
            name: weight
            for name, weight in asked.items()
            if any(f".{name}".endswith(f".{target}") for target in targets)
        }
    without = {name: weight for name, weight in asked.items() if name not in layers and name not in on_experts}
    if without:
        share = sum(weight.numel() for weight in without.values()) / sum(weight.numel() for weight in asked.values())
        names = leaves(without)
        remedy = (
            f"; to put some on experts, name {', '.join(leaves(fused))} and the others in it"
            if everything and not on_experts
            else ""
        )
        notice(
            f"{TARGETS}: {share:.0%} of the weights that it means get no adapter and stay as they are:"
            f" {', '.join(names[:SHOWN])}{', ...' * (len(names) > SHOWN)} (what PEFT reaches in"
            f" {config.model_type}){remedy}"
        )


def linear_modules(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return name → weight of the modules that all-linear selects: all linear modules but the output embeddings."""
    import torch
    from transformers import PreTrainedModel
    from transformers.pytorch_utils import Conv1D

    last = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return {
        name: m.weight for name, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not last
    }
