"""speech-recognition: what `prepare` makes of rows, how each mistake is told, and what is learnt."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jiwer
import pytest
import soundfile
import torch
from trainer.preparing import prepared
from trainer.tones import RATE, file_of, save_model, save_speech_model, tone, write_speech
from transformers import (
    AutoProcessor,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
    WhisperForConditionalGeneration,
    pipeline,
)
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

from luthier_api.exitcodes import ExitCode
from luthier_api.run import FineTuneRun
from luthier_trainer.prepare.main import main
from luthier_trainer.publish import model_card
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.scoring import speech
from luthier_trainer.training import main as train

MakeRun = Callable[..., FineTuneRun]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_speech(tmp_path_factory.mktemp("audio") / "speech")


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_speech_model(tmp_path_factory.mktemp("models") / "whisper")


@pytest.fixture(scope="module")
def english(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_speech_model(tmp_path_factory.mktemp("models") / "english", multilingual=False)


@pytest.fixture
def listen(make_run: MakeRun, said: Path, whisper: Path) -> MakeRun:
    def make(**spec: Any) -> FineTuneRun:
        data = {"files": [str(said)], "evalFraction": 0.1} | spec.pop("dataset", {})
        training = {"maxLength": 32, "batchSize": 9, "maxSteps": 4, "learningRate": 5e-3, "logSteps": 50}
        given = {"task": "speech-recognition", "model": {"path": str(whisper)}, "method": {"type": "full"}}
        given |= {"speech": {"language": "en"}}
        training |= spec.pop("training", {})
        data = {name: value for name, value in data.items() if value is not None}
        return make_run(**given | spec, dataset=data, training=training)

    return make


def clips(data: Any) -> list[Any]:
    """The samples of the rows, by soundfile alone: they have the rate of the model."""
    return [soundfile.read(io.BytesIO(file), dtype="float32")[0] for file in data["audio"]]


@pytest.mark.slow
def test_what_is_said_is_learnt(listen: MakeRun) -> None:
    """And a pipeline of transformers writes of held-out clips what the evaluation has seen, with jiwer's rates."""
    run = listen(training={"maxSteps": 80}, dataset={"evalFraction": 0.25})
    _, data = prepared(run)
    metrics = train.main(run).metrics or {}
    assert metrics["wer"] < 0.4
    assert metrics["cer"] < 0.4
    write = pipeline("automatic-speech-recognition", model=str(Path(run.workspace) / "result"), device="cpu")
    texts = [write({"raw": clip, "sampling_rate": RATE})["text"] for clip in clips(data["eval"])]
    plain = BasicTextNormalizer()
    written, wanted = ([plain(text).strip() for text in found] for found in (texts, data["eval"]["reference"]))
    assert metrics["wer"] == pytest.approx(jiwer.wer(wanted, written))
    assert metrics["cer"] == pytest.approx(jiwer.cer(wanted, written))


def test_the_loss_is_that_of_transformers(listen: MakeRun, whisper: Path) -> None:
    """Over all tokens of the held-out texts, with the control tokens that the tokenizer writes."""
    run = listen(training={"maxSteps": 1})
    _, data = prepared(run)
    metrics = train.main(run).metrics or {}
    model = WhisperForConditionalGeneration.from_pretrained(Path(run.workspace) / "result").eval()
    processor = AutoProcessor.from_pretrained(whisper)
    processor.tokenizer.set_prefix_tokens(language="english", task="transcribe")
    losses, count = 0.0, 0
    for clip, text in zip(clips(data["eval"]), data["eval"]["reference"], strict=True):
        inputs = processor(clip, sampling_rate=RATE, return_tensors="pt")
        labels = processor.tokenizer(text, return_tensors="pt")["input_ids"][:, 1:]
        with torch.no_grad():
            losses += model(**inputs, labels=labels).loss.item() * labels.numel()
        count += labels.numel()
    assert metrics["evalLoss"] == pytest.approx(losses / count, rel=1e-4)


def test_a_model_of_one_language_learns_by_lora(listen: MakeRun, english: Path) -> None:
    run = listen(
        model={"path": str(english)},
        speech={"beams": 2, "normalize": "none"},
        method={"type": "lora", "rank": 4, "targetModules": ["q_proj", "v_proj"]},
    )
    record, _ = prepared(run)
    metrics = train.main(run).metrics or {}
    assert metrics["evalLoss"] < metrics["evalLossBefore"]
    assert {"wer", "cer"} <= metrics.keys()
    card = model_card.card(run, record, Path(run.workspace) / "result")
    assert "AutoModelForSpeechSeq2Seq" in card
    assert "AutoProcessor" in card


@dataclass(frozen=True)
class RefusedCase:
    name: str
    message: str
    spec: dict[str, Any] = field(default_factory=dict)
    english: bool = False


REFUSED = [
    RefusedCase(
        name="no language",
        spec={"speech": {}},
        message="spec.speech.language: the model knows 3 languages (de, en, zh); name the one that is spoken",
    ),
    RefusedCase(
        name="an unknown language",
        spec={"speech": {"language": "fr"}},
        message="spec.speech.language: the model does not know fr (it knows: de, en, zh)",
    ),
    RefusedCase(
        name="a language of a model of one",
        english=True,
        message="spec.speech.language: the model knows one language, or its generation_config.json names none",
    ),
    RefusedCase(
        name="a translation by a model of one",
        english=True,
        spec={"speech": {"task": "translate"}},
        message="spec.speech.task: the model knows one language and does not translate; remove it",
    ),
    RefusedCase(
        name="longer texts than there are positions",
        spec={"training": {"maxLength": 64}},
        message="spec.training.maxLength: the model has 48 positions for texts; set 48 at most",
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_what_does_not_suit_the_model(case: RefusedCase, listen: MakeRun, english: Path) -> None:
    spec = ({"model": {"path": str(english)}} if case.english else {}) | case.spec
    with pytest.raises(Failure) as caught:
        main(listen(**spec))
    assert caught.value.code == ExitCode.INVALID_SPEC
    assert caught.value.message.startswith(case.message)


def test_models_with_ctc_are_refused(listen: MakeRun, tmp_path: Path) -> None:
    """With a processor that is whole."""
    save_model(tmp_path)
    letters = tmp_path / "vocab.json"
    letters.write_text(
        json.dumps({letter: i for i, letter in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *"aet"])})
    )
    processor = Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), Wav2Vec2CTCTokenizer(str(letters)))
    processor.save_pretrained(tmp_path)
    with pytest.raises(Failure) as caught:
        main(listen(model={"path": str(tmp_path)}, speech={}))
    assert caught.value.code == ExitCode.INVALID_SPEC
    assert "wav2vec2" in caught.value.message, caught.value.message


def test_rows_that_are_too_long_are_left_out(listen: MakeRun, tmp_path: Path) -> None:
    rows = [("a", 0.5), ("b", 0.4), ("c" * 40, 0.3), ("d", 1.5), (" ", 0.2)]
    lines = []
    for n, (text, seconds) in enumerate(rows):
        (tmp_path / f"{n}.wav").write_bytes(file_of(tone(300 + n, seconds)))
        lines.append(json.dumps({"audio": f"{n}.wav", "text": text}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    _, data = prepared(listen(dataset={"files": [str(tmp_path / "rows.jsonl")], "evalFraction": None}))
    assert data["train"]["samples"] == [8000, 6400]
    for text in (
        "spec.training.maxSeconds: 1 of 4 training rows have audio of more than 1 s and are left out",
        "spec.training.maxLength: 1 of 4 training rows have a text of more than 32 tokens and are left out",
        'spec.dataset.columns.text: column "text" of rows.jsonl is blank in 1 of 5 rows, which are left out.',
    ):
        assert any(notice.startswith(text) for notice in notices.given()), notices.given()


def test_its_memory_is_planned(listen: MakeRun) -> None:
    record, _ = prepared(listen(resources={"gpusPerNode": 0, "memory": "64Gi"}))
    assert record.memory_facts.missing is None
    assert record.memory_facts.steps
    assert record.compute.multiplied > 0


PAIRS = [
    ("a low tone", "a low tone"),
    ("A low, tone!", "a low tone"),
    ("low low", "a low tone [noise]"),
    ("", "middle"),
    ("a b c d e f", "x"),
    ("ein hoher Ton", "ein hoher  Ton."),
]


@dataclass(frozen=True)
class Counted:
    """A pair of texts, and what a person counts."""

    written: str
    wanted: str
    words: tuple[int, int]
    """Wrong ones, and all of the reference."""
    characters: tuple[int, int]


COUNTED = [
    Counted("a high tone", "a high tone", words=(0, 3), characters=(0, 11)),
    Counted("a low tone", "a high tone", words=(1, 3), characters=(4, 11)),  # h → l, i → o, g → w, h left out
    Counted("high tone so", "a high tone", words=(2, 3), characters=(5, 11)),  # "a " left out, " so" added
    Counted("", "lute", words=(1, 1), characters=(4, 4)),
    Counted("The Lute!", "the lute", words=(0, 2), characters=(0, 8)),
]


@pytest.mark.parametrize("case", COUNTED, ids=lambda case: case.written)
def test_errors_are_those_that_a_person_counts(case: Counted) -> None:
    assert speech.numbers(case.written, case.wanted, "basic") == [*case.words, *case.characters]


@pytest.mark.parametrize("how", ["none", "basic"])
def test_rates_of_a_corpus_are_those_of_jiwer(how: str) -> None:
    """Added up row by row, of all rows."""
    rows = [speech.numbers(written, wanted, how) for written, wanted in PAIRS]
    found = speech.figures([sum(column) for column in zip(*rows, strict=True)])
    plain = BasicTextNormalizer() if how == "basic" else str
    texts, wanted = ([" ".join(plain(pair[i]).split()) for pair in PAIRS] for i in range(2))
    assert found["wer"] == pytest.approx(jiwer.wer(wanted, texts))
    assert found["cer"] == pytest.approx(jiwer.cer(wanted, texts))
