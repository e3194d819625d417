"""Biases of the base that are trained beside adapters: those of plain PEFT, in the result, and in what is merged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cases.methods import method_of
from datasets import DatasetDict
from peft import LoraConfig, PeftModel, get_peft_model
from prepared_workspace import losses, prepared_run
from safetensors.torch import load_file
from trainer.training.test_resume import stopped_at
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from luthier_trainer.methods.apply import with_method
from luthier_trainer.methods.checks import check_biases
from luthier_trainer.methods.trainable import adapter_tensors
from luthier_trainer.models.merge import merge
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.training import main as train

CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    attention_bias=True,
    mlp_bias=True,
)


@pytest.fixture(scope="module")
def biased(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with biases, which are not zero."""
    folder = tmp_path_factory.mktemp("models") / "biased"
    torch.manual_seed(1)
    model = LlamaForCausalLM(CONFIG)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(llama).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Case:
    name: str
    method: dict[str, Any]
    plain: dict[str, Any]
    biases: int


CASES = [
    Case(
        name="of modules with an adapter",
        method={"bias": "lora_only", "targetModules": ["q_proj", "v_proj"]},
        plain={"bias": "lora_only", "target_modules": ["q_proj", "v_proj"]},
        biases=2 * 2,
    ),
    Case(
        name="all, beside a module trained whole",
        method={"bias": "all", "targetModules": ["q_proj", "v_proj"], "modulesToSave": ["1.mlp"]},
        plain={"bias": "all", "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["1.mlp"]},
        biases=2 * 4 + 3,
    ),
]


def test_biases_of_normalisations_learn_in_16_bits() -> None:
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)
    torch.manual_seed(1)
    base = GPT2LMHeadModel(config)
    tokens = torch.arange(32).reshape(2, 16)
    expected = base(input_ids=tokens, labels=tokens).loss.item()
    model = with_method(
        base.to(torch.bfloat16), method_of(type="lora", rank=2, bias="all"), "CAUSAL_LM", [], deepspeed=False
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    learnt = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert loss.item() == pytest.approx(expected, rel=1e-2)
    assert any("ln_1.bias" in name for name in learnt)
    assert {weight.dtype for weight in learnt.values()} == {torch.float32}
    assert all(weight.grad is not None for weight in learnt.values())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_same_biases_learn_as_in_plain_peft(case: Case, biased: Path) -> None:
    method = method_of(type="lora", rank=4, **case.method)
    base = AutoModelForCausalLM.from_pretrained(biased)
    ours = with_method(base, method, "CAUSAL_LM", [], deepspeed=False)
    plain = get_peft_model(
        AutoModelForCausalLM.from_pretrained(biased),
        LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=32, **case.plain),
    )
    learning, expect = ({n: w for n, w in m.named_parameters() if w.requires_grad} for m in (ours, plain))
    assert learning.keys() == expect.keys()
    assert len([n for n in learning if n.endswith(".bias") and "modules_to_save" not in n]) == case.biases
    counted = adapter_tensors(AutoModelForCausalLM.from_pretrained(biased), method, [])
    assert sorted(tensor.shape for tensor in counted) == sorted(tuple(weight.shape) for weight in learning.values())


def test_a_result_brings_its_biases(
    tmp_path: Path, biased: Path, prose_data: DatasetDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DatasetDict(train=prose_data["train"].select(range(32)), eval=prose_data["eval"].select(range(4)))
    asked: dict[str, Any] = {
        "method": {"type": "lora", "rank": 2, "bias": "all", "targetModules": ["q_proj"]},
        "training": {"maxSteps": 4, "learningRate": 5e-2},
    }
    run = prepared_run(tmp_path / "job", biased, data, **asked)
    metrics = train.main(run).metrics
    assert metrics is not None
    folder = tmp_path / "job/result"
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(biased), folder)
    assert measured(plain, data) == pytest.approx(metrics["evalLoss"], abs=1e-5)
    merged = AutoModelForCausalLM.from_pretrained(merge(biased, folder, tmp_path / "merged", None, "spec.model.job"))
    assert measured(merged, data) == pytest.approx(metrics["evalLoss"], abs=1e-5)
    weights, before = load_file(folder / "adapter_model.safetensors"), load_file(biased / "model.safetensors")
    biases = {name.removeprefix("base_model.model.").replace("base_layer.", ""): w for name, w in weights.items()}
    biases = {name: weight for name, weight in biases.items() if name.endswith(".bias")}
    assert biases.keys() == {name for name in before if name.endswith(".bias")}
    assert not any(torch.equal(weight, before[name]) for name, weight in biases.items() if "k_proj" not in name)

    again = prepared_run(tmp_path / "again", biased, data, **asked)
    assert stopped_at(again, 2, monkeypatch).code == 75
    assert train.main(again).code == 0
    assert losses(again) == losses(run)
    resumed = load_file(tmp_path / "again/result/adapter_model.safetensors")
    assert {name for name, weight in weights.items() if not torch.equal(weight, resumed[name])} == set()


def measured(model: Any, data: DatasetDict) -> float:
    """Held-out loss, a row at a time."""
    total = count = 0
    for row in data["eval"]["input_ids"]:
        ids = torch.tensor([row])
        with torch.no_grad():
            logits = model.eval()(input_ids=ids).logits[0]
        # Before the logits of its tokens may be those of virtual ones.
        total += torch.nn.functional.cross_entropy(logits[-len(row) : -1], ids[0, 1:], reduction="sum").item()
        count += len(row) - 1
    return total / count


@dataclass(frozen=True)
class Refused:
    name: str
    config: LlamaConfig
    method: dict[str, Any]
    message: str


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 99, "num_hidden_layers": 1}
REFUSED = [
    Refused(
        name="a model without biases",
        config=LlamaConfig(**SIZES),
        method={"bias": "all"},
        message="spec.method.bias: llama has no biases, so that nothing would be trained; remove it",
    ),
    Refused(
        name="none where the adapters are",
        config=LlamaConfig(attention_bias=True, **SIZES),
        method={"bias": "lora_only", "targetModules": ["up_proj"]},
        message="spec.method.bias: llama has no biases in modules with an adapter, so that nothing would be",
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_biases_that_are_not_there_are_refused(case: Refused) -> None:
    with pytest.raises(Failure) as failure:
        check_biases(case.config, "causal-lm", method_of(type="lora", **case.method))
    assert failure.value.message.startswith(case.message)
