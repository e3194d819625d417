"""Recognises the errors of CUDA, NCCL and the driver by their texts, with the exit code and a remedy for each.

They come in exceptions; where a thread of these libraries aborts the process, they are only in its output. Imports no
library, because PID 1 reads output with it.
"""

from __future__ import annotations

import re

from luthier_api.exitcodes import ExitCode

SMALLER = (
    "The GPU is full: set training.gradientCheckpointing, a smaller microBatchSize or maxLength, a zero strategy, or"
    " method qlora"
)
BROKEN = "Look at the GPUs of the node (nvidia-smi -q) and its kernel log (Xid)"

# Texts of CUDA 13, cuBLAS, NCCL 2.29 and torch 2.13 (ProcessGroupNCCL). A GPU's own fault comes before that of a peer:
# NCCL's errors quote it.
PATTERNS: tuple[tuple[re.Pattern[str], ExitCode, str], ...] = tuple(
    (re.compile(pattern), code, remedy)
    for pattern, code, remedy in (
        (
            (
                r"CUDA error: out of memory|Cuda failure (2 )?'out of"
                r" memory'|CU(BLAS|DNN|SPARSE|SOLVER)_STATUS_ALLOC_FAILED"
            ),
            ExitCode.CUDA_OUT_OF_MEMORY,
            SMALLER,
        ),
        (
            r"Duplicate GPU detected|invalid device ordinal",
            ExitCode.MISCONFIGURED,
            "There are fewer GPUs than processes: set resources.gpusPerNode to what a node gives",
        ),
        (
            r"no kernel image is available",
            ExitCode.MISCONFIGURED,
            "The trainer image's torch is not built for this GPU: use another GPU, or image",
        ),
        (
            r"driver version is insufficient|driver on your system is too old",
            ExitCode.MISCONFIGURED,
            "Use a newer driver on the node, or an image with an older CUDA",
        ),
        (
            (
                r"uncorrectable (ECC|NVLink) error|[Dd]evice\(?s?\)? is/are busy or unavailable|unspecified launch"
                r" failure|hardware stack error"
            ),
            ExitCode.INFRASTRUCTURE_ERROR,
            BROKEN,
        ),
        (
            r"Watchdog caught collective operation timeout",
            ExitCode.HANG,
            "A process of the group did not come to a collective operation",
        ),
        (
            r"ncclRemoteError|remote process exited|NCCL error|gloo/.*Connection (closed|reset) by peer",
            ExitCode.PEER_LOST,
            "",
        ),
    )
)


def match(text: str) -> tuple[ExitCode, str] | None:
    """The exit code of the error in `text`, and what to do; None if it holds none of these errors."""
    found = rank(text)
    return None if found is None else PATTERNS[found][1:]


def rank(text: str) -> int | None:
    """The index in PATTERNS: of two lines of an output, the one with the smaller number is more specific."""
    return next((i for i, (pattern, _, _) in enumerate(PATTERNS) if pattern.search(text)), None)
