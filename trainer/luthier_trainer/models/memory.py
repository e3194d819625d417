"""What a training needs of a GPU, from the model's configuration alone: on the meta device, which takes no memory.

The model has its method, heads and types as in a training, and `step_trace` runs one step of it, for two numbers of
rows. The operations are the same, so each moment of the step is a line over the number of rows, and the highest of
these lines are kept (`luthier_api.run.Moment`). `workspace.gpu_memory` computes the peak of a layout from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from luthier_api.finetune import FineTuneJobSpec
from luthier_api.methods import QUANTIZATIONS, QuantizationType
from luthier_api.run import MemoryFacts, Moment, StepMemory, Weights
from luthier_trainer.models.step_trace import ALIGNMENT, Autocast, Device, Ledger, attention_of
from luthier_trainer.workspace import gpu_memory

FEW, MORE = 2, 3  # rows of the two traces. A single row would do without some copies that two rows need.
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 1024)  # for which a moment may be the highest
SHOWN = 200  # characters of a message of another library


@dataclass(frozen=True)
class Trial:
    """A step of a training, as the task computes it, on the meta device."""

    model: Any
    """Without the method."""
    batch: Callable[[int], Mapping[str, Any]]
    """Number of rows → a batch of that many of the longest rows."""
    loss: Callable[..., torch.Tensor] | None
    """(outputs, labels) → the loss; None: the model computes it from the labels."""
    heads: list[str]
    """Modules whose weights are all trained."""
    row_tokens: int = 0
    """Tokens of the longest row; 0 if rows have none."""
    mixed_lengths: bool = False
    """Whether rows have different numbers of tokens."""
    packed: bool = False
    """Whether a row holds several documents that do not see each other."""

    @property
    def padded(self) -> bool:
        """Whether attention needs a mask in the largest micro-batch."""
        return self.packed or self.mixed_lengths


@dataclass(frozen=True)
class Setting:
    """How a step is computed."""

    device: Device
    dtype: torch.dtype | None
    """Of autocast; None: everything is computed in the type of the weights."""
    checkpointing: bool = False
    padded: bool = False


@dataclass(frozen=True)
class Step:
    """A step for one number of rows: bytes."""

    kept: int
    """That autograd keeps of the forward pass, beside weights."""
    moments: list[tuple[int, int]]
    """At each moment: of all but the gradients of weights, and of these."""


def facts_of(
    model: Any,
    trial: Trial,
    quantised: Mapping[str, Any],
    spec: FineTuneJobSpec,
    weights: Weights,
    dtype: torch.dtype | None,
) -> MemoryFacts:
    """Return what the memory of any layout of this training is computed from.

    `model`: that of `trial` with its method. `quantised`: its layers that rest in few bits, by name. `dtype`: of
    autocast, if any. If the step cannot be run on the meta device, the facts have the reason instead of steps.
    """
    kind = spec.model.quantization.type if spec.model.quantization else None
    few_bits = {id(module.weight) for module in quantised.values()}
    parameters = list(model.parameters())
    learning = [weight for weight in parameters if weight.requires_grad]
    resting = sum(size_of(weight, kind if id(weight) in few_bits else None) for weight in parameters)
    facts = MemoryFacts(
        **gpu_memory.of_weights(spec, weights),
        weight_bytes=resting + sum(buffer.nbytes for buffer in model.buffers()),
        gradient_bytes=sum(weight.nbytes for weight in learning),
        largest_unit=max(sum(weight.numel() for weight in unit.parameters()) for unit in units_of(model)),
        unpacked_bytes=max((m.weight.numel() * weights.computed_bytes for m in quantised.values()), default=0),
        largest_learning=max(weight.numel() for weight in learning),
        row_tokens=trial.row_tokens,
        mixed_lengths=trial.mixed_lengths,
        packed=trial.packed,
    )
    cpu = not spec.resources.gpus_per_node
    setting = Setting("cpu" if cpu else "cuda", dtype, padded=trial.padded)
    kinds = (bool(spec.training.gradient_checkpointing),) if cpu else (False, True)
    try:
        steps = [
            step_of(model, trial, replace(setting, checkpointing=kind))
            for kind in kinds
            if not kind or getattr(trial.model, "supports_gradient_checkpointing", False)
        ]
    except Exception as error:  # each architecture fails in its own way where it reads values, which meta tensors lack
        what = " ".join(str(error).split())[:SHOWN]
        return facts.model_copy(update={"missing": f"{type(error).__name__}: {what}"})
    return facts.model_copy(update={"steps": steps})


def step_of(model: Any, trial: Trial, setting: Setting) -> StepMemory:
    """Return what a step holds as lines over the number of rows.

    Raises ValueError if other operations are computed for more rows.
    """
    few, more = (traced(model, trial.batch(rows), trial.loss, setting) for rows in (FEW, MORE))
    if len(few.moments) != len(more.moments):
        raise ValueError(f"{len(few.moments)} operations for {FEW} rows, and {len(more.moments)} for {MORE}")
    lines = {
        Moment(fixed=a - FEW * (b - a), per_row=b - a, gradients=gradients)
        for (a, gradients), (b, _) in zip(few.moments, more.moments, strict=True)
    }
    per_row = more.kept - few.kept
    return StepMemory(
        checkpointing=setting.checkpointing,
        padded=setting.padded,
        kept_fixed=few.kept - FEW * per_row,
        kept_per_row=per_row,
        moments=highest(lines),
    )


def highest(lines: Iterable[Moment]) -> list[Moment]:
    """Return those of `lines` that are the highest for some number of rows, with gradients counted or not."""
    lines = list(lines)
    kept = []
    for counted in (0, 1):
        for rows in ROWS:
            kept.append(max(lines, key=lambda line: line.fixed + rows * line.per_row + counted * line.gradients))
    return list(dict.fromkeys(kept))


def traced(model: Any, batch: Mapping[str, Any], loss: Callable[..., torch.Tensor] | None, setting: Setting) -> Step:
    """Run a step on the meta device: forward pass, loss and backward pass."""
    inputs = dict(batch)
    labels = inputs["labels"] if loss is None else inputs.pop("labels")
    if not setting.padded and "position_ids" not in inputs:
        inputs.pop("attention_mask", None)
    ledger = Ledger([*model.parameters(), *model.buffers()], ALIGNMENT[setting.device])
    for tensor in batch.values():
        if isinstance(tensor, torch.Tensor):
            ledger.add(tensor)
    autocast = Autocast(setting.device, setting.dtype, attention_of(setting.device), needs_mask=setting.padded)
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    hooks = [weight.register_post_accumulate_grad_hook(ledger.is_gradient) for weight in learning]
    try:
        with checkpointing(model, setting.checkpointing), autocast.in_place(), ledger, autocast:
            with torch.autograd.graph.saved_tensors_hooks(ledger.keep, lambda tensor: tensor):
                autocast.enabled = autocast.keeps = True
                outputs = model(**inputs)
                autocast.forget()
                if setting.dtype is not None:
                    outputs = in_fp32(outputs)  # as accelerate does
                value = outputs["loss"] if loss is None else loss(outputs, labels)
            del outputs
            # For what is recomputed: each part has a context of its own, which keeps no weight after its end.
            autocast.enabled, autocast.keeps = True, False
            # torch's own function for it would leave the mode.
            torch.autograd.Variable._execution_engine.run_backward(
                (value,), (torch.ones_like(value),), False, False, (), allow_unreachable=True, accumulate_grad=True
            )
            del value
    finally:
        for hook in hooks:
            hook.remove()
        for weight in learning:
            weight.grad = None
    return Step(sum(ledger.kept.values()), ledger.moments)


@contextmanager
def checkpointing(model: Any, wanted: bool) -> Iterator[None]:
    """Recompute activations inside this context, if `wanted`, as the trainer does."""
    model.train()
    if not wanted:
        yield
        return
    model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()


def in_fp32(value: Any) -> Any:
    """Return outputs of a model with all floating-point tensors in fp32."""
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: in_fp32(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [in_fp32(item) for item in value]
    return value


def size_of(weight: torch.Tensor, kind: QuantizationType | None) -> int:
    """Return the bytes of a weight, which rests in few bits if `kind` is not None."""
    return weight.nbytes if kind is None else int(weight.numel() * QUANTIZATIONS[kind].bits_with_scales / 8)


def quantised_layers(model: Any) -> dict[str, Any]:
    """Return name → linear layer that bitsandbytes quantises: all but the output embeddings and heads."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert

    from luthier_trainer.models.heads import HEADS

    kept = {*get_keys_to_not_convert(model), *HEADS}
    return {
        name: module
        for name, module in model.named_modules()
        if (type(module) is torch.nn.Linear or isinstance(module, Conv1D))
        and not any(f".{k}." in f".{name}." for k in kept)
    }


def units_of(model: Any) -> list[Any]:
    """Return the modules whose weights ZeRO-3 gathers at once at least: those of the lists of layers, and others."""
    layers = [part for module in model.modules() if isinstance(module, torch.nn.ModuleList) for part in module]
    others = [module for module in model.modules() if isinstance(module, (torch.nn.Embedding, torch.nn.Linear))]
    return [*layers, *others]
