"""audio-classification over real audio: what `prepare` makes of files and tables, how each mistake is told, and what is
learnt.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
import torch
from datasets import Audio, Dataset, Features, Value
from trainer.preparing import prepared
from trainer.tones import AST, HEIGHTS, RATE, WAV2VEC2, WHISPER, file_of, save_model, tone, write_tones
from transformers import AutoModelForAudioClassification, pipeline

from luthier_api.dataset import TrainingData
from luthier_api.exitcodes import ExitCode
from luthier_api.run import FineTuneRun
from luthier_trainer.data import audio
from luthier_trainer.data.load import Loader
from luthier_trainer.prepare.main import main
from luthier_trainer.publish import model_card
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.tasks.audio import fitting
from luthier_trainer.training import main as train

MakeRun = Callable[..., FineTuneRun]


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tones(tmp_path_factory.mktemp("audio") / "tones")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {config.model_type: save_model(folder / config.model_type, config) for config in (WAV2VEC2, WHISPER, AST)}


@pytest.fixture
def hear(make_run: MakeRun, tones: Path, models: dict[str, Path]) -> MakeRun:
    """A run over the tones; fields of `dataset` and `training` are merged with what is there."""

    def make(kind: str = "wav2vec2", **spec: Any) -> FineTuneRun:
        data = {"files": [str(tones)], "evalFraction": 0.2} | spec.pop("dataset", {})
        training = {"batchSize": 8, "maxSteps": 10, "learningRate": 3e-3, "logSteps": 50} | spec.pop("training", {})
        given = {"task": "audio-classification", "model": {"path": str(models[kind])}, "method": {"type": "full"}}
        data = {name: value for name, value in data.items() if value is not None}
        return make_run(**given | spec, dataset=data, training=training)

    return make


def failure(run: FineTuneRun) -> str:
    with pytest.raises(Failure) as caught:
        main(run)
    assert caught.value.code in (ExitCode.INVALID_DATASET, ExitCode.INVALID_SPEC)
    return caught.value.message


def said(text: str) -> bool:
    return any(text in notice for notice in notices.given())


# ---- files


@dataclass(frozen=True)
class FileCase:
    kind: str
    rate: int
    channels: int
    error: float  # of a sample, but for the ends; MP3 is lossy


FILES = [
    FileCase(kind="WAV", rate=16_000, channels=1, error=1e-4),
    FileCase(kind="WAV", rate=44_100, channels=2, error=2e-3),
    FileCase(kind="WAV", rate=8_000, channels=1, error=2e-3),
    FileCase(kind="FLAC", rate=48_000, channels=2, error=2e-3),
    FileCase(kind="OGG", rate=22_050, channels=1, error=5e-2),
    FileCase(kind="MP3", rate=44_100, channels=2, error=5e-2),
]


@pytest.mark.parametrize("case", FILES, ids=lambda case: f"{case.kind}-{case.rate}-{case.channels}")
def test_a_file_is_the_tone_that_was_written(case: FileCase) -> None:
    """At the rate of the model, from its beginning, with the channels mixed down."""
    hertz, seconds = 440.0, 1.0
    one = tone(hertz, seconds, case.rate)
    channels = one if case.channels == 1 else numpy.stack([one * 1.5, one * 0.5], axis=1)
    file = file_of(channels, case.rate, case.kind)
    assert audio.check(file).seconds == pytest.approx(seconds, abs=0.06)  # MP3 has frames
    heard, wanted = audio.samples(file, RATE, 30.0), tone(hertz, seconds)
    middle = slice(2000, 14_000)
    assert heard.dtype == numpy.float32
    assert numpy.abs(heard[middle] - wanted[middle]).max() < case.error
    assert len(audio.samples(file, RATE, 0.5)) == 8000


def rows_of(folder: Path, name: str, content: bytes | None = None) -> dict[str, Any]:
    """A table of two good clips, and then one with this content; None: there is no such file."""
    folder.mkdir()
    names = ["a.wav", "b.wav", name]
    for n, path in enumerate(names[:2]):
        (folder / path).write_bytes(file_of(tone(300 + 300 * n)))
    if content is not None:
        (folder / name).write_bytes(content)
    lines = [json.dumps({"audio": path, "label": "xy"[n % 2]}) for n, path in enumerate(names)]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return {"files": [str(folder / "rows.jsonl")], "evalFraction": None}


def table(folder: Path, column: pyarrow.Array) -> dict[str, Any]:
    made = pyarrow.table({"audio": column, "label": ["x", "y"]})
    pyarrow.parquet.write_table(made, folder / "rows.parquet")
    return {"files": [str(folder / "rows.parquet")], "evalFraction": None}


AUDIO = "spec.dataset.columns.audio"
THIRD = (
    f"{AUDIO}: 1 audio files of rows.jsonl cannot be used. The first is row 2, counted from 0 (line 3 of rows.jsonl): "
)
FLAC = file_of(tone(300, 3.0, noise=0.1), kind="FLAC")


@dataclass(frozen=True)
class MistakeCase:
    name: str
    dataset: Callable[[Path], dict[str, Any]]  # from a scratch folder
    message: str


MISTAKES = [
    MistakeCase(
        name="no such column",
        dataset=lambda t: {"columns": {"audio": "sound"}},
        message=f'{AUDIO}: no column "sound" in tones.jsonl (columns: audio, label). ',
    ),
    MistakeCase(
        name="no such file",
        dataset=lambda t: rows_of(t / "rows", "gone.wav"),
        message=f"{THIRD}gone.wav: No such file or directory. Replace or remove them",
    ),
    MistakeCase(
        name="no audio",
        dataset=lambda t: rows_of(t / "rows", "text.wav", b"hello" * 100),
        message=f"{THIRD}text.wav: it cannot be read as audio (",
    ),
    MistakeCase(
        name="an empty file",
        dataset=lambda t: rows_of(t / "rows", "none.wav", b""),
        message=f"{THIRD}none.wav: the file is empty. Replace",
    ),
    MistakeCase(
        name="no samples",
        dataset=lambda t: rows_of(t / "rows", "short.wav", file_of(numpy.zeros(0, "float32"))),
        message=f"{THIRD}short.wav: it has no samples. Replace",
    ),
    MistakeCase(
        name="cut in the middle",
        dataset=lambda t: rows_of(t / "rows", "cut.flac", FLAC[: len(FLAC) // 2]),
        message=f"{THIRD}cut.flac: it breaks off after ",
    ),
    MistakeCase(
        name="no path",
        dataset=lambda t: rows_of(t / "rows", ""),
        message=f"{THIRD}there is none. Replace",
    ),
    MistakeCase(
        name="a column of numbers",
        dataset=lambda t: table(t, pyarrow.array([1, 2])),
        message=f'{AUDIO}: column "audio" of rows.parquet holds int64, and neither audio nor paths of files. Write',
    ),
    MistakeCase(
        name="a row without audio",
        dataset=lambda t: table(t, pyarrow.array([file_of(tone(300)), None])),
        message=f"{AUDIO}: 1 audio files of rows.parquet cannot be used. The first is row 1, counted from 0",
    ),
    MistakeCase(
        name="too short",
        dataset=lambda t: rows_of(t / "rows", "click.wav", file_of(tone(300, 0.02))),
        message=f"{AUDIO}: 1 of 3 training clips are too short for the model. The first is row 2 of those that are",
    ),
]


@pytest.mark.parametrize("case", MISTAKES, ids=lambda case: case.name)
def test_rows_that_do_not_fit(case: MistakeCase, hear: MakeRun, tmp_path: Path) -> None:
    assert failure(hear(dataset=case.dataset(tmp_path))).startswith(case.message)


def test_audio_in_all_forms_is_the_same_file(tmp_path: Path) -> None:
    """Paths from / on and relative ones, bytes, bytes and path, and the feature of `datasets`."""
    files = [file_of(tone(300)), file_of(tone(900))]
    names = [f"{n}.wav" for n in range(2)]
    for name, file in zip(names, files, strict=True):
        (tmp_path / name).write_bytes(file)
    both = [{"bytes": None, "path": str(tmp_path / names[0])}, {"bytes": files[1], "path": "1.wav"}]
    whole = Dataset.from_dict(
        {"audio": both, "label": ["x", "y"]},
        features=Features({"audio": {"bytes": Value("binary"), "path": Value("string")}, "label": Value("string")}),
    ).cast_column("audio", Audio())
    forms: dict[str, Any] = {
        "relative": pyarrow.array(names),
        "absolute": pyarrow.array([str(tmp_path / name) for name in names]),
        "bytes": pyarrow.array(files),
        "both": pyarrow.array(both),
    }
    whole.to_parquet(tmp_path / "whole.parquet")
    tables = {"feature": str(tmp_path / "whole.parquet")}
    for form, column in forms.items():
        tables[form] = str(tmp_path / f"{form}.parquet")
        pyarrow.parquet.write_table(pyarrow.table({"audio": column, "label": ["x", "y"]}), tables[form])
    seen = {}
    for form, path in tables.items():
        names = ("audio", "label")
        loader = Loader(TrainingData(files=[path]), "spec.dataset", tmp_path / "cache", names, others=False)
        seen[form] = fitting(loader.split("train", "split"), "audio", AUDIO, names).data[:]
    assert seen == {key: {"audio": files, "label": ["x", "y"]} for key in tables}


@dataclass(frozen=True)
class NoticeCase:
    name: str
    clips: list[bytes]
    notice: str
    kind: str = "wav2vec2"
    training: dict[str, Any] = field(default_factory=dict)


PLAIN = file_of(tone(300, noise=0.01))
NOTICES = [
    NoticeCase(
        name="other rates",
        clips=[PLAIN, file_of(tone(300, rate=8000), 8000), file_of(tone(400, rate=44100), 44100)],
        notice=f"{AUDIO}: 2 of 3 training clips are converted to the 16,000 Hz of the model (1 from 8,000 Hz, 1 from"
        " 44,100 Hz)",
    ),
    NoticeCase(
        name="channels",
        clips=[PLAIN, file_of(numpy.stack([tone(300), tone(300)], axis=1))],
        notice=f"{AUDIO}: 1 of 2 training clips have several channels, of which the model hears the mean",
    ),
    NoticeCase(
        name="too long",
        clips=[PLAIN, file_of(tone(300, 2.5))],
        training={"maxSeconds": 2},
        notice="spec.training.maxSeconds: 1 of 2 training clips are longer than 2 s and are cut; the longest has 2.5 s",
    ),
    NoticeCase(
        name="longer than what Whisper hears",
        clips=[PLAIN, file_of(tone(300, 2.5))],
        kind="whisper",
        notice="spec.training.maxSeconds: 1 of 2 training clips are longer than 1 s and are cut;",
    ),
    NoticeCase(
        name="longer than what AST hears",
        clips=[PLAIN, file_of(tone(300, 2.5))],
        kind="audio-spectrogram-transformer",
        notice="spec.training.maxSeconds: 1 of 2 training clips are longer than 0.655 s and are cut;",
    ),
    NoticeCase(
        name="silence",
        clips=[PLAIN, file_of(numpy.zeros(8000, "float32"))],
        notice=f"{AUDIO}: 1 audio files of rows.parquet are silent from beginning to end. The first is row 1,",
    ),
    NoticeCase(
        name="masks",
        clips=[PLAIN, PLAIN],
        notice="spec.model: parts of the clips are masked at random while it learns, as its config.json says"
        " (SpecAugment: mask_time_prob 0.05)",
    ),
    NoticeCase(
        name="layers",
        clips=[PLAIN, PLAIN],
        notice="spec.model: its config.json lets whole layers out at random while it learns (layerdrop 0.5)",
    ),
]


@pytest.mark.parametrize("case", NOTICES, ids=lambda case: case.name)
def test_what_is_changed_is_said(case: NoticeCase, hear: MakeRun, tmp_path: Path) -> None:
    column = {"audio": case.clips, "label": ["xy"[n % 2] for n in range(len(case.clips))]}
    pyarrow.parquet.write_table(pyarrow.table(column), tmp_path / "rows.parquet")
    data = {"files": [str(tmp_path / "rows.parquet")], "evalFraction": None}
    main(hear(case.kind, dataset=data, training={"batchSize": 2} | case.training))
    assert said(case.notice), notices.given()


def test_more_than_the_model_hears_is_refused(hear: MakeRun) -> None:
    message = "spec.training.maxSeconds: the model hears 1 s at once, and would not hear the rest; set 1 at most"
    assert failure(hear("whisper", training={"maxSeconds": 5})) == message


def test_a_model_without_an_extractor(hear: MakeRun, models: dict[str, Path], tmp_path: Path) -> None:
    model = shutil.copytree(models["wav2vec2"], tmp_path / "model")
    (model / "preprocessor_config.json").unlink()
    assert failure(hear(model={"path": str(model)})).startswith(
        f"spec.model.path: {model} has no usable feature extractor (preprocessor_config.json)"
    )


# ---- training


@pytest.mark.parametrize(
    "kind",
    [
        "whisper",
        pytest.param("wav2vec2", marks=pytest.mark.slow),
        pytest.param("audio-spectrogram-transformer", marks=pytest.mark.slow),
    ],
)
def test_tones_are_told_apart(kind: str, hear: MakeRun) -> None:
    """And the result, in a pipeline of transformers, is as good on held-out clips as it says."""
    run = hear(kind, training={"maxSteps": 60, "batchSize": 12, "learningRate": 5e-3})
    record, data = prepared(run)
    assert record.dataset.labels == sorted(HEIGHTS)
    metrics = train.main(run).metrics or {}
    assert metrics["accuracy"] > 0.8 > 0.4 > metrics["majorityShare"]
    result = Path(run.workspace) / "result"
    heard = pipeline("audio-classification", model=str(result), device="cpu")
    names = [heard.model.config.id2label[label] for label in data["eval"]["labels"]]
    clips = [decoded(file) for file in data["eval"]["audio"]]
    answers = [heard({"raw": clip, "sampling_rate": RATE})[0]["label"] for clip in clips]
    assert numpy.mean([a == b for a, b in zip(answers, names, strict=True)]) == pytest.approx(metrics["accuracy"])


def decoded(file: bytes) -> numpy.ndarray:
    """By soundfile alone: the tones have the rate of the models."""
    import io

    return soundfile.read(io.BytesIO(file), dtype="float32")[0]


def test_the_loss_is_that_of_transformers(hear: MakeRun, models: dict[str, Path]) -> None:
    """Before the first step, over all held-out clips, each alone, with a head that is there already."""
    run = hear("wav2vec2", training={"maxSteps": 1})
    _, data = prepared(run)
    metrics = train.main(run).metrics or {}
    torch.manual_seed(0)
    model = AutoModelForAudioClassification.from_pretrained(Path(run.workspace) / "result").eval()
    from transformers import AutoFeatureExtractor

    extractor = AutoFeatureExtractor.from_pretrained(models["wav2vec2"])
    losses = []
    for row in data["eval"]:
        inputs = extractor(decoded(row["audio"]), sampling_rate=RATE, return_tensors="pt")
        with torch.no_grad():
            losses.append(model(**inputs, labels=torch.tensor([row["labels"]])).loss.item())
    assert metrics["evalLoss"] == pytest.approx(numpy.mean(losses), rel=1e-4)


def test_the_card_loads_the_result(hear: MakeRun) -> None:
    run = hear("whisper", method={"type": "lora", "rank": 4}, training={"maxSteps": 2})
    record, _ = prepared(run)
    train.main(run)
    card = model_card.card(run, record, Path(run.workspace) / "result")
    assert 'extractor = AutoFeatureExtractor.from_pretrained("job")' in card
    assert "pipeline_tag: audio-classification" in card
    assert "AutoModelForAudioClassification" in card


@pytest.mark.parametrize(
    ("kind", "drawn"), [("wav2vec2", 0), ("wav2vec2", 1), ("whisper", 0), ("audio-spectrogram-transformer", 0)]
)
def test_its_memory_is_planned(kind: str, drawn: int, hear: MakeRun) -> None:
    """A step of the longest clip is computed on the meta device, whatever is drawn at random before."""
    run = hear(kind, resources={"gpusPerNode": 0, "memory": "64Gi"})
    torch.manual_seed(drawn)
    record, _ = prepared(run)
    assert record.memory_facts.missing is None
    assert record.memory_facts.steps
    assert record.compute.multiplied > 0
