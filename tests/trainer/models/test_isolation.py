"""Packed documents do not see each other: of each family, a model is tried as training runs it, or refused."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from luthier_trainer.models import isolation
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.tasks.batches import TokenCollator

PADDING = 3
DOCUMENTS = [[11, 12, 13, 14, 15, 16, 17, 18, 19], [21, 22, 23, 24, 25, 26], [31, 32, 33, 34, 35, 36, 37]]


@dataclass(frozen=True)
class Family:
    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    isolates: bool = True
    exactly: bool = True
    """Whether other documents change nothing at all. The experts of a mixture are computed in batches whose sizes
    depend on all documents, which rounds differently.
    """

    @property
    def name(self) -> str:
        return " ".join([self.model_type, *(f"{key}={value}" for key, value in self.config.items())])


WINDOW = {"sliding_window": 4}
FAMILIES = [
    Family("llama"),
    Family("gpt2"),
    Family("qwen2"),
    Family("qwen3"),
    Family("mistral", WINDOW),
    Family("gemma2", WINDOW),
    Family("gemma3_text", WINDOW),
    Family("gpt_neox"),
    Family("phi3", WINDOW),
    Family("mixtral", WINDOW, exactly=False),
    Family("qwen3_moe", exactly=False),
    # transformers 5.23 builds their masks without the positions.
    Family("gpt_oss", isolates=False),
    Family("falcon", isolates=False),
    # ALiBi and positions that are counted by the model
    Family("bloom", isolates=False),
    Family("mpt", isolates=False),
    Family("opt", isolates=False),
    # States and convolutions
    Family("mamba", isolates=False),
    Family("mamba2", isolates=False),
    Family("jamba", isolates=False),
    Family("qwen3_next", isolates=False),
    Family("recurrent_gemma", isolates=False),
    Family("rwkv", isolates=False),
]


def config_of(family: Family) -> Any:
    """The default of the architecture, which is often a published model of billions of weights."""
    return AutoConfig.for_model(family.model_type, **family.config)


def model_of(family: Family, implementation: str) -> PreTrainedModel:
    small = isolation.small_model(config_of(family), "causal-lm")
    model = AutoModelForCausalLM.from_config(small.config, attn_implementation=implementation)
    model.load_state_dict(small.state_dict())
    return model.eval()


@torch.inference_mode()
def logits(model: PreTrainedModel, rows: list[list[list[int]]]) -> torch.Tensor:
    """The logits of rows of documents, float64 [rows, length, vocabulary], from the batch that training would see."""
    batch = TokenCollator(PADDING)(
        [
            {"input_ids": list(itertools.chain(*documents)), "seq_lengths": [len(d) for d in documents]}
            for documents in rows
        ]
    )
    assert "attention_mask" not in batch
    batch.pop("labels")
    return model(**batch).logits.double()


IMPLEMENTATIONS = [
    (family, implementation)
    for family in FAMILIES
    for implementation in ("eager", "sdpa")
    if family.isolates and (family.model_type, implementation) != ("gemma2", "sdpa")  # its logits are capped
]


@pytest.mark.parametrize(
    ("family", "implementation"), IMPLEMENTATIONS, ids=[f"{f.name} {i}" for f, i in IMPLEMENTATIONS]
)
def test_a_packed_document_is_the_document_alone(family: Family, implementation: str) -> None:
    """Also with padding after it, and beside a row of other documents."""
    model = model_of(family, implementation)
    first, second, third = DOCUMENTS
    packed = logits(model, [[first, second], [third]])
    alone = [logits(model, [[document]])[0] for document in DOCUMENTS]
    begin, end = len(first), len(first) + len(second)
    assert (packed[0, :begin] - alone[0]).abs().max() < 1e-5
    assert (packed[0, begin:end] - alone[1]).abs().max() < 1e-5
    assert (packed[1, : len(third)] - alone[2]).abs().max() < 1e-5

    changed = logits(model, [[[41, *first[1:]], second], [third]])
    assert (changed[0, :begin] - packed[0, :begin]).abs().max() > 1e-3
    moved = (changed[0, begin:end] - packed[0, begin:end]).abs().max()
    assert moved < 1e-5
    if family.exactly:
        assert moved == 0


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_what_leaks_is_refused(family: Family) -> None:
    """By a trial of the model that its own configuration describes."""
    config = config_of(family)
    if family.isolates:
        isolation.check(config, "causal-lm", "spec.training.packing")
        return
    with pytest.raises(Failure) as refused:
        isolation.check(config, "causal-lm", "spec.training.packing")
    message = refused.value.message
    assert message.startswith("spec.training.packing: isolated: ")
    assert family.model_type in message
    assert "concatenate" in message


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_type_of_the_files_does_not_matter(dtype: str) -> None:
    """Most published models are in 16 bits, where logits move by rounding alone."""
    isolation.check(AutoConfig.for_model("llama", dtype=dtype), "causal-lm", "spec.training.packing")
