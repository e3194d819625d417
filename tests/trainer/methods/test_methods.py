"""Which weights learn, in which type; and what `run` says of target modules that only the loaded model shows to be
wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from cases.methods import method_of
from datasets import DatasetDict
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from prepared_workspace import loaded, prepared_run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from luthier_trainer.methods import whole
from luthier_trainer.methods.apply import weights_options, with_method
from luthier_trainer.methods.checks import check_patterns
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.tasks.pretrained import with_names
from luthier_trainer.training import main as train


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


@pytest.mark.parametrize(("device", "straight"), [("cpu", False), ("cuda:0", True)])
def test_weights_are_read_straight_to_a_gpu(device: str, straight: bool, tiny_model: Path) -> None:
    """They are those that are read on the CPU, new ones apart, which a GPU would draw by a generator of its own."""
    options = weights_options(method_of(type="full"), "bf16", deepspeed=False, device=torch.device(device))
    assert options.pop("device_map", None) == ({"": torch.device(device)} if straight else None)
    plain = loaded("causal-lm", tiny_model, **options).model
    mapped = loaded("causal-lm", tiny_model, **options, device_map={"": torch.device("cpu")}).model
    weights = mapped.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in plain.state_dict().items())


@dataclass(frozen=True)
class PlainCase:
    name: str
    method: dict[str, Any]
    plain: dict[str, Any]


MLP = ("gate", "up", "down")
ATTENTION = ["q_proj", "v_proj"]
PLAIN = [
    PlainCase(
        name="rsLoRA",
        method={"rank": 8, "alpha": 16, "rslora": True},
        plain={"r": 8, "lora_alpha": 16, "use_rslora": True, "target_modules": "all-linear"},
    ),
    PlainCase(
        name="DoRA",
        method={"rank": 4, "dora": True, "targetModules": ATTENTION},
        plain={"r": 4, "lora_alpha": 32, "use_dora": True, "target_modules": ATTENTION},
    ),
    PlainCase(
        name="other ranks and scales for some modules",
        method={"rank": 4, "rankPattern": {r"layers\.0\..*": 2, "down_proj": 6}, "alphaPattern": {"q_proj": 64}},
        plain={
            "r": 4,
            "lora_alpha": 32,
            "rank_pattern": {r"layers\.0\..*": 2, "down_proj": 6},
            "alpha_pattern": {"q_proj": 64},
            "target_modules": "all-linear",
        },
    ),
    PlainCase(
        name="some layers",
        method={"rank": 4, "layers": [1], "targetModules": ATTENTION},
        plain={"r": 4, "lora_alpha": 32, "layers_to_transform": [1], "target_modules": ATTENTION},
    ),
    PlainCase(
        name="modules trained whole",
        method={"rank": 4, "modulesToSave": ["lm_head", "0.input_layernorm", "1.mlp"]},
        plain={
            "r": 4,
            "lora_alpha": 32,
            "modules_to_save": ["lm_head", "0.input_layernorm", "1.mlp"],
            "target_modules": r".*(layers\.0\..*|self_attn)\.(q|k|v|o|gate|up|down)_proj",
        },
    ),
    PlainCase(
        name="a regular expression beside a name",
        method={"rank": 4, "targetModules": [r"layers\.0\..*(up|v)_proj", "o_proj"]},
        plain={"r": 4, "lora_alpha": 32, "target_modules": r".*(layers\.0\..*(up|v)_proj|\.o_proj)"},
    ),
    PlainCase(
        name="a regular expression in some layers, beside a module trained whole",
        method={"rank": 4, "targetModules": [".*"], "layers": [1], "modulesToSave": ["1.mlp"]},
        plain={
            "r": 4,
            "lora_alpha": 32,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "layers_to_transform": [1],
            "modules_to_save": ["1.mlp"],
        },
    ),
    PlainCase(
        name="all linear modules of some layers",
        method={"rank": 4, "layers": [1]},
        plain={
            "r": 4,
            "lora_alpha": 32,
            "target_modules": r".*layers\.1\..*(q|k|v|o|gate|up|down)_proj",
        },
    ),
]


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
def test_adapters_are_those_of_plain_peft(case: PlainCase, tiny_model: Path) -> None:
    def base() -> Any:
        torch.manual_seed(1)
        return AutoModelForCausalLM.from_pretrained(tiny_model)

    ours = with_method(base(), method_of(type="lora", **case.method), "CAUSAL_LM", [], deepspeed=False)
    plain = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", **case.plain))
    expect = plain.state_dict()
    assert any("lora_A" in name for name in expect)
    assert ours.state_dict().keys() == expect.keys()
    assert all(torch.equal(weight, expect[name]) for name, weight in ours.state_dict().items())
    scales = {name: module.scaling for name, module in plain.named_modules() if isinstance(module, LoraLayer)}
    assert {name: m.scaling for name, m in ours.named_modules() if isinstance(m, LoraLayer)} == scales


def test_a_trained_adapter_gives_the_same_in_plain_peft(tmp_path: Path, llama: Path, prose_data: DatasetDict) -> None:
    method = {"type": "lora", "rank": 4, "rslora": True, "dora": True, "rankPattern": {"q_proj": 2}, "layers": [1]}
    method |= {"modulesToSave": ["embed_tokens", "0.mlp"], "targetModules": [".*(q|v|down)_proj"]}
    data = DatasetDict(train=prose_data["train"].select(range(32)), eval=prose_data["eval"].select(range(4)))
    metrics = train.main(
        prepared_run(tmp_path / "job", llama, data, method=method, training={"maxSteps": 4, "learningRate": 1e-2})
    ).metrics
    assert metrics is not None
    assert metrics["evalLoss"] < metrics["evalLossBefore"] - 0.01

    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "job/result").eval()
    losses, counts = [], []
    for row in data["eval"]["input_ids"]:
        ids = torch.tensor([row])
        with torch.no_grad():
            losses.append(plain(input_ids=ids, labels=ids).loss.item() * (len(row) - 1))
        counts.append(len(row) - 1)
    assert sum(losses) / sum(counts) == pytest.approx(metrics["evalLoss"], abs=1e-5)

    saved, base = load_file(tmp_path / "job/result/adapter_model.safetensors"), load_file(llama / "model.safetensors")
    trained = {name.removeprefix("base_model.model."): weight for name, weight in saved.items() if ".lora_" not in name}
    assert trained.keys() == {"model.embed_tokens.weight", *(f"model.layers.0.mlp.{m}_proj.weight" for m in MLP)}
    assert not any(torch.equal(weight, base[name]) for name, weight in trained.items())


@dataclass(frozen=True)
class PatternCase:
    name: str
    method: dict[str, Any]
    message: str


PATTERNS = [
    PatternCase(
        name="a layer that is not there",
        method={"layers": [1, 2]},
        message="spec.method.layers[1]: no module with an adapter is in layer 2 (layers: 0 to 1)",
    ),
    PatternCase(
        name="a pattern of nothing",
        method={"rankPattern": {"query": 4}},
        message="spec.method.rankPattern: no module with an adapter has a name that ends with 'query' (they end with: ",
    ),
    PatternCase(
        name="a pattern of modules in other layers",
        method={"layers": [1], "alphaPattern": {r"layers\.0\..*": 4}},
        message="spec.method.alphaPattern: no module with an adapter has a name that ends with",
    ),
    PatternCase(
        name="no regular expression",
        method={"rankPattern": {"q_proj(": 4}},
        message="spec.method.rankPattern: 'q_proj(' is not a regular expression of Python: missing ), unterminated",
    ),
]


@pytest.mark.parametrize("case", PATTERNS, ids=lambda case: case.name)
def test_what_matches_no_module_is_refused(case: PatternCase) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 99}
    config = LlamaConfig(num_hidden_layers=2, **sizes)
    with pytest.raises(Failure) as failure:
        check_patterns(config, "causal-lm", method_of(type="lora", **case.method))
    assert failure.value.message.startswith(case.message)


@dataclass(frozen=True)
class WholeCase:
    name: str
    method: dict[str, Any]
    message: str
    tied: bool = False
    quantised: bool = False


WHOLE = [
    WholeCase(
        name="a module that is not there",
        method={"modulesToSave": ["lm_heads"]},
        message="spec.method.modulesToSave[0]: the model has no module 'lm_heads' (it has: down_proj, embed_tokens, ",
    ),
    WholeCase(
        name="a list of modules",
        method={"modulesToSave": ["lm_head", "layers"]},
        message="spec.method.modulesToSave[1]: 'layers' is no module with weights of its own; name one of: down_proj,",
    ),
    WholeCase(
        name="a module without weights",
        method={"modulesToSave": ["act_fn"]},
        message="spec.method.modulesToSave[0]: 'act_fn' is no module with weights of its own; name one of: down_proj,",
    ),
    WholeCase(
        name="shared weights",
        method={"modulesToSave": ["embed_tokens"]},
        tied=True,
        message="spec.method.modulesToSave[0]: model.embed_tokens has the same weights as lm_head, and PEFT would",
    ),
    WholeCase(
        name="a module with adapters",
        method={"modulesToSave": ["q_proj"], "targetModules": ["q_proj", "v_proj"]},
        message="spec.method.modulesToSave[0]: 'q_proj' is in targetModules, too, and what is trained whole gets no",
    ),
    WholeCase(
        name="quantised weights",
        method={"modulesToSave": ["lm_head", "embed_tokens", "0.mlp"]},
        quantised=True,
        message="spec.method.modulesToSave[2]: '0.mlp' is quantised, and weights of few bits cannot be trained; use",
    ),
]


@pytest.mark.parametrize("case", WHOLE, ids=lambda case: case.name)
def test_modules_that_cannot_be_trained_whole_are_refused(case: WholeCase) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 99}
    config = LlamaConfig(num_hidden_layers=2, tie_word_embeddings=case.tied, **sizes)
    with pytest.raises(Failure) as failure:
        whole.check(config, "causal-lm", method_of(type="lora", **case.method), case.quantised)
    assert failure.value.message.startswith(case.message)


@dataclass(frozen=True)
class ExpressionCase:
    name: str
    targets: list[str]
    message: str
    options: dict[str, Any] = field(default_factory=dict)


EXPRESSIONS = [
    ExpressionCase(
        name="of no module",
        targets=["q_proj", r"layers\.9\..*"],
        message="spec.method.targetModules[1]: no linear module has a name that ends with 'layers\\\\.9",
    ),
    ExpressionCase(
        name="of the logits alone",
        targets=["lm_.*"],
        message="spec.method.targetModules[0]: no linear module has a name that ends with 'lm_.*' (they end",
    ),
    ExpressionCase(
        name="that is none",
        targets=["(q|v_proj"],
        message="spec.method.targetModules[0]: '(q|v_proj' is neither a name nor a regular expression of Python:",
    ),
    ExpressionCase(
        name="of no module in these layers",
        targets=[r"layers\.0\..*"],
        options={"layers": [1]},
        message="spec.method.targetModules[0]: no linear module of layers 1 has a name that ends with",
    ),
]


@pytest.mark.parametrize("case", EXPRESSIONS, ids=lambda case: case.name)
def test_expressions_that_mean_no_module_are_refused(case: ExpressionCase) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 99}
    method = method_of(type="lora", targetModules=case.targets, **case.options)
    with pytest.raises(Failure) as failure:
        with_names(method, LlamaConfig(num_hidden_layers=2, **sizes), "causal-lm")
    assert failure.value.message.startswith(case.message)
