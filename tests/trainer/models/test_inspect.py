"""What a configuration says of a model, against what a small model of it does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
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

POSITIONS = [
    # architecture              fields                                        of 66 positions, tokens have
    ("bert", SIZES, 66),
    ("mpnet", SIZES, 64),
    ("roberta", SIZES, 64),
    ("camembert", SIZES | {"pad_token_id": 5}, 60),
    ("roberta-prelayernorm", SIZES, 64),
    ("data2vec-text", SIZES, 64),
    ("xlm-roberta-xl", SIZES, 64),
    ("ibert", SIZES, 64),
    ("opt", SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32}, 66),
    ("llama", SIZES, 66),
]


@pytest.mark.parametrize(("kind", "fields", "tokens"), POSITIONS, ids=[p[0] for p in POSITIONS])
def test_room(kind: str, fields: dict[str, Any], tokens: int) -> None:
    config = AutoConfig.for_model(kind, **fields, max_position_embeddings=66)
    assert max_positions(config) == tokens
    model = AutoModel.from_config(config).eval()
    model(input_ids=torch.full((1, tokens), 9))
    if kind != "llama":  # which has no table to run out of
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, tokens + 1), 9))


READERS = [
    # architecture       fields                               looks back only
    ("llama", SIZES, True),
    ("gpt2", GPT, True),
    ("gpt_neox", SIZES, True),
    ("bart", BART, True),
    ("bert", SIZES, False),
    ("bert", SIZES | {"is_decoder": True}, True),
    ("bert-generation", SIZES, False),
    ("xlm-roberta", SIZES, False),
    ("electra", SIZES, False),
    ("xlnet", {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64}, False),
    ("xlm", {"vocab_size": 64, "emb_dim": 32, "n_layers": 2, "n_heads": 2}, False),
]


@pytest.mark.parametrize(
    ("kind", "fields", "back"), READERS, ids=[f"{r[0]}{' decoder' * ('is_decoder' in r[1])}" for r in READERS]
)
@pytest.mark.parametrize("task", ["causal-lm", "text-generation"])
def test_a_causal_language_model_looks_back_only(task: str, kind: str, fields: dict[str, Any], back: bool) -> None:
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **fields)
    refusal = (
        rf"^spec\.model: {kind} reads a text from both ends.*; choose a model that reads forward, such as llama or"
        r" gpt2$"
    )
    with nullcontext() if back else pytest.raises(Failure, match=refusal):
        check_task(config, task, "spec.model")
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)  # so that what is seen shows
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 8, 10]])).logits
    assert torch.allclose(logits[0, :4], logits[1, :4], atol=1e-4) == back


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


NEW_TOKENS = [("all positions", 256, False), ("all but one", 255, True)]


@pytest.mark.parametrize(("name", "new", "fits"), NEW_TOKENS, ids=[n[0] for n in NEW_TOKENS])
def test_a_prompt_needs_room(name: str, new: int, fits: bool, make_generate_run: Callable[..., GenerateRun]) -> None:
    run = make_generate_run(text={"maxNewTokens": new})
    if fits:
        main(run)
    else:
        with pytest.raises(Failure) as failure:
            main(run)
        assert (
            failure.value.message
            == "spec.text.maxNewTokens: 256 tokens leave no room for a prompt: the model has 256 positions"
            " (max_position_embeddings); set it below that"
        )
