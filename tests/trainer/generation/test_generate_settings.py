"""Each setting of `text` does what transformers' own `generate` does with one prompt."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from trainer.generating import generate_run, sample
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from luthier_trainer.generation.engines.text import TextEngine
from luthier_trainer.generation.hardware import Hardware
from luthier_trainer.generation.samples import Output, Sample
from luthier_trainer.generation.slots import Slots

PROMPTS = ["The class statement", "An import", "Objects are " * 12, "Names refer to names refer to"]
NEW = 24
WEIGHT = 6  # times that of a new model, so that texts depend on their prompts


@pytest.fixture(scope="module")
def lively(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with larger weights, which ends the second of the texts after six tokens."""
    folder = tmp_path_factory.mktemp("lively")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(WEIGHT)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = tokenizer(PROMPTS[1], return_tensors="pt").input_ids
    end = int(model.generate(ids, max_new_tokens=NEW, do_sample=False)[0, ids.shape[1] + 6])
    model.generation_config = GenerationConfig(eos_token_id=[tokenizer.eos_token_id, end], pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def kept() -> dict[str, list[Output]]:
    return {}


@pytest.fixture
def plain(lively: Path, kept: dict[str, list[Output]]) -> list[Output]:
    """The likeliest texts. Not of the module, because each test has a heartbeat of its own."""
    if "plain" not in kept:
        kept["plain"] = written(engine_of(lively), PROMPTS)
    return kept["plain"]


@pytest.fixture(scope="module")
def model(lively: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(lively).eval()


def engine_of(folder: Path, batch_size: int = 3, **text: Any) -> TextEngine:
    run = generate_run(
        folder / "job",
        [{"prompt": "-"}],
        task="text-generation",
        model={"path": str(folder)},
        text={"maxNewTokens": NEW} | text,
    )
    return TextEngine(run.spec, folder, folder, [], Hardware("cpu", "fp32"), batch_size)


def written(engine: TextEngine, prompts: Sequence[str]) -> list[Output]:
    samples = [sample(prompt, row=row, seed=100 + row, settings=engine.settings) for row, prompt in enumerate(prompts)]
    outputs = [output for outputs in engine.work(samples) for output in outputs]
    return sorted(outputs, key=lambda output: output.sample.row)


@dataclass(frozen=True)
class Case:
    name: str
    text: dict[str, Any]
    """Fields of `spec.text`."""
    same: dict[str, Any] = field(default_factory=dict)
    """transformers' words for them."""


SAMPLED = {"temperature": 1.5, "do_sample": True}
CASES = [
    Case(
        name="the likeliest tokens",
        text={},
    ),
    Case(
        name="minNewTokens",
        text={"minNewTokens": 20},
        same={"min_new_tokens": 20},
    ),
    Case(
        name="repetitionPenalty",
        text={"repetitionPenalty": 1.7},
        same={"repetition_penalty": 1.7},
    ),
    Case(
        name="noRepeatNgramSize",
        text={"noRepeatNgramSize": 1},
        same={"no_repeat_ngram_size": 1},
    ),
    Case(
        name="numBeams",
        text={"numBeams": 3, "lengthPenalty": 2.0, "minNewTokens": 3},
        same={"num_beams": 3, "length_penalty": 2.0, "min_new_tokens": 3},
    ),
    Case(
        name="temperature",
        text={"temperature": 1.5},
        same=SAMPLED | {"top_k": 0},
    ),
    Case(
        name="topK",
        text={"temperature": 1.5, "topK": 7},
        same=SAMPLED | {"top_k": 7},
    ),
    Case(
        name="topP",
        text={"temperature": 1.5, "topP": 0.6},
        same=SAMPLED | {"top_k": 0, "top_p": 0.6},
    ),
    Case(
        name="minP",
        text={"temperature": 1.5, "minP": 0.3},
        same=SAMPLED | {"top_k": 0, "min_p": 0.3},
    ),
    Case(
        name="typicalP",
        text={"temperature": 1.5, "typicalP": 0.5},
        same=SAMPLED | {"top_k": 0, "typical_p": 0.5},
    ),
    Case(
        name="all at once",
        text={"temperature": 1.5, "topP": 0.9, "topK": 40, "minP": 0.01, "repetitionPenalty": 1.3, "minNewTokens": 5},
        same=SAMPLED | {"top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3, "min_new_tokens": 5},
    ),
]


@pytest.fixture
def drawn_by_seed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Lets `generate` draw by inverse transform sampling from the numbers in this list: an independent computation."""
    numbers: list[float] = []

    def draw(likelihood: torch.Tensor, num_samples: int) -> torch.Tensor:
        cumulative = numpy.cumsum(likelihood[0].double().numpy())
        return torch.tensor([[int(numpy.searchsorted(cumulative, numbers.pop(0) * cumulative[-1], side="right"))]])

    monkeypatch.setattr(torch, "multinomial", draw)
    return numbers


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_setting_is_that_of_transformers(
    case: Case, lively: Path, plain: list[Output], model: PreTrainedModel, drawn_by_seed: list[float]
) -> None:
    engine = engine_of(lively, **case.text)
    tokenizer = engine.tokenizer
    outputs = written(engine, PROMPTS)
    for output in outputs:
        random = torch.Generator().manual_seed(output.sample.seed)
        drawn_by_seed[:] = torch.rand(NEW, generator=random, dtype=torch.float64).tolist()
        expect, reason = alone(model, tokenizer(output.sample.prompt)["input_ids"], case.same)
        assert output.text == tokenizer.decode(expect, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert (output.facts["finishReason"], output.facts["newTokens"]) == (reason, len(expect))
    assert not case.same or [o.text for o in outputs] != [o.text for o in plain], "the setting shows nothing here"


def alone(model: PreTrainedModel, prompt: list[int], settings: dict[str, Any]) -> tuple[list[int], str]:
    """What transformers writes after one prompt, and why it ends."""
    ends = model.generation_config.eos_token_id
    config = GenerationConfig(**{"max_new_tokens": NEW, "eos_token_id": ends, "pad_token_id": 0} | settings)
    made = model.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :].tolist()
    end = next((i for i, token in enumerate(made) if token in ends), None)
    return made[:end], "length" if end is None else "stop"


def test_a_text_is_what_its_constraint_allows(lively: Path) -> None:
    schema = {"type": "object", "properties": {"name": {"enum": ["lute", "oud"]}}, "required": ["name"]}
    schema["additionalProperties"] = False
    for sampled in ({}, {"temperature": 2.0}):
        for output in written(
            engine_of(lively, jsonSchema=json.dumps(schema), maxNewTokens=60, **sampled), PROMPTS[:2]
        ):
            assert output.facts["finishReason"] == "length" or json.loads(output.text or "")["name"] in ("lute", "oud")
        for output in written(engine_of(lively, regex="[0-9]{3}(-[a-f]{4})?", **sampled), PROMPTS):
            assert re.fullmatch("[0-9]{3}(-[a-f]{4})?", output.text or "")
            assert output.facts["finishReason"] == "stop"


def test_a_constraint_that_cannot_be_used_is_the_error_of_its_rows(lively: Path) -> None:
    for text, reason in (
        ({"regex": "(a"}, "text.regex: cannot be used: "),
        ({"jsonSchema": "{]"}, "text.jsonSchema: "),
    ):
        engine = engine_of(lively, **text)
        problem = engine.problem(sample("a", settings=engine.settings))
        assert problem is not None
        assert problem.startswith(reason)


def test_penalties_of_openai(lively: Path, model: PreTrainedModel) -> None:
    """By their formula, and a forward pass over everything so far."""
    engine = engine_of(lively, presencePenalty=1.5, frequencyPenalty=0.5, minNewTokens=NEW)
    ends = sorted(engine.ends)
    for output in written(engine, PROMPTS[:2]):
        prompt, new = engine.tokens(output.sample), list[int]()
        for _ in range(NEW):
            with torch.no_grad():
                scores = model(torch.tensor([prompt + new])).logits[0, -1]
            for token in set(new):
                scores[token] -= 1.5 + 0.5 * new.count(token)
            scores[ends] = -torch.inf
            new.append(int(scores.argmax()))
        assert output.text == engine.tokenizer.decode(prompt + new)[len(output.sample.prompt) :]


def test_a_text_ends_before_a_stop_string(lively: Path, plain: list[Output]) -> None:
    """Wherever it stands: over several tokens, as a part of one, and only the first of them."""
    for whole in plain[:3]:
        text = whole.text or ""
        for begin, end in ((3, 4), (5, 9), (0, 2)):
            stop = text[begin:end] or text
            (cut,) = written(engine_of(lively, stop=["never there", stop]), [whole.sample.prompt])
            assert cut.text == text[: text.find(stop)]
            assert cut.facts["finishReason"] == "stop-string"
            assert cut.facts["newTokens"] <= whole.facts["newTokens"]


def logits_of(engine: TextEngine, samples: Sequence[Sample]) -> dict[int, torch.Tensor]:
    """The logits after each token of each text, by the seed of its sample."""
    found: dict[int, list[torch.Tensor]] = {}
    choice = engine.choice

    def watch(texts: Sequence[Any], logits: torch.Tensor) -> None:
        for row, text in enumerate(texts):
            if text is not None:
                found.setdefault(text.seed, []).append(logits[row].clone())
        choice(texts, logits)

    engine.choice = watch  # type: ignore[assignment]
    for _ in engine.work(samples):
        pass
    engine.choice = choice
    return {seed: torch.stack(steps) for seed, steps in found.items()}


@pytest.mark.parametrize(
    "apart",
    [
        pytest.param(True, id="caches of their own"),
        pytest.param(False, id="caches of one capacity", marks=pytest.mark.slow),
    ],
)
def test_the_bits_of_a_text_depend_on_nothing_beside_it(lively: Path, apart: bool) -> None:
    """The logits of every step, alone, among others, in another order, and after other texts in the same slot."""
    engine = engine_of(lively)
    assert engine.sharing == "slots apart"
    engine.slots = Slots(engine.model, engine.batch_size, engine.padding, apart=apart)
    texts = [*PROMPTS, "A", "is", "The class statement defines", "Objects " * 30, "Names " * 3]
    samples = [sample(text, row=i, seed=i, settings=engine.settings) for i, text in enumerate(texts)]
    whole = logits_of(engine, samples)
    assert len(whole) == len(texts)
    parts = {}
    for part in ([samples[0]], samples[:0:-1], samples[2::3], samples[1::3]):
        parts |= logits_of(engine, part)
        for seed, logits in parts.items():
            assert torch.equal(logits[: len(whole[seed])], whole[seed])


def test_a_text_that_ends_leaves_its_slot_to_the_next(lively: Path) -> None:
    """Texts of 9, 3, 3 and 3 tokens in two slots take 9 steps, where batches would take 12."""
    engine = engine_of(lively, batch_size=2, minNewTokens=NEW)
    assert engine.slots
    texts = [engine.text(sample(PROMPTS[0], row=i, seed=i, settings=engine.settings)) for i in range(4)]
    for text, length in zip(texts, (9, 3, 3, 3), strict=True):
        text.settings = text.settings.model_copy(update={"max_new_tokens": length})
    steps: list[tuple[int, ...]] = []
    engine.model.get_input_embeddings().register_forward_pre_hook(lambda _, given: steps.append(tuple(given[0].shape)))
    ended = [len(text.new) for texts in engine.slots.write(texts, 64, engine.choice) for text in texts]
    assert sorted(ended) == [3, 3, 3, 9]
    assert len([shape for shape in steps if shape == (2, 1)]) == 9
