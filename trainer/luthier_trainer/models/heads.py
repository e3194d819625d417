"""Heads of classifiers: which weights belong to them, which are kept, and which begin with random values."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, PreTrainedModel
from transformers.integrations import deepspeed as zero

from luthier_api.tasks import TASKS

# What transformers' architectures call the modules behind the encoder, of which only the last knows how many labels
# there are.
HEADS = ("classifier", "score", "classification_head", "pre_classifier", "logits_proj")
SHOWN = 5  # labels in a notice


def row_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None) -> torch.Tensor:
    """Cross-entropy of each row's label (nats), over the rows of the step."""
    losses = cross_entropy(outputs.logits.float(), labels, reduction="none")
    return losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch


def labels_in(path: str) -> list[str]:
    """The labels that a model's configuration names, by id; `LABEL_0` and so on where it names none."""
    return [name for _, name in sorted((AutoConfig.from_pretrained(path).id2label or {}).items())]


def head_weights(model: PreTrainedModel) -> dict[str, int]:
    """Names of the weights that have a row for each label, and which of their dimensions the labels are. Some models
    have two heads.
    """
    few, more = (shapes(model, labels) for labels in (3, 5))
    differing = {name: [a != b for a, b in zip(shape, more.get(name, ()), strict=False)] for name, shape in few.items()}
    return {name: differs.index(True) for name, differs in differing.items() if True in differs}


def shapes(model: PreTrainedModel, labels: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that such a model would have for so many labels."""
    return {name: tuple(p.shape) for name, p in twin(model, num_labels=labels).named_parameters()}


def twin(model: PreTrainedModel, **settings: Any) -> PreTrainedModel:
    """Such a model on the meta device, with other `settings` in its configuration: without memory, and whole where
    ZeRO-3 has spread it.
    """
    config = copy.deepcopy(model.config)
    for name, value in settings.items():
        setattr(config, name, value)
    with unsharded(), torch.device("meta"):
        return type(model)(config)


@contextmanager
def unsharded() -> Iterator[None]:
    """Models that are made inside are whole: under ZeRO-3 transformers would spread those that are made of models, also
    without memory.
    """
    # transformers 5.23 keeps a weak reference to the configuration by which models are spread. It has a function to set
    # it and one to unset it, but none to read it.
    reference = zero._hf_deepspeed_config_weak_ref
    config = reference() if reference is not None else None
    zero.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            zero.set_hf_deepspeed_config(config)


def fit_head(model: PreTrainedModel, missing: set[str], held: list[str], wanted: list[str]) -> None:
    """Make the rows of a head that was made for the labels `held` those of `wanted`: in their order, or new where the
    labels are others.

    `describe_head` says what will happen, in `prepare`.
    """
    kept = {name: dimension for name, dimension in head_weights(model).items() if name not in missing}
    if held == wanted or not kept:
        return
    order = head_order(held, wanted)
    weights = {name: model.get_parameter(name) for name in kept}
    with gathered(list(weights.values())), torch.no_grad():
        if order:
            for name, weight in weights.items():
                weight.copy_(weight.index_select(kept[name], torch.tensor(order, device=weight.device)))
        else:
            for module in sorted({name.rpartition(".")[0] for name in kept}):
                model.get_submodule(module).reset_parameters()


def head_order(held: list[str], wanted: list[str]) -> list[int] | None:
    """For each label of `wanted`, the row of a head for the labels `held` that is its; None where the head is for other
    labels.

    A head whose labels have no names (LABEL_0, LABEL_1, ...) fits rows whose labels are as many numbers from 0.
    """
    if sorted(held) == sorted(wanted):
        return [held.index(name) for name in wanted]
    if are_unnamed(held) and are_numbers(wanted) and len(held) == len(wanted):
        return [int(name) for name in wanted]
    return None


def are_unnamed(labels: list[str]) -> bool:
    return labels == [f"LABEL_{i}" for i in range(len(labels))]


def are_numbers(labels: list[str]) -> bool:
    return sorted(labels) == sorted(str(i) for i in range(len(labels)))


def describe_head(model: PreTrainedModel, there: Collection[str], held: list[str], wanted: list[str]) -> str:
    """What becomes of the head of a model for the labels `held` when it is trained for `wanted`. `there`: the names of
    the weights in its files.
    """
    new = f"a new one for {shown(wanted)} begins with random weights"
    if not any(name in there for name in head_weights(model)):
        return f"it has no head for labels; {new}"
    order = head_order(held, wanted)
    if order is None:
        hint = ""
        if len(held) == len(wanted) and are_unnamed(held):
            hint = (
                f". If {held[0]} is {wanted[0]}, and so on, name them so under id2label in its config.json, and it is"
                " kept"
            )
        elif len(held) == len(wanted) and are_numbers(wanted):
            hint = f". If 0 is {held[0]}, and so on, write these names into the rows, and it is kept"
        return f"its head is for other labels ({shown(held)}); {new}{hint}"
    if are_unnamed(held) and held != wanted:
        return f"its head names no labels and is kept: {held[0]} is 0, and so on"
    if held != wanted:
        return f"its head knows the labels in another order ({shown(held)}) and is put into ours ({shown(wanted)})"
    return f"its head is for the same labels ({shown(held)}) and is kept"


def shown(labels: list[str]) -> str:
    return ", ".join(labels[:SHOWN]) + ", ..." * (len(labels) > SHOWN)


def gathered(parameters: list[torch.nn.Parameter]) -> Any:
    """Whole weights inside, where ZeRO-3 has spread them over the processes; what the first one makes of them is
    everybody's.
    """
    if not zero.is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


def heads_of(model: PreTrainedModel, task: str) -> list[str]:
    """Modules of a skeleton that are trained whole whatever the adapters: none, for tasks without classes."""
    return whole_modules(model, set()) if TASKS[task].labels else []


def whole_modules(model: PreTrainedModel, new_weights: set[str]) -> list[str]:
    """Modules that adapters must not touch: the head, and what else has no pretrained weights. Only the outermost of
    nested ones.
    """
    names = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in HEADS}
    names |= {weight.rpartition(".")[0] for weight in new_weights | head_weights(model).keys()}
    return sorted(name for name in names if name and not any(name.startswith(f"{other}.") for other in names))
