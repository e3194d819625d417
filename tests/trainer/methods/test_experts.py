"""Mixtures of experts, whose experts are one parameter a layer: what qlora and adapters reach of them is told, refused,
and exact.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from cases.methods import method_of
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DeepseekV3Config,
    GptOssConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from luthier_api.finetune import FineTuneJobSpec
from luthier_trainer.methods import checks as method_checks
from luthier_trainer.methods import experts
from luthier_trainer.methods.apply import with_method
from luthier_trainer.models import inspect
from luthier_trainer.models.merge import merge
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.failure import Failure

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=16),
    "qwen2_moe": Qwen2MoeConfig(**SIZES, **EXPERTS, shared_expert_intermediate_size=32),
    "gpt_oss": GptOssConfig(
        **SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=16, layer_types=["full_attention"] * 2
    ),
    # The first layer is dense, the second has four experts and a shared one.
    "deepseek_v3": DeepseekV3Config(
        **SIZES,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
    ),
}


@pytest.fixture(autouse=True)
def no_notices_of_others() -> Iterator[None]:
    notices.forget()
    yield
    notices.forget()


def spec_of(targets: list[str], **given: Any) -> FineTuneJobSpec:
    method = {"type": "lora", "targetModules": targets} | given.pop("method", {})
    return FineTuneJobSpec.model_validate(
        {
            "task": "causal-lm",
            "model": {"path": "/m"},
            "dataset": {"files": ["/d.txt"]},
            "method": method,
            "resources": {"gpusPerNode": 1},
        }
        | given
    )


ALL = ["all-linear"]


@dataclass(frozen=True)
class ReachCase:
    model: str
    targets: list[str]
    notice: str | None


REACH = [
    ReachCase(
        model="llama",
        targets=ALL,
        notice=None,
    ),
    ReachCase(
        model="qwen3_moe",
        targets=ALL,
        notice=None,
    ),
    ReachCase(
        model="qwen3_moe",
        targets=["q_proj"],
        notice=None,
    ),
    ReachCase(
        model="qwen3_moe",
        targets=["gate_proj", "up_proj", "down_proj"],
        notice=None,
    ),
    ReachCase(
        model="qwen3_moe",
        targets=["q_proj", "gate_up_proj"],
        notice=None,
    ),
    ReachCase(
        model="qwen2_moe",
        targets=ALL,
        notice=(
            "stay as they are: down_proj, gate_up_proj (what PEFT reaches in qwen2_moe); to put some on experts, name"
        ),
    ),
    ReachCase(
        model="qwen2_moe",
        targets=["down_proj", "gate_up_proj"],
        notice=None,
    ),
    ReachCase(
        model="gpt_oss",
        targets=ALL,
        notice="stay as they are: down_proj, gate_up_proj (what PEFT reaches in gpt_oss); to put some on experts, name",
    ),
    ReachCase(
        model="gpt_oss",
        targets=["q_proj", "down_proj"],
        notice=None,
    ),
    ReachCase(
        model="deepseek_v3",
        targets=ALL,
        notice="stay as they are: down_proj, gate_proj, up_proj (what PEFT reaches in deepseek_v3)",
    ),
]


@pytest.mark.parametrize("case", REACH, ids=lambda case: f"{case.model}: {' '.join(case.targets)}")
def test_weights_without_an_adapter_are_named(case: ReachCase) -> None:
    method_checks.check_adapters(CONFIGS[case.model], "causal-lm", case.targets, "spec.method.targetModules")
    experts.check_adapters(CONFIGS[case.model], spec_of(case.targets))
    assert [case.notice in said for said in notices.given()] == ([] if case.notice is None else [True])


@dataclass(frozen=True)
class RefusedCase:
    model: str
    spec: dict[str, Any]
    message: str


REFUSED = [
    RefusedCase(
        model="qwen3_moe",
        spec={"targets": ["q_proj", "w1"]},
        message="spec.method.targetModules[1]: the model has no module 'w1' (it has: down_proj, gate_up_proj, k_proj, ",
    ),
    RefusedCase(
        model="qwen3_moe",
        spec={"targets": ["gate_proj"]},
        message="without also targeting up_proj because they are fused into gate_up_proj",
    ),
    RefusedCase(
        model="qwen3_moe",
        spec={"targets": ALL, "method": {"dropout": 0.1}},
        message="spec.method.dropout: adapters on experts (down_proj, gate_up_proj) have no dropout",
    ),
    RefusedCase(
        model="qwen3_moe",
        spec={"targets": ALL, "strategy": "zero3", "resources": {"gpusPerNode": 2}},
        message="spec.strategy: ZeRO-3 does not spread weights with adapters on",
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.message[:40])
def test_adapters_that_cannot_be_put_there(case: RefusedCase) -> None:
    spec = spec_of(**case.spec)
    method_checks.check_adapters(
        CONFIGS[case.model], "causal-lm", spec.method.target_modules, "spec.method.targetModules"
    )
    with pytest.raises(Failure) as caught:
        experts.check_adapters(CONFIGS[case.model], spec)
    assert caught.value.code.reason == "InvalidSpec"
    assert case.message in caught.value.message


@dataclass(frozen=True)
class FourBitsCase:
    model: str
    notice: str | None
    refusal: str | None
    sizes: dict[str, int] = field(default_factory=dict)


FOUR_BITS = [
    FourBitsCase(
        model="llama",
        notice=None,
        refusal=None,
    ),
    FourBitsCase(
        model="llama",
        sizes={"vocab_size": 4096},
        notice="7% of the 282,784 weights of llama",
        refusal=None,
    ),
    FourBitsCase(
        model="qwen3_moe",
        notice=None,
        refusal="22% of the 37,344 weights of qwen3_moe would be in 4 bits",
    ),
    FourBitsCase(
        model="qwen3_moe",
        sizes={"num_experts": 1, "moe_intermediate_size": 8, "vocab_size": 8},
        notice="The ",
        refusal=None,
    ),
]


@pytest.mark.parametrize("case", FOUR_BITS, ids=lambda case: f"{case.model} {' '.join(case.sizes)}")
def test_the_share_of_the_weights_in_four_bits(case: FourBitsCase) -> None:
    config = type(CONFIGS[case.model])(**CONFIGS[case.model].to_dict() | case.sizes)
    if case.refusal is None:
        experts.check_quantised_share(config, "causal-lm", "nf4", "spec.method.type")
    else:
        with pytest.raises(Failure) as caught:
            experts.check_quantised_share(config, "causal-lm", "nf4", "spec.method.type")
        assert case.refusal in caught.value.message
    assert [case.notice in said for said in notices.given()] == ([] if case.notice is None else [True])


@pytest.mark.parametrize("name", CONFIGS)
def test_those_are_the_weights_that_bitsandbytes_replaces(name: str) -> None:
    from bitsandbytes.nn import Linear4bit
    from transformers.integrations import replace_with_bnb_linear
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    expected = experts.quantised_weights(inspect.skeleton(CONFIGS[name], "causal-lm", "spec.model"))
    model = inspect.skeleton(CONFIGS[name], "causal-lm", "spec.model")
    kept = Bnb4BitHfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    replace_with_bnb_linear(model, kept, BitsAndBytesConfig(load_in_4bit=True))
    assert sum(m.weight.numel() for m in model.modules() if isinstance(m, Linear4bit)) == expected > 0


EXACT: list[tuple[str, list[str]]] = [
    ("qwen3_moe", ALL),
    ("qwen3_moe", ["q_proj", "gate_up_proj", "down_proj"]),
    ("qwen2_moe", ["gate_proj", "gate_up_proj", "down_proj"]),
    ("gpt_oss", ["o_proj", "gate_up_proj", "down_proj"]),
    ("deepseek_v3", ALL),
]


@pytest.mark.parametrize(("name", "targets"), EXACT, ids=[f"{e[0]}: {' '.join(e[1])}" for e in EXACT])
def test_what_was_trained_is_what_is_merged(name: str, targets: list[str], tmp_path: Path) -> None:
    """Experts included: they learn, and base + adapter as files give the logits of the training."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(CONFIGS[name])
    base.save_pretrained(tmp_path / "base")
    model = with_method(
        base, method_of(type="lora", rank=2, targetModules=targets), "CAUSAL_LM", [], deepspeed=False
    ).eval()
    ids = torch.arange(40).view(2, 20)
    adapters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        before = model(input_ids=ids).logits
        for weight in adapters.values():
            weight.normal_(std=0.3)
    logits = model(input_ids=ids).logits
    logits.square().sum().backward()
    assert not torch.allclose(before, logits, atol=1e-2)
    assert {n for n, p in adapters.items() if p.grad is None or not p.grad.any()} == set()
    assert any("experts" in n for n in adapters)

    model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", None, "spec.model")
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(input_ids=ids).logits
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["r"] == 2
    assert torch.allclose(merged, logits, atol=2e-4), float((merged - logits).abs().max())
