"""What a process of the run phase computes with: how many GPUs torch can use, and the precision that suits them.

`prepare` runs without a GPU, so this is seen here. Where torch sees no GPU, or fewer than processes, libraries silently
take the CPU or share one.
"""

from __future__ import annotations

import torch

from luthier_api.exitcodes import ExitCode
from luthier_trainer.runtime.failure import Failure

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def assert_gpus(asked: int, field: str) -> None:
    """Raise Failure(MISCONFIGURED) where torch can use fewer GPUs than the `asked` of this pod."""
    if not asked:
        return  # to ask torch would make it warn of a driver that nobody needs
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if seen >= asked:
        return
    raise Failure(
        ExitCode.MISCONFIGURED,
        f"{field}: {asked} asked for, and torch {torch.__version__} (CUDA: {torch.version.cuda or 'none'}) can use"
        f" {seen}. Check the node's driver and device plugin and the trainer image, or set {field}: 0 to run on CPU",
    )


def fitting_precision(cpu: bool) -> str:
    """What `precision: auto` means: fp32 on CPU, bf16 on a GPU, fp16 on GPUs before Ampere, which only emulate bf16."""
    if cpu:
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
