"""Tasks other than text-generation with `model.quantization`: against transformers alone, one row at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from cases.quick import quick
from PIL import Image
from trainer.generating import generate_run, generate_shards, result_lines
from trainer.tones import save_speech_model
from trainer.word_pieces import word_pieces
from transformers import (
    AutoTokenizer,
    BartConfig,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BitsAndBytesConfig,
    ResNetConfig,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    WhisperForConditionalGeneration,
    pipeline,
)

from luthier_trainer.generation.batching import needs_to_be_alone
from luthier_trainer.generation.hardware import Hardware
from luthier_trainer.generation.loading import load_with_adapters
from luthier_trainer.prepare.generation import check_memory_settings
from luthier_trainer.prepare.main import main as prepare
from luthier_trainer.runtime.failure import Failure

Line = dict[str, Any]
POSITIONS, ROWS = 64, 5
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}
BITS: dict[str, Line] = {
    "nf4": FOUR_BITS | {"bnb_4bit_quant_type": "nf4"},
    "fp4": FOUR_BITS | {"bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


def labels(model: Any, folder: Path, row: Line) -> Line:
    read = AutoTokenizer.from_pretrained(folder)(row["text"], return_tensors="pt")
    return {"scores": ranked(model, read)}


def ranked(model: Any, read: Any) -> list[Line]:
    scores = model(**read).logits[0].softmax(-1).tolist()
    named = sorted(zip(model.config.id2label.values(), scores, strict=True), key=lambda one: -one[1])
    return [{"label": name, "score": score} for name, score in named]


def entities(model: Any, folder: Path, row: Line) -> Line:
    found = pipeline("token-classification", model, tokenizer=AutoTokenizer.from_pretrained(folder))(row["text"])
    return {"entities": [{"word": one["word"], "score": float(one["score"])} for one in found]}


def text(model: Any, folder: Path, row: Line) -> Line:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    read = tokenizer(row["text"], return_tensors="pt", return_token_type_ids=False)
    made = model.generate(**read, max_new_tokens=8, do_sample=False)[0, 1:]
    # The end of the model is an ordinary piece of this tokenizer.
    return {"output": tokenizer.decode(made[made != model.config.eos_token_id], skip_special_tokens=True)}


def picture(model: Any, folder: Path, row: Line) -> Line:
    with Image.open(row["image"]) as image:
        pixels = ViTImageProcessor.from_pretrained(folder)(image, return_tensors="pt")
    return {"scores": ranked(model, pixels)}


def bert(**config: Any) -> BertConfig:
    return BertConfig(vocab_size=400, max_position_embeddings=POSITIONS, initializer_range=0.3, **WIDE, **config)


T5 = T5Config(
    vocab_size=400,
    d_model=64,
    d_ff=128,
    d_kv=32,
    num_layers=2,
    num_heads=2,
    decoder_start_token_id=0,
    pad_token_id=0,
    eos_token_id=399,
    initializer_factor=2.0,  # with much larger weights, rounding grows until other tokens win
)
VIT = ViTConfig(image_size=16, patch_size=4, initializer_range=0.3, id2label=dict(enumerate("abcdefgh")), **WIDE)


@dataclass(frozen=True)
class Case:
    name: str
    spec: Line
    kind: str
    model: type[Any]
    config: Any
    expect: Callable[[Any, Path, Line], Line]
    skip: list[str] = field(default_factory=list)
    """Modules that stay as they are, besides those of which transformers knows it."""


CASES = [
    Case(
        name="labels in nf4",
        spec={"task": "text-classification"},
        kind="nf4",
        model=BertForSequenceClassification,
        config=bert(num_labels=3),
        expect=labels,
        skip=["classifier"],
    ),
    Case(
        name="entities in int8",
        spec={"task": "token-classification", "entities": {"aggregation": "none"}},
        kind="int8",
        model=BertForTokenClassification,
        config=bert(id2label={0: "O", 1: "B-PER", 2: "I-PER"}),
        expect=entities,
        skip=["classifier"],
    ),
    Case(
        name="other texts in fp4",
        spec={"task": "summarization", "text": {"maxNewTokens": 8}},
        kind="fp4",
        model=T5ForConditionalGeneration,
        config=T5,
        expect=text,
    ),
    Case(
        name="images in nf4",
        spec={"task": "image-classification"},
        kind="nf4",
        model=ViTForImageClassification,
        config=VIT,
        expect=picture,
        skip=["classifier"],
    ),
]


def save(case: Case, folder: Path, paragraphs: list[str]) -> None:
    """Save a model with random weights, and what reads its rows."""
    torch.manual_seed(3)
    case.model(case.config).save_pretrained(folder)
    if case.config is VIT:
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    else:
        word_pieces(paragraphs[:100], POSITIONS).save_pretrained(folder)


def rows_of(case: Case, folder: Path, paragraphs: list[str]) -> list[Line]:
    if case.expect is picture:
        blocks = numpy.random.default_rng(0).integers(0, 255, (ROWS, 20, 24, 3), dtype=numpy.uint8)
        for i, pixels in enumerate(blocks):
            Image.fromarray(pixels).save(folder / f"{i}.png")
        return [{"image": str(folder / f"{i}.png")} for i in range(ROWS)]
    if case.kind != "int8":
        return [
            {"text": " ".join(paragraph.split()[: 2 + 3 * i])} for i, paragraph in enumerate(paragraphs[20 : 20 + ROWS])
        ]
    # Three texts of one length each, which could share a batch, and would do so in pairs that depend on their order.
    texts = [paragraph.split()[: 3 + 6 * i] for i, paragraph in enumerate(paragraphs[20:22])]
    return [{"text": " ".join(words)} for text in texts for words in (text, text[::-1], text[1:] + text[:1])]


def near(found: Any, expect: Any) -> bool:
    """Whether two values are the same, but for the rounding of a batch; `found` may have more keys."""
    if isinstance(expect, dict):
        return all(near(found[name], expect[name]) for name in expect)
    if isinstance(expect, list):
        return len(found) == len(expect) and all(near(a, b) for a, b in zip(found, expect, strict=True))
    return bool(abs(found - expect) < 1e-4 if isinstance(expect, float) else found == expect)


@pytest.mark.parametrize("case", quick(CASES, "labels in nf4", "entities in int8", "other texts in fp4"))
def test_outputs_are_those_of_the_quantised_model(
    case: Case,
    tmp_path: Path,
    paragraphs: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And the same bits in another order, with other neighbours, on two shards."""
    folder = tmp_path / "model"
    save(case, folder, paragraphs)
    rows = rows_of(case, tmp_path, paragraphs)

    def lines(some: list[Line], name: str, **spec: Any) -> list[Line]:
        model = {"path": str(folder), "quantization": {"type": case.kind}}
        run = generate_run(tmp_path / name, some, **case.spec | {"model": model, "batchSize": 2} | spec)
        generate_shards(run, monkeypatch, prepare)
        return result_lines(run)

    found = lines(rows, "one")
    assert ("LLM.int8()" in capsys.readouterr().out) == (case.kind == "int8")
    bits = BitsAndBytesConfig(**BITS[case.kind], llm_int8_skip_modules=case.skip or None)
    theirs = case.model.from_pretrained(
        folder, dtype=torch.float32, quantization_config=bits, device_map={"": "cpu"}
    ).eval()

    @torch.inference_mode()
    def made_by(model: Any) -> list[Line]:
        return [case.expect(model, folder, row) for row in rows]

    expect = made_by(theirs)
    assert all(map(near, found, expect)), (found, expect)
    whole = case.model.from_pretrained(folder, dtype=torch.float32).eval()
    assert not all(map(near, found, made_by(whole))), "nothing was quantised"
    turned = lines(rows[::-1], "other", shards=2)
    assert [line["sha256"] for line in turned[::-1]] == [line["sha256"] for line in found]


@torch.inference_mode()
def test_a_model_that_hears_is_quantised_as_transformers_does_it(tmp_path: Path) -> None:
    save_speech_model(tmp_path)
    model = {"path": str(tmp_path), "quantization": {"type": "int8"}}
    run = generate_run(tmp_path / "job", [{"audio": "/a"}], task="automatic-speech-recognition", model=model)
    bits = BitsAndBytesConfig(**BITS["int8"])
    whole = WhisperForConditionalGeneration.from_pretrained(tmp_path).eval()
    theirs = WhisperForConditionalGeneration.from_pretrained(
        tmp_path, quantization_config=bits, device_map={"": "cpu"}
    ).eval()
    ours = load_with_adapters(run.spec, tmp_path, [], Hardware("cpu", "fp32"))
    assert needs_to_be_alone(ours)
    assert not needs_to_be_alone(whole)
    config = whole.config
    read = {
        "input_features": torch.randn(1, config.num_mel_bins, 2 * config.max_source_positions),
        "decoder_input_ids": torch.tensor([[1, 2, 3]]),
    }
    made, expect, plain = (model(**read).logits for model in (ours, theirs, whole))
    assert torch.equal(made, expect)
    assert not torch.equal(made, plain)


REFUSED = [
    (ResNetConfig(), "image-classification", "nf4", "bitsandbytes quantises linear layers, and resnet has none"),
    (
        BartConfig(d_model=64, encoder_ffn_dim=96),
        "summarization",
        "fp4",
        "fp4 on CPU needs layers whose inputs are a multiple of 64",
    ),
]


@pytest.mark.parametrize(("config", "task", "kind", "problem"), REFUSED)
def test_what_prepare_refuses(config: Any, task: str, kind: str, problem: str) -> None:
    row = {"image": "/a.png"} if task == "image-classification" else {"text": "a"}
    run = generate_run(Path("/w"), [row], task=task, model={"path": "/m", "quantization": {"type": kind}})
    with pytest.raises(Failure) as failed:
        check_memory_settings(config, run.spec)
    assert failed.value.message.startswith(f"spec.model.quantization: {problem}")
