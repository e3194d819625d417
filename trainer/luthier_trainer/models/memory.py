"""What a training needs of a GPU, from the model's configuration alone: on the meta device, which takes no memory.

The model has its method, heads and types as in a training, and `step_trace` records one step of it, for two numbers of
rows. The operations are the same, so each moment of the step is a line over the number of rows, and the highest of
these lines are kept (`luthier_api.run.Moment`). `workspace.gpu_memory` computes the peak of a layout from them.

A loss that computes some tokens at a time holds no more of them where there are more rows. So there are lines for few
rows, and others for those from which on its first chunk is full.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from luthier_api.finetune import FineTuneJobSpec
from luthier_api.methods import QUANTIZATIONS, QuantizationType
from luthier_api.run import MemoryFacts, Moment, StepMemory, Weights
from luthier_trainer.models.fsdp import blocks
from luthier_trainer.models.generation_trace import Generation, written
from luthier_trainer.models.meta_kernels import Device
from luthier_trainer.models.step_trace import ALIGNMENT, Autocast, Ledger
from luthier_trainer.workspace import gpu_memory

FEW = 2  # rows of the first of two traces. A single row would do without some copies that two rows need.
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 1024)  # for which a moment may be the highest
SHOWN = 200  # characters of a message of another library


Batch = Mapping[str, Any]
LossStep = Callable[["Forward", dict[str, Any]], torch.Tensor]
"""(the model, a batch) → the loss, a scalar, as the trainer of the task computes it."""


class Forward:
    """Computes the outputs of a model as a trainer does: with autocast, and then in fp32, as accelerate lets it."""

    def __init__(self, model: Any, autocast: Autocast) -> None:
        self.model, self._autocast = model, autocast

    def __call__(self, **inputs: Any) -> Any:
        """Return the outputs of the model: a mapping."""
        self._autocast.enabled = self._autocast.keeps = True
        outputs = self.model(**inputs)
        self._autocast.enabled = False
        self._autocast.forget()
        return outputs if self._autocast.dtype is None else in_fp32(outputs)

    def of_base(self) -> Forward:
        """Return the same for the model inside an adapter of PEFT, which has the adapter's layers."""
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        return Forward(model, self._autocast)

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Compute without gradients, and without the adapter where there is one."""
        with torch.no_grad(), getattr(self.model, "disable_adapter", nullcontext)():
            yield


@dataclass(frozen=True)
class Trial:
    """A step of a training, as the task computes it, on the meta device."""

    model: Any
    """Without the method."""
    batch: Callable[[int], Batch]
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
    step: LossStep | None = None
    """How a trainer computes the loss that does more than calling the model once; `loss` is then left out."""
    loss_tokens: int = 0
    """Tokens that the loss computes at once; 0 if it computes all of them."""
    beside: tuple[Any, ...] = ()
    """Other models of the step, which are frozen, with the types that they have in the training."""
    writes: Generation | None = None
    """What the model writes before a step learns from it."""
    evaluates: Callable[[Forward, dict[str, Any]], object] | None = None
    """What an evaluation computes of a batch, if that may hold more than a step does."""

    @property
    def padded(self) -> bool:
        """Whether attention needs a mask in the largest micro-batch."""
        return self.packed or self.mixed_lengths

    def computed(self, forward: Forward, batch: dict[str, Any]) -> torch.Tensor:
        """Return the loss of a batch."""
        if self.step is not None:
            return self.step(forward, batch)
        if self.loss is None:
            found: torch.Tensor = forward(**batch)["loss"]
            return found
        labels = batch.pop("labels")
        return self.loss(forward(**batch), labels)


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
    kernels: int
    """Operations that compute something."""
    moved: int
    """That all of them read and write."""


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
    block_sizes = [sum(weight.numel() for weight in block.parameters()) for block in blocks(model)]
    facts = MemoryFacts(
        **gpu_memory.of_weights(spec, weights),
        weight_bytes=resting + sum(buffer.nbytes for buffer in model.buffers()),
        gradient_bytes=sum(weight.nbytes for weight in learning),
        largest_block=max(block_sizes, default=0),
        outside_blocks=sum(weight.numel() for weight in parameters) - sum(block_sizes),
        largest_unit=max(sum(weight.numel() for weight in unit.parameters()) for unit in units_of(model)),
        unpacked_bytes=max((m.weight.numel() * weights.computed_bytes for m in quantised.values()), default=0),
        largest_learning=max(weight.numel() for weight in learning),
        beside_bytes=sum(weight.nbytes for other in trial.beside for weight in other.parameters()),
        row_tokens=trial.row_tokens,
        mixed_lengths=trial.mixed_lengths,
        packed=trial.packed,
    )
    cpu = not spec.resources.gpus_per_node
    setting = Setting("cpu" if cpu else "cuda", dtype, padded=trial.padded)
    kinds = (bool(spec.training.gradient_checkpointing),) if cpu else (False, True)
    try:
        steps = [
            step
            for kind in kinds
            if not kind or can_recompute(trial.model)
            for step in steps_of(model, trial, replace(setting, checkpointing=kind))
        ]
        beside = moments_beside(model, trial, setting)
    except Exception as error:  # each architecture fails in its own way where it reads values, which meta tensors lack
        what = " ".join(str(error).split())[:SHOWN]
        return facts.model_copy(update={"missing": f"{type(error).__name__}: {what}"})
    return facts.model_copy(update={"steps": steps, **beside})


def moments_beside(model: Any, trial: Trial, setting: Setting) -> dict[str, list[Moment]]:
    """Return what is held beside steps: while the model writes what they learn from, and in an evaluation."""
    found = {}
    if writes := trial.writes:
        found["writing"] = lines_of(lambda rows: generated(model, writes, rows, setting))
    if trial.writes or trial.evaluates:
        found["evaluating"] = lines_of(lambda rows: evaluated(model, trial, rows, setting))
    return found


def steps_of(model: Any, trial: Trial, setting: Setting) -> Iterator[StepMemory]:
    """Yield what a step holds: for few rows, and for those with which the first chunk of the loss is full."""
    yield step_of(model, trial, setting)
    if trial.loss_tokens:
        tokens = max(value.numel() for value in trial.batch(1).values() if isinstance(value, torch.Tensor))
        full = math.ceil(trial.loss_tokens / tokens)
        if FEW < full <= ROWS[-1]:
            yield step_of(model, trial, setting, full)


def step_of(model: Any, trial: Trial, setting: Setting, rows: int = 1) -> StepMemory:
    """Return what a step of `rows` rows or more holds, as lines over the number of rows.

    Raises ValueError if other operations are computed for more rows.
    """
    first = max(rows, FEW)
    few, more = (traced(model, trial, number, setting) for number in (first, first + 1))
    per_row, moved = more.kept - few.kept, more.moved - few.moved
    return StepMemory(
        checkpointing=setting.checkpointing,
        padded=setting.padded,
        rows=rows,
        kept_fixed=few.kept - first * per_row,
        kept_per_row=per_row,
        kernels=few.kernels,
        moved_fixed=few.moved - first * moved,
        moved_per_row=moved,
        moments=between(few, more, first),
    )


def lines_of(held: Callable[[int], Step]) -> list[Moment]:
    """Return the highest moments of something else than a step. `held`: number of rows → what it holds."""
    return between(held(FEW), held(FEW + 1), FEW)


def between(few: Step, more: Step, rows: int) -> list[Moment]:
    """Return the highest of the lines through the moments for `rows` rows, and for one more.

    Raises ValueError if other operations are computed for more rows.
    """
    if len(few.moments) != len(more.moments):
        raise ValueError(f"{len(few.moments)} operations for {rows} rows, and {len(more.moments)} for {rows + 1}")
    return highest(
        Moment(fixed=a - rows * (b - a), per_row=b - a, gradients=gradients)
        for (a, gradients), (b, _) in zip(few.moments, more.moments, strict=True)
    )


def highest(lines: Iterable[Moment]) -> list[Moment]:
    """Return those of `lines` that are the highest for some number of rows, with gradients counted or not."""
    lines = set(lines)
    kept = []
    for counted in (0, 1):
        for rows in ROWS:
            kept.append(max(lines, key=lambda line: line.fixed + rows * line.per_row + counted * line.gradients))
    return list(dict.fromkeys(kept))


def traced(model: Any, trial: Trial, rows: int, setting: Setting) -> Step:
    """Run a step on the meta device: forward pass, loss and backward pass."""
    inputs = inputs_of(trial, rows, setting)
    ledger, autocast = prepared(model, inputs.values(), setting)
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    hooks = [weight.register_post_accumulate_grad_hook(ledger.is_gradient) for weight in learning]
    try:
        with checkpointing(model, setting.checkpointing), autocast.in_place(), ledger, autocast:
            with torch.autograd.graph.saved_tensors_hooks(ledger.keep, lambda tensor: tensor):
                value = trial.computed(Forward(model, autocast), inputs)
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
    return Step(sum(ledger.kept.values()), ledger.moments, ledger.kernels, ledger.moved)


def evaluated(model: Any, trial: Trial, rows: int, setting: Setting) -> Step:
    """Compute a batch without gradients on the meta device, as an evaluation does."""
    inputs = inputs_of(trial, rows, setting)
    ledger, autocast = prepared(model, inputs.values(), setting)
    with torch.no_grad(), checkpointing(model, False), autocast.in_place(), ledger, autocast:
        model.eval()
        (trial.evaluates or trial.computed)(Forward(model, autocast), inputs)
    return Step(0, ledger.moments, ledger.kernels, ledger.moved)


def generated(model: Any, writes: Generation, rows: int, setting: Setting) -> Step:
    """Let the model write completions of `rows` prompts on the meta device."""
    ledger, autocast = prepared(model, (), setting)
    with torch.no_grad(), checkpointing(model, False), autocast.in_place(), ledger, autocast:
        written(Forward(model, autocast), writes, rows)
    return Step(0, ledger.moments, ledger.kernels, ledger.moved)


def inputs_of(trial: Trial, rows: int, setting: Setting) -> dict[str, Any]:
    """Return a batch. Attention masks are left out where models find that they mask nothing."""
    batch = trial.batch(rows)
    masks = () if setting.padded or "position_ids" in batch else [name for name in batch if "attention_mask" in name]
    return {name: value for name, value in batch.items() if name not in masks}


def prepared(model: Any, inputs: Iterable[Any], setting: Setting) -> tuple[Ledger, Autocast]:
    """Return the modes that record what `model` does with `inputs`, which are there from the beginning."""
    ledger = Ledger([*model.parameters(), *model.buffers()], ALIGNMENT[setting.device])
    for tensor in inputs:
        if isinstance(tensor, torch.Tensor):
            ledger.add(tensor)
    return ledger, Autocast(setting.device, setting.dtype, needs_mask=setting.padded)


def can_recompute(model: Any) -> bool:
    """Return whether a model of transformers or diffusers can recompute its activations."""
    return bool(
        getattr(model, "supports_gradient_checkpointing", False)
        or getattr(model, "_supports_gradient_checkpointing", False)
    )


@contextmanager
def checkpointing(model: Any, wanted: bool) -> Iterator[None]:
    """Recompute activations inside this context, if `wanted`, as the trainer does."""
    model.train()
    if not wanted:
        yield
        return
    own = model.get_base_model() if hasattr(model, "get_base_model") else model
    of_diffusers = hasattr(own, "enable_gradient_checkpointing")
    if of_diffusers:
        own.enable_gradient_checkpointing()
    else:
        model.activation_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        (own.disable_gradient_checkpointing if of_diffusers else model.activation_checkpointing_disable)()


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
    """Return name → linear layer that bitsandbytes quantises: all but the output embeddings, heads, and layers that the
    model wants in fp32, such as one of T5's.
    """
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert

    from luthier_trainer.models.heads import HEADS

    kept = {*get_keys_to_not_convert(model), *(getattr(model, "_keep_in_fp32_modules", None) or ()), *HEADS}
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
