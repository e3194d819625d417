"""Counts the weights that a method trains, on the meta device, before anything is loaded.

`workspace.space` computes the sizes of checkpoints and results from these numbers.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier_api.finetune import FineTuneJobSpec
from luthier_api.method import Method
from luthier_api.methods import METHODS
from luthier_api.run import Compute, Weights
from luthier_api.status import Plan
from luthier_api.tasks import TASKS
from luthier_trainer.methods import frozen
from luthier_trainer.methods.lora import layer_of
from luthier_trainer.methods.table import FAMILIES
from luthier_trainer.methods.targets import expanded
from luthier_trainer.methods.whole import whole_modules, without_adapters
from luthier_trainer.models.embedding import token_tables
from luthier_trainer.models.inspect import ALL_LINEAR, MODEL, skeleton
from luthier_trainer.workspace.model_files import MODEL_CONFIG
from luthier_trainer.workspace.optimizer_state import Tensor, state_bytes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

HALF = ("bfloat16", "float16")


def weights_of(
    config: PreTrainedConfig, spec: FineTuneJobSpec, plan: Plan, folder: Path, new_tokens: int = 0
) -> Weights:
    """Return the numbers of weights of the model with this configuration, whose files are in `folder`.

    `new_tokens`: tokens whose rows of the embedding an adapter holds.
    """
    from luthier_trainer.models.heads import heads_of

    model = used(config, spec.task)
    rows = (
        []
        if not new_tokens
        else [Tensor((new_tokens, model.get_submodule(name).weight.shape[1])) for name in token_tables(model)]
    )
    return weights_in(model, heads_of(model, spec.task), spec, plan, source_dtype(folder), rows)


def used(config: PreTrainedConfig, task: str) -> PreTrainedModel:
    """Return the model of a task on the meta device, without the modules that the task does not use."""
    model = skeleton(config, task, MODEL)
    for name in TASKS[task].unused:
        if getattr(model, name, None) is not None:
            setattr(model, name, None)
    return model


def compute_of(config: PreTrainedConfig, spec: FineTuneJobSpec, length: float) -> Compute:
    """Return what a token of the model with this configuration is multiplied with, its adapters included.

    `length`: tokens of the row that a token is in, on average.
    """
    from luthier_trainer.models.compute import of_tokens
    from luthier_trainer.models.heads import heads_of

    model = used(config, spec.task)
    return with_adapters(of_tokens(model, config, length), model, heads_of(model, spec.task), spec)


def with_adapters(whole: Compute, model: torch.nn.Module, heads: list[str], spec: FineTuneJobSpec) -> Compute:
    """Return `whole`, of a model all of whose weights learn, as the method of `spec` trains it.

    Of an image, a weight is used in many places: an adapter's share of the weights is taken as that of the work.
    """
    if not METHODS[spec.method.type].adapter:
        return whole
    task_type = TASKS[spec.task].peft_task_type
    learning = [tensor for tensor in adapter_tensors(model, spec.method, heads, task_type) if not tensor.embedding]
    times = 1.0
    if whole.unit == "row":
        times = whole.multiplied / sum(weight.numel() for weight in model.parameters())
    return whole.model_copy(
        update={
            "adapters": round(times * sum(tensor.weights for tensor in learning if tensor.adapter)),
            "learning": round(times * sum(tensor.weights for tensor in learning)),
        }
    )


def weights_in(
    model: torch.nn.Module,
    heads: list[str],
    spec: FineTuneJobSpec,
    plan: Plan,
    source: str,
    rows: Sequence[Tensor] = (),
) -> Weights:
    """Return the numbers of weights of `model`.

    `heads`: modules whose own weights are all trained. `source`: the dtype of the weights in the model's files. `rows`:
    what adapters hold of embeddings.
    """
    from torch.nn.modules.batchnorm import _BatchNorm as batch_norm  # of all dimensions; torch exports no common class

    total = sum(weight.numel() for weight in model.parameters())
    adapters = METHODS[spec.method.type].adapter
    if adapters:
        family = FAMILIES[spec.method.type]
        learning = [*adapter_tensors(model, spec.method, heads, TASKS[spec.task].peft_task_type), *rows]
        kept = family.state_weight_bytes * sum(tensor.weights for tensor in learning if tensor.adapter)
    else:
        learning, kept = tensors_of(model, spec.method, heads), 0
    training = spec.training
    cpu = spec.resources.gpus_per_node == 0
    return Weights(
        total=total,
        learning=sum(tensor.weights for tensor in learning),
        tensors=len(learning),
        learning_bytes=2 if training.parameter_precision == "bf16" else 4,
        state_bytes=kept
        + sum(state_bytes(training.optimizer, training.parameter_precision, tensor) for tensor in learning),
        adapters=adapters,
        computed_bytes=2 if plan.precision in ("bf16", "fp16") or (plan.precision == "auto" and not cpu) else 4,
        source_bytes=2 if source in HALF else 4,
        normalizes_over_batch=any(isinstance(module, batch_norm) for module in model.modules()),
    )


def source_dtype(folder: Path) -> str:
    """Return the name of the dtype of the weights in a model's folder, from its configuration."""
    config = json.loads((folder / MODEL_CONFIG).read_text())
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def tensors_of(model: torch.nn.Module, method: Method, heads: list[str]) -> list[Tensor]:
    """Return the tensors of a model that learn by a method without adapters. `heads`: modules that answer the task."""
    import torch

    from luthier_trainer.models.heads import hidden_matrices

    hidden, learning = hidden_matrices(model, heads), frozen.learning(model, method, heads)
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)}
    return [
        Tensor(tuple(weight.shape), embedding=name in tables, hidden=name in hidden)
        for name, weight in model.named_parameters()
        if name in learning
    ]


def adapter_tensors(
    model: torch.nn.Module, method: Method, whole: list[str], task_type: str | None = None
) -> list[Tensor]:
    """Return each trainable tensor: of the adapters, of the modules in `whole`, and of those that the method names.

    `task_type`: PEFT's name of the task.
    """
    import torch

    family, whole = FAMILIES[method.type], whole_modules(model, method, whole)
    method = expanded(method, model, whole)
    adapted = adapted_modules(model, method, whole)
    found = [Tensor(tuple(bias.shape)) for _, bias in biases_of(model, method, adapted, whole)]
    found += [Tensor(shape, adapter=True) for shape in family.beside(method, model, task_type)]
    for name, module in model.named_modules():
        if name in whole:
            found += [
                Tensor(tuple(weight.shape), embedding=isinstance(part, torch.nn.Embedding))
                for part in module.modules()
                for weight in part.parameters(recurse=False)
            ]
        elif name in adapted:
            weight: torch.Tensor = module.weight
            size = (weight.shape[0], weight[0].numel())
            found += [Tensor(shape, adapter=True) for shape in family.shapes(method, name, size)]
    return found


def inside(name: str, modules: Collection[str]) -> bool:
    """Return whether the module or weight `name` is one of `modules`, or inside one of them."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def adapted_modules(model: torch.nn.Module, method: Method, whole: Collection[str]) -> list[str]:
    """Return the names of the modules that get an adapter. `whole`: those that are trained whole get none."""
    without = [*whole, *without_adapters(model)]
    return [
        name
        for name, module in model.named_modules()
        if gets_adapter(name, module, model, method) and not inside(name, without)
    ]


def biases_of(
    model: torch.nn.Module, method: Method, adapted: Collection[str], whole: Collection[str]
) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield name and weight of the biases that are trained, beside those in modules that are trained `whole`.

    `adapted`: names of the modules with an adapter.
    """
    for name, weight in model.named_parameters():
        module, _, own = name.rpartition(".")
        if own != "bias" or inside(name, whole):
            continue
        if method.bias == "all" or (method.bias == "lora_only" and module in adapted):
            yield name, weight


def gets_adapter(name: str, module: Any, model: torch.nn.Module, method: Method) -> bool:
    """Return whether a module gets an adapter, by the rules of PEFT.

    `all-linear` selects all linear modules except the one that computes the logits of tokens.
    """
    import torch
    from transformers import PreTrainedModel
    from transformers.pytorch_utils import Conv1D

    if method.layers is not None and layer_of(name) not in method.layers:
        return False
    if not method.target_modules:
        return False
    if method.target_modules == [ALL_LINEAR]:
        last = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        return isinstance(module, torch.nn.Linear | Conv1D) and module is not last
    suits = any(name == target or name.endswith(f".{target}") for target in method.target_modules)
    return suits and getattr(module, "weight", None) is not None
