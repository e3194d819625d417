"""What `run` says of target modules that only the loaded model shows to be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from luthier_api.finetune import Method
from luthier_trainer.ending import Failure
from luthier_trainer.methods import with_method


def test_modules_that_are_trained_whole_are_not_offered_for_adapters(tiny_model: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
    with pytest.raises(Failure) as failure:
        with_method(model, Method(type="lora", target_modules=["score"]), "SEQ_CLS", ["score"], deepspeed=False)
    assert failure.value.message.startswith("spec.method.targetModules: score does not suit LlamaForSequenceClassification")
    assert failure.value.message.endswith("Its linear modules: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj; all-linear takes them all")
