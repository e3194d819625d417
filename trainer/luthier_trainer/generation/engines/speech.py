"""automatic-speech-recognition: what is said in each audio file, by Whisper.

A text depends only on its file and the batch size: each file is processed alone, and all batches have one number of
files. Audio that is longer than the model hears at once is written down alone, window after window, by transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from luthier_api.generate import GenerateJobSpec
from luthier_api.run import GenerateRun, PreparedRecord
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.data import audio
from luthier_trainer.generation.batching import needs_to_be_alone
from luthier_trainer.generation.engines.base import batches, read_ahead
from luthier_trainer.generation.hardware import Hardware
from luthier_trainer.generation.loading import load_with_adapters
from luthier_trainer.generation.pictures import Recordings
from luthier_trainer.generation.records import ValueRecords, keys_of
from luthier_trainer.generation.samples import Output, Sample, padded
from luthier_trainer.generation.sampling import Heartbeat
from luthier_trainer.generation.writing import at_the_same_time
from luthier_trainer.models.processors import read_speech_processor
from luthier_trainer.runtime.notices import notice
from luthier_trainer.tasks.audio import Hearing
from luthier_trainer.tasks.speech_recognition import checked, languages_of

VALUES = ("output",)
FACTS = ("language", "seconds", "newTokens", "finishReason")
PROCESSOR = "processor"
"""Folder of the feature extractor and the tokenizer in what `prepare` leaves."""
BLOCK = "transcribe"
AUDIO = "audio"
SLACK = 1.0  # seconds that a file may have beyond what its header says


class WithoutTimestamps(Heartbeat):
    """Leaves out timestamps, of which `first` is the id of the first one, and sends a heartbeat for each token.

    If a text had one that was not asked for, transformers (5.23) would hear from there once more, in a smaller batch.
    """

    def __init__(self, first: int) -> None:
        self.first = first

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        left = super().__call__(input_ids, scores).clone()
        left[:, self.first :] = -torch.inf
        return left


class SpeechEngine:
    """Hears audio, `batch_size` files at a time, and writes what is said."""

    records: ClassVar[ValueRecords] = ValueRecords(
        keys=keys_of("automatic-speech-recognition", VALUES, FACTS), values=VALUES
    )
    window_rows: ClassVar[int] = 0

    @classmethod
    def prepare(
        cls, spec: GenerateJobSpec, config: PreTrainedConfig, source: Path, field: str, folder: WorkspaceFolder
    ) -> None:
        """Check in `prepare` that the model suits the job, and save its processor, which is in `source`.

        Raises Failure if it does not.
        """
        processor = read_speech_processor(source, field)
        checked(source, config, processor, spec.transcribe, BLOCK)
        processor.save_pretrained(folder.prepared / PROCESSOR)

    @classmethod
    def load(cls, run: GenerateRun, prepared: PreparedRecord, hardware: Hardware, batch_size: int) -> Self:
        """Return the engine with its model on the device. Raises Failure if it or an adapter cannot be loaded."""
        model = load_with_adapters(
            run.spec, Path(prepared.model_path), [Path(path) for path in prepared.adapter_paths], hardware
        )
        return cls(run.spec, model, WorkspaceFolder(Path(run.workspace)), batch_size)

    def __init__(self, spec: GenerateJobSpec, model: PreTrainedModel, folder: WorkspaceFolder, batch_size: int) -> None:
        self.spec, self.model = spec, model
        self.batch_size = 1 if needs_to_be_alone(model) else batch_size
        processor = read_speech_processor(folder.prepared / PROCESSOR, "spec.model")
        self.tokenizer, self.hearing = processor.tokenizer, Hearing.up_to(processor.feature_extractor, None)
        self.recordings = Recordings(folder)
        own = model.generation_config
        ends = own.eos_token_id
        self.ends = frozenset(ends if isinstance(ends, list) else [ends])
        codes = languages_of(own)
        self.languages = {own.lang_to_id[f"<|{code}|>"]: code for code in codes}
        self.without_timestamps = WithoutTimestamps(getattr(own, "no_timestamps_token_id", model.config.vocab_size) + 1)
        if (own.num_beams or 1) > 1 and spec.transcribe.num_beams == 1:
            notice(
                f"spec.{BLOCK}.numBeams: the model's own settings ask for {own.num_beams} beams, and this job takes the"
                f" likeliest token at each step; set numBeams: {own.num_beams} to search as they do"
            )

    def expect(self, samples: Sequence[Sample]) -> None:
        """Do nothing: files are read a batch before they are heard."""

    def problem(self, sample: Sample) -> str | None:
        """Return why the audio is not written down; None if it is."""
        seconds = self._clip(sample).seconds
        if self.spec.transcribe.long_audio == "refuse" and self._is_long(sample):
            return (
                f"{AUDIO}: {seconds:.1f} s, and the model hears {self.hearing.seconds:.4g} s at once; divide it, or set"
                f" {BLOCK}.longAudio: windows"
            )
        return None

    def work(self, samples: Sequence[Sample]) -> Iterator[list[Output]]:
        """Yield the outputs of all samples, a batch at a time. Long audio is written down alone."""
        long = {sample.key: sample for sample in samples if self._is_long(sample)}
        short = [sample for sample in samples if sample.key not in long]
        together = list(batches(short, lambda sample: sample.variant, self.batch_size))
        for part, inputs in read_ahead(together, self._heard):
            yield self._written(part, inputs, return_timestamps=False)
        for part, inputs in read_ahead([[sample] for sample in long.values()], self._heard_long):
            yield self._written(part, inputs, return_timestamps=True)

    def _heard(self, samples: Sequence[Sample]) -> Mapping[str, torch.Tensor]:
        """Return what the model gets of files that it hears at once, filled up to a batch."""
        clips = at_the_same_time(lambda sample: self.hearing.heard(self._file(sample)), samples)
        return {"input_features": self.hearing.batch(padded(clips, self.batch_size))["input_features"]}

    def _heard_long(self, samples: Sequence[Sample]) -> Mapping[str, torch.Tensor]:
        """Return what the model gets of one file that it hears a window at a time."""
        (sample,) = samples
        clip = audio.samples(self._file(sample), self.hearing.rate, self._clip(sample).seconds + SLACK)
        made = self.hearing.extractor(
            [clip],
            sampling_rate=self.hearing.rate,
            truncation=False,
            padding="longest",
            return_attention_mask=True,
            return_tensors="pt",
        )
        return {name: made[name] for name in ("input_features", "attention_mask")}

    @torch.inference_mode()
    def _written(
        self, samples: Sequence[Sample], inputs: Mapping[str, torch.Tensor], return_timestamps: bool
    ) -> list[Output]:
        """Return the outputs of samples. `inputs`: of the model, a row for each of them, and others beyond them."""
        given = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        given["input_features"] = given["input_features"].to(self.model.dtype)
        processor = Heartbeat() if return_timestamps else self.without_timestamps
        made = self.model.generate(
            **given,
            **self._asked(),
            return_timestamps=return_timestamps,
            return_segments=True,
            num_beams=self.spec.transcribe.num_beams,
            do_sample=False,
            logits_processor=[processor],
        )
        return [self._output(sample, said) for sample, said in zip(samples, made["segments"], strict=False)]

    def _asked(self) -> dict[str, str]:
        """Return which language is spoken, and which one is written, as `generate` is told it.

        Models of one language are told nothing. The model finds out the language that it is not told.
        """
        own, settings = self.model.generation_config, self.spec.transcribe
        if not self.languages:
            return {}
        asked = {"language": settings.language, "task": settings.task}
        # Without both, transformers (5.23) would leave it to the model whether it translates.
        if not any(getattr(own, name, None) for name in ("language", "task", "forced_decoder_ids")):
            asked["task"] = settings.task or "transcribe"
        return {name: value for name, value in asked.items() if value is not None}

    def _output(self, sample: Sample, segments: Sequence[Mapping[str, Any]]) -> Output:
        """Return the output of a sample. `segments`: of transformers; "result" has all tokens of the window of one."""
        new = [token for segment in segments for token in segment["tokens"].tolist()]
        windows = [segment["result"].tolist() for segment in segments]
        told = [self.languages[token] for window in windows for token in window if token in self.languages]
        facts = {
            "language": told[0] if told else self.spec.transcribe.language,
            "seconds": round(self._clip(sample).seconds, 3),
            "newTokens": len(new),
            "finishReason": "stop" if all(self.ends & {*window} for window in windows) else "length",
        }
        return Output(sample, facts, values={"output": self.tokenizer.decode(new, skip_special_tokens=True).strip()})

    def _is_long(self, sample: Sample) -> bool:
        return self._clip(sample).samples_at(self.hearing.rate) > self.hearing.most

    def _clip(self, sample: Sample) -> audio.Clip:
        return audio.clip_of(self._file(sample))

    def _file(self, sample: Sample) -> bytes:
        return self.recordings.content(sample.cells[AUDIO])
