"""The `TrainingArguments` of transformers for a run, made from its spec and its plan.

Constructing them joins the process group of torch.distributed.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import FineTuneJobSpec
from luthier_api.status import Plan
from luthier_trainer.distributed.launch import cores
from luthier_trainer.distributed.strategy import FSDP
from luthier_trainer.runtime.devices import assert_gpus, fitting_precision
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.tasks.base import Task
from luthier_trainer.training import optimizers
from luthier_trainer.workspace import course

GROUP_TIMEOUT_SECONDS = 1800  # transformers' own default
GROUP_TIMEOUT_MARGIN_SECONDS = 300


def training_arguments(
    task: Task, spec: FineTuneJobSpec, plan: Plan, checkpoints: Path, evaluates: bool, step_timeout: float
) -> TrainingArguments:
    """Return the arguments of the task's trainer.

    Batch sizes and the number of steps come from the plan, the learning rate and its schedule from the spec. Reports to
    other services, progress bars and transformers' rotation of checkpoints are off. `step_timeout`: seconds after which
    the supervisor ends a run that hangs.

    Raises Failure if the GPUs are not those that the job asks for, or do not have the requested precision.
    """
    training, cpu = spec.training, spec.resources.gpus_per_node == 0
    assert_gpus(spec.resources.gpus_per_node, "spec.resources.gpusPerNode")
    precision = precision_of(plan, cpu)
    by_steps = training.eval_every == "steps"
    loaders = 0 if cpu or spec.dataset.streaming else task.loader_workers(cores(spec.resources))
    common: dict[str, Any] = {
        "output_dir": str(checkpoints),
        "max_steps": plan.steps or -1,
        "num_train_epochs": training.epochs,
        "per_device_train_batch_size": plan.micro_batch_size or training.batch_size,
        "per_device_eval_batch_size": plan.micro_batch_size or training.batch_size,
        "gradient_accumulation_steps": plan.accumulation_steps or 1,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.schedule,
        "lr_scheduler_kwargs": course.schedule_arguments(training, plan.steps or 0),
        "warmup_steps": course.warmup_steps(training, plan.steps or 0),
        "weight_decay": training.weight_decay,
        **optimizers.arguments(training),
        "neftune_noise_alpha": training.neftune_noise_alpha,
        "max_grad_norm": training.max_grad_norm,
        "seed": training.seed,
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "use_cpu": cpu,
        "ddp_timeout": group_timeout(plan, step_timeout),
        "ddp_backend": "gloo" if cpu and plan.world_size > 1 else None,
        "ddp_find_unused_parameters": False,
        "activation_checkpointing": bool(plan.gradient_checkpointing),
        "activation_checkpointing_kwargs": {"use_reentrant": False} if plan.gradient_checkpointing else None,
        # On a CPU, loader processes would only take cores away from the model. A stream is read ahead by a thread,
        # which knows the position that a checkpoint needs.
        "dataloader_num_workers": loaders,
        "dataloader_persistent_workers": loaders > 0,  # else each epoch and each evaluation starts them anew
        "dataloader_pin_memory": not cpu,
        "label_names": ["labels"],
        "logging_steps": training.log_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # if true, the log shows the last finite mean instead of NaN
        "eval_strategy": training.eval_every if evaluates and (training.eval_steps or not by_steps) else "no",
        "eval_steps": training.eval_steps,
        "batch_eval_metrics": True,
        "save_strategy": training.save_every,
        "save_steps": training.save_steps or 500,  # not used with saveEvery: epoch, but transformers wants a number
        "save_total_limit": None,  # `checkpoint.rotate` removes old checkpoints, after the newest is committed
        "report_to": "none",
        "disable_tqdm": True,
    }
    if plan.strategy == FSDP:
        # Each pass sums its gradients into the shards: until the last one, they would be whole on each GPU.
        common["accelerator_config"] = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    return task.arguments(spec, common)


def group_timeout(plan: Plan, step_timeout: float) -> int:
    """Return how many seconds a process waits for the others in a collective operation before it fails.

    The others wait while one process writes a checkpoint. The timeout is therefore at least twice the planned time of a
    save, in case the volume is slow. The supervisor comes first, because it knows which process does not react, and
    writes the stacks of all.
    """
    patience = max(step_timeout, 2 * (plan.save_seconds or 0))
    return max(GROUP_TIMEOUT_SECONDS, math.ceil(patience) + GROUP_TIMEOUT_MARGIN_SECONDS)


def precision_of(plan: Plan, cpu: bool) -> str:
    """Return the precision of the training: fp32, bf16 or fp16. `cpu`: whether the job trains without GPUs.

    Raises Failure if the spec asks for bf16 and the GPU could only emulate it, which transformers refuses.
    """
    fitting = fitting_precision(cpu)
    if plan.precision not in ("fp32", "bf16", "fp16"):
        return fitting
    if plan.precision == "bf16" and fitting == "fp16":
        raise Failure(
            ExitCode.MISCONFIGURED,
            "spec.training.precision: bf16, which this GPU does not have; use auto or fp16, or choose GPUs from"
            " Ampere on",
        )
    return plan.precision
