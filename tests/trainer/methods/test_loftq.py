"""LoftQ: adapters begin as what 4 bits have lost, equal to plain singular vectors, and stay with the base in 4 bits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes
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
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
)

from luthier_api.finetune import FineTuneJobSpec
from luthier_api.methods import QuantizationType
from luthier_api.spec import Quantization
from luthier_api.tasks import TASKS
from luthier_trainer.distributed.ranks import Ranks
from luthier_trainer.methods import initial, loftq
from luthier_trainer.methods.apply import weights_options, with_method
from luthier_trainer.methods.checks import check_initial
from luthier_trainer.models.merge import merge
from luthier_trainer.models.quantised_base import arguments_of, check_adapter
from luthier_trainer.prepare.main import main as prepare
from luthier_trainer.publish.model_card import loading
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.training import main as train
from luthier_trainer.training import result

CPU = torch.device("cpu")
IDS = torch.arange(2, 34).reshape(2, 16)
PREFIX = "base_model.model."


def wide(vocabulary: int) -> LlamaConfig:
    """The narrowest model that bitsandbytes quantises on a CPU."""
    return LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=vocabulary,
        use_cache=False,
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    LlamaForCausalLM(wide(256)).save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def plainly_quantised(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return portable(
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=bits, device_map={"": CPU})
    )


def portable(model: Any) -> Any:
    """Without bitsandbytes' kernel for AVX512, which has no backward pass and rounds otherwise."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def layers_of(model: Any) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and isinstance(module.get_base_layer(), bitsandbytes.nn.Linear4bit):
            yield name, module


@torch.no_grad()
def dequantised(layer: Any) -> torch.Tensor:
    weight = layer.get_base_layer().weight
    found: torch.Tensor = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    return found


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    was = model.training
    found: torch.Tensor = model.eval()(input_ids=IDS).logits
    model.train(was)
    return found


def learn(model: Any) -> torch.Tensor:
    """The logits of three steps."""
    model.train()
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-3)
    found = []
    for _ in range(3):
        out = model(input_ids=IDS, labels=IDS)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(out.logits.detach())
    return torch.stack(found)


@dataclass(frozen=True)
class Case:
    name: str
    type: QuantizationType
    method: dict[str, Any]
    plain: dict[str, Any]


CASES = [
    Case(
        name="nf4, LoRA",
        type="nf4",
        method={},
        plain={},
    ),
    Case(
        name="fp4, rsLoRA, other ranks",
        type="fp4",
        method={"rslora": True, "rankPattern": {"q_proj": 2}, "alphaPattern": {"v_proj": 3}},
        plain={"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_adapters_begin_as_what_the_quantisation_has_lost(case: Case, base: Path, tmp_path: Path) -> None:
    method = method_of(type="lora", rank=4, alpha=8, initLoraWeights="loftq", **case.method)
    options = weights_options(method, "fp32", False, CPU, Quantization(type=case.type))
    ours = with_method(AutoModelForCausalLM.from_pretrained(base, **options), method, "CAUSAL_LM", [], deepspeed=False)
    assert initial.begin(ours, method, CPU, tmp_path / "kept", Ranks(60), "run", base) is None
    files = [load_file(file) for file in base.glob("*.safetensors")]
    weights = {name: weight for file in files for name, weight in file.items()}

    plain = get_peft_model(
        plainly_quantised(base, case.type),
        LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", **case.plain),
    )
    found = dict(layers_of(ours))
    assert len(found) == 14
    for name, layer in layers_of(plain):
        weight = weights[f"{name.removeprefix(PREFIX)}.weight"]
        lost = weight - dequantised(layer)
        rank = 2 if "q_proj" in name and case.method else 4
        left, values, right = torch.linalg.svd(lost)
        best = left[:, :rank] @ torch.diag(values[:rank]) @ right[:rank]
        scale = layer.scaling["default"]
        first, second = (found[name].get_submodule(f"lora_{part}.default").weight.detach() for part in "AB")
        torch.testing.assert_close(second @ first * scale, best, rtol=0, atol=1e-5)
        torch.testing.assert_close(first.norm(), second.norm())
        assert (lost - best).norm() < 0.95 * lost.norm()
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(first)
            layer.lora_B["default"].weight.copy_(second)
    unquantised = logits(AutoModelForCausalLM.from_pretrained(base))
    with plain.disable_adapter():
        without = logits(plain)
    assert (logits(ours) - unquantised).norm() < (without - unquantised).norm()
    torch.testing.assert_close(learn(ours), learn(plain), rtol=0, atol=1e-4)


@pytest.fixture
def spoken(tmp_path: Path, llama: Path) -> Path:
    """A base that is wide enough, with the tokenizer of the tests' prose."""
    folder = tmp_path / "spoken"
    torch.manual_seed(0)
    LlamaForCausalLM(wide(LlamaConfig.from_pretrained(llama).vocab_size)).save_pretrained(folder)
    for file in llama.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_a_result_fits_the_quantised_base(
    tmp_path: Path, spoken: Path, prose_data: DatasetDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As plain PEFT and bitsandbytes load it, as it is merged, as its card says, and as it is refused elsewhere."""
    data = DatasetDict(train=prose_data["train"].select(range(32)), eval=prose_data["eval"].select(range(4)))
    asked: dict[str, Any] = {
        "method": {"type": "qlora", "rank": 4, "dropout": 0.1, "initLoraWeights": "loftq"},
        "training": {"maxSteps": 4, "learningRate": 1e-2},
    }
    trained: list[torch.Tensor] = []
    write = result.write

    def listening(loop: Any, *rest: Any) -> None:
        trained.append(logits(loop.model))
        write(loop, *rest)

    monkeypatch.setattr(result, "write", listening)
    run = prepared_run(tmp_path / "job", spoken, data, **asked)
    assert train.main(run).code == 0
    folder = tmp_path / "job/result"
    plain = PeftModel.from_pretrained(plainly_quantised(spoken, "nf4"), folder)
    torch.testing.assert_close(logits(plain), trained[0], rtol=0, atol=1e-4)
    elsewhere = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(spoken), folder)
    assert (logits(elsewhere) - trained[0]).abs().max() > 1e-2

    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"]) == (4, True)
    assert arguments_of(config) == {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
    }
    with pytest.raises(Failure) as failure:
        check_adapter(config, "spec.adapters[0]")
    assert "spec.adapters[0]: the adapter was begun by LoftQ" in failure.value.message
    assert "fits its base in nf4 alone" in failure.value.message

    into = merge(spoken, folder, tmp_path / "merged", None, "spec.model.job")
    whole = AutoModelForCausalLM.from_pretrained(into)
    assert not getattr(whole.config, "quantization_config", None)
    for name, layer in layers_of(plain):
        found = whole.get_submodule(name.removeprefix(PREFIX)).weight
        torch.testing.assert_close(found, dequantised(layer) + layer.get_delta_weight("default"), rtol=0, atol=1e-6)
    # Products in the type of 4 bits are computed in bf16.
    error = (logits(whole) - trained[0]).norm()
    assert error < 0.1 * (logits(elsewhere) - trained[0]).norm()

    text = loading("org/result", TASKS["causal-lm"], folder, head=False)
    assert "AutoPeftModelForCausalLM" in text
    names: dict[str, Any] = {}
    lines = text.replace("org/result", str(folder)).splitlines()
    exec("\n".join(line for line in lines if not line.startswith("tokenizer")), names)
    torch.testing.assert_close(logits(portable(names["model"])), trained[0], rtol=0, atol=1e-4)

    again = prepared_run(tmp_path / "again", spoken, data, **asked)
    assert stopped_at(again, 2, monkeypatch).code == 75
    with monkeypatch.context() as patch:
        patch.setattr(loftq, "beginning", lambda *_: pytest.fail("singular vectors are computed once"))
        assert train.main(again).code == 0
    assert losses(again) == losses(run)
    once, resumed = (load_file(tmp_path / name / "result/adapter_model.safetensors") for name in ("job", "again"))
    assert {name for name, weight in once.items() if not torch.equal(weight, resumed[name])} == set()


def test_what_was_quantised_in_16_bits_is_merged_so(base: Path, tmp_path: Path) -> None:
    """Weights that are rounded before they are quantised fall into other steps."""
    adapted = get_peft_model(
        plainly_quantised(base, "nf4", torch.bfloat16),
        LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    loftq.write_settings(tmp_path / "adapter", adapted)
    whole = AutoModelForCausalLM.from_pretrained(merge(base, tmp_path / "adapter", tmp_path / "merged", None, "f"))
    assert whole.dtype == torch.float32
    for name, layer in layers_of(adapted):
        found = whole.get_submodule(name.removeprefix(PREFIX)).weight
        expected = dequantised(layer).float() + layer.get_delta_weight("default").float()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_what_a_cpu_dequantises_wrong_is_not_merged(tmp_path: Path) -> None:
    """Bitsandbytes' CPU kernels give other weights where a row is no multiple of a block."""
    config = wide(256)
    config.intermediate_size = 96
    LlamaForCausalLM(config).save_pretrained(tmp_path / "narrow")
    adapted = get_peft_model(plainly_quantised(tmp_path / "narrow", "nf4"), LoraConfig(task_type="CAUSAL_LM", r=4))
    adapted.save_pretrained(tmp_path / "adapter")
    loftq.write_settings(tmp_path / "adapter", adapted)
    with pytest.raises(Failure) as failure:
        merge(tmp_path / "narrow", tmp_path / "adapter", tmp_path / "merged", None, "spec.model.job")
    assert failure.value.message.startswith(
        "spec.model.job: bitsandbytes (0.50) computes with wrong weights for model.layers.0.mlp.down_proj on a CPU,"
        " because its 96 inputs are no multiple of 64. Train the adapter on an unquantised model"
    )


def test_a_classifier_is_prepared_trained_merged_and_loaded(
    tmp_path: Path, spoken: Path, make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its base has other names in its files and no head, which is not quantised."""
    rows = [{"text": f"the word {word}", "label": word} for word in ("a", "b") for _ in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained: list[torch.Tensor] = []
    write = result.write

    def listening(loop: Any, *rest: Any) -> None:
        trained.append(logits(loop.model))
        write(loop, *rest)

    monkeypatch.setattr(result, "write", listening)
    notices.forget()
    run = make_run(
        task="text-classification",
        model={"path": str(spoken), "quantization": {"type": "fp4"}},
        method={"type": "lora", "rank": 4, "initLoraWeights": "loftq"},
        dataset={"files": [str(tmp_path / "rows.jsonl")]},
        training={"maxLength": 16, "batchSize": 8, "maxSteps": 2, "learningRate": 1e-3},
    )
    prepare(run)
    assert [text for text in notices.given() if "is an adapter for its base in fp4 alone" in text]
    assert train.main(run).code == 0
    folder = Path(run.workspace) / "result"
    names: dict[str, Any] = {}
    lines = loading("org/result", TASKS["text-classification"], folder, head=True)
    lines = lines.replace("org/result", str(folder))
    exec("\n".join(line for line in lines.splitlines() if not line.startswith("tokenizer")), names)
    torch.testing.assert_close(logits(portable(names["model"])), trained[0], rtol=0, atol=1e-4)
    into = merge(spoken, folder, tmp_path / "merged", ["a", "b"], "spec.model.job")
    whole = AutoModelForSequenceClassification.from_pretrained(into)
    whole.config.pad_token_id = names["model"].config.pad_token_id  # of the files that are copied beside it
    torch.testing.assert_close(logits(whole), trained[0], rtol=0, atol=1e-2)


def spec_of(**method: Any) -> FineTuneJobSpec:
    method = {"type": "qlora", "rank": 4, "initLoraWeights": "loftq"} | method
    return FineTuneJobSpec.model_validate(
        {"task": "causal-lm", "model": {"path": "/m"}, "dataset": {"files": ["/d.txt"]}, "method": method}
    )


@dataclass(frozen=True)
class Refused:
    name: str
    config: Any
    method: dict[str, Any]
    message: str


REFUSED = [
    Refused(
        name="a rank above a width",
        config=wide(256),
        method={"rank": 65},
        message="spec.method.initLoraWeights: model.layers.0.self_attn.q_proj has 64 singular values, and its rank is",
    ),
    Refused(
        name="a Conv1D",
        config=GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=64),
        method={"targetModules": ["c_attn"]},
        message="spec.method.initLoraWeights: loftq is for linear modules, and transformer.h.0.attn.c_attn is none",
    ),
    Refused(
        name="weights that came quantised",
        config=LlamaConfig(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        method={},
        message="spec.method.initLoraWeights: the weights of the model came quantised, and loftq learns from those",
    ),
    Refused(
        name="weights that the files have not",
        config=LlamaConfig(**wide(256).to_dict() | {"num_hidden_layers": 3}),
        method={"targetModules": ["v_proj"]},
        message="spec.method.initLoraWeights: loftq reads the weights before they are quantised, and the files of the"
        " model have no model.layers.2.self_attn.v_proj.weight of the shape 64 × 64",
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_models_that_it_cannot_begin_on_are_refused(case: Refused, base: Path) -> None:
    spec = spec_of(**case.method)

    def check() -> None:
        check_initial(case.config, "causal-lm", spec.method)
        loftq.check(base, case.config, "causal-lm", spec)

    with pytest.raises(Failure) as failure:
        check()
    assert failure.value.message.startswith(case.message)


def test_the_status_says_what_the_result_is_for(base: Path) -> None:
    notices.forget()
    loftq.check(base, wide(256), "causal-lm", spec_of())
    assert [text for text in notices.given() if "is an adapter for its base in nf4 alone" in text]


def test_other_weights_than_those_in_the_files_are_refused(base: Path, tmp_path: Path) -> None:
    """As where transformers reorders them on loading."""
    method = spec_of().method
    model = with_method(plainly_quantised(base, "nf4"), method, "CAUSAL_LM", [], deepspeed=False)
    torch.manual_seed(1)
    LlamaForCausalLM(wide(256)).save_pretrained(tmp_path / "other")
    with pytest.raises(Failure) as failure:
        initial.begin(model, method, CPU, tmp_path / "kept", Ranks(60), "run", tmp_path / "other")
    assert "q_proj is not what the files of the model have under this name" in failure.value.message


def test_adapters_beside_plain_weights_alone_are_refused(base: Path, tmp_path: Path) -> None:
    method = spec_of(targetModules=["lm_head"]).method
    model = with_method(plainly_quantised(base, "nf4"), method, "CAUSAL_LM", [], deepspeed=False)
    with pytest.raises(Failure) as failure:
        initial.begin(model, method, CPU, tmp_path / "kept", Ranks(60), "run", base)
    assert "none of the modules with an adapter is quantised" in failure.value.message
