"""Texts of `generate`: what they depend on (prompt, seed, settings, adapters) and what they do not (shards, neighbours,
batches).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trainer.generating import generate_run, generate_shards, result_lines, sample
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

from luthier_api.exitcodes import ExitCode
from luthier_trainer.runtime.failure import Failure

PROMPTS = [
    "The class statement",
    "A function is",
    "An import",
    "Objects are " * 12,
    "Names refer to",
    "The try statement specifies",
]
DRAWN = {"maxNewTokens": 12, "temperature": 1.0, "topP": 0.95}

Texts = Callable[..., list[dict[str, Any]]]


def rows(*prompts: str) -> list[dict[str, Any]]:
    return [{"prompt": p} for p in prompts]


@pytest.fixture
def texts(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Texts:
    """The lines of a job over the tiny model; keywords are fields of its spec."""

    def make(prompts: list[dict[str, Any]], **spec: Any) -> list[dict[str, Any]]:
        workspace = tmp_path / f"job{len(list(tmp_path.glob('job*')))}"
        run = generate_run(
            workspace, prompts, **{"task": "text-generation", "model": {"path": str(tiny_model)}, "text": DRAWN} | spec
        )
        generate_shards(run, monkeypatch)
        return result_lines(run)

    return make


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter whose weights were drawn, not learnt."""
    return write_adapter(tiny_model, tmp_path_factory.mktemp("adapter"))


def write_adapter(tiny_model: Path, folder: Path, **config: Any) -> Path:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(r=4, target_modules="all-linear", **config)
    )
    generator = torch.Generator().manual_seed(5)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.5, generator=generator)
    model.save_pretrained(folder)
    return folder


def written(lines: list[dict[str, Any]]) -> list[str]:
    return [line["text"] for line in lines]


def test_greedy_text_is_what_transformers_writes(texts: Texts, tiny_model: Path) -> None:
    lines = texts(rows(*PROMPTS[:3]), text={"maxNewTokens": 12})
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    for line in lines:
        ids = tokenizer(line["prompt"], return_tensors="pt")
        expect = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids.input_ids.shape[1] :]
        assert line["text"] == tokenizer.decode(expect, skip_special_tokens=True)
        assert line["newTokens"] == len(expect)


@dataclass(frozen=True)
class DependenceCase:
    name: str
    spec: dict[str, Any]
    differs: bool


DEPENDENCE = [
    DependenceCase(
        name="nothing",
        spec={},
        differs=False,
    ),
    DependenceCase(
        name="2 shards instead of 1",
        spec={"shards": 2},
        differs=False,
    ),
    DependenceCase(
        name="5 shards, some with one row",
        spec={"shards": 5},
        differs=False,
    ),
    DependenceCase(
        name="another temperature",
        spec={"text": DRAWN | {"temperature": 3.0}},
        differs=True,
    ),
    DependenceCase(
        name="a penalty for repetition",
        spec={"text": DRAWN | {"repetitionPenalty": 5.0}},
        differs=True,
    ),
    DependenceCase(
        name="few tokens to choose from",
        spec={"text": DRAWN | {"topK": 2}},
        differs=True,
    ),
    DependenceCase(
        name="bf16",
        spec={"precision": "bf16"},
        differs=True,
    ),
]


@pytest.mark.parametrize("case", DEPENDENCE, ids=lambda case: case.name)
def test_what_texts_depend_on(texts: Texts, case: DependenceCase) -> None:
    prompts = rows(*PROMPTS, *PROMPTS)
    assert (written(texts(prompts)) != written(texts(prompts, **case.spec))) is case.differs


def test_a_row_is_the_same_among_other_rows(texts: Texts) -> None:
    many = texts(rows(*PROMPTS), batchSize=4)
    for row, neighbours in ((0, [1, 2, 4]), (3, [3, 3, 3]), (5, [0, 1, 3])):
        alone = [{"prompt": PROMPTS[i], "seed": 100 * i} for i in (row, *neighbours)]
        assert texts(alone, batchSize=4)[0]["text"] == many[row]["text"]


def test_the_model_sees_shapes_that_follow_from_the_row(tiny_model: Path, tmp_path: Path) -> None:
    """Kernels are chosen by shape, and other kernels round in other ways. Long prompts are read alone, as they are;
    short ones together, with padding, and never fewer of them. A step is always of as many texts as there are slots.
    """
    from luthier_trainer.generation.engines.text import TextEngine
    from luthier_trainer.generation.hardware import Hardware

    run = generate_run(
        tmp_path, rows("-"), task="text-generation", model={"path": str(tiny_model)}, text={"maxNewTokens": 2}
    )
    engine = TextEngine(run.spec, tiny_model, tiny_model, [], Hardware("cpu", "fp32"), batch_size=3)
    seen: list[tuple[int, ...]] = []
    engine.model.get_input_embeddings().register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape)))
    long = "The class " * 20
    for prompts in (["The class"] * 3, ["An import"], [long], ["A function is", long, "An import"]):
        for _ in engine.work([sample(prompt, row=i, settings=run.spec.text) for i, prompt in enumerate(prompts)]):
            pass
    length = len(engine.tokens(sample(long))) - 1
    assert [shape for shape in seen if shape[1] > 1] == [(3, 16), (3, 16), (1, length), (1, length), (3, 16)]
    assert {shape for shape in seen if shape[1] == 1} == {(3, 1)}


def test_samples_of_a_row_have_seeds_of_their_own_that_rows_can_ask_for(texts: Texts) -> None:
    several = texts([{"prompt": PROMPTS[0], "seed": 7}], text=DRAWN | {"perPrompt": 3}, batchSize=3)
    assert [line["seed"] for line in several] == [7, 8, 9]
    assert len(set(written(several))) == 3
    asked = texts([{"prompt": PROMPTS[0], "seed": 7 + i} for i in range(3)], batchSize=3)
    assert written(asked) == written(several)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    from luthier_trainer.generation.sampling import drawn

    likelihood = torch.tensor([0.5, 0.0, 0.3, 0.2])
    numbers = torch.rand(4000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shares = drawn(likelihood.log().expand(4000, 4), numbers).bincount(minlength=4) / 4000
    assert shares[1] == 0
    assert torch.allclose(shares, likelihood, atol=0.03)  # 4 standard deviations


def test_text_ends_at_the_first_end_token(texts: Texts, tiny_model: Path, tmp_path: Path) -> None:
    """A model that has learnt to say one thing: the end."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.generation_config.eos_token_id = [0, tokenizer.eos_token_id]  # as Llama 3 has two
    model.save_pretrained(tmp_path / "terse")
    tokenizer.save_pretrained(tmp_path / "terse")
    (line,) = texts(rows("The end"), model={"path": str(tmp_path / "terse")}, text={"maxNewTokens": 5})
    assert (line["text"], line["newTokens"], line["finishReason"]) == ("", 0, "stop")


def test_adapters(texts: Texts, adapter: Path) -> None:
    prompts = rows(*PROMPTS[:2])
    plain = written(texts(prompts))

    def adapted(*weights: float) -> list[str]:
        return written(texts(prompts, adapters=[{"path": str(adapter), "weight": w} for w in weights]))

    full = adapted(1.0)
    assert full != plain
    assert adapted(0.0) == plain
    assert adapted(0.5) not in (full, plain)
    assert adapted(0.75, 0.25) == full
    assert adapted(1.0, -1.0) == plain


def test_an_adapter_merged_is_the_adapter_that_peft_runs(texts: Texts, adapter: Path, tiny_model: Path) -> None:
    from peft import PeftModel

    (line,) = texts(rows(PROMPTS[1]), adapters=[{"path": str(adapter)}], text={"maxNewTokens": 12})
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), adapter)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = tokenizer(PROMPTS[1], return_tensors="pt")
    expect = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids.input_ids.shape[1] :]
    assert line["text"] == tokenizer.decode(expect, skip_special_tokens=True)


def test_a_row_that_cannot_be_made_has_a_line_that_says_why(texts: Texts) -> None:
    lines = texts(rows("short", "The class statement. " * 100, "also short"), shards=3)
    assert [line["error"] is not None for line in lines] == [False, True, False]
    assert "text.maxNewTokens 12 are more than the model's 256; shorten the prompt" in lines[1]["error"]


@dataclass(frozen=True)
class MistakeCase:
    name: str
    change: Callable[..., Any]
    code: ExitCode
    messages: list[str]


MISTAKES = [
    MistakeCase(
        name="every row is too long",
        change=lambda m, t: {"inputs": {"rows": rows("long " * 300, "long " * 400)}, "shards": 2},
        code=ExitCode.INVALID_DATASET,
        messages=["spec.inputs: not one row", "row 0: prompt: "],
    ),
    MistakeCase(
        name="no GPU is there",
        change=lambda m, t: {"resources": {"gpus": 1}},
        code=ExitCode.MISCONFIGURED,
        messages=["spec.resources.gpus: 1 asked for", "set spec.resources.gpus: 0"],
    ),
    MistakeCase(
        name="the model is an encoder",
        change=lambda m, t: {"model": {"path": str(encoder(m, t))}},
        code=ExitCode.INVALID_SPEC,
        messages=["spec.model: ", "holds no weights for", "BertLMHeadModel"],
    ),
    MistakeCase(
        name="the adapter is of another model",
        change=lambda m, t: {"adapters": [{"path": str(adapter_of_another(m, t))}]},
        code=ExitCode.INVALID_SPEC,
        messages=["spec.adapters[0]: does not fit the model", "size mismatch"],
    ),
    MistakeCase(
        name="an empty adapter folder",
        change=lambda m, t: {"adapters": [{"path": str(t)}]},
        code=ExitCode.INVALID_SPEC,
        messages=["spec.adapters[0]", "adapter_config"],
    ),
]


@pytest.mark.parametrize("case", MISTAKES, ids=lambda case: case.name)
def test_mistakes(texts: Texts, tiny_model: Path, tmp_path: Path, case: MistakeCase) -> None:
    (own := tmp_path / "own").mkdir()
    with pytest.raises(Failure) as failure:
        texts(rows("The class"), **case.change(tiny_model, own))
    assert failure.value.code is case.code
    for word in case.messages:
        assert word in failure.value.message


def encoder(tiny_model: Path, folder: Path) -> Path:
    config = BertConfig(
        vocab_size=512,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        is_decoder=True,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, folder)
    return folder


def adapter_of_another(tiny_model: Path, folder: Path) -> Path:
    """An adapter of a model with wider layers."""
    config = AutoModelForCausalLM.from_pretrained(tiny_model).config
    config.hidden_size, config.head_dim = 64, 32
    model = AutoModelForCausalLM.from_config(config)
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(folder)
    return folder
