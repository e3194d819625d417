"""What a process of the run phase computes with: how many GPUs torch can use, and the precision that suits them.

`prepare` runs without a GPU, so this can only be checked here. Where torch sees no GPU, or fewer than there are
processes, libraries silently use the CPU, or one GPU for several processes.
"""

from __future__ import annotations

import torch

from luthier_api.exitcodes import ExitCode
from luthier_trainer.runtime.failure import Failure

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


def fitting_precision(cpu: bool) -> str:
    """What `precision: auto` means: fp32 on CPU, bf16 on a GPU, fp16 on GPUs before Ampere, which only emulate bf16."""
    if cpu:
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
