"""Models that come quantised: text is written with their weights as they are meant, and jobs that would misuse them end
in `prepare`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cases.methods import method_of
from peft import LoraConfig, PeftModel, get_peft_model
from prepared_workspace import loaded
from safetensors.torch import load_file, save_file
from trainer.conftest import MakeRun
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from luthier_api.exitcodes import ExitCode
from luthier_api.generate import GenerateJobSpec
from luthier_api.spec import NewModel, Quantization
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.generation.engines.text import TextEngine
from luthier_trainer.generation.hardware import Hardware
from luthier_trainer.methods import apply as methods
from luthier_trainer.models import weight_check, weight_files
from luthier_trainer.models.merge import merge
from luthier_trainer.models.new_model import new_config, save_new_model
from luthier_trainer.prepare import main as prepare
from luthier_trainer.runtime.failure import Failure

BLOCK = 128  # the fields of FP8 weights that share a scale, as DeepSeek and Qwen publish them
FP8_MAX = 448.0
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}
IDS = torch.arange(24)[None]


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model three times: plain (bf16), fp8, nf4."""
    root = tmp_path_factory.mktemp("quantised")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    save_new_model(
        new_config(NewModel(model_type="llama", vocab_size=512, parameters=WIDE), tokenizer), root / "new", seed=1
    )
    plain = AutoModelForCausalLM.from_pretrained(root / "new", dtype=torch.bfloat16)
    plain.save_pretrained(root / "plain")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    AutoModelForCausalLM.from_pretrained(
        root / "plain", quantization_config=nf4, device_map={"": "cpu"}
    ).save_pretrained(root / "nf4")
    shutil.copytree(root / "plain", root / "fp8")
    to_fp8(root / "fp8")
    for name in ("plain", "fp8", "nf4"):
        tokenizer.save_pretrained(root / name)
    return root


def to_fp8(folder: Path) -> None:
    weights: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if weight.ndim == 2 and ".layers." in name:
            rows, columns = weight.shape
            blocks = weight.float().reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
            scale = blocks.abs().amax((1, 3)) / FP8_MAX
            weights[name] = (blocks / scale[:, None, :, None]).reshape(rows, columns).to(torch.float8_e4m3fn)
            weights[name.replace("weight", "weight_scale_inv")] = scale
        else:
            weights[name] = weight
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    quantisation = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))


def engine(model: Path, *adapters: Path) -> PreTrainedModel:
    spec = GenerateJobSpec.model_validate(
        {
            "task": "text-generation",
            "model": {"path": str(model)},
            "inputs": {"rows": [{"prompt": "a"}]},
            "resources": {"gpus": 0},
            "adapters": [{"path": str(a)} for a in adapters],
        }
    )
    return TextEngine(spec, model, model, adapters, Hardware("cpu", "bf16"), 1).model


def differ(one: torch.Tensor, other: torch.Tensor) -> float:
    """The spread of the difference, as a part of that of `other`."""
    return float((one - other).std() / other.std())


@torch.inference_mode()
def logits(model: PreTrainedModel | PeftModel) -> torch.Tensor:
    return model(input_ids=IDS).logits.float()


def test_fp8_is_unpacked_also_where_the_gpu_could_compute_in_it(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = logits(AutoModelForCausalLM.from_pretrained(models / "plain"))
    # Without a GPU transformers unpacks them by itself, and only warns.
    monkeypatch.setattr(
        "transformers.quantizers.quantizer_finegrained_fp8.FineGrainedFP8HfQuantizer.validate_environment",
        lambda *a, **k: None,
    )
    assert differ(logits(engine(models / "fp8")), plain) < 0.1


def test_nf4_is_run_as_it_is(models: Path) -> None:
    expect = AutoModelForCausalLM.from_pretrained(models / "nf4", dtype=torch.bfloat16, device_map={"": "cpu"})
    assert torch.equal(logits(engine(models / "nf4")), logits(expect))


@pytest.fixture(scope="module")
def adapter(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(models / "plain"), LoraConfig(r=4, target_modules="all-linear")
    )
    generator = torch.Generator().manual_seed(5)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1, generator=generator)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


def test_an_adapter_is_added_to_the_weights_that_nf4_stands_for(models: Path, adapter: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(
        models / "nf4", dtype=torch.bfloat16, device_map={"": "cpu"}
    ).dequantize()
    expect = logits(PeftModel.from_pretrained(base, adapter).merge_and_unload())
    assert differ(logits(engine(models / "nf4", adapter)), expect) < 0.05
    merged = AutoModelForCausalLM.from_pretrained(
        merge(models / "nf4", adapter, tmp_path / "merged", None, "spec.model.job")
    )
    assert not getattr(merged.config, "quantization_config", None)
    assert differ(logits(merged), expect) < 0.05
    assert differ(logits(engine(models / "nf4")), expect) > 0.2  # without it


def test_qlora_learns_beside_weights_that_came_in_nf4(models: Path) -> None:
    method = method_of(type="qlora", rank=4)
    options = methods.weights_options(method, "fp32", False, torch.device("cpu"), Quantization(type="nf4"))
    base = loaded("causal-lm", models / "nf4", **options)
    model = methods.with_method(base.model, method, "CAUSAL_LM", base.new_modules, deepspeed=False)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


@dataclass(frozen=True)
class Case:
    task: str
    method: str | None
    quantisation: dict[str, Any]
    refusal: str | None  # None: accepted


UNFIT = [
    Case(
        task="causal-lm",
        method="full",
        quantisation={"quant_method": "fp8"},
        refusal="(fp8), which this job cannot use; choose the unquantised model",
    ),
    Case(
        task="causal-lm",
        method="lora",
        quantisation={"quant_method": "bitsandbytes"},
        refusal="(bitsandbytes), which this job cannot use",
    ),
    Case(
        task="causal-lm",
        method="qlora",
        quantisation={"quant_method": "gptq"},
        refusal="(gptq), which this job cannot use; choose the unquantised model or one",
    ),
    Case(
        task="causal-lm",
        method="qlora",
        quantisation={"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        refusal=None,
    ),
    Case(
        task="causal-lm",
        method="qlora",
        quantisation={"quant_method": "bitsandbytes", "load_in_8bit": True},
        refusal="its weights are quantised already, in int8, and the job asks for nf4",
    ),
    Case(
        task="text-generation",
        method=None,
        quantisation={"quant_method": "awq"},
        refusal="or one quantised with bitsandbytes or fp8",
    ),
    Case(
        task="text-generation",
        method=None,
        quantisation={"quant_method": "fp8"},
        refusal=None,
    ),
]


@pytest.mark.parametrize("case", UNFIT, ids=lambda case: f"{case.task}-{case.method}-{case.refusal}")
def test_what_prepare_says_of_them(
    case: Case, models: Path, make_run: MakeRun, make_generate_run: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models / "plain", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": case.quantisation}))
    model = {"path": str(folder)}
    run = (
        make_run(model=model, method={"type": case.method})
        if case.method
        else make_generate_run(model=model, task=case.task)
    )
    if case.refusal is None:
        assert prepare.main(run).code == ExitCode.COMPLETED
        return
    with pytest.raises(Failure) as failure:
        prepare.main(run)
    assert failure.value.code == ExitCode.INVALID_SPEC
    assert failure.value.message.startswith("spec.model")
    assert case.refusal in failure.value.message


@pytest.mark.parametrize("name", ["plain", "fp8", "nf4"])
def test_prepare_knows_the_weights_however_they_are_kept(name: str, models: Path, tmp_path: Path) -> None:
    """Names and shapes are those of the model as it is meant, and statistics and scales are no weights."""
    plain = AutoModelForCausalLM.from_pretrained(models / "plain")
    config = AutoConfig.from_pretrained(models / name)
    assert weight_files.shapes([models / name / "model.safetensors"]) == {
        n: tuple(w.shape) for n, w in plain.state_dict().items()
    }
    assert weight_files.count(models / name, "spec.model") == sum(p.numel() for p in plain.parameters())
    assert (
        weight_check.fitting(
            models / name, config, "causal-lm", "spec.model", WorkspaceFolder(tmp_path), named_by_adapter=True
        )
        == models / name
    )
    broken = shutil.copytree(models / name, tmp_path / name)
    weights = load_file(broken / "model.safetensors")
    lost = {n for n in weights if n.startswith("model.layers.1.mlp.up_proj.weight")}
    save_file(
        {n: w for n, w in weights.items() if n not in lost}, broken / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(
        Failure,
        match=r"does not hold 1 of the 21 weights of a LlamaForCausalLM: model\.layers\.1\.mlp\.up_proj\.weight\.",
    ):
        weight_check.fitting(
            broken, config, "causal-lm", "spec.model", WorkspaceFolder(tmp_path), named_by_adapter=True
        )


def test_weights_in_fp8_without_their_scales_are_refused(models: Path, tmp_path: Path) -> None:
    """transformers loads such a layer with weights 5,600 times as large, without a word."""
    broken = shutil.copytree(models / "fp8", tmp_path / "fp8")
    weights = load_file(broken / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight_scale_inv"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    config = AutoConfig.from_pretrained(broken)
    with pytest.raises(
        Failure,
        match=(
            r"holds no scales for 1 weights in FP8: model\.layers\.1\.mlp\.up_proj\.weight\. Copy or download it again"
        ),
    ):
        weight_check.fitting(
            broken, config, "text-generation", "spec.model", WorkspaceFolder(tmp_path), named_by_adapter=False
        )
