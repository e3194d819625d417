"""Adapters as part of a model: a merged model gives the logits of base + adapter, as PEFT computes them, for every
target that is accepted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from trainer.cells import clips, mel_and_text
from trainer.tones import save_model, save_speech_model
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
)

from luthier_api.generate import Adapter
from luthier_trainer.generation.engines.text import load_model
from luthier_trainer.methods import checks as method_checks
from luthier_trainer.models import inspect
from luthier_trainer.models.adapters import check_kind, check_shapes, check_together, check_weights
from luthier_trainer.models.merge import add_adapters, merge
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.failure import Failure

SIZES: dict[str, Any] = {"vocab_size": 64, "max_position_embeddings": 32, "pad_token_id": 1}
WIDTHS: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
IDS = torch.randint(5, 60, (2, 12), generator=torch.Generator().manual_seed(0))
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**WIDTHS, **SIZES),
    "gpt2": GPT2Config(
        n_embd=16, n_layer=1, n_head=2, n_positions=32, vocab_size=64
    ),  # Conv1D instead of linear layers
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


def with_adapters(base: Path, *adapters: tuple[Path, float]) -> Any:
    """The model that a GenerateJob writes with."""
    model = load_model(base, torch.float32, torch.device("cpu"))
    return add_adapters(model, [path for path, _ in adapters], [weight for _, weight in adapters], "spec.adapters")


def accepted_targets(base: Path, task: str) -> list[list[str]]:
    """What `prepare` takes for targetModules: each name of an embedding or of an output layer, these together, and all
    other names together.
    """
    config = AutoConfig.from_pretrained(base)
    model = inspect.skeleton(config, task, "spec.model")
    names = {name.rpartition(".")[2]: module for name, module in model.named_modules() if name}
    accepted = [name for name in names if is_accepted(config, task, [name])]
    output = model.get_output_embeddings()
    apart = [name for name in accepted if isinstance(names[name], torch.nn.Embedding) or names[name] is output]
    return [[*(n for n in accepted if n not in apart)], *([name] for name in apart), apart, ["all-linear"]]


def is_accepted(config: PreTrainedConfig, task: str, target: list[str]) -> bool:
    try:
        method_checks.check_adapters(config, task, target, "spec.method.targetModules")
    except Failure:
        return False
    return True


@pytest.mark.parametrize(
    ("name", "tied"),
    [
        *(pytest.param(name, True, marks=[] if name in ("gemma3", "bert") else [pytest.mark.slow]) for name in CONFIGS),
        ("llama", False),
        pytest.param("gpt2", False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_merged_language_model_is_base_and_adapter(name: str, tied: bool, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", name, tied)
    targets = accepted_targets(base, "causal-lm")
    assert len(targets) >= 5
    for target in targets:
        adapter = tmp_path / "-".join(target)
        together = save_adapter(
            AutoModelForCausalLM.from_pretrained(base),
            adapter,
            target_modules=target[0] if target == ["all-linear"] else target,
        )
        alone = logits(AutoModelForCausalLM.from_pretrained(base))
        assert (together - alone).abs().max() > 0.01, target
        # What users of the result load with plain PEFT.
        torch.testing.assert_close(
            logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)), together
        )
        # What a job with model.job trains on, and what a GenerateJob with adapters writes with.
        merged = merge(base, adapter, tmp_path / f"merged-{adapter.name}", None, "spec.model.job")
        generating = with_adapters(base, (adapter, 1.0))
        for what, model in (("merged", AutoModelForCausalLM.from_pretrained(merged)), ("generating", generating)):
            torch.testing.assert_close(
                logits(model),
                together,
                rtol=1e-3,
                atol=1e-4,
                msg=lambda text, what=what, target=target: f"{what} {target}: {text}",
            )


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.filterwarnings("ignore")
def test_a_merged_classifier_is_base_and_adapter(name: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", name, True, "text-classification")
    head = {"bert": "classifier", "llama": "score"}[name]
    for target in accepted_targets(base, "text-classification"):
        adapter = tmp_path / "-".join(target)
        together = save_adapter(
            AutoModelForSequenceClassification.from_pretrained(base),
            adapter,
            task_type="SEQ_CLS",
            modules_to_save=[head],
            target_modules=target[0] if target == ["all-linear"] else target,
            exclude_modules=rf".*{head}.*",
        )
        merged = merge(base, adapter, tmp_path / f"merged-{adapter.name}", CLASSES, "spec.model.job")
        torch.testing.assert_close(
            logits(AutoModelForSequenceClassification.from_pretrained(merged)), together, rtol=1e-3, atol=1e-4
        )


@dataclass(frozen=True)
class KindCase:
    name: str
    config: dict[str, Any]


KINDS = [
    # what else the adapters that others publish do to shared weights
    KindCase(
        name="input embeddings trained whole",
        config={"modules_to_save": ["embed_tokens"]},
    ),
    KindCase(
        name="both embeddings trained whole",
        config={"modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    KindCase(
        name="both trained whole, and tied",
        config={"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    ),
    KindCase(
        name="both adapted, and tied",
        config={"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    ),
    KindCase(
        name="a few tokens",
        config={"trainable_token_indices": {"embed_tokens": [7, 20], "lm_head": [20, 21]}},
    ),
    KindCase(
        name="DoRA",
        config={"target_modules": ["embed_tokens", "lm_head"], "use_dora": True},
    ),
    KindCase(
        name="a head trained whole",
        config={"modules_to_save": ["lm_head"]},
    ),
]


@pytest.mark.parametrize("case", KINDS, ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore")
def test_adapters_of_others_on_shared_weights(case: KindCase, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", True)
    together = save_adapter(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter", **{"target_modules": ["q_proj"]} | case.config
    )
    merged = merge(base, tmp_path / "adapter", tmp_path / "merged", None, "spec.model.job")
    generating = with_adapters(base, (tmp_path / "adapter", 1.0))
    for model in (AutoModelForCausalLM.from_pretrained(merged), generating):
        torch.testing.assert_close(logits(model), together, rtol=1e-3, atol=1e-4)


HEARING = [
    pytest.param("AudioClassification", save_model, clips, id="audio-classification"),
    pytest.param("SpeechSeq2Seq", save_speech_model, mel_and_text, id="speech-recognition"),
]
"""What PEFT has no task for: the class of the model says what it is."""


@pytest.mark.parametrize(("auto", "save", "inputs"), HEARING)
@torch.no_grad()
def test_adapters_of_models_that_hear(auto: str, save: Any, inputs: Any, tmp_path: Path) -> None:
    base, kind = save(tmp_path / "base"), getattr(transformers, f"AutoModelFor{auto}")
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(kind.from_pretrained(base), config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    merged = kind.from_pretrained(merge(base, tmp_path / "adapter", tmp_path / "merged", None, "spec.model.job")).eval()
    torch.testing.assert_close(merged(**inputs()).logits, adapted(**inputs()).logits, rtol=1e-3, atol=1e-4)


def test_a_model_stays_tied_where_no_adapter_sits_on_shared_weights(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", True)
    save_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter", target_modules=["q_proj"])
    model = AutoModelForCausalLM.from_pretrained(
        merge(base, tmp_path / "adapter", tmp_path / "merged", None, "spec.model.job")
    )
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_targets_that_share_weights_are_pointed_out() -> None:
    notices.forget()
    method_checks.check_adapters(CONFIGS["gpt2"], "causal-lm", ["c_attn", "wte"], "spec.method.targetModules")
    (text,) = notices.given()
    assert text.startswith(
        "spec.method.targetModules[1]: transformer.wte has the same weights as lm_head, and the adapter changes those"
        " of transformer.wte alone"
    )


def test_embeddings_that_peft_would_look_up_wrongly_are_refused() -> None:
    with pytest.raises(
        Failure,
        match=(
            r"targetModules\[0\]: 'embed_positions' is a OPTLearnedPositionalEmbedding, whose rows are found in"
            r" another way"
        ),
    ):
        method_checks.check_adapters(CONFIGS["opt"], "causal-lm", ["embed_positions"], "spec.method.targetModules")


@dataclass(frozen=True)
class LinearCase:
    name: str
    architecture: str
    config: dict[str, Any]


LINEAR = [
    # what an adapter may consist of, where its weight counts
    LinearCase(
        name="linear layers",
        architecture="llama",
        config={"target_modules": "all-linear"},
    ),
    LinearCase(
        name="rank-stabilised",
        architecture="llama",
        config={"target_modules": "all-linear", "use_rslora": True},
    ),
    LinearCase(
        name="shared embeddings",
        architecture="llama",
        config={"target_modules": ["embed_tokens", "lm_head"]},
    ),
    LinearCase(
        name="all biases",
        architecture="gpt2",
        config={"target_modules": ["c_attn"], "bias": "all"},
    ),
    LinearCase(
        name="biases beside the adapters",
        architecture="gpt2",
        config={"target_modules": ["c_attn"], "bias": "lora_only"},
    ),
    LinearCase(
        name="biases of the adapters",
        architecture="gpt2",
        config={"target_modules": ["c_attn"], "lora_bias": True},
    ),
]


@pytest.mark.parametrize("case", LINEAR, ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore")
def test_a_weight_counts_for_all_of_an_adapter(case: LinearCase, tmp_path: Path) -> None:
    base, adapter = save_base(tmp_path / "base", case.architecture, True), tmp_path / "adapter"
    save_adapter(AutoModelForCausalLM.from_pretrained(base), adapter, **case.config)
    plain, once, half = (weights_of(with_adapters(base, (adapter, weight))) for weight in (0.0, 1.0, 0.5))
    changed = [name for name in once if not torch.equal(once[name], plain[name])]
    assert changed
    for weight in once:
        torch.testing.assert_close(half[weight], plain[weight] + 0.5 * (once[weight] - plain[weight]))
    check_together([adapter], [Adapter(path="/a", weight=0.5)], "spec.adapters")  # and `prepare` takes it


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.filterwarnings("ignore")
def test_adapters_add_up(tied: bool, tmp_path: Path) -> None:
    """Also on embeddings, of which PEFT's files bring the base's own along, and on shared ones."""
    base = save_base(tmp_path / "base", "llama", tied)
    targets = {"one": ["embed_tokens", "q_proj"], "two": ["embed_tokens", "lm_head", "q_proj"], "three": ["lm_head"]}
    for name, names in targets.items():
        save_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / name, target_modules=names)
    plain, *alone = (
        weights_of(with_adapters(base, *adapters)) for adapters in ([], *([(tmp_path / name, 1.0)] for name in targets))
    )
    together = weights_of(with_adapters(base, *((tmp_path / name, 1.0) for name in targets)))
    for weight in together:
        torch.testing.assert_close(
            together[weight], plain[weight] + sum(model[weight] - plain[weight] for model in alone)
        )


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters(remove_duplicate=False)}


WHOLE, LORA, EMBEDDING = (
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj"]},
    {"target_modules": ["embed_tokens"]},
)


@dataclass(frozen=True)
class TogetherCase:
    name: str
    adapters: list[tuple[dict[str, Any], float]]  # configuration and weight of each
    refusal: str | None  # None: accepted


TOGETHER = [
    TogetherCase(
        name="two of the same kind",
        adapters=[(LORA, 0.5), (LORA, -1)],
        refusal=None,
    ),
    TogetherCase(
        name="two on embeddings",
        adapters=[(EMBEDDING, 1), (EMBEDDING, 0.5)],
        refusal=None,
    ),
    TogetherCase(
        name="one with a head",
        adapters=[(LORA, 0.5), (WHOLE, 1)],
        refusal=None,
    ),
    TogetherCase(
        name="two heads",
        adapters=[(WHOLE, 1), (WHOLE, 1)],
        refusal=(
            "spec.adapters[1]: lm_head.weight is replaced by one of this adapter and spec.adapters[0], and changed by"
            " the other as well"
        ),
    ),
    TogetherCase(
        name="two heads, of which one does not count",
        adapters=[(WHOLE, 1), (WHOLE, 0)],
        refusal=None,
    ),
    TogetherCase(
        name="a head and an adapter on it",
        adapters=[({"target_modules": ["lm_head"]}, 1), (WHOLE, 1)],
        refusal="spec.adapters[1]: lm_head.weight is replaced by one of",
    ),
    TogetherCase(
        name="half a head",
        adapters=[(WHOLE, 0.5)],
        refusal=(
            "spec.adapters[0].weight: the adapter replaces lm_head.weight instead of adding to it, and what is replaced"
            " has no"
        ),
    ),
    TogetherCase(
        name="half of DoRA",
        adapters=[(LORA | {"use_dora": True}, 0.5)],
        refusal="spec.adapters[0].weight: the adapter replaces model.layers.0.self_attn.q_proj.weight instead",
    ),
    TogetherCase(
        name="DoRA and LoRA",
        adapters=[(LORA | {"use_dora": True}, 1), (LORA, 1)],
        refusal="spec.adapters[1]: model.layers.0.self_attn.q_proj.weight is replaced by one of",
    ),
    TogetherCase(
        name="tokens and an adapter on embeddings",
        adapters=[(LORA | {"trainable_token_indices": [7]}, 1), (EMBEDDING, 1)],
        refusal="spec.adapters[1]: model.embed_tokens.weight is replaced by one of",
    ),
]


@pytest.mark.parametrize("case", TOGETHER, ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore")
def test_adapters_that_would_undo_each_other(case: TogetherCase, tmp_path: Path) -> None:
    folders = [tmp_path / str(i) for i in range(len(case.adapters))]
    for folder, (config, _) in zip(folders, case.adapters, strict=True):
        base = AutoModelForCausalLM.from_config(CONFIGS["llama"].__class__.from_dict(CONFIGS["llama"].to_dict()))
        get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM", **config)).save_pretrained(folder)
    given = [
        Adapter(path=str(folder), weight=weight) for folder, (_, weight) in zip(folders, case.adapters, strict=True)
    ]
    if case.refusal is None:
        check_together(folders, given, "spec.adapters")
        return
    with pytest.raises(Failure) as failure:
        check_together(folders, given, "spec.adapters")
    assert failure.value.message.startswith(case.refusal)


@dataclass(frozen=True)
class UnfitCase:
    name: str
    tensors: dict[str, list[int]]  # shapes in its file
    refusal: str
    config: dict[str, Any] = field(default_factory=dict)  # changes to adapter_config.json


UNFIT = [
    UnfitCase(
        name="not LoRA",
        config={"peft_type": "LOHA"},
        tensors={},
        refusal="spec.adapters[0]: is a LOHA adapter, which cannot be merged, because it is not known",
    ),
    UnfitCase(
        name="layers of its own",
        config={"layer_replication": [[0, 1], [0, 1]]},
        tensors={},
        refusal="spec.adapters[0]: the adapter has layer_replication (adapter_config.json), and cannot",
    ),
    UnfitCase(
        name="for a base in 4 bits",
        config={"loftq_config": {"quantization_config": {"bnb_4bit_quant_type": "fp4"}}},
        tensors={},
        refusal=(
            "spec.adapters[0]: the adapter was begun by LoftQ (adapter_config.json: loftq_config) and fits its base"
            " in fp4 alone, and adapters are added to the plain weights. Name its FineTuneJob in spec.model.job instead"
        ),
    ),
    UnfitCase(
        name="for a base in 4 bits, by PEFT",
        config={"init_lora_weights": "loftq"},
        tensors={},
        refusal=(
            "spec.adapters[0]: the adapter was begun by LoftQ (adapter_config.json: loftq_config) and fits its base"
            " in 4 bits alone"
        ),
    ),
    UnfitCase(
        name="a head that is not there",
        tensors={"value_head.weight": [1, 16]},
        refusal="spec.adapters[0]: the adapter does not fit org/m, which has no module value_head.",
    ),
    UnfitCase(
        name="an embedding that is not there",
        tensors={"model.wte.lora_embedding_A": [2, 64]},
        refusal="spec.adapters[0]: the adapter does not fit org/m, which has no module",
    ),
    UnfitCase(
        name="a bias where there is none",
        tensors={"model.layers.0.self_attn.q_proj.lora_B.bias": [16]},
        refusal=(
            "spec.adapters[0]: the adapter has a bias for model.layers.0.self_attn.q_proj, which has none in org/m; it"
            " cannot be merged"
        ),
    ),
    UnfitCase(
        name="other widths",
        tensors={"model.layers.0.self_attn.q_proj.lora_A.weight": [2, 32]},
        refusal=(
            "spec.adapters[0]: the adapter does not fit org/m: model.layers.0.self_attn.q_proj has 16 inputs there, and"
            " 32 in the adapter"
        ),
    ),
    UnfitCase(
        name="another vocabulary",
        tensors={"model.embed_tokens.lora_embedding_A": [2, 70]},
        refusal=(
            "spec.adapters[0]: the adapter does not fit org/m: model.embed_tokens has 64 inputs there, and 70 in the"
            " adapter"
        ),
    ),
    UnfitCase(
        name="a head for another vocabulary",
        tensors={"lm_head.weight": [70, 16]},
        refusal=(
            "spec.adapters[0]: the adapter does not fit org/m: lm_head has 64 rows or columns there, and 70 in the"
            " adapter"
        ),
    ),
    UnfitCase(
        name="the embeddings of another vocabulary",
        tensors={"model.embed_tokens.base_layer.weight": [70, 16]},
        refusal=(
            "spec.adapters[0]: the adapter does not fit org/m: model.embed_tokens has 64 rows or columns there, and 70"
            " in the adapter"
        ),
    ),
    UnfitCase(
        name="a name that a checkpoint of another program has",
        tensors={"model.layers.0.self_attn.q_proj.lora_A.default.weight": [2, 16]},
        refusal=(
            "spec.adapters[0]: the adapter does not fit org/m, which has no module"
            " model.layers.0.self_attn.q_proj.lora_A.default"
        ),
    ),
    UnfitCase(
        name="not finite",
        tensors={"model.layers.0.self_attn.q_proj.lora_A.weight": [2, 16]},
        refusal=(
            "spec.adapters[0]: weights of the adapter are not finite: model.layers.0.self_attn.q_proj.lora_A.weight."
            " Choose another"
        ),
    ),
    UnfitCase(
        name="another name",
        tensors={"model.layers.0.self_attn.q_proj.lora_A.weight": [2, 16]},
        refusal="spec.adapters[0]: FOLDER has no adapter_model.safetensors (it has: ",
    ),
    UnfitCase(
        name="nothing wrong",
        tensors={
            "model.layers.0.self_attn.q_proj.lora_A.weight": [2, 16],
            "model.embed_tokens.base_layer.weight": [64, 16],
        },
        refusal="",
    ),
]


@pytest.mark.parametrize("case", UNFIT, ids=lambda case: case.name)
def test_an_adapter_that_the_model_has_no_place_for(case: UnfitCase, tmp_path: Path) -> None:
    CONFIGS["llama"].save_pretrained(tmp_path)
    weights = {
        f"base_model.model.{key}": torch.full(shape, torch.nan if case.name == "not finite" else 0.0)
        for key, shape in case.tensors.items()
    }
    save_file(weights, tmp_path / ("model.safetensors" if case.name == "another name" else "adapter_model.safetensors"))

    def check() -> None:
        check_kind({"peft_type": "LORA"} | case.config, "spec.adapters[0]")
        check_weights(tmp_path, "spec.adapters[0]")
        check_shapes(tmp_path, "spec.adapters[0]", tmp_path, "org/m", "text-generation")

    if not case.refusal:
        check()
        return
    with pytest.raises(Failure) as failure:
        check()
    assert failure.value.message.startswith(case.refusal.replace("FOLDER", str(tmp_path)))
