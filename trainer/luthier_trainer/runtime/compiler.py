"""Whether a pod can compile what torch generates (`training.torchCompile`, FlexAttention). Imports no torch."""

from __future__ import annotations

import os
import shlex
import shutil
import sysconfig
from pathlib import Path

from luthier_api.attention import ATTENTIONS
from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import FineTuneJobSpec
from luthier_trainer.runtime.failure import Failure

C_COMPILERS = ("gcc", "clang", "cc")  # Triton's, for the small program that starts a kernel
CXX_COMPILERS = ("g++", "clang++")  # Inductor's, for kernels of CPUs


def needs_compiler(spec: FineTuneJobSpec) -> str | None:
    """Return the field of the spec for which torch compiles in the pods of `run`, if any."""
    if spec.training.torch_compile:
        return "spec.training.torchCompile"
    attention = spec.training.attention
    return "spec.training.attention" if attention and ATTENTIONS[attention].compiles else None


def check(spec: FineTuneJobSpec) -> None:
    """Check that there is a compiler where the job needs one. Raises Failure if not.

    `prepare` and `run` have the same image, so that `prepare` refuses it.
    """
    field = needs_compiler(spec)
    if field is None:
        return
    gpu = spec.resources.gpus_per_node > 0
    named, known = ("CC", C_COMPILERS) if gpu else ("CXX", CXX_COMPILERS)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    found = any(shutil.which(name) for name in (shlex.split(os.environ.get(named, "")) or known)[:3])
    if found and header.exists():
        return
    missing = f"a compiler ({', '.join(known)})" if not found else f"Python's headers ({header})"
    raise Failure(
        ExitCode.INVALID_SPEC,
        f"{field}: torch compiles for it in the pods, and this image lacks {missing}. Remove the field, or use a"
        " trainer image that was built with COMPILER=gcc",
    )
