"""Adapters as part of a model: a merged model gives the logits of base + adapter, as PEFT computes them, for every target that is accepted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
)  # fmt: skip

from luthier_trainer import modelfacts, notices
from luthier_trainer.ending import Failure
from luthier_trainer.generation.text import load_model, merge_adapter
from luthier_trainer.merging import merge

SIZES: dict[str, Any] = {"vocab_size": 64, "max_position_embeddings": 32, "pad_token_id": 1}
WIDTHS: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
IDS = torch.randint(5, 60, (2, 12), generator=torch.Generator().manual_seed(0))
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**WIDTHS, **SIZES),
    "gpt2": GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, vocab_size=64),  # Conv1D instead of linear layers
    "gemma3": Gemma3TextConfig(head_dim=8, num_key_value_heads=2, **WIDTHS, **SIZES),  # embeddings with a scale
    "opt": OPTConfig(ffn_dim=32, word_embed_proj_dim=16, **WIDTHS, **SIZES),  # positions with an offset
    "bert": BertConfig(is_decoder=True, **WIDTHS, **SIZES),
}
CLASSES = ["neg", "pos", "mixed"]


def save_base(folder: Path, name: str, tied: bool, task: str = "causal-lm") -> Path:
    """A model with random weights, biases and norms."""
    config = CONFIGS[name].__class__.from_dict(CONFIGS[name].to_dict() | {"tie_word_embeddings": tied})
    torch.manual_seed(0)
    if task == "causal-lm":
        model = AutoModelForCausalLM.from_config(config)
    else:
        config.num_labels = len(CLASSES)
        model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder


def save_adapter(base: Any, folder: Path, **config: Any) -> torch.Tensor:
    """An adapter on the model `base` with random weights; the logits of both together."""
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | config))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.3)
    model.save_pretrained(folder)
    return logits(model)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model.eval()(IDS).logits
    return result


def accepted_targets(base: Path, task: str) -> list[list[str]]:
    """What `prepare` takes for targetModules: each name of an embedding or of an output layer, these together, and all other names together."""
    config = AutoConfig.from_pretrained(base)
    model = modelfacts.skeleton(config, task, "spec.model")
    names = {name.rpartition(".")[2]: module for name, module in model.named_modules() if name}
    accepted = [name for name in names if is_accepted(config, task, [name])]
    output = model.get_output_embeddings()
    apart = [name for name in accepted if isinstance(names[name], torch.nn.Embedding) or names[name] is output]
    return [[*(n for n in accepted if n not in apart)], *([name] for name in apart), apart, ["all-linear"]]


def is_accepted(config: PreTrainedConfig, task: str, target: list[str]) -> bool:
    try:
        modelfacts.check_adapters(config, task, target, "spec.method.targetModules")
    except Failure:
        return False
    return True


@pytest.mark.parametrize(("name", "tied"), [*((name, True) for name in CONFIGS), ("llama", False), ("gpt2", False)])
@pytest.mark.filterwarnings("ignore")
def test_a_merged_language_model_is_base_and_adapter(name: str, tied: bool, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", name, tied)
    targets = accepted_targets(base, "causal-lm")
    assert len(targets) >= 5
    for target in targets:
        adapter = tmp_path / "-".join(target)
        together = save_adapter(AutoModelForCausalLM.from_pretrained(base), adapter, target_modules=target[0] if target == ["all-linear"] else target)
        alone = logits(AutoModelForCausalLM.from_pretrained(base))
        assert (together - alone).abs().max() > 0.01, target
        # What users of the result load with plain PEFT.
        torch.testing.assert_close(logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)), together)
        # What a job with model.job trains on, and what a GenerateJob with adapters writes with.
        merged = merge(base, adapter, tmp_path / f"merged-{adapter.name}", None, "spec.model.job")
        generating = merge_adapter(load_model(base, torch.float32, torch.device("cpu")), adapter, 1.0, "spec.adapters[0]")
        for what, model in (("merged", AutoModelForCausalLM.from_pretrained(merged)), ("generating", generating)):
            torch.testing.assert_close(logits(model), together, rtol=1e-3, atol=1e-4, msg=lambda text, what=what, target=target: f"{what} {target}: {text}")


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.filterwarnings("ignore")
def test_a_merged_classifier_is_base_and_adapter(name: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", name, True, "text-classification")
    head = {"bert": "classifier", "llama": "score"}[name]
    for target in accepted_targets(base, "text-classification"):
        adapter = tmp_path / "-".join(target)
        together = save_adapter(
            AutoModelForSequenceClassification.from_pretrained(base), adapter, task_type="SEQ_CLS", modules_to_save=[head],
            target_modules=target[0] if target == ["all-linear"] else target, exclude_modules=rf".*{head}.*",
        )  # fmt: skip
        merged = merge(base, adapter, tmp_path / f"merged-{adapter.name}", CLASSES, "spec.model.job")
        torch.testing.assert_close(logits(AutoModelForSequenceClassification.from_pretrained(merged)), together, rtol=1e-3, atol=1e-4)


KINDS: list[tuple[str, dict[str, Any]]] = [
    # what else the adapters that others publish do to shared weights
    ("input embeddings trained whole", {"modules_to_save": ["embed_tokens"]}),
    ("both embeddings trained whole", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    ("both trained whole, and tied", {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}),
    ("both adapted, and tied", {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}),
    ("a few tokens", {"trainable_token_indices": {"embed_tokens": [7, 20], "lm_head": [20, 21]}}),
    ("DoRA", {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}),
    ("a head trained whole", {"modules_to_save": ["lm_head"]}),
]


@pytest.mark.parametrize(("name", "config"), KINDS, ids=[k[0] for k in KINDS])
@pytest.mark.filterwarnings("ignore")
def test_adapters_of_others_on_shared_weights(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", True)
    together = save_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter", **{"target_modules": ["q_proj"]} | config)
    merged = merge(base, tmp_path / "adapter", tmp_path / "merged", None, "spec.model.job")
    generating = merge_adapter(load_model(base, torch.float32, torch.device("cpu")), tmp_path / "adapter", 1.0, "spec.adapters[0]")
    for model in (AutoModelForCausalLM.from_pretrained(merged), generating):
        torch.testing.assert_close(logits(model), together, rtol=1e-3, atol=1e-4)


def test_a_model_stays_tied_where_no_adapter_sits_on_shared_weights(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", True)
    save_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter", target_modules=["q_proj"])
    model = AutoModelForCausalLM.from_pretrained(merge(base, tmp_path / "adapter", tmp_path / "merged", None, "spec.model.job"))
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_targets_that_share_weights_are_pointed_out() -> None:
    notices.forget()
    modelfacts.check_adapters(CONFIGS["gpt2"], "causal-lm", ["c_attn", "wte"], "spec.method.targetModules")
    (text,) = notices.given()
    assert text.startswith("spec.method.targetModules[1]: transformer.wte has the same weights as lm_head, and the adapter changes those of transformer.wte alone")


def test_embeddings_that_peft_would_look_up_wrongly_are_refused() -> None:
    with pytest.raises(Failure, match=r"targetModules\[0\]: 'embed_positions' is a OPTLearnedPositionalEmbedding, whose rows are found in another way"):
        modelfacts.check_adapters(CONFIGS["opt"], "causal-lm", ["embed_positions"], "spec.method.targetModules")
