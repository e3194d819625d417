"""New models: what is made of a configuration, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from luthier_api.exitcodes import ExitCode
from luthier_api.spec import NewModel
from luthier_trainer.ending import Failure
from luthier_trainer.newmodel import new_config, save_new_model

REFUSED = [
    ("unknown architecture", {"model_type": "lama"}, "spec.model.config.modelType: transformers has no architecture 'lama'. Did you mean 'llama'?"),
    ("an encoder", {"model_type": "vit"}, "spec.model.config.modelType: vit is not a causal language model; choose one such as llama"),
    (
        "unknown parameter", {"model_type": "llama", "parameters": {"hidden_sise": 64}},
        "spec.model.config.parameters.hidden_sise: the configuration of llama has no such field. Did you mean 'hidden_size'?",
    ),
    (
        "vocabulary twice", {"model_type": "llama", "parameters": {"vocab_size": 512}},
        "spec.model.config.parameters.vocab_size: the tokenizer sets it; use model.config.vocabSize",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "given", "expect"), REFUSED, ids=[c[0] for c in REFUSED])
def test_a_wrong_configuration_is_refused(name: str, given: dict[str, object], expect: str) -> None:
    with pytest.raises(Failure) as failure:
        new_config(NewModel.model_validate(given))
    assert (failure.value.code, failure.value.message) == (ExitCode.INVALID_SPEC, expect)


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Failure, match=r"spec\.model\.config\.parameters: ") as failure:
        save_new_model(new_config(NewModel(model_type="llama", parameters={"hidden_size": 30, "num_attention_heads": 4})), tmp_path, seed=1)
    assert failure.value.code is ExitCode.INVALID_SPEC


def test_a_new_model_loads_and_its_tokenizer_is_lossless(tiny_model: Path, paragraphs: list[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    text = paragraphs[300] + "\n\n\t“ünïcode” 🎻"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (model.config.vocab_size, model.config.eos_token_id, model.config.pad_token_id) == (512, 0, 1)
    assert len({tokenizer.eos_token_id, tokenizer.pad_token_id}) == 2


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    config = new_config(NewModel(model_type="gpt2", parameters={"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}))
    digests = []
    for i, seed in enumerate((1, 1, 2)):
        save_new_model(config, tmp_path / str(i), seed)
        digests.append((tmp_path / str(i) / "model.safetensors").read_bytes())
    assert digests[0] == digests[1] != digests[2]
