"""What tells the tasks apart, in names alone: no phase has to import torch to ask.

Neighbours: `tasks` has what training does for each of them, `data` what `prepare` does with texts and with images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class TaskFacts:
    model: str
    """What transformers' classes of such models are named for: AutoModelFor<model>, LlamaFor<model>."""
    pipeline_tag: str
    """The Hub's name of the task."""
    inputs: Literal["text", "image"] = "text"
    labelled: bool = False
    """Each row has a class, which a head of the model answers with."""
    peft_type: str | None = None
    """PEFT's name of the task. For those it has no name for, its adapters remember the class of their base model."""

    @property
    def processor_class(self) -> str:
        """transformers' class that turns inputs into tensors."""
        return {"text": "AutoTokenizer", "image": "AutoImageProcessor"}[self.inputs]


FACTS: Mapping[str, TaskFacts] = {
    "causal-lm": (causal := TaskFacts("CausalLM", "text-generation", peft_type="CAUSAL_LM")),
    "text-classification": TaskFacts(
        "SequenceClassification", "text-classification", labelled=True, peft_type="SEQ_CLS"
    ),
    "image-classification": TaskFacts("ImageClassification", "image-classification", inputs="image", labelled=True),
    "text-generation": causal,
}
"""The tasks whose models are transformers': those of a FineTuneJob, and of a GenerateJob."""


def task_of_adapter(config: Mapping[str, Any]) -> str | None:
    """The task that an adapter was trained for, by its adapter_config.json; None where that does not tell, or tells
    another.
    """
    peft_type, base = config.get("task_type"), (config.get("auto_mapping") or {}).get("base_model_class") or ""
    return next(
        (t for t, f in FACTS.items() if (f.peft_type == peft_type if peft_type else base.endswith(f"For{f.model}"))),
        None,
    )
