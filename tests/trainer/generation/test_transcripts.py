"""automatic-speech-recognition, from the manifest to the lines: against transformers alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import jiwer
import numpy
import pytest
import soundfile
import torch
from cases.quick import quick
from datasets import Audio, Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from trainer.generating import generate_run, generate_shards, result_lines
from trainer.tones import RATE, file_of, save_model, save_speech_model, speech_tokenizer, tone
from transformers import AutoProcessor, WhisperForConditionalGeneration, pipeline
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

from luthier_api.exitcodes import ExitCode
from luthier_api.termination import TerminationMessage
from luthier_trainer.prepare.main import main as prepare
from luthier_trainer.runtime.failure import Failure

Line = dict[str, Any]
FILES = ("a.wav", "b.flac", "c.mp3", "d.wav", "e.flac", "long.wav")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Audio of several kinds and lengths, at the rate of the model, and a file that is none."""
    folder = tmp_path_factory.mktemp("clips")
    for i, name in enumerate(FILES):
        seconds = 2.6 if name == "long.wav" else 0.3 + i / 10
        heard = tone(200 + 500 * i, seconds, noise=0.3 * i, seed=i)
        (folder / name).write_bytes(file_of(heard, kind=name.rpartition(".")[2].upper()))
    (folder / "bad.wav").write_bytes(b"no audio")
    return folder


def with_wide_weights(folder: Path, seed: int = 5) -> Path:
    """The model in a folder with weights so large that what it writes, in letters, depends on what it hears."""
    model, tokenizer = WhisperForConditionalGeneration.from_pretrained(folder), speech_tokenizer()
    end = tokenizer.eos_token_id
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.copy_(torch.randn(weight.shape))
        model.get_input_embeddings().weight[end] *= 1.5  # so that some texts end
    bytes_and_control = range(tokenizer.convert_tokens_to_ids("<|notimestamps|>") + 1)
    letters = {*tokenizer.convert_tokens_to_ids([*ascii_lowercase, "Ġ"]), end}
    model.generation_config.suppress_tokens = [token for token in bytes_and_control if token not in letters]
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_wide_weights(save_speech_model(tmp_path_factory.mktemp("models") / "whisper"))


@pytest.fixture(scope="module")
def english(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_wide_weights(save_speech_model(tmp_path_factory.mktemp("models") / "english", multilingual=False))


Run = Callable[..., tuple[list[Line], list[TerminationMessage]]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whisper: Path) -> Run:
    """The lines of a job, in the order of its rows, and the messages of its shards; keywords are fields of its spec."""

    def make(**spec: Any) -> tuple[list[Line], list[TerminationMessage]]:
        given = {"task": "automatic-speech-recognition", "model": {"path": str(whisper)}, "batchSize": 4} | spec
        job = generate_run(tmp_path / f"job{len(list(tmp_path.glob('job*')))}", [], **given)
        messages = generate_shards(job, monkeypatch, prepare)
        return result_lines(job), messages

    return make


def samples(path: Path) -> numpy.ndarray:
    return soundfile.read(path, dtype="float32")[0]


def without_timestamps(model: Any) -> Line:
    """What `generate` is told so that it writes no timestamps, which a model with random weights does."""
    settings = model.generation_config
    stamps = range(settings.no_timestamps_token_id + 1, model.config.vocab_size)
    return {"num_beams": 1, "suppress_tokens": [*settings.suppress_tokens, *stamps]}


def of_rows(clips: Path, data: Path) -> Line:
    return {"rows": [{"audio": str(clips / name)} for name in (*FILES, "bad.wav")]}


def of_paths(clips: Path, data: Path) -> Line:
    """A table that names the files, beside it."""
    (clips / "list.jsonl").write_text("".join(json.dumps({"audio": name}) + "\n" for name in (*FILES, "bad.wav")))
    return {"dataset": {"files": [str(clips / "list.jsonl")]}}


def of_column(clips: Path, data: Path) -> Line:
    stored = [{"path": name, "bytes": (clips / name).read_bytes()} for name in (*FILES, "bad.wav")]
    rows = Dataset.from_dict({"clip": stored}).cast_column("clip", Audio(decode=False))
    rows.to_parquet(data / "clips.parquet")
    return {"dataset": {"files": [str(data / "clips.parquet")]}, "columns": {"audio": "clip"}}


@dataclass(frozen=True)
class Case:
    name: str
    inputs: Callable[[Path, Path], Line] = of_rows
    transcribe: Line = field(default_factory=dict)
    plain: Line = field(default_factory=dict)
    """The same for `generate`."""
    english: bool = False
    key: str = "audio"
    """Under which `input` has the name of the file."""


CASES = [
    Case(
        name="a language",
        transcribe={"language": "de", "task": "translate"},
        plain={"language": "de", "task": "translate"},
    ),
    Case(name="a language that the model tells", inputs=of_paths, plain={"task": "transcribe"}),
    Case(name="one language", inputs=of_column, key="clip", english=True),
    Case(name="beams", transcribe={"language": "en", "numBeams": 3}, plain={"language": "en", "num_beams": 3}),
]


@pytest.mark.parametrize("case", quick(CASES, "one language", "beams"))
def test_texts_are_those_of_a_pipeline(
    case: Case, clips: Path, whisper: Path, english: Path, tmp_path: Path, run: Run
) -> None:
    """One that cannot be read is an error of its row. One that is long is heard a window at a time."""
    model = english if case.english else whisper
    found, _ = run(model={"path": str(model)}, inputs=case.inputs(clips, tmp_path), transcribe=case.transcribe)
    by_name = {Path(line["input"][case.key]).name: line for line in found}
    bad = by_name.pop("bad.wav")
    assert bad["output"] is None
    assert "audio: " in bad["error"]
    assert "it cannot be read as audio" in bad["error"]
    assert len({line["output"] for line in by_name.values()}) > 3
    plain = pipeline("automatic-speech-recognition", str(model), device="cpu")
    for name, line in by_name.items():
        heard = {"raw": samples(clips / name), "sampling_rate": RATE}
        options = {"num_beams": 1} if name == "long.wav" else without_timestamps(plain.model)
        made = plain(heard, return_timestamps=name == "long.wav", generate_kwargs=options | case.plain)
        assert line["output"] == made["text"].strip(), name
        assert line["seconds"] == pytest.approx(len(samples(clips / name)) / RATE, abs=1e-3)


def test_each_output_says_its_language_and_how_it_ends(clips: Path, whisper: Path, run: Run) -> None:
    found, _ = run(inputs=of_rows(clips, clips))
    model = WhisperForConditionalGeneration.from_pretrained(whisper).eval()
    processor = AutoProcessor.from_pretrained(whisper)
    names = {token: name.strip("<|>") for name, token in model.generation_config.lang_to_id.items()}
    reasons = set()
    for name, line in zip(FILES[:-1], found, strict=False):
        features = processor(samples(clips / name), sampling_rate=RATE, return_tensors="pt")["input_features"]
        assert line["language"] == names[int(model.detect_language(features)[0])]
        options = without_timestamps(model) | {"language": line["language"], "task": "transcribe"}
        made = model.generate(features, force_unique_generate_call=True, return_dict_in_generate=True, **options)
        (whole,) = made["sequences"].tolist()
        ended = model.generation_config.eos_token_id in whole
        assert line["finishReason"] == ("stop" if ended else "length"), name
        assert line["newTokens"] == len(whole) - 4 - ended
        reasons.add(line["finishReason"])
    assert reasons == {"stop", "length"}


def test_neighbours_and_shards_change_no_bit(clips: Path, run: Run) -> None:
    rows = of_rows(clips, clips)["rows"][:-1]
    one, _ = run(inputs={"rows": rows})
    order = [5, 2, 4, 0]
    other, _ = run(inputs={"rows": [rows[i] for i in order]}, shards=3)
    assert [line["sha256"] for line in other] == [one[i]["sha256"] for i in order]
    assert [line["newTokens"] for line in other] == [one[i]["newTokens"] for i in order]


def test_error_rates_of_references_are_those_of_jiwer(clips: Path, run: Run) -> None:
    rows = of_rows(clips, clips)["rows"][:4]
    said, _ = run(inputs={"rows": rows})
    wanted = [line["output"][1:] + " so" for line in said[:3]]
    rows = [row | {"reference": text} for row, text in zip(rows, wanted, strict=False)] + rows[3:]
    _, messages = run(inputs={"rows": rows}, shards=2)
    plain = BasicTextNormalizer()
    given, wanted = ([" ".join(plain(text).split()) for text in texts] for texts in ([*map(output, said[:3])], wanted))
    metrics = messages[-1].metrics or {}
    assert metrics["wer"] == pytest.approx(jiwer.wer(wanted, given))
    assert metrics["cer"] == pytest.approx(jiwer.cer(wanted, given))


def output(line: Line) -> str:
    return str(line["output"])


def test_an_adapter_is_added(clips: Path, whisper: Path, tmp_path: Path, run: Run) -> None:
    base = WhisperForConditionalGeneration.from_pretrained(whisper)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    rows = of_rows(clips, clips)["rows"][:5]
    said, _ = run(inputs={"rows": rows}, adapters=[{"path": str(tmp_path / "adapter")}], transcribe={"language": "en"})
    base = WhisperForConditionalGeneration.from_pretrained(whisper)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().eval()
    processor = AutoProcessor.from_pretrained(whisper)
    plain, _ = run(inputs={"rows": rows}, transcribe={"language": "en"})
    assert [*map(output, said)] != [*map(output, plain)]
    for name, line in zip(FILES, said, strict=False):
        features = processor(samples(clips / name), sampling_rate=RATE, return_tensors="pt")["input_features"]
        ids = model.generate(features, language="en", **without_timestamps(model))
        assert line["output"] == processor.batch_decode(ids, skip_special_tokens=True)[0].strip()


def test_long_audio_may_be_refused(clips: Path, run: Run) -> None:
    found, _ = run(inputs=of_rows(clips, clips), transcribe={"longAudio": "refuse"})
    assert [line["error"] is None for line in found] == [True] * 5 + [False] * 2
    assert found[5]["error"] == (
        "audio: 2.6 s, and the model hears 1 s at once; divide it, or set transcribe.longAudio: windows"
    )


@dataclass(frozen=True)
class RefusedCase:
    name: str
    message: str
    transcribe: Line = field(default_factory=dict)
    english: bool = False


REFUSED = [
    RefusedCase(
        name="an unknown language",
        transcribe={"language": "fr"},
        message="spec.transcribe.language: the model does not know fr (it knows: de, en, zh)",
    ),
    RefusedCase(
        name="a language of a model of one",
        transcribe={"language": "en"},
        english=True,
        message="spec.transcribe.language: the model knows one language, or its generation_config.json names none",
    ),
    RefusedCase(
        name="a translation by a model of one",
        transcribe={"task": "translate"},
        english=True,
        message="spec.transcribe.task: the model knows one language and does not translate; remove it",
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_what_does_not_suit_the_model(case: RefusedCase, clips: Path, whisper: Path, english: Path, run: Run) -> None:
    with pytest.raises(Failure) as caught:
        run(
            model={"path": str(english if case.english else whisper)},
            inputs={"rows": [{"audio": str(clips / "a.wav")}]},
            transcribe=case.transcribe,
        )
    assert caught.value.code == ExitCode.INVALID_SPEC
    assert caught.value.message.startswith(case.message)


def test_other_models_are_refused(clips: Path, tmp_path: Path, run: Run) -> None:
    save_model(tmp_path / "wav2vec2")
    with pytest.raises(Failure, match="wav2vec2"):
        run(model={"path": str(tmp_path / "wav2vec2")}, inputs={"rows": [{"audio": str(clips / "a.wav")}]})


def test_a_column_without_audio_is_refused(tmp_path: Path, run: Run) -> None:
    (tmp_path / "n.jsonl").write_text('{"audio": 3}\n')
    with pytest.raises(
        Failure, match=r'column "audio" of n.jsonl holds int64, and neither audio files nor their paths'
    ):
        run(inputs={"dataset": {"files": [str(tmp_path / "n.jsonl")]}})
