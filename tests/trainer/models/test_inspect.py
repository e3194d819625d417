"""What a configuration says of a model, against what a small model of it does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

from luthier_api.run import FineTuneRun, GenerateRun
from luthier_trainer.models.checks import check_task
from luthier_trainer.models.inspect import max_positions
from luthier_trainer.prepare.main import main
from luthier_trainer.runtime.failure import Failure

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
BART = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}
GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}


@dataclass(frozen=True)
class PositionCase:
    architecture: str
    fields: dict[str, Any]
    tokens: int  # how many fit into 66 positions


POSITIONS = [
    PositionCase(
        architecture="bert",
        fields=SIZES,
        tokens=66,
    ),
    PositionCase(
        architecture="mpnet",
        fields=SIZES,
        tokens=64,
    ),
    PositionCase(
        architecture="roberta",
        fields=SIZES,
        tokens=64,
    ),
    PositionCase(
        architecture="camembert",
        fields=SIZES | {"pad_token_id": 5},
        tokens=60,
    ),
    PositionCase(
        architecture="roberta-prelayernorm",
        fields=SIZES,
        tokens=64,
    ),
    PositionCase(
        architecture="data2vec-text",
        fields=SIZES,
        tokens=64,
    ),
    PositionCase(
        architecture="xlm-roberta-xl",
        fields=SIZES,
        tokens=64,
    ),
    PositionCase(
        architecture="ibert",
        fields=SIZES,
        tokens=64,
    ),
    PositionCase(
        architecture="opt",
        fields=SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32},
        tokens=66,
    ),
    PositionCase(
        architecture="llama",
        fields=SIZES,
        tokens=66,
    ),
]


@pytest.mark.parametrize("case", POSITIONS, ids=lambda case: case.architecture)
def test_room(case: PositionCase) -> None:
    config = AutoConfig.for_model(case.architecture, **case.fields, max_position_embeddings=66)
    assert max_positions(config) == case.tokens
    model = AutoModel.from_config(config).eval()
    model(input_ids=torch.full((1, case.tokens), 9))
    if case.architecture != "llama":  # which has no table to run out of
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, case.tokens + 1), 9))


@dataclass(frozen=True)
class ReaderCase:
    architecture: str
    fields: dict[str, Any]
    causal: bool  # each token attends to earlier ones alone


READERS = [
    ReaderCase(
        architecture="llama",
        fields=SIZES,
        causal=True,
    ),
    ReaderCase(
        architecture="gpt2",
        fields=GPT,
        causal=True,
    ),
    ReaderCase(
        architecture="gpt_neox",
        fields=SIZES,
        causal=True,
    ),
    ReaderCase(
        architecture="bart",
        fields=BART,
        causal=True,
    ),
    ReaderCase(
        architecture="bert",
        fields=SIZES,
        causal=False,
    ),
    ReaderCase(
        architecture="bert",
        fields=SIZES | {"is_decoder": True},
        causal=True,
    ),
    ReaderCase(
        architecture="bert-generation",
        fields=SIZES,
        causal=False,
    ),
    ReaderCase(
        architecture="xlm-roberta",
        fields=SIZES,
        causal=False,
    ),
    ReaderCase(
        architecture="electra",
        fields=SIZES,
        causal=False,
    ),
    ReaderCase(
        architecture="xlnet",
        fields={"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64},
        causal=False,
    ),
    ReaderCase(
        architecture="xlm",
        fields={"vocab_size": 64, "emb_dim": 32, "n_layers": 2, "n_heads": 2},
        causal=False,
    ),
]


@pytest.mark.parametrize(
    "case", READERS, ids=lambda case: f"{case.architecture}{' decoder' * ('is_decoder' in case.fields)}"
)
@pytest.mark.parametrize("task", ["causal-lm", "text-generation"])
def test_a_causal_language_model_looks_back_only(task: str, case: ReaderCase) -> None:
    torch.manual_seed(1)
    config = AutoConfig.for_model(case.architecture, **case.fields)
    refusal = (
        rf"^spec\.model: {case.architecture} reads a text from both ends.*; choose a model that reads forward,"
        r" such as llama or gpt2$"
    )
    with nullcontext() if case.causal else pytest.raises(Failure, match=refusal):
        check_task(config, task, "spec.model")
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)  # so that what is seen shows
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 8, 10]])).logits
    assert torch.allclose(logits[0, :4], logits[1, :4], atol=1e-4) == case.causal


def test_an_encoder_is_refused_before_anything_is_learnt(
    make_run: Callable[..., FineTuneRun], tiny_model: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    BertModel(BertConfig(**SIZES | {"vocab_size": len(tokenizer)})).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    with pytest.raises(
        Failure, match=r"spec\.model: bert reads a text from both ends \(its configuration has is_decoder: false\)"
    ):
        main(make_run(model={"path": str(tmp_path / "bert")}))


def test_a_model_that_cannot_be_built(make_run: Callable[..., FineTuneRun], tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | {"hidden_act": "none such"}))
    with pytest.raises(Failure, match=r"spec\.model: no model can be built: KeyError: 'none such'"):
        main(make_run(model={"path": str(tmp_path / "m")}))


@dataclass(frozen=True)
class NewTokenCase:
    name: str
    tokens: int
    fits: bool


NEW_TOKENS = [
    NewTokenCase(
        name="all positions",
        tokens=256,
        fits=False,
    ),
    NewTokenCase(
        name="all but one",
        tokens=255,
        fits=True,
    ),
]


@pytest.mark.parametrize("case", NEW_TOKENS, ids=lambda case: case.name)
def test_a_prompt_needs_room(case: NewTokenCase, make_generate_run: Callable[..., GenerateRun]) -> None:
    run = make_generate_run(text={"maxNewTokens": case.tokens})
    if case.fits:
        main(run)
    else:
        with pytest.raises(Failure) as failure:
            main(run)
        assert (
            failure.value.message
            == "spec.text.maxNewTokens: 256 tokens leave no room for a prompt: the model has 256 positions"
            " (max_position_embeddings); set it below that"
        )
