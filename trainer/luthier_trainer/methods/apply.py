"""Applies a method to a model: the options for loading its weights, and the model to train, with adapters if any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from peft import get_peft_model
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from luthier_api.exitcodes import ExitCode
from luthier_api.method import Method
from luthier_api.methods import METHODS, ParameterPrecision
from luthier_api.spec import Quantization
from luthier_trainer.methods import frozen
from luthier_trainer.methods.base import SOME_STEPS, Surroundings
from luthier_trainer.methods.experts import fused_experts, linear_modules
from luthier_trainer.methods.quantization import settings
from luthier_trainer.methods.table import FAMILIES
from luthier_trainer.methods.targets import expanded
from luthier_trainer.methods.whole import whole_modules, without_adapters
from luthier_trainer.models import embedding, fsdp
from luthier_trainer.models.sources import OWN_WEIGHTS
from luthier_trainer.runtime.devices import DTYPES
from luthier_trainer.runtime.failure import Failure

RANKS = "ranknum"  # AdaLoRA's counts of ranks, by which PEFT scales adapters


def weights_options(
    method: Method,
    precision: str,
    deepspeed: bool,
    device: torch.device,
    quantization: Quantization | None = None,
    parameter_precision: ParameterPrecision | None = None,
    shards: int = 1,
) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that decide how weights are stored.

    Frozen weights are stored in the precision of the computation, or quantised. Trainable weights are stored in fp32,
    or as `parameter_precision` says, and 16-bit computations use autocast. DeepSpeed keeps the fp32 copy itself and
    needs one dtype for all weights. They are read straight to a GPU, tensor by tensor: otherwise each process would
    hold a whole model in fp32 on the host first. ZeRO-3 reads its shards by itself. `shards`: over how many processes
    FSDP divides the weights.
    """
    frozen = METHODS[method.type].adapter
    stored = precision if frozen or deepspeed else parameter_precision or "fp32"
    options: dict[str, Any] = {"dtype": DTYPES[stored], **OWN_WEIGHTS}
    if quantization:
        options["quantization_config"] = settings(quantization.type, precision)
    if shards > 1:
        return options | fsdp.loading_options(shards)
    if quantization or (device.type != "cpu" and not is_deepspeed_zero3_enabled()):
        options["device_map"] = {"": device}
    return options


def with_method(
    model: PreTrainedModel,
    method: Method,
    peft_type: str | None,
    whole: list[str],
    deepspeed: bool,
    new_tokens: Sequence[int] = (),
    steps: int = SOME_STEPS,
    piece_parts: Mapping[int, Sequence[int]] = MappingProxyType({}),
) -> Any:
    """Return the model to train: the model itself, some of whose weights may be frozen, or the model with adapters.

    `whole`: names of modules whose own weights are all trained, beside the adapters and the modules that the method
    names. `new_tokens`: tokens whose rows of the embedding are trained beside adapters; the model gets those that it
    lacks. `steps`: of the training. `piece_parts`: new token → tokens with the mean of whose rows it begins. The other
    initial values of adapters and rows depend on torch's current seed. Raises Failure if the adapters do not suit the
    model.
    """
    if not METHODS[method.type].adapter:
        frozen.apply(model, method, whole)
        return model
    # On CPUs with AVX512-BF16 bitsandbytes repacks 4-bit weights in the first evaluation, for a kernel without a
    # backward pass, and keeps using it in training: gradients then silently skip the frozen weights.
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    tokens: dict[str, Sequence[int]] = {}
    if new_tokens:
        embedding.with_rows(model, max(new_tokens) + 1)
        embedding.begin_as_means(model, piece_parts)
        tokens = dict.fromkeys(embedding.token_tables(model), new_tokens)
    method, whole = expanded(method, model, whole), whole_modules(model, method, whole)
    # Not that of the input embeddings, which those of images lack. Quantised weights are integers.
    computed = next(weight.dtype for weight in model.parameters() if weight.is_floating_point())
    config = FAMILIES[method.type].config(
        method,
        Surroundings(
            peft_type, whole, fused_experts(model), tokens, linear_modules(model), steps, without_adapters(model)
        ),
    )
    try:
        adapted = get_peft_model(model, config, autocast_adapter_dtype=not deepspeed)
    except ValueError as error:
        if not method.target_modules:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"spec.method.type: {method.type} does not suit {type(model).__name__} ({error}); use lora",
            ) from None
        linear = {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and not any(f"{name}.".startswith(f"{head}.") for head in whole)
        }
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"spec.method.targetModules: {', '.join(method.target_modules)} does not suit {type(model).__name__}"
            f" ({error}). Its linear modules: {', '.join(sorted(linear))}; all-linear takes them all",
        ) from None
    for name, weight in adapted.named_parameters():
        if f".{RANKS}." in name:  # which PEFT (0.21) trains where they are beside quantised weights
            weight.requires_grad_(False)
    if new_tokens:
        # PEFT would save the whole embedding beside its new rows if it saw that the base model has fewer. Which model
        # that is, `training.result` writes.
        adapted.peft_config["default"].base_model_name_or_path = ""
    # PEFT converts only adapters to fp32. Heads would be trained in 16 bits, where small updates are lost to rounding,
    # and gradients in fp16 cannot be unscaled. DeepSpeed, which keeps the fp32 copy itself, needs the dtype of the
    # other weights; PEFT alone makes adapters on quantised weights in the dtype of the products, bf16.
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(computed if deepspeed else torch.float32)
    # torch's normalisations on CPU want both their weights in one dtype.
    for module in adapted.modules():
        own = dict(module.named_parameters(recurse=False))
        if own.keys() == {"weight", "bias"} and own["bias"].requires_grad and own["weight"].ndim == 1:
            own["weight"].data = own["weight"].data.to(own["bias"].dtype)
    return adapted
