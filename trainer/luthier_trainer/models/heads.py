"""Heads of classifiers: which weights belong to a head, which are kept, and which start with random values."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, PreTrainedModel
from transformers.integrations import deepspeed as zero

from luthier_api.tasks import TASKS

# Names that transformers' architectures give to the modules after the encoder. Of these modules, only the last has a
# dimension for the labels.
HEADS = ("classifier", "score", "classification_head", "pre_classifier", "projector", "logits_proj", "qa_outputs")
SHOWN = 5  # labels in a notice


def row_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None) -> torch.Tensor:
    """Return the mean cross-entropy of the labels (nats), a scalar.

    `outputs.logits` has the shape (rows, labels), `labels` has the shape (rows,). `num_items_in_batch` is the number of
    rows of the whole optimizer step, over all of its batches; without it, the mean is over the rows of this batch.
    """
    losses = cross_entropy(outputs.logits.float(), labels, reduction="none")
    return losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch


def labels_in(path: str) -> list[str]:
    """Return the labels in a model's configuration in the order of ids; `LABEL_0` and so on if it names none."""
    return [name for _, name in sorted((AutoConfig.from_pretrained(path).id2label or {}).items())]


def head_weights(model: PreTrainedModel) -> dict[str, int]:
    """Return name → dimension of the weights that have one entry for each label along this dimension.

    They are found by comparing the shapes of the model for three and for five labels. Some models have two heads. One
    that has a fixed number of outputs (DistilBERT's for questions) is known by its name.
    """
    if not resizable(model):
        named = [name for name, _ in model.named_parameters() if {*HEADS} & {*name.split(".")}]
        return dict.fromkeys(named, 0)
    # A dimension that differs between three and five labels is the dimension of the labels.
    few, more = (shapes(model, labels) for labels in (3, 5))
    differing = {name: [a != b for a, b in zip(shape, more.get(name, ()), strict=False)] for name, shape in few.items()}
    return {name: differs.index(True) for name, differs in differing.items() if True in differs}


def resizable(model: PreTrainedModel) -> bool:
    """Return whether the model can be made with any number of labels."""
    try:
        twin(model, num_labels=3)
    except ValueError:
        return False
    return True


def shapes(model: PreTrainedModel, labels: int) -> dict[str, tuple[int, ...]]:
    """Return name → shape of the parameters that the model would have for so many labels."""
    return {name: tuple(p.shape) for name, p in twin(model, num_labels=labels).named_parameters()}


def twin(model: PreTrainedModel, **settings: Any) -> PreTrainedModel:
    """Return a model of the same class on the meta device, with `settings` changed in its configuration.

    It takes no memory, and its shapes are complete also where ZeRO-3 has sharded `model`.
    """
    config = copy.deepcopy(model.config)
    for name, value in settings.items():
        setattr(config, name, value)
    with unsharded(), torch.device("meta"):
        return type(model)(config)


@contextmanager
def unsharded() -> Iterator[None]:
    """Create models unsharded inside this context.

    Under ZeRO-3, transformers would also shard models that are created on the meta device.
    """
    # transformers 5.23 keeps a weak reference to the DeepSpeed configuration. It has functions to set and unset it, but
    # none to read it.
    reference = zero._hf_deepspeed_config_weak_ref
    config = reference() if reference is not None else None
    zero.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            zero.set_hf_deepspeed_config(config)


def fit_head(model: PreTrainedModel, missing: set[str], held: list[str], wanted: list[str]) -> None:
    """Change a head that was made for the labels `held` into one for `wanted`, in place.

    Its rows are put into the order of `wanted`, or initialised anew if the labels are others. `missing` are the weights
    that were not in the files: these are random already. `describe_head` announces the same decision in `prepare`.
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
    """Return, for each label of `wanted`, its row in a head for the labels `held`.

    A head whose labels have no names (LABEL_0, LABEL_1, ...) fits rows whose labels are the numbers from 0, if there
    are as many. Returns None if the head is for other labels.
    """
    if len(held) == len(wanted) == 1:  # one number, such as a reward, whatever its name is
        return [0]
    if sorted(held) == sorted(wanted):
        return [held.index(name) for name in wanted]
    if are_unnamed(held) and are_numbers(wanted) and len(held) == len(wanted):
        return [int(name) for name in wanted]
    return None


def are_unnamed(labels: list[str]) -> bool:
    """Return whether the labels are the default names that transformers gives: LABEL_0, LABEL_1, ..."""
    return labels == [f"LABEL_{i}" for i in range(len(labels))]


def are_numbers(labels: list[str]) -> bool:
    """Return whether the labels are the numbers from 0, in any order."""
    return sorted(labels) == sorted(str(i) for i in range(len(labels)))


def describe_head(model: PreTrainedModel, there: Collection[str], held: list[str], wanted: list[str]) -> str:
    """Return a sentence on what happens to the model's head for the labels `held` in a training for `wanted`.

    `there` holds the names of the weights in the model's files.
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
    if len(held) == 1:
        return f"its head answers with one number already ({held[0]}) and is kept"
    if are_unnamed(held) and held != wanted:
        return f"its head names no labels and is kept: {held[0]} is 0, and so on"
    if held != wanted:
        return f"its head knows the labels in another order ({shown(held)}) and is put into ours ({shown(wanted)})"
    return f"its head is for the same labels ({shown(held)}) and is kept"


def shown(labels: list[str]) -> str:
    """Return the first labels, for a message."""
    return ", ".join(labels[:SHOWN]) + ", ..." * (len(labels) > SHOWN)


def unused_parameters(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> set[str]:
    """Return the names of the parameters that do not affect the logits, for example those of a pre-training task.

    `inputs`: of the model, on the meta device, which allocates no memory. Raises whatever the model raises if it does
    not accept them.
    """
    bare = twin(model).eval()
    bare(**inputs).logits.sum().backward()
    return {name for name, weight in bare.named_parameters() if weight.grad is None}


def gathered(weights: list[torch.Tensor], changed: bool = True) -> Any:
    """Return a context in which weights of a model are whole where ZeRO-3 has sharded them over the processes.

    `changed`: whether, at its end, the values that rank 0 has written are distributed to all processes. Without ZeRO-3
    it does nothing.
    """
    if not zero.is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(weights, modifier_rank=0 if changed else None)


def heads_of(model: PreTrainedModel, task: str) -> list[str]:
    """Return the modules of a skeleton that are always trained in full: the heads, for tasks that have one."""
    return whole_modules(model, set()) if TASKS[task].head else []


def whole_modules(model: PreTrainedModel, new_weights: set[str]) -> list[str]:
    """Return the modules that adapters must not be added to: the head, and all others without pretrained weights.

    `new_weights` are the weights that were not in the files. Of nested modules, only the outermost is returned.
    """
    names = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in HEADS}
    names |= {weight.rpartition(".")[0] for weight in new_weights | head_weights(model).keys()}
    return sorted(name for name in names if name and not any(name.startswith(f"{other}.") for other in names))


def hidden_matrices(model: torch.nn.Module, heads: list[str]) -> set[str]:
    """Return the names of the weights that Muon suits: matrices [outputs, inputs] of hidden layers.

    Embeddings, the layer that computes the logits of tokens, and the modules in `heads` are none of them.
    """
    import torch
    from transformers import PreTrainedModel

    last = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    outside = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) or module is last or name in heads
    ]
    return {
        name
        for name, weight in model.named_parameters()
        if weight.ndim == 2 and not any(name.startswith(f"{module}.") for module in outside)
    }
