"""Which weights learn, in which type; and what `run` says of target modules that only the loaded model shows to be
wrong.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases.methods import method_of
from prepared_workspace import loaded
from transformers import AutoModelForSequenceClassification

from luthier_trainer.methods.apply import weights_options, with_method
from luthier_trainer.runtime.failure import Failure


def test_modules_that_are_trained_whole_are_not_offered_for_adapters(tiny_model: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
    with pytest.raises(Failure) as failure:
        with_method(model, method_of(type="lora", targetModules=["score"]), "SEQ_CLS", ["score"], deepspeed=False)
    assert failure.value.message.startswith(
        "spec.method.targetModules: score does not suit LlamaForSequenceClassification"
    )
    assert failure.value.message.endswith(
        "Its linear modules: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj; all-linear takes them all"
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_what_learns_is_kept_in_fp32(precision: str, tiny_model: Path) -> None:
    """A head, too: in 16 bit its small steps would be rounded away, and fp16's gradients could not be unscaled."""
    method = method_of(type="lora", rank=2)
    options = weights_options(method, precision, deepspeed=False, device=torch.device("cpu"))
    base = loaded("text-classification", tiny_model, ["a", "b"], **options)
    model = with_method(base.model, method, "SEQ_CLS", base.new_modules, deepspeed=False)
    assert base.new_modules
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {options["dtype"]}
