"""Which weights learn: the methods of `luthier_api.methods` as data for transformers and PEFT. A model goes in, the
model to train comes out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import PreTrainedModel

from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import Method
from luthier_api.methods import METHODS, MethodType
from luthier_api.spec import Quantization
from luthier_trainer.methods.experts import fused_experts
from luthier_trainer.methods.quantization import settings
from luthier_trainer.models.sources import OWN_WEIGHTS
from luthier_trainer.runtime.devices import DTYPES
from luthier_trainer.runtime.failure import Failure

ALL_LINEAR = ["all-linear"]


def weights_options(
    method: Method, precision: str, deepspeed: bool, device: torch.device, quantization: Quantization | None = None
) -> dict[str, Any]:
    """Arguments of `from_pretrained`. Frozen weights rest in the precision of the computation; weights that learn are
    kept in fp32, beside which the 16-bit computation is autocast. DeepSpeed keeps the fp32 copy itself, and wants one
    type throughout.
    """
    frozen = METHODS[method.type].adapter
    options: dict[str, Any] = {"dtype": DTYPES[precision] if frozen or deepspeed else torch.float32, **OWN_WEIGHTS}
    if quantization:
        options |= {
            "quantization_config": settings(quantization.type, precision),
            "device_map": {"": device},
        }
    return options


def with_method(
    model: PreTrainedModel, method: Method, peft_type: str | None, whole: list[str], deepspeed: bool
) -> Any:
    """The model that learns. `whole`: modules trained entirely beside the adapters. Adapters start from torch's current
    seed.
    """
    if not METHODS[method.type].adapter:
        return model
    # On CPUs with AVX512-BF16 bitsandbytes repacks 4-bit weights in the first evaluation, for a kernel without a
    # backward pass, and keeps using it in training: gradients then silently skip the frozen weights.
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    config = PEFT_CONFIGS[method.type](method, peft_type, whole, fused_experts(model))
    try:
        adapted = get_peft_model(model, config, autocast_adapter_dtype=not deepspeed)
    except ValueError as error:
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
    if not deepspeed:
        # PEFT does so for adapters alone: heads would learn in 16 bit, where a small step is rounded away and fp16
        # cannot be unscaled.
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()
    return adapted


def lora_config(method: Method, peft_type: str | None, whole: list[str], experts: Iterable[str] = ()) -> LoraConfig:
    """`experts` are names of parameters that hold the weights of several experts: no modules, so PEFT wants them
    apart.
    """
    targets = method.target_modules
    on_experts = sorted({".".join(name.split(".")[-2:]) for name in experts if name.rpartition(".")[2] in targets})
    return LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules="all-linear" if targets == ALL_LINEAR else list(targets),
        target_parameters=on_experts or None,
        task_type=peft_type,
        modules_to_save=whole or None,
        # all-linear would also put adapters into heads that are trained whole, which PEFT refuses.
        exclude_modules=rf"(.*\.)?({'|'.join(map(re.escape, whole))})(\..*)?" if whole else None,
    )


PEFT_CONFIGS: Mapping[MethodType, Callable[[Method, str | None, list[str], Iterable[str]], PeftConfig]] = {
    "lora": lora_config,
    "qlora": lora_config,
}
"""Method → its adapters: for each row of `METHODS` that makes adapters."""
