"""`prepare` computes a step of the training on the meta device, with the method of the job, to plan its memory."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from luthier_api.attention import ATTENTIONS
from luthier_api.finetune import FineTuneJobSpec
from luthier_api.methods import METHODS
from luthier_api.run import MemoryFacts, Weights
from luthier_api.status import Plan
from luthier_api.tasks import TASKS
from luthier_trainer.distributed.strategy import FSDP, uses_deepspeed
from luthier_trainer.models.inspect import MODEL
from luthier_trainer.runtime.notices import notice
from luthier_trainer.tasks.base import Model, Task
from luthier_trainer.workspace import gpu_memory

SHOWN = 200  # characters of a message of another library

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from datasets import Dataset

    from luthier_trainer.models.memory import Trial


def memory_facts(
    task: Task,
    model: Model,
    spec: FineTuneJobSpec,
    plan: Plan,
    weights: Weights,
    labels: list[str] | None,
    rows: Dataset | None,
    others: Sequence[Path] = (),
) -> MemoryFacts:
    """Return what the memory of any layout of the job is computed from. Gives notice of what is not part of it.

    `rows`: encoded; None before they are read. `others`: folders of the models that the task uses besides. Without GPUs
    a step is computed if there is a limit to compare it with, because it takes seconds for a deep model.
    """
    if not spec.resources.gpus_per_node and spec.resources.memory is None:
        return gpu_memory.without_model(spec, weights, "resources.memory is not set, and nothing is compared with it")
    try:
        trial = task.trial(model, spec, labels, rows)
        if isinstance(trial, str):
            facts = gpu_memory.without_model(spec, weights, trial)
        else:
            held = model.new_tokens if METHODS[spec.method.type].adapter else ()
            facts = facts_of_trial(trial, spec, plan, weights, held)
    except Exception as error:  # what an architecture cannot do on the meta device must not end the job
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:SHOWN]}"
        facts = gpu_memory.without_model(spec, weights, what)
    if facts.missing:
        notice(f"{MODEL}: the planned memory lacks what is kept for the backward pass: {facts.missing}")
    beside = sum(file.stat().st_size for folder in others for file in folder.glob("*.safetensors"))
    return facts.model_copy(update={"beside_bytes": facts.beside_bytes + beside})


def facts_of_trial(
    trial: Trial, spec: FineTuneJobSpec, plan: Plan, weights: Weights, new_tokens: Sequence[int] = ()
) -> MemoryFacts:
    """Return the facts of a step, with the types and the method of the job.

    `new_tokens`: those whose rows of the embedding an adapter holds. Precision auto counts as bf16, as GPUs have it.
    """
    import torch

    from luthier_trainer.methods.apply import with_method
    from luthier_trainer.models import memory
    from luthier_trainer.runtime.devices import DTYPES

    computed = DTYPES["bf16" if plan.precision in (None, "auto") else plan.precision]
    adapter = METHODS[spec.method.type].adapter
    # FSDP gathers the weights of full fine-tuning in the type of the computation, in which DeepSpeed has them.
    deepspeed = uses_deepspeed(plan.strategy) or (plan.strategy == FSDP and not adapter)
    in_16_bits = spec.training.parameter_precision == "bf16"
    trial.model.to(computed if adapter or deepspeed or in_16_bits else torch.float32)
    attention = ATTENTIONS.get(plan.attention)  # type: ignore[call-overload]  # None is no name of one
    if attention and attention.documents:
        trial = replace(trial, packed=False)  # no mask is made
    quantised = memory.quantised_layers(trial.model) if spec.model.quantization else {}
    with torch.device("meta"):
        model = with_method(
            trial.model, spec.method, TASKS[spec.task].peft_task_type, trial.heads, deepspeed, new_tokens
        )
    autocast = None if deepspeed or computed == torch.float32 else computed
    if autocast is not None:
        # PEFT's adapters on layers of bitsandbytes leave the type of their input to autocast; others convert it.
        few_bits = set(quantised.values())
        for module in model.modules():
            if getattr(module, "base_layer", None) in few_bits:
                module.cast_input_dtype_enabled = False
    return memory.facts_of(model, trial, quantised, spec, weights, autocast)
