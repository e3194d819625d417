"""Embeddings of prompts: those of diffusers' own pipelines, each text once, long ones in parts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from trainer.generating import image_engine, sample

from luthier_api.task_settings import ImageSettings
from luthier_trainer.generation.prompts import parts, token_ids

# diffusers and numpy 2 talk about each other.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

IMAGE = {"width": 32, "height": 32, "steps": 1, "longPrompts": "chunk"}
SETTINGS = ImageSettings.model_validate(IMAGE)
PLAIN = sample("a lute on a bench", settings=SETTINGS)
NEGATIVE = sample("two lutes", row=1, seed=8, negative="rain, people", settings=SETTINGS)
LONG = sample("x " * 80, row=2, seed=9, negative="rain", settings=SETTINGS)


@pytest.mark.parametrize("kind", ["sdxl", "sd"])
def test_embeddings_are_those_of_diffusers(kind: str, request: pytest.FixtureRequest) -> None:
    engine = image_engine(request.getfixturevalue(kind), IMAGE)
    for one in (PLAIN, NEGATIVE):
        found = engine.prompts_for(one).arguments([one])
        expect = engine.pipe.encode_prompt(
            one.prompt,
            device="cpu",
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
            negative_prompt=one.negative_prompt,
        )
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        assert set(found) == set(names[: len(expect)])
        for name, tensor in zip(names, expect, strict=False):
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)


def test_tokens_of_one_part_are_those_of_the_tokenizer(sdxl: Path) -> None:
    tokenizer = image_engine(sdxl, IMAGE).pipe.tokenizer
    for text in ("", "a lute", "x " * 75):
        expect = tokenizer(text, padding="max_length", max_length=77, truncation=True)["input_ids"]
        assert token_ids(tokenizer, text, 1) == [expect]
        assert parts(tokenizer, text) == 1
    assert parts(tokenizer, "x " * 76) == 2


def test_a_long_prompt_is_read_to_its_end_in_parts(sdxl: Path) -> None:
    """Each part is what the encoder makes of it alone, and a shorter text beside it is filled up with empty ones."""
    prompts = image_engine(sdxl, IMAGE).prompts_for(LONG)
    assert prompts.size(LONG) == 2
    found = prompts.arguments([LONG])
    assert found["prompt_embeds"].shape[1] == found["negative_prompt_embeds"].shape[1] == 2 * 77
    expected = {"prompt_embeds": ("x " * 75, "x " * 5), "negative_prompt_embeds": ("rain", "")}
    for name, texts in expected.items():
        for i, text in enumerate(texts):
            assert torch.equal(found[name][:, i * 77 : (i + 1) * 77], prompts.embedding(text, 1).tokens)
    assert torch.equal(found["pooled_prompt_embeds"], prompts.embedding("x " * 75, 1).pooled)


def test_what_a_part_says_changes_the_image(sdxl: Path) -> None:
    engine = image_engine(sdxl, IMAGE, batch_size=1)
    ends = ({"prompt": LONG.prompt + end, "negativePrompt": "rain"} for end in ("a lute", "an oud"))
    whole, other = (engine.make([replace(LONG, cells=cells)])[0] for cells in ends)
    assert whole.file
    assert other.file
    assert whole.file() != other.file()


def test_each_text_is_encoded_once(sdxl: Path) -> None:
    engine = image_engine(sdxl, IMAGE, batch_size=2)
    texts: list[int] = []
    engine.pipe.text_encoder.register_forward_pre_hook(lambda _, given: texts.append(len(given[0])))
    for first in range(0, 8, 2):
        engine.make(
            [sample("a lute", index=i, seed=i, negative="rain", settings=SETTINGS) for i in range(first, first + 2)]
        )
    assert texts == [1, 1]  # the prompt and the negative one
    engine.make([NEGATIVE, PLAIN])
    assert texts == [1, 1] + [1] * 3  # without a negative prompt the embedding is zero
