"""Methods that train a part of the model itself: exactly this part changes, and the result is a whole model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from cases.methods import method_of
from datasets import DatasetDict
from prepared_workspace import losses, prepared_run
from trainer.methods.test_biases import CONFIG, measured
from trainer.methods.test_families import Changes
from trainer.training.test_resume import stopped_at
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    PegasusConfig,
    PegasusForConditionalGeneration,
    WhisperConfig,
    WhisperForAudioClassification,
)

from luthier_trainer.methods import frozen
from luthier_trainer.models.inspect import skeleton
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.training import main as train


@pytest.fixture(scope="module")
def biased(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with biases."""
    folder = tmp_path_factory.mktemp("models") / "biased"
    torch.manual_seed(1)
    LlamaForCausalLM(CONFIG).save_pretrained(folder)
    AutoTokenizer.from_pretrained(llama).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Case:
    name: str
    method: dict[str, Any]
    learns: str
    """Beginnings or ends of the names of the weights that learn."""
    rate: float = 2e-3


CASES = [
    Case(name="the biases alone", method={"type": "bitfit"}, learns="bias", rate=5e-2),
    Case(
        name="without the embedding, and of the layers the last",
        method={"type": "full", "freeze": ["embed_tokens"], "layers": [1]},
        learns="model.layers.1. model.norm lm_head",
    ),
    Case(
        name="without what an expression means",
        method={"type": "full", "freeze": ["embed_tokens", "lm_head", r"self_attn\.[qk]_proj", "layers.0.mlp"]},
        learns=("v_proj o_proj model.layers.1.mlp input_layernorm.weight post_attention_layernorm.weight model.norm"),
    ),
]


def learns(name: str, case: Case) -> bool:
    return any(name.startswith(part) or part in name for part in case.learns.split())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_exactly_this_part_learns(
    case: Case, tmp_path: Path, biased: Path, prose_data: DatasetDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DatasetDict(train=prose_data["train"].select(range(64)), eval=prose_data["eval"].select(range(4)))
    asked: dict[str, Any] = {"method": case.method, "training": {"maxSteps": 6, "learningRate": case.rate}}
    changes = Changes()
    run = prepared_run(tmp_path / "job", biased, data, **asked)
    metrics = train.main(run, [changes]).metrics
    assert metrics is not None
    names = {name for name, _ in skeleton(CONFIG, "causal-lm", "").named_parameters()}
    # A bias of keys adds the same to all scores of a query, so that its gradient is rounding alone.
    still = {name for name in names if name.endswith("k_proj.bias")}
    assert changes.learning == {name for name in names if learns(name, case)}
    assert changes.learning - still <= changes.changed <= changes.learning
    assert metrics["evalLoss"] < metrics["evalLossBefore"]

    again = prepared_run(tmp_path / "again", biased, data, **asked)
    assert stopped_at(again, 3, monkeypatch).code == 75
    resumed = train.main(again).metrics
    assert resumed is not None
    assert (losses(again), resumed["evalLoss"]) == (losses(run), metrics["evalLoss"])

    result = AutoModelForCausalLM.from_pretrained(tmp_path / "job/result")
    assert measured(result, data) == pytest.approx(metrics["evalLoss"], abs=1e-5)
    before = AutoModelForCausalLM.from_pretrained(biased).state_dict()
    different = {name for name, weight in result.state_dict().items() if not torch.equal(weight, before[name])}
    assert different == changes.changed


SMALL = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "vocab_size": 50,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
FIXED = [
    (MarianMTModel, MarianConfig(**SMALL), {"encoder.embed_positions", "decoder.embed_positions"}),
    (PegasusForConditionalGeneration, PegasusConfig(**SMALL), {"encoder.embed_positions", "decoder.embed_positions"}),
    (WhisperForAudioClassification, WhisperConfig(**SMALL, num_mel_bins=8), {"encoder.embed_positions"}),
    (LlamaForCausalLM, CONFIG, set()),
]


@pytest.mark.parametrize(("kind", "config", "expect"), FIXED, ids=lambda value: getattr(value, "__name__", ""))
def test_what_an_architecture_keeps_fixed_does_not_learn(tmp_path: Path, kind: Any, config: Any, expect: Any) -> None:
    """Although a model that was loaded says that it does."""
    kind(config).save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    assert all(weight.requires_grad for weight in loaded.parameters())
    frozen.apply(loaded, method_of(type="full"), [])
    kept = {
        name.removeprefix("model.").removesuffix(".weight")
        for name, w in loaded.named_parameters()
        if not w.requires_grad
    }
    assert kept == expect


def test_a_frozen_weight_is_so_wherever_it_is_used() -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    method = method_of(type="full", freeze=["lm_head"])
    frozen.check(config, "causal-lm", method)
    assert "model.embed_tokens.weight" not in frozen.learning(skeleton(config, "causal-lm", ""), method, [])
    assert notices.given() == [
        "spec.method.freeze: these stay as they are, too, because they share weights: model.embed_tokens with lm_head"
    ]


@dataclass(frozen=True)
class Refused:
    name: str
    method: dict[str, Any]
    message: str
    config: Any = field(default_factory=lambda: GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=32))


REFUSED = [
    Refused(
        name="no biases",
        method={"type": "bitfit"},
        message="spec.method.type: llama has no biases, so that bitfit would train nothing of it; use lora",
        config=LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        ),
    ),
    Refused(
        name="no such module",
        method={"type": "full", "freeze": ["embed"]},
        message="spec.method.freeze[0]: the model has no module whose name ends with 'embed' (they end with: act,",
    ),
    Refused(
        name="no expression",
        method={"type": "full", "freeze": ["wte", "("]},
        message="spec.method.freeze[1]: '(' is no regular expression of Python",
    ),
    Refused(
        name="no such layer",
        method={"type": "full", "layers": [0, 2]},
        message="spec.method.layers[1]: the model has no layer 2 (layers: 0 to 1)",
    ),
    Refused(
        name="nothing is left",
        method={"type": "full", "freeze": ["transformer", "lm_head"]},
        message="spec.method.freeze: no weight of the model would learn; name less",
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_refused(case: Refused) -> None:
    with pytest.raises(Failure) as failure:
        frozen.check(case.config, "causal-lm", method_of(**case.method))
    assert failure.value.message.startswith(case.message)
