"""The tasks that look at images, from the manifest to the lines: each against transformers alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from cases.quick import quick
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from trainer.generating import generate_run, generate_shards, result_lines
from trainer.word_pieces import CLS, PAD, SEP, WORDS, word_pieces
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    BertConfig,
    BlipConfig,
    BlipForConditionalGeneration,
    GitConfig,
    GitForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from luthier_api.exitcodes import ExitCode
from luthier_trainer.prepare.main import main as prepare
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.failure import Failure

Line = dict[str, Any]
SIDE = 16
COUNT = 7
PROCESSOR = {"size": {"height": SIDE, "width": SIDE}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of other sizes and modes, and a file that is none."""
    folder = tmp_path_factory.mktemp("photos")
    random = numpy.random.default_rng(0)
    for i in range(COUNT):
        blocks = random.integers(0, 255, (2, 2, 4), dtype=numpy.uint8)
        blocks[..., 3] = 255
        image = Image.fromarray(blocks).resize((40 - i, 20 + i), Image.Resampling.NEAREST)
        image.convert(["RGB", "L", "RGBA"][i % 3]).save(folder / f"{i}.png")
    (folder / "bad.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(3)
    config = ViTConfig(
        image_size=SIDE,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.5,
        id2label={0: "lute", 1: "oud", 2: "saz"},
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(**PROCESSOR).save_pretrained(folder)
    return folder


Lines = Callable[..., list[Line]]


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lines:
    """The lines of a job, in the order of its rows; keywords are fields of its spec."""

    def make(**spec: Any) -> list[Line]:
        run = generate_run(tmp_path / f"job{len(list(tmp_path.glob('job*')))}", [], **{"batchSize": 4} | spec)
        generate_shards(run, monkeypatch, prepare)
        return result_lines(run)

    return make


def of_folder(photos: Path, data: Path) -> Line:
    return {"dataset": {"files": [str(photos)], "format": "imagefolder"}}


def of_column(photos: Path, data: Path) -> Line:
    names = [*(str(photos / f"{i}.png") for i in range(COUNT)), str(photos / "bad.png")]
    stored = [{"path": name, "bytes": Path(name).read_bytes()} for name in names]
    Dataset.from_dict({"photo": stored}).cast_column("photo", ImageFeature(decode=False)).to_parquet(data / "p.parquet")
    return {"dataset": {"files": [str(data / "p.parquet")]}, "columns": {"image": "photo"}}


def of_paths(photos: Path, data: Path) -> Line:
    """A table that names the files, beside it."""
    (photos / "list.jsonl").write_text(
        "".join(json.dumps({"image": f"{i}.png"}) + "\n" for i in [*range(COUNT), "bad"])
    )
    return {"dataset": {"files": [str(photos / "list.jsonl")]}}


def of_rows(photos: Path, data: Path) -> Line:
    return {"rows": [{"image": str(photos / f"{i}.png")} for i in [*range(COUNT), "bad"]]}


@dataclass(frozen=True)
class Case:
    name: str
    inputs: Callable[[Path, Path], Line]
    key: str = "image"
    """Under which `input` has the name of the file."""


CASES = [
    Case(name="a folder", inputs=of_folder),
    Case(name="a column of images", inputs=of_column, key="photo"),
    Case(name="a column of paths", inputs=of_paths),
    Case(name="rows of the job", inputs=of_rows),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_images_are_classified_as_transformers_does(
    case: Case, photos: Path, classifier: Path, tmp_path: Path, lines: Lines
) -> None:
    """One that cannot be read is an error of its row."""
    inputs = case.inputs(photos, tmp_path)
    spec = {"task": "image-classification", "model": {"path": str(classifier)}, "inputs": inputs}
    found = {Path(line["input"][case.key]).name: line for line in lines(**spec)}
    assert len(found) == COUNT + 1
    bad = found.pop("bad.png")
    assert bad["scores"] is None
    assert "image: " in bad["error"]
    assert "cannot identify image file" in bad["error"]
    alone = pipeline("image-classification", str(classifier), device="cpu", top_k=None, use_fast=False)
    for name, line in found.items():
        expect = {one["label"]: one["score"] for one in alone(str(photos / name))}
        assert {one["label"]: one["score"] for one in line["scores"]} == pytest.approx(expect, abs=1e-5), name
        assert line["label"] == max(expect, key=expect.__getitem__)


def test_neighbours_and_shards_change_no_bit(photos: Path, classifier: Path, lines: Lines) -> None:
    spec = {"task": "image-classification", "model": {"path": str(classifier)}}
    rows = [{"image": str(photos / f"{i}.png")} for i in range(COUNT)]
    one = lines(inputs={"rows": rows}, **spec)
    assert len({line["sha256"] for line in one}) == COUNT
    for shards in (2, 3):
        assert [line["sha256"] for line in lines(inputs={"rows": rows}, shards=shards, **spec)] == [
            line["sha256"] for line in one
        ]
    order = [5, 2, 6, 0]
    other = lines(inputs={"rows": [rows[i] for i in order]}, **spec)
    assert [line["sha256"] for line in other] == [one[i]["sha256"] for i in order]


def test_a_job_without_any_image_that_can_be_read_fails_in_prepare(
    photos: Path, classifier: Path, lines: Lines
) -> None:
    notices.forget()
    rows = [{"image": str(photos / "bad.png")}, {"image": str(photos / "gone.png")}, {"image": "0.png"}]
    with pytest.raises(Failure, match="not one row can be worked on") as failure:
        lines(task="image-classification", model={"path": str(classifier)}, inputs={"rows": rows})
    assert failure.value.code is ExitCode.INVALID_DATASET
    assert "bad.png: cannot identify image file" in failure.value.message


def test_a_column_without_images_is_refused(classifier: Path, tmp_path: Path, lines: Lines) -> None:
    (tmp_path / "n.jsonl").write_text('{"image": 3}\n')
    with pytest.raises(Failure, match=r'column "image" of n.jsonl holds int64, and neither images nor their paths'):
        lines(
            task="image-classification",
            model={"path": str(classifier)},
            inputs={"dataset": {"files": [str(tmp_path / "n.jsonl")]}},
        )


# Texts of images

LAYERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
LOOKS = LAYERS | {"image_size": SIDE, "patch_size": 4}
WRITES = LAYERS | {"vocab_size": WORDS, "max_position_embeddings": 64}
TOKENS = {"bos_token_id": CLS, "eos_token_id": SEP, "pad_token_id": PAD}


def encoder_decoder() -> PreTrainedModel:
    decoder = BertConfig(**WRITES, is_decoder=True, add_cross_attention=True)
    model = VisionEncoderDecoderModel(
        VisionEncoderDecoderConfig(encoder=ViTConfig(**LOOKS).to_dict(), decoder=decoder.to_dict())
    )
    model.generation_config.update(decoder_start_token_id=CLS, **TOKENS)
    model.config.update({"decoder_start_token_id": CLS} | TOKENS)
    return model


def blip() -> PreTrainedModel:
    words = WRITES | TOKENS | {"sep_token_id": SEP, "eos_token_id": PAD, "encoder_hidden_size": 16, "is_decoder": True}
    return BlipForConditionalGeneration(BlipConfig(text_config=words, vision_config=LOOKS, projection_dim=16))


def git() -> PreTrainedModel:
    return GitForCausalLM(GitConfig(vision_config=LOOKS, **WRITES, **TOKENS))


@pytest.fixture(scope="module")
def words(paragraphs: list[str]) -> PreTrainedTokenizerFast:
    return word_pieces(paragraphs[:100], 64)


@dataclass(frozen=True)
class Captions:
    name: str
    model: Callable[[], PreTrainedModel]
    text: Line
    """The settings of the job, without the number of tokens."""
    plain: Line | None = None
    """Those of `generate`; None: the texts are drawn, which it does otherwise."""


CAPTIONS = [
    Captions(name="an encoder and a decoder", model=encoder_decoder, text={}, plain={}),
    Captions(
        name="an encoder and a decoder, by beams", model=encoder_decoder, text={"numBeams": 3}, plain={"num_beams": 3}
    ),
    Captions(name="blip", model=blip, text={}, plain={}),
    Captions(name="git", model=git, text={}, plain={}),
    Captions(name="git, drawn: the seed of each row decides", model=git, text={"temperature": 1.5}),
]


@pytest.mark.parametrize(
    "case", quick(CAPTIONS, "an encoder and a decoder, by beams", "git, drawn: the seed of each row decides")
)
def test_texts_of_images_are_those_of_transformers(
    case: Captions, words: PreTrainedTokenizerFast, photos: Path, tmp_path: Path, lines: Lines
) -> None:
    """And the same bits whatever the order of the rows, their neighbours and the number of shards are."""
    folder = tmp_path / "model"
    torch.manual_seed(5)
    model = case.model()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.copy_(torch.randn(weight.shape))  # so that texts depend on the image
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    ViTImageProcessor(**PROCESSOR).save_pretrained(folder)
    rows = [{"image": str(photos / f"{i}.png"), "seed": i} for i in range(COUNT)]
    spec = {"task": "image-to-text", "model": {"path": str(folder)}, "text": {"maxNewTokens": 8} | case.text}
    found = lines(inputs={"rows": rows}, **spec)
    assert len({line["output"] for line in found}) > 2
    if case.plain is not None:
        plain = AutoModelForImageTextToText.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for row, line in zip(rows, found, strict=True):
            with Image.open(row["image"]) as image:
                pixels = ViTImageProcessor(**PROCESSOR)(image.convert("RGB"), return_tensors="pt")["pixel_values"]
            made = plain.generate(pixel_values=pixels, max_new_tokens=8, do_sample=False, **case.plain)
            assert line["output"] == tokenizer.decode(made[0, 1:], skip_special_tokens=True)
    order = [4, 1, 6, 2]
    other = lines(inputs={"rows": [rows[i] for i in order]}, shards=3, **spec)
    assert [line["sha256"] for line in other] == [found[i]["sha256"] for i in order]


def test_a_model_that_needs_a_prompt_is_refused(tmp_path: Path, photos: Path, lines: Lines) -> None:
    small = LAYERS | {"vocab_size": 64}
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=LOOKS | {"model_type": "clip_vision_model"},
            text_config=small | {"model_type": "llama"},
            image_token_index=1,
        )
    )
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(Failure, match="llava answers to a prompt with an image in it") as failure:
        lines(
            task="image-to-text",
            model={"path": str(tmp_path / "model")},
            inputs={"rows": [{"image": str(photos / "0.png")}]},
        )
    assert failure.value.code is ExitCode.INVALID_SPEC
