"""An adapter as a whole model: its weights added to those of its base, in the base's own precision, never in 4 bits."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_trainer.ending import Failure
from luthier_trainer.modelfacts import safetensors_header
from luthier_trainer.sources import ADAPTER_CONFIG, OWN_WEIGHTS
from luthier_trainer.taskfacts import FACTS, task_of_adapter

if TYPE_CHECKING:
    from peft import PeftModel

PREFIX = "base_model.model."  # of names in PEFT's files
SHOWN = 5  # weights in a message


def merge(base: Path, adapter: Path, into: Path, labels: list[str] | None, field: str) -> Path:
    """Write base + adapter to `into`. `labels` are a classifier's classes: its base has another head. Raises Failure when they do not fit."""
    import torch
    import transformers
    from peft import PeftModel

    task = FACTS[task_of_adapter(json.loads((adapter / ADAPTER_CONFIG).read_text())) or "causal-lm"]
    options: dict[str, Any] = {"dtype": "auto", **OWN_WEIGHTS}
    if labels:
        names = {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}}
        options |= {"num_labels": len(labels), "ignore_mismatched_sizes": True} | names  # the adapter brings its own head
    model, loaded = getattr(transformers, f"AutoModelFor{task.model}").from_pretrained(base, output_loading_info=True, **options)
    brought = {key.removeprefix(PREFIX) for file in adapter.glob("adapter_model*.safetensors") for key in safetensors_header(file)}
    lacking = {*loaded["missing_keys"], *(key[0] if isinstance(key, tuple) else key for key in loaded["mismatched_keys"])}
    if lost := sorted(lacking - brought):
        # PEFT would leave what was drawn at random, and say nothing.
        raise Failure(ExitCode.INVALID_SPEC, f"{field}: neither the adapter nor its base model {base} has {', '.join(lost[:SHOWN])}")
    if quantised := getattr(model, "is_quantized", False):
        model = model.dequantize()
    try:
        model = PeftModel.from_pretrained(model, str(adapter), torch_device="cpu")
    except (RuntimeError, ValueError, KeyError) as error:
        text = " ".join(str(error).split())[:500]
        raise Failure(ExitCode.INVALID_SPEC, f"{field}: the adapter does not fit its base model {base}: {text}") from error
    untie(model)
    with torch.no_grad():
        merged = model.merge_and_unload(safe_merge=True)
    merged.save_pretrained(into, save_original_format=not quantised)  # transformers cannot turn round how it read the 4 bits
    return into


def untie(model: PeftModel) -> None:
    """Give each module weights of its own where an adapter sits on weights that two modules share: input and output embeddings, as a rule.

    An adapter belongs to one of the two. PEFT 0.21 merges it into the shared weights, and so adds it to the other one as well, or twice
    where both have one (peft issue 2777). `config.tie_word_embeddings` is set accordingly, so that the model is saved and loaded untied.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper
    from transformers import PreTrainedModel

    uses = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    adapted = [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
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
