"""Merges adapters into their model.

Their weights are added to those of the base in the base's own precision, never in 4 bits; those of adapters that
belong to a base in 4 bits (`quantised_base`) to what these leave of it. `merge` writes the model that another job
starts from, `add_adapters` changes the model that a GenerateJob runs. Both give the same logits as base + adapter in
PEFT.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_api.tasks import TASKS
from luthier_trainer.models import quantised_base
from luthier_trainer.models.adapters import COPIED, names_in, task_of_adapter
from luthier_trainer.models.embedding import make_room
from luthier_trainer.models.sources import OWN_WEIGHTS
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.workspace.model_files import ADAPTER_CONFIG, MODEL_CONFIG

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

SHOWN = 5  # weights in a message


def outputs_of(adapter: Path) -> list[str] | None:
    """Return the names of the outputs of the head that an adapter brings; None if it has none.

    Tasks with a head save the configuration of the trained model beside the adapter.
    """
    from luthier_trainer.models.heads import labels_in

    task = task_of_adapter(json.loads((adapter / ADAPTER_CONFIG).read_text()))
    has_head = task is not None and TASKS[task].head and (adapter / MODEL_CONFIG).is_file()
    return labels_in(str(adapter)) if has_head else None


def merge(base: Path, adapter: Path, into: Path, labels: list[str] | None, field: str) -> Path:
    """Write base + adapter to the folder `into`, and return it.

    `labels` are the outputs of a head: the adapter brings it, and the base has another one. Raises Failure if the
    adapter and the base do not fit each other.
    """
    import torch
    import transformers
    from peft import PeftModel

    config = json.loads((adapter / ADAPTER_CONFIG).read_text())
    task = task_of_adapter(config)
    if task is None:
        raise Failure(ExitCode.INVALID_SPEC, f"{field}: {adapter / ADAPTER_CONFIG} does not say for which task it is")
    options: dict[str, Any] = {"dtype": "auto", **OWN_WEIGHTS}
    # Some adapters fit the quantised base alone, which is dequantised below.
    options |= (bits := quantised_base.options_of(config))
    if labels:
        names = {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}}
        options |= {
            "num_labels": len(labels),
            "ignore_mismatched_sizes": True,
        } | names  # the adapter brings its own head
    model, loaded = getattr(transformers, str(TASKS[task].auto_class)).from_pretrained(
        base, output_loading_info=True, **options
    )
    lacking = {
        *loaded["missing_keys"],
        *(key[0] if isinstance(key, tuple) else key for key in loaded["mismatched_keys"]),
    }
    if lost := sorted(lacking - names_in(adapter).keys()):
        # PEFT would keep these weights at their random values without a warning.
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: neither the adapter nor its base model {base} has {', '.join(lost[:SHOWN])}",
        )
    if quantised := getattr(model, "is_quantized", False):
        remedy = "Train the adapter on an unquantised model, without initLoraWeights: loftq"
        quantised_base.check_rows(model, field, remedy)
        model = model.dequantize()
    if bits:
        model = model.to(transformers.AutoConfig.from_pretrained(base).dtype or torch.float32)
    make_room(model, adapter)
    try:
        with without_false_alarm():
            model = PeftModel.from_pretrained(model, str(adapter), torch_device="cpu")
    except (RuntimeError, ValueError, KeyError) as error:
        text = " ".join(str(error).split())[:500]
        raise Failure(
            ExitCode.INVALID_SPEC, f"{field}: the adapter does not fit its base model {base}: {text}"
        ) from error
    untie(model)
    with torch.no_grad():
        whole = merged(model, field)
    # transformers cannot invert the conversion by which it has read weights in 4 bits.
    whole.save_pretrained(into, save_original_format=not quantised)
    return into


def add_adapters(
    model: PreTrainedModel, folders: Sequence[Path], weights: Sequence[float], field: str
) -> PreTrainedModel:
    """Return `model` with adapters merged into its weights, each multiplied by its entry of `weights`.

    Adapters of weight 0 are left out. Raises Failure if an adapter does not fit the model.
    """
    used = [(i, folder, weight) for i, (folder, weight) in enumerate(zip(folders, weights, strict=True)) if weight != 0]
    originals = copied_weights(model, [folder for _, folder, _ in used]) if len(used) > 1 else {}
    for i, folder, weight in used:
        model = add_adapter(model, folder, weight, f"{field}[{i}]", originals)
    return model


@contextmanager
def without_false_alarm() -> Iterator[None]:
    """Suppress what PEFT (0.21) says of each AdaLoRA adapter: that the keys of its `rank_pattern` match no module.

    In LoRA they are modules. Here they are names of tensors, which PEFT cuts to the ranks that are left.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"The following rank_pattern keys .*\.lora_E'", RuntimeWarning)
        yield


def copied_weights(model: PreTrainedModel, folders: Sequence[Path]) -> dict[str, torch.Tensor]:
    """Return name → copy of those weights of the model that adapters in `folders` contain as well.

    PEFT saves the embeddings of the base with an adapter that is on them.
    """
    weights = dict(model.named_parameters(remove_duplicate=False))
    names = {
        name.removesuffix(COPIED) + ".weight"
        for folder in folders
        for name in names_in(folder)
        if name.endswith(COPIED)
    }
    return {name: weights[name].detach().clone() for name in names & weights.keys()}


def add_adapter(
    model: PreTrainedModel, folder: Path, weight: float, field: str, originals: Mapping[str, torch.Tensor]
) -> PreTrainedModel:
    """Return the model with one adapter merged into its weights. Raises Failure if it does not fit.

    `originals` are the weights that adapters contain a copy of, as they were in the base before any adapter was merged.
    """
    import torch
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    biases = (
        [(bias, bias.detach().clone()) for name, bias in model.named_parameters() if name.endswith("bias")]
        if weight != 1
        else []
    )
    before = copied_weights(model, [folder]) if originals else {}
    make_room(model, folder)
    try:
        with without_false_alarm():
            adapted = PeftModel.from_pretrained(model, folder)
    except (ValueError, RuntimeError, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise  # an error of the volume, not of the adapter
        raise Failure(ExitCode.INVALID_SPEC, f"{field}: does not fit the model: {error}") from None
    untie(adapted)
    with torch.no_grad():
        # PEFT has replaced the trained biases. Their change is multiplied by the same weight as the rest of the
        # adapter.
        for bias, old in biases:
            bias.copy_(old + weight * (bias - old))
        # PEFT has also replaced embeddings by the adapter's copy, which lacks the changes of earlier adapters.
        for name, old in before.items():
            copied = adapted.base_model.model.get_submodule(name.removesuffix(".weight")).get_base_layer().weight
            copied.copy_(old + (copied - originals[name]))
        for module in adapted.modules():
            if weight != 1 and isinstance(module, LoraLayer):
                module.set_scale("default", weight)
        return merged(adapted, field)


def merged(adapted: PeftModel, field: str) -> PreTrainedModel:
    """Return the model with the adapters merged into its weights. Raises Failure if weights are not finite."""
    try:
        model: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise Failure(ExitCode.INVALID_SPEC, f"{field}: cannot be merged: {error}") from None
    return model


def untie(model: PeftModel) -> None:
    """Copy weights that two modules share, usually input and output embeddings, if an adapter is on one of them.

    The adapter belongs to only one of the two modules. PEFT 0.21 merges it into the shared weights, and so adds it to
    the other module as well, or twice if both modules have one (peft issue 2777). `config.tie_word_embeddings` is set
    to false, so that the model is saved and loaded untied.
    """
    import torch
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
    from transformers import PreTrainedModel

    uses = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    # Where PEFT itself gives both modules the same rows of tokens, they stay tied.
    rows = [module for module in model.modules() if isinstance(module, TrainableTokensLayer)]
    both = {id(one) for layer in rows if layer.tied_adapter for one in (layer, layer.tied_adapter)}
    adapted = [
        module
        for module in model.modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        and id(module.token_adapter if isinstance(module, TrainableTokensWrapper) else module) not in both
    ]
    if not any(uses[id(weight)] > 1 for module in adapted for weight in module.parameters()):
        return
    seen = set[int]()
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if id(weight) in seen:
                setattr(module, name, torch.nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad))
            seen.add(id(weight))
        if isinstance(module, PreTrainedModel):
            module.config.tie_word_embeddings = False
            module.all_tied_weights_keys = {}
