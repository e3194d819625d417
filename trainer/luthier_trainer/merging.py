"""An adapter as a whole model: its weights added to those of its base, in the base's own precision, never in 4 bits."""

from __future__ import annotations

from pathlib import Path

from luthier_api.exitcodes import ExitCode
from luthier_trainer.ending import Failure


def merge(base: Path, adapter: Path, into: Path, labels: list[str] | None, field: str) -> Path:
    """Write base + adapter to `into`. `labels` are a classifier's classes: its base has another head. Raises Failure when they do not fit."""
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    config = PeftConfig.from_pretrained(str(adapter))
    classifies = getattr(config.task_type, "value", config.task_type) == "SEQ_CLS"
    auto = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    options = {"num_labels": len(labels), "id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}} if labels else {}
    model = auto.from_pretrained(base, dtype="auto", **options)
    if quantised := getattr(model, "is_quantized", False):
        model = model.dequantize()
    try:
        model = PeftModel.from_pretrained(model, str(adapter), torch_device="cpu")
    except (RuntimeError, ValueError, KeyError) as error:
        text = " ".join(str(error).split())[:500]
        raise Failure(ExitCode.INVALID_SPEC, f"{field}: the adapter does not fit its base model {base}: {text}") from error
    with torch.no_grad():
        merged = model.merge_and_unload(safe_merge=True)
    merged.save_pretrained(into, save_original_format=not quantised)  # transformers cannot turn round how it read the 4 bits
    return into
