"""What new tokens add to a prompt's text, and that it is what transformers writes, with one text at a time, for models
of many kinds.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer.architectures import NEW_TOKENS, alone, engine_of, save_tiny, texts, tiny_config, tiny_model_of
from trainer.sentencepieces import byte_level, llama, unigram
from transformers import GenerationConfig

from luthier_api.exitcodes import ExitCode
from luthier_trainer.generation.batching import STEPS, difference, followed_logits, step_logits
from luthier_trainer.generation.slots import Slots
from luthier_trainer.generation.texts import continuation
from luthier_trainer.models import inspect
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.failure import Failure

TOKENIZERS = {"unigram": unigram, "llama": llama, "byte-level": byte_level}
TEXTS = ["An object is at the object", "An object  is", "a €uro, an é", "👩‍🎨 is an object", "one\n two\n\nthree"]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_a_text_cut_anywhere_goes_on_to_the_character(kind: str, text: str) -> None:
    """Wherever between two tokens the prompt ends: after a word, after a blank, or inside a character of several
    bytes.
    """
    tokenizer = TOKENIZERS[kind]()
    tokens = tokenizer(text)["input_ids"]
    for cut in range(1, len(tokens)):
        before = tokenizer.decode(tokens[:cut]).rstrip("\ufffd")  # of a character whose bytes are not all there
        assert before + continuation(tokenizer, tokens[:cut], tokens[cut:]) == text


@dataclass(frozen=True)
class ContinuationCase:
    tokenizer: str
    prompt: str
    generated: list[str]
    expect: str


CONTINUATIONS = [
    ContinuationCase(
        tokenizer="unigram",
        prompt="An object",
        generated=["▁is"],
        expect=" is",
    ),
    ContinuationCase(
        tokenizer="unigram",
        prompt="An object ",
        generated=["is"],
        expect="is",
    ),
    ContinuationCase(
        tokenizer="unigram",
        prompt="An object",
        generated=["▁", "▁is"],
        expect="  is",
    ),
    ContinuationCase(
        tokenizer="unigram",
        prompt="An obj",
        generated=["e", "c", "t"],
        expect="ect",
    ),
    ContinuationCase(
        tokenizer="llama",
        prompt="An object",
        generated=["▁", "i", "s"],
        expect=" is",
    ),
    ContinuationCase(
        tokenizer="llama",
        prompt="An object ",
        generated=["i", "s"],
        expect="is",
    ),
    ContinuationCase(
        tokenizer="llama",
        prompt="An object",
        generated=["<0xE2>", "<0x82>", "<0xAC>"],
        expect="€",
    ),
    ContinuationCase(
        tokenizer="llama",
        prompt="An object",
        generated=["<s>", "▁", "i", "s"],
        expect=" is",
    ),
    ContinuationCase(
        tokenizer="llama",
        prompt="An object",
        generated=[],
        expect="",
    ),
    ContinuationCase(
        tokenizer="byte-level",
        prompt="An object",
        generated=["Ġ", "i", "s"],
        expect=" is",
    ),
    ContinuationCase(
        tokenizer="byte-level",
        prompt="An object ",
        generated=["i", "s"],
        expect="is",
    ),
]


@pytest.mark.parametrize("case", CONTINUATIONS, ids=lambda case: f"{case.tokenizer}-{case.prompt}-{case.expect}")
def test_continuations(case: ContinuationCase) -> None:
    tokenizer = TOKENIZERS[case.tokenizer]()
    ids = tokenizer.convert_tokens_to_ids(case.generated)
    assert tokenizer.unk_token_id not in ids
    assert continuation(tokenizer, tokenizer(case.prompt)["input_ids"], ids) == case.expect


def test_blanks_before_punctuation_stay() -> None:
    """Repositories switch on a clean-up that joins them with the word before; it would change code and verse."""
    tokenizer = llama()
    tokenizer.clean_up_tokenization_spaces = True
    prompt = tokenizer("int x ")["input_ids"]
    assert continuation(tokenizer, prompt, tokenizer("int x = f() ; y ?")["input_ids"][len(prompt) :]) == "= f() ; y ?"


PROMPTS = ["An object", "is", "The object is at the object in the object on the", "one two three four five six seven"]

# Architecture → what texts share.
ARCHITECTURES: dict[str, str] = {
    "llama": "slots apart",
    "gpt2": "slots apart",
    "bloom": "any length",
    "opt": "slots apart",
    "mixtral": "slots apart",
    "gemma2": "slots",
    "mamba": "any length",
    "xglm": "slots",
    "roberta": "slots apart",
    "recurrent_gemma": "equal length",
    "bart": "equal length",
    "blenderbot-small": "equal length",
    "rwkv": "none",
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_batches_write_what_transformers_writes_alone(kind: str, tmp_path: Path) -> None:
    notices.forget()
    model = save_tiny(kind, tmp_path)
    engine = engine_of(tmp_path, batch_size=2)
    assert engine.sharing == ARCHITECTURES[kind]
    assert [f"spec.model: {kind} does not write the same in a batch as alone" in text for text in notices.given()] == [
        True
    ] * (engine.sharing in ("equal length", "none"))
    made = texts(engine, PROMPTS)
    assert made == [alone(model, engine.tokenizer, prompt, NEW_TOKENS) for prompt in PROMPTS]
    assert len(set(made)) > 1, "texts that do not depend on the prompt show nothing"
    if engine.sharing == "slots apart":  # on GPUs caches have one capacity
        engine.slots = Slots(engine.model, 2, engine.padding)
        assert texts(engine, PROMPTS) == made


@pytest.mark.parametrize("kind", ["gemma2", "llama4_text"])
def test_layers_that_look_back_only_so_far(kind: str, tmp_path: Path) -> None:
    """Every other layer of Gemma 2 sees a window, most layers of Llama 4 a part of the text. Both end inside of it."""
    model = save_tiny(kind, tmp_path, sliding_window=6, attention_chunk_size=6)
    engine = engine_of(tmp_path, batch_size=2)
    assert engine.sharing == "slots"
    assert texts(engine, PROMPTS) == [alone(model, engine.tokenizer, prompt, NEW_TOKENS) for prompt in PROMPTS]


@pytest.mark.parametrize("kind", ["llama", "roberta", "opt"])
def test_what_counts_as_rounding_is_rounding(kind: str, tmp_path: Path) -> None:
    """A larger measure of it would let a model pass that reads prompts otherwise in a batch."""
    model, prompt = save_tiny(kind, tmp_path), [5, 9, 21, 7, 30]
    assert difference(step_logits(model, [prompt], 1, 5)[:1], followed_logits(model, prompt, 1, 16)) < 1e-5


def test_batches_are_judged_by_what_they_do_to_the_logits() -> None:
    """Independent of `generate`: the prompt alone, by forward passes over prompt and new tokens together."""
    prompt, other = [7, 30, 99, 201, 45, 33, 12], [64, 20, 21, 22, 23, 24, 25]
    for kind, by_padding, by_neighbour in (("gpt2", False, False), ("bart", True, False), ("rwkv", True, True)):
        model = tiny_model_of(kind)
        model.generation_config = GenerationConfig(do_sample=False, pad_token_id=2)
        with torch.inference_mode():
            whole = model(input_ids=torch.tensor([[*prompt, *prompt[-STEPS:]]]), use_cache=False).logits[0].double()
        expect = whole[len(prompt) - 1 : -1]
        assert difference(expect, step_logits(model, [prompt], 2, 7)) < 1e-5
        assert (difference(expect, step_logits(model, [prompt], 2, 32)) > 0.01) is by_padding
        assert (difference(expect, step_logits(model, [prompt, other], 2, 7)) > 0.01) is by_neighbour


def test_a_model_that_cannot_generate_is_the_users(tmp_path: Path) -> None:
    """Jamba of two layers has no attention, and its cache cannot say how long it is: nothing that another attempt would
    mend.
    """
    save_tiny("jamba", tmp_path, num_hidden_layers=2)
    with pytest.raises(Failure) as failure:
        engine_of(tmp_path, batch_size=2)
    assert failure.value.code is ExitCode.INVALID_SPEC
    assert failure.value.message.startswith("spec.model: the jamba can be loaded, but not generate: ValueError: ")


def test_xglm_has_room_for_as_many_tokens_as_its_configuration_says() -> None:
    """Its table of positions is computed and knows a padding row."""
    assert inspect.max_positions(tiny_config("xglm")) == 256


@dataclass(frozen=True)
class BrokenCase:
    name: str
    change: Callable[..., Any]
    message: str


BROKEN = [
    BrokenCase(
        name="a list",
        change=lambda config: [config],
        message="config.json is not a JSON object",
    ),
    BrokenCase(
        name="a number where a list belongs",
        change=lambda config: config | {"rope_parameters": 7},
        message="config.json cannot be used: ",
    ),
    BrokenCase(
        name="a layer of a kind that is not there",
        change=lambda config: config | {"model_type": "gemma3_text", "layer_types": 3},
        message="config.json cannot be used: ",
    ),
]


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: case.name)
def test_a_configuration_that_transformers_stumbles_over_is_the_users(case: BrokenCase, tmp_path: Path) -> None:
    config = json.loads(tiny_config("llama").to_json_string())
    (tmp_path / "config.json").write_text(json.dumps(case.change(config)))
    with pytest.raises(Failure, match=case.message) as failure:
        inspect.read_config(tmp_path, "spec.model.path")
    assert failure.value.code is ExitCode.INVALID_SPEC
