"""New models: what is made of a configuration, and what is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from trainer.conftest import MakeRun
from trainer.preparing import prepared
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from luthier_api.exitcodes import ExitCode
from luthier_api.spec import NewModel
from luthier_trainer.models.new_model import new_config, save_new_model
from luthier_trainer.models.new_tokenizer import train_tokenizer
from luthier_trainer.runtime.failure import Failure


@dataclass(frozen=True)
class RefusedCase:
    name: str
    given: dict[str, object]
    expect: str


REFUSED = [
    RefusedCase(
        name="unknown architecture",
        given={"model_type": "lama"},
        expect="spec.model.config.modelType: transformers has no architecture 'lama'. Did you mean 'llama'?",
    ),
    RefusedCase(
        name="an encoder",
        given={"model_type": "vit"},
        expect="spec.model.config.modelType: vit is not a causal language model; choose one such as llama",
    ),
    RefusedCase(
        name="a reader from both ends",
        given={"model_type": "bert"},
        expect=(
            "spec.model.config.modelType: bert reads a text from both ends (its configuration has is_decoder: false),"
            " so it would see the very tokens that it has to predict; choose a model that reads forward, such as llama"
            " or gpt2"
        ),
    ),
    RefusedCase(
        name="unknown parameter",
        given={"model_type": "llama", "parameters": {"hidden_sise": 64}},
        expect=(
            "spec.model.config.parameters.hidden_sise: the configuration of llama has no such field. Did you mean"
            " 'hidden_size'?"
        ),
    ),
    RefusedCase(
        name="vocabulary twice",
        given={"model_type": "llama", "parameters": {"vocab_size": 512}},
        expect="spec.model.config.parameters.vocab_size: the tokenizer sets it; use model.config.vocabSize",
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_a_wrong_configuration_is_refused(case: RefusedCase) -> None:
    with pytest.raises(Failure) as failure:
        new_config(NewModel.model_validate(case.given))
    assert (failure.value.code, failure.value.message) == (ExitCode.INVALID_SPEC, case.expect)


@dataclass(frozen=True)
class MisfitCase:
    name: str
    parameters: dict[str, object]
    message: str


MISFITS = [
    MisfitCase(
        name="heads of a part of a row",
        parameters={"hidden_size": 30, "num_attention_heads": 4},
        message="Class validation error",
    ),
    MisfitCase(
        name="no such function",
        parameters={"hidden_size": 32, "hidden_act": "none"},
        message="no model can be built: KeyError: 'none'",
    ),
    MisfitCase(
        name="heads that do not divide",
        parameters={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 3},
        message="the model can be built, but not run: The size of tensor a (4) must match the size of tensor b (3)",
    ),
]


@pytest.mark.parametrize("case", MISFITS, ids=lambda case: case.name)
def test_sizes_that_do_not_fit_are_refused(case: MisfitCase, tmp_path: Path) -> None:
    with pytest.raises(Failure) as failure:
        save_new_model(new_config(NewModel(model_type="llama", parameters=case.parameters)), tmp_path / "model", seed=1)
    assert failure.value.code is ExitCode.INVALID_SPEC
    assert failure.value.message.startswith(f"spec.model.config.parameters: {case.message}")
    assert not (tmp_path / "model").exists()


def test_a_new_model_loads_and_its_tokenizer_is_lossless(tiny_model: Path, paragraphs: list[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    text = paragraphs[300] + "\n\n\t“ünïcode” 🎻"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (model.config.vocab_size, model.config.eos_token_id, model.config.pad_token_id) == (512, 0, 1)
    assert len({tokenizer.eos_token_id, tokenizer.pad_token_id}) == 2


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    config = new_config(
        NewModel(model_type="gpt2", parameters={"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32})
    )
    digests = []
    for i, seed in enumerate((1, 1, 2)):
        save_new_model(config, tmp_path / str(i), seed)
        digests.append((tmp_path / str(i) / "model.safetensors").read_bytes())
    assert digests[0] == digests[1] != digests[2]


# transformers reads the tokenizer of Qwen2's and Qwen3.5's folders with classes of their own, whatever class has saved
# it.
@pytest.mark.parametrize(
    "model_type", ["gpt2", "llama", "mistral", "opt", "phi3", "qwen2", "qwen3", "qwen3_5_text", "qwen3_5_moe_text"]
)
def test_users_of_the_result_tokenise_as_training_did(model_type: str, paragraphs: list[str], tmp_path: Path) -> None:
    config = AutoConfig.for_model(model_type)
    tokenizer = train_tokenizer(paragraphs[:100], 400, config)
    # Of pairs that are equally frequent, the same one is merged first in each training. (With a suffix at the end of
    # words, tokenizers 0.23 numbers the alphabet in the order of a hash map, which differs even within a process.)
    again = train_tokenizer(paragraphs[:100], 400, config)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    users = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*paragraphs[300:350], "It's 2024:\n\n\n  indented\t x “ünïcode” 🎻"]
    assert [users(t)["input_ids"] for t in texts] == [tokenizer(t)["input_ids"] for t in texts]
    assert [users.decode(users(t)["input_ids"]) for t in texts] == texts
    assert (len(users), users.eos_token_id, users.bos_token_id, users.pad_token_id) == (400, 0, 0, 1)
    assert users.eos_token not in users.tokenize(paragraphs[300])


def test_prepare_keeps_the_tokenizer_that_it_trained_with(make_run: MakeRun, corpus_rows: Path) -> None:
    """The rows as `train` reads them are those of the tokenizer in the model's folder."""
    small = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    run = make_run(
        model={"config": {"modelType": "qwen2", "vocabSize": 400, "parameters": small}}, method={"type": "full"}
    )
    record, data = prepared(run)
    users = AutoTokenizer.from_pretrained(record.model_path)
    for row, given in zip(data["train"], corpus_rows.read_text().splitlines()[:50], strict=False):
        ids = [*users(json.loads(given)["text"])["input_ids"], users.eos_token_id]
        assert row["input_ids"][:20] == ids[:20]
