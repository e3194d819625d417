"""Adapters on quantised weights: what bitsandbytes and PEFT make of the same model by themselves."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from cases.methods import method_of
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from luthier_api.exitcodes import ExitCode
from luthier_api.methods import QuantizationType
from luthier_api.spec import Quantization
from luthier_trainer.methods.apply import weights_options, with_method
from luthier_trainer.methods.checks import check_quantisable
from luthier_trainer.models.checks import check_stored_type
from luthier_trainer.models.quantised_base import check_rows
from luthier_trainer.runtime.failure import Failure

CPU = torch.device("cpu")
IDS = torch.arange(32).view(2, 16)
WIDE = LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=256, use_cache=False
)


@dataclass(frozen=True)
class Case:
    type: QuantizationType
    plain: dict[str, Any]
    """What a user would give bitsandbytes for it."""
    layer: str
    """bitsandbytes' class of a linear module."""


CASES = [
    Case(
        type="nf4",
        plain={
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16,
        },
        layer="Linear4bit",
    ),
    Case(
        type="fp4",
        plain={
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "fp4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16,
        },
        layer="Linear4bit",
    ),
    Case(
        type="int8",
        plain={"load_in_8bit": True},
        layer="Linear8bitLt",
    ),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    LlamaForCausalLM(WIDE).save_pretrained(folder)
    return folder


def learn(model: Any) -> list[float]:
    """The losses of five steps."""
    model.train()
    optimizer = torch.optim.AdamW((weight for weight in model.parameters() if weight.requires_grad), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.type)
def test_an_adapter_learns_as_with_plain_peft_and_bitsandbytes(case: Case, base: Path) -> None:
    method = method_of(type="lora", rank=4, alpha=8)
    options = weights_options(method, "fp32", False, CPU, Quantization(type=case.type))
    ours = AutoModelForCausalLM.from_pretrained(base, **options)
    torch.manual_seed(1)
    ours = with_method(ours, method, "CAUSAL_LM", [], deepspeed=False)
    quantised = ours.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    assert type(quantised).__name__ == case.layer

    plain = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=BitsAndBytesConfig(**case.plain), device_map={"": CPU}
    )
    torch.manual_seed(1)
    plain = get_peft_model(plain, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    found, expected = learn(ours), learn(plain)
    assert found == expected
    assert found[-1] < found[0] - 0.1


@dataclass(frozen=True)
class StoredCase:
    name: str
    stored: dict[str, Any] | None
    wanted: QuantizationType
    refusal: str | None


STORED = [
    StoredCase(
        name="weights that are not quantised",
        stored=None,
        wanted="int8",
        refusal=None,
    ),
    StoredCase(
        name="the same type",
        stored={"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        wanted="nf4",
        refusal=None,
    ),
    StoredCase(
        name="8 bits for 8 bits",
        stored={"quant_method": "bitsandbytes", "load_in_8bit": True},
        wanted="int8",
        refusal=None,
    ),
    StoredCase(
        name="8 bits for 4 bits",
        stored={"quant_method": "bitsandbytes", "load_in_8bit": True},
        wanted="nf4",
        refusal="in int8, and the job asks for nf4; set method.type: lora and model.quantization.type: int8",
    ),
    StoredCase(
        name="another type of 4 bits",
        stored={"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        wanted="nf4",
        refusal="in fp4, and the job asks for nf4; set method.type: lora and model.quantization.type: fp4",
    ),
]


@pytest.mark.parametrize("case", STORED, ids=lambda case: case.name)
def test_weights_that_came_quantised_are_in_the_type_that_the_job_asks_for(case: StoredCase) -> None:
    config = LlamaConfig(**({"quantization_config": case.stored} if case.stored else {}))
    if case.refusal is None:
        check_stored_type(config, case.wanted, "spec.model")
        return
    with pytest.raises(Failure) as failure:
        check_stored_type(config, case.wanted, "spec.model")
    assert failure.value.code == ExitCode.INVALID_SPEC
    assert case.refusal in failure.value.message


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_widths_that_four_bits_on_cpu_cannot_have(kind: QuantizationType) -> None:
    with pytest.raises(Failure) as failure:
        check_quantisable(LlamaConfig(hidden_size=96), kind, "spec.model.quantization")
    assert failure.value.message == (
        f"spec.model.quantization: {kind} on CPU needs widths of a multiple of 64, and the model's hidden_size is 96;"
        " use method.type: lora without model.quantization, or a GPU"
    )


def test_eight_bits_have_any_width() -> None:
    """What is accepted is what bitsandbytes computes right."""
    check_quantisable(LlamaConfig(hidden_size=96), "int8", "spec.model.quantization")
    torch.manual_seed(1)
    weight, rows = torch.randn(96, 96), torch.randn(8, 96)
    layer = bitsandbytes.nn.Linear8bitLt(96, 96, bias=False, has_fp16_weights=False)
    layer.weight = bitsandbytes.nn.Int8Params(weight.clone(), has_fp16_weights=False, requires_grad=False)
    found, expected = layer.to("cpu")(rows.bfloat16()).float(), rows @ weight.T
    assert layer.weight.dtype == torch.int8
    assert (found - expected).norm() / expected.norm() < 0.03


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(("inputs", "refused"), [(64, False), (96, True), (192, False)])
def test_rows_that_a_cpu_reads_wrong_are_refused(kind: QuantizationType, inputs: int, refused: bool) -> None:
    """What is refused is what bitsandbytes computes wrong. Rows of unlike size, or the wrong block hardly shows.

    Only its kernel for AVX-512 with bf16 does. Such rows are refused on each CPU, because `prepare` cannot know on
    which one the training will run.
    """
    torch.manual_seed(1)
    layer = bitsandbytes.nn.Linear4bit(inputs, 96, bias=False, quant_type=kind)
    weight = torch.randn(96, inputs) * torch.logspace(-2, 0, 96)[torch.randperm(96), None]
    layer.weight = bitsandbytes.nn.Params4bit(weight.clone(), requires_grad=False, quant_type=kind)
    rows = torch.randn(8, inputs)
    found, expected = layer.to("cpu")(rows), rows @ weight.T
    wrong = bool((found - expected).norm() / expected.norm() > 0.2)
    assert wrong is (refused and bool(bitsandbytes.functional.has_avx512bf16()))
    with pytest.raises(Failure, match=r"no multiple of 64\. Use a GPU") if refused else nullcontext():
        check_rows(torch.nn.Sequential(layer), "spec.model", "Use a GPU")
