"""Whether the weights of a training fit the memory of a GPU, where the administrator has said how large it is.

`prepare` has no GPU to look at, so this is the least that the weights take, and says nothing about activations: what
it refuses would end with 79 at the first step, on GPUs. docs/memory.md has the whole sum. Imports no torch.
"""

from __future__ import annotations

from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import FineTuneJobSpec
from luthier_api.methods import METHODS, QUANTIZATIONS
from luthier_api.run import FineTuneRun, Weights
from luthier_api.status import Plan
from luthier_trainer.distributed.strategy import ZERO_STAGE
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.workspace import space

HALF = 2  # bytes of a frozen weight, and of one that DeepSpeed computes with
LEARNING = 8  # a weight in fp32 and its gradient


def check(run: FineTuneRun, plan: Plan, weights: Weights) -> None:
    """Raises Failure if the weights alone are larger than a GPU of the job's class."""
    if run.gpu is None or run.gpu.memory is None or not run.spec.resources.gpus_per_node:
        return
    needed = least_bytes(run.spec, plan, weights)
    if needed <= run.gpu.memory:
        return
    raise Failure(
        ExitCode.INVALID_SPEC,
        f"spec.resources.gpuClass: the weights alone take at least {space.amount(needed)} of each GPU, and one of class"
        f" {run.spec.resources.gpu_class} has {space.amount(run.gpu.memory)}. Choose a class with more memory, a"
        " strategy that shards the weights (zero3), or a smaller or quantised model (method.type: qlora)",
    )


def least_bytes(spec: FineTuneJobSpec, plan: Plan, weights: Weights) -> int:
    """Bytes of one GPU that the weights take at least, whatever the batch is."""
    stage = ZERO_STAGE.get(plan.strategy)
    whole = not METHODS[spec.method.type].adapter
    # The reference model is a frozen copy where there is no adapter to switch off.
    copy = whole and spec.preference is not None and not spec.preference.precompute_reference
    frozen = weights.total * HALF if copy else 0
    if stage is None and whole:
        return weights.learning * LEARNING + weights.state_bytes + (weights.total - weights.learning) * HALF + frozen
    if stage == 3:
        return 0 if "offload" in plan.strategy else weights.total * HALF // (plan.world_size or 1)
    quantization = spec.model.quantization
    bits = QUANTIZATIONS[quantization.type].bits if quantization else 8 * HALF
    return weights.total * bits // 8 + frozen
