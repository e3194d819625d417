"""How processes share the work: DeepSpeed's configuration for each strategy, and the check that it really runs.

The check matters: on CPU, transformers and `accelerate launch --cpu` silently train independent replicas, which looks
like a good run on a part of the data. Imported by PID 1, so without torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from luthier_api.exitcodes import ExitCode
from luthier_api.status import Plan
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice

FSDP = "fsdp"
ZERO_STAGE = {"zero1": 1, "zero2": 2, "zero2-offload": 2, "zero3": 3, "zero3-offload": 3}
# Numbers that are sent at once. DeepSpeed has 5e8 for all models: with overlap, gigabytes beside a small one. A share
# of the model is a few layers of it; more than 2e8 makes no message faster.
SMALLEST_BUCKET, LARGEST_BUCKET = 10**7, 2 * 10**8
BUCKETS = 32
NAMES_OF_PRECISIONS = {"no": "fp32"}  # as accelerate calls them → as plans do
PREFETCHED = 5 * 10**7  # DeepSpeed's own limit of what ZeRO-3 gathers ahead


def uses_deepspeed(strategy: str) -> bool:
    return strategy in ZERO_STAGE


def bucket(parameters: int | None) -> int:
    """Numbers that DeepSpeed sends at once, for a model with so many weights."""
    return min(max((parameters or 0) // BUCKETS, SMALLEST_BUCKET), LARGEST_BUCKET)


def within_node(strategy: str, nodes: int, processes: int) -> int:
    """Over how many processes ZeRO-3 divides the copy of the weights from which it gathers them in the backward pass.

    With several nodes these are the `processes` of a node (hpZ of ZeRO++), so that half of the gathering stays off the
    network; each GPU then holds such a part of the weights beside its own. 1: no such copy.
    """
    return processes if strategy == "zero3" and nodes > 1 else 1


def deepspeed_config(
    strategy: str, cpu: bool, parameters: int | None = None, nodes: int = 1, processes: int = 1
) -> dict[str, Any]:
    """DeepSpeed's JSON for `strategy`; what is "auto" is filled in by transformers from its own arguments.

    `parameters`: weights of the model. `processes`: of each of the `nodes`.
    """
    size = bucket(parameters)
    zero: dict[str, Any] = {
        "stage": ZERO_STAGE[strategy],
        "reduce_bucket_size": size,
        "allgather_bucket_size": size,
        "contiguous_gradients": True,
        # While gradients are sent, the next ones are computed. A CPU has no streams for that.
        "overlap_comm": not cpu,
    }
    place = {"device": "cpu", "pin_memory": not cpu}
    if strategy.endswith("-offload"):
        zero["offload_optimizer"] = place
    if ZERO_STAGE[strategy] == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
        zero["stage3_prefetch_bucket_size"] = min(size, PREFETCHED)
        zero["zero_hpz_partition_size"] = within_node(strategy, nodes, processes)
        if strategy.endswith("-offload") and not cpu:
            zero["offload_param"] = place  # on CPU the weights are in that memory already
    return {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
    }


def realised(trainer: Any) -> dict[str, Any]:
    """The settings that this process really runs with, once the trainer has wrapped the model."""
    engine = trainer.model_wrapped
    facts: dict[str, Any] = {
        "device": trainer.args.device.type,
        "processes": trainer.args.world_size,
        "distributed type": trainer.accelerator.distributed_type.value,
        "model": type(engine).__name__,
    }
    recomputing = [m.gradient_checkpointing for m in trainer.model.modules() if hasattr(m, "gradient_checkpointing")]
    facts |= {
        "steps": trainer.state.max_steps,
        "rows in a micro-batch": trainer.args.per_device_train_batch_size,
        "micro-batches in a step": trainer.args.gradient_accumulation_steps,
        "precision": NAMES_OF_PRECISIONS.get(trainer.accelerator.mixed_precision, trainer.accelerator.mixed_precision),
        # Models of other libraries than transformers and diffusers have their own flags.
        "recomputed activations": any(recomputing) if recomputing else trainer.args.activation_checkpointing,
    }
    config = getattr(trainer.model, "config", None)
    if (attention := getattr(config, "_attn_implementation", None)) is not None:
        facts["attention"] = attention
    if hasattr(engine, "zero_optimization_stage"):
        facts["ZeRO stage"] = engine.zero_optimization_stage()
        facts["rows in a micro-batch"] = engine.train_micro_batch_size_per_gpu()
        facts["micro-batches in a step"] = engine.gradient_accumulation_steps()
        facts["optimizer on CPU"] = type(engine.optimizer.optimizer).__name__ == "DeepSpeedCPUAdam"
        facts["overlap"] = engine.zero_overlap_comm()
        facts["bucket"] = engine.zero_reduce_bucket_size()
        facts["processes that share a copy of the weights"] = engine.zero_hpz_partition_size()
    if hasattr(engine, "gradient_as_bucket_view"):
        facts["gradients in buckets"] = engine.gradient_as_bucket_view
    if hasattr(engine, "set_requires_gradient_sync"):  # of FSDP2's modules
        facts["weights divided by FSDP"] = divided_over(engine)
        facts["each pass sums gradients"] = trainer.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch")
    return facts


def divided_over(model: Any) -> int | str:
    """Over how many processes each weight of a model at rest is divided; the name of one that is not, if there is."""
    over = 1
    for name, weight in model.named_parameters():
        places: Any = getattr(weight, "placements", ())
        if not (len(places) == 1 and places[0].is_shard(0)):
            return f"not {name}"
        over = weight.device_mesh.size()
    return over


def count(weights: Iterable[Any]) -> int:
    """Numbers of those weights that learn, also where ZeRO-3 has left this process a part of a weight."""
    return sum(getattr(weight, "ds_numel", None) or weight.numel() for weight in weights if weight.requires_grad)


def requested(plan: Plan, model: str, cpu: bool) -> dict[str, Any]:
    """The settings that `realised` must return. `model` is the class name of the model before it is wrapped."""
    device: dict[str, Any] = {"device": "cpu" if cpu else "cuda"}
    planned = {
        "attention": plan.attention,
        "steps": plan.steps,
        "rows in a micro-batch": plan.micro_batch_size,
        "micro-batches in a step": plan.accumulation_steps,
        "precision": None if plan.precision == "auto" else plan.precision,  # then the GPU decides
        "recomputed activations": plan.gradient_checkpointing,
    }
    device |= {name: value for name, value in planned.items() if value is not None}
    if uses_deepspeed(plan.strategy):
        return device | {
            "processes": plan.world_size,
            "distributed type": "DEEPSPEED",
            "model": "DeepSpeedEngine",
            "ZeRO stage": ZERO_STAGE[plan.strategy],
            "optimizer on CPU": plan.strategy.endswith("-offload"),
            "overlap": not cpu,
            "bucket": bucket(plan.parameters),
            "processes that share a copy of the weights": within_node(
                plan.strategy, plan.world_size // local_processes(), local_processes()
            ),
        }
    if plan.strategy == FSDP:
        return device | {
            "processes": plan.world_size,
            "distributed type": "MULTI_CPU" if cpu else "MULTI_GPU",
            "model": model,  # FSDP2 changes modules in place
            "weights divided by FSDP": plan.world_size,
            "each pass sums gradients": True,
        }
    if plan.world_size == 1:
        return device | {"processes": 1, "distributed type": "NO", "model": model}
    return device | {
        "processes": plan.world_size,
        "distributed type": "MULTI_CPU" if cpu else "MULTI_GPU",
        "model": "DistributedDataParallel",
        "gradients in buckets": True,
    }


def local_processes() -> int:
    """Processes of this node, as torch's agent says it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def assert_started(plan: Plan) -> None:
    """Raise Failure(MISCONFIGURED) when this process was not started as one of the plan's: before it waits for the
    others.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != plan.world_size:
        raise Failure(ExitCode.MISCONFIGURED, _mismatch(plan, [f"processes is {started} instead of {plan.world_size}"]))


def assert_realised(trainer: Any, plan: Plan, unused: int = 0) -> None:
    """Raise Failure(MISCONFIGURED) when this process runs something else than the plan says.

    Gives notice if another number of weights learns than was planned. `unused`: numbers that the plan has counted, and
    that the task does not use.
    """
    asked = requested(plan, type(trainer.model).__name__, cpu=trainer.args.use_cpu)
    runs = realised(trainer)
    wrong = [
        f"{name} is {runs.get(name)!r} instead of {value!r}" for name, value in asked.items() if runs.get(name) != value
    ]
    if wrong:
        raise Failure(ExitCode.MISCONFIGURED, _mismatch(plan, wrong))
    found = count(trainer.model.parameters()) + unused
    if plan.trainable_parameters not in (None, found) and trainer.ranks.first:
        notice(
            f"spec.method: {found:,} weights learn, and the plan has counted {plan.trainable_parameters:,}. Its memory,"
            " and the sizes of checkpoints, are for those"
        )


def _mismatch(plan: Plan, wrong: list[str]) -> str:
    return (
        f"spec.strategy: {plan.strategy} over {plan.world_size} processes was asked for, but {', '.join(wrong)}. "
        "That is not what was planned; start the processes with the image's own command, and with its libraries"
    )
