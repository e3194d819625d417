"""Attention by documents (`varlen`) computes what torch's own does with a mask, or is not chosen; what is asked for and
what is computed are compared.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from trainer.models.test_isolation import DOCUMENTS, WINDOW, Family, config_of
from transformers import AutoModelForCausalLM

from luthier_api.finetune import FineTuneJobSpec
from luthier_api.run import Attention
from luthier_trainer.models import attention, isolation, varlen
from luthier_trainer.runtime import devices
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.tasks.batches import TokenCollator
from luthier_trainer.workspace.attention import planned

PADDING = 3


@dataclass(frozen=True)
class Kind:
    family: Family
    trouble: str | None = None
    """What is said of a model that varlen cannot compute."""


KINDS = [
    Kind(Family("llama", {"num_key_value_heads": 1})),
    Kind(Family("mistral", WINDOW)),
    Kind(Family("gemma3_text", WINDOW)),
    Kind(Family("qwen3_moe")),
    Kind(Family("gpt_neox")),
    Kind(Family("gpt2"), trouble="drops weights at random"),
    Kind(Family("gemma2", WINDOW), trouble="softcap"),
    Kind(Family("llama", {"head_dim": 512}), trouble="at most 256"),
    # Llama 4 looks back within chunks.
    Kind(Family("llama4_text", {"attention_chunk_size": 8}), trouble="llama4_text"),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.family.name)
def test_what_varlen_cannot_compute_is_found_out(kind: Kind) -> None:
    trouble = attention.cannot_varlen(config_of(kind.family), "causal-lm")
    if kind.trouble is None:
        assert trouble is None
    else:
        assert trouble is not None
        assert kind.trouble in trouble


@pytest.mark.parametrize("config", [{"num_key_value_heads": 1}, {"num_hidden_layers": 2}], ids=str)
def test_losses_and_gradients_are_those_of_a_mask(config: dict[str, Any]) -> None:
    """Of two rows with documents of different lengths, one of them with padding."""
    varlen.register()
    small = isolation.small_model(config_of(Family("mistral", WINDOW | config)), "causal-lm")
    first, second, third = DOCUMENTS
    rows = [
        {"input_ids": [*first, *second], "seq_lengths": [len(first), len(second)]},
        {"input_ids": third, "seq_lengths": [len(third)]},
    ]
    found = {}
    for name, tells in (("sdpa", False), (varlen.NAME, True)):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(small.config), attn_implementation=name)
        model.load_state_dict(small.state_dict())
        loss = model(**TokenCollator(PADDING, tells)(rows)).loss
        loss.backward()
        found[name] = (loss.item(), {key: weight.grad for key, weight in model.named_parameters()})
    assert found["varlen"][0] == pytest.approx(found["sdpa"][0], abs=1e-6)
    for name, gradient in found["varlen"][1].items():
        torch.testing.assert_close(gradient, found["sdpa"][1][name], atol=1e-6, rtol=1e-4, msg=name)


SDPA = Attention(default="sdpa")


@dataclass(frozen=True)
class Choice:
    name: str
    expect: str | None
    training: dict[str, Any] = field(default_factory=dict)
    gpus: int = 1
    model: Attention | None = SDPA
    reason: str = ""


CHOICES = [
    Choice(
        name="packed rows on GPUs",
        training={"packing": "isolated"},
        expect="varlen",
        reason="no mask",
    ),
    Choice(
        name="packed rows on a CPU",
        training={"packing": "isolated"},
        gpus=0,
        expect="sdpa",
    ),
    Choice(
        name="packed rows of a model that cannot",
        training={"packing": "isolated"},
        model=Attention(default="eager", cannot_varlen="gemma2 cannot: its attention has softcap"),
        expect="eager",
        reason="because gemma2 cannot",
    ),
    Choice(
        name="packed rows in fp32",
        training={"packing": "isolated", "precision": "fp32"},
        expect="sdpa",
        reason="in 16 bits",
    ),
    Choice(
        name="rows that see across",
        training={"packing": "concatenate"},
        expect="sdpa",
    ),
    Choice(
        name="what the user sets",
        training={"packing": "isolated", "attention": "flex_attention"},
        expect="flex_attention",
    ),
    Choice(
        name="no model of transformers",
        model=None,
        expect=None,
    ),
]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice.name)
def test_what_is_planned_and_why(choice: Choice) -> None:
    spec = FineTuneJobSpec.model_validate(
        {
            "task": "causal-lm",
            "model": {"id": "org/model"},
            "dataset": {"files": ["rows.txt"]},
            "training": choice.training,
            "resources": {"gpusPerNode": choice.gpus},
        }
    )
    implementation, reasons = planned(spec, choice.model)
    assert implementation == choice.expect
    assert bool(reasons) == bool(choice.reason)
    assert choice.reason in "".join(reasons)


@dataclass(frozen=True)
class Asked:
    name: str
    implementation: Any
    message: str
    family: Family = Family("llama")  # noqa: RUF009  # frozen
    trouble: str | None = None


ASKED = [
    Asked(
        name="a package that the image does not have",
        implementation="flash_attention_2",
        message="flash_attn, which this image does not have",
    ),
    Asked(
        name="varlen, of a model that cannot",
        implementation="varlen",
        trouble="gpt2 cannot: its attention drops",
        message="varlen: gpt2 cannot",
    ),
    Asked(
        name="an implementation that the model has not",
        implementation="flex_attention",
        family=Family("bloom"),
        message="does not support",
    ),
]


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: asked.name)
def test_what_does_not_work_is_refused_in_prepare(asked: Asked) -> None:
    with pytest.raises(Failure) as refused:
        attention.check(config_of(asked.family), "causal-lm", asked.implementation, asked.trouble)
    assert refused.value.message.startswith("spec.training.attention: ")
    assert asked.message in refused.value.message
    assert "use auto" in refused.value.message


@dataclass(frozen=True)
class Device:
    name: str
    precision: str
    capability: tuple[int, int]
    expect: str


DEVICES = [
    Device("Ampere", "bf16", (8, 0), "varlen"),
    Device("Turing", "fp16", (7, 5), "sdpa"),
    Device("fp32 after all", "fp32", (9, 0), "sdpa"),
]


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_a_gpu_without_flash_attention_takes_another(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: device.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: device.name)
    implementation, why = devices.fitting_attention("varlen", device.precision, cpu=False)
    assert implementation == device.expect
    assert bool(why) == (device.expect != "varlen")
    assert devices.fitting_attention("sdpa", device.precision, cpu=False) == ("sdpa", "")
