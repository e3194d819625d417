"""What a process of the run phase computes with: how many GPUs torch can use, and the precision that suits them.

`prepare` runs without a GPU, so this can only be checked here. Where torch sees no GPU, or fewer than there are
processes, libraries silently use the CPU, or one GPU for several processes.
"""

from __future__ import annotations

import importlib.util

import torch

from luthier_api.exitcodes import ExitCode
from luthier_trainer.runtime.failure import Failure

AMPERE = (8, 0)  # compute capability
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def assert_gpus(asked: int, field: str) -> None:
    """Raise Failure(MISCONFIGURED) where torch can use fewer GPUs than the `asked` of this pod."""
    if not asked:
        return  # torch would warn of a missing driver, which this job does not need
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if seen >= asked:
        return
    raise Failure(
        ExitCode.MISCONFIGURED,
        f"{field}: {asked} asked for, and torch {torch.__version__} (CUDA: {torch.version.cuda or 'none'}) can use"
        f" {seen}. Check the node's driver and device plugin and the trainer image, or set {field}: 0 to run on CPU",
    )


def fitting_attention(planned: str | None, precision: str, cpu: bool) -> tuple[str | None, str]:
    """(How attention is computed on this device, why it is not as `planned`). `prepare` sees no GPU."""
    if planned != "varlen" or cpu:
        return planned, ""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return "sdpa", f"torch {torch.__version__} has no varlen_attn, which is there from 2.10 on"
    if precision == "fp32":
        return "sdpa", "FlashAttention computes in 16 bits, and this training in fp32"
    if torch.cuda.get_device_capability() < AMPERE:
        return "sdpa", f"FlashAttention needs a GPU from Ampere on, and this is {torch.cuda.get_device_name()}"
    return planned, ""


def use_tf32(asked: bool | None, precision: str, cpu: bool) -> bool:
    """Let products in fp32 be computed in TF32, or not, and return whether they are. `asked`: None by the precision.

    Raises Failure if the job asks for it and the GPU does not have it.
    """
    if cpu:
        return False
    has = torch.cuda.get_device_capability() >= AMPERE
    if asked and not has:
        raise Failure(
            ExitCode.MISCONFIGURED,
            f"spec.training.tf32: {torch.cuda.get_device_name()} does not have it; choose GPUs from Ampere on, or"
            " remove it",
        )
    uses = has and (precision != "fp32" if asked is None else asked)
    torch.set_float32_matmul_precision("high" if uses else "highest")
    return uses


def fitting_precision(cpu: bool) -> str:
    """What `precision: auto` means: fp32 on CPU, bf16 on a GPU, fp16 on GPUs before Ampere, which only emulate bf16."""
    if cpu:
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
