"""What tasks have in common whose model hears: which audio can be used, how much of it, and what the model gets of it.

Audio is saved in the workspace as encoded files, and decoded when the training reads it (`data.audio`).
"""

from __future__ import annotations

import contextlib
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import FineTuneJobSpec
from luthier_api.run import Compute
from luthier_trainer.data import audio, columns, tokens
from luthier_trainer.data.audio import BadAudio
from luthier_trainer.data.load import Rows
from luthier_trainer.methods.trainable import with_adapters
from luthier_trainer.models import inspect, processors
from luthier_trainer.runtime import cores
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice
from luthier_trainer.tasks.base import Batch, Model, Processor
from luthier_trainer.tasks.images import loader_workers
from luthier_trainer.tasks.pretrained import PretrainedTask, with_labels

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import FeatureExtractionMixin, PreTrainedConfig, PreTrainedModel

FIELD = "spec.dataset.columns.audio"
SECONDS = "spec.training.maxSeconds"
AUDIO, SAMPLES = "audio", "samples"
"""Columns of encoded rows: the file, and how many samples it has at the rate of the model."""
USUAL_SECONDS = 30.0  # of models that hear any length
AT_ONCE = 100  # files in memory at a time
FEW: Mapping[str, Any] = {"batch_size": AT_ONCE, "writer_batch_size": AT_ONCE}
PROBLEM, SILENT = "problem", "silent"  # columns while rows are read: why a file cannot be used, whether it is silent
# The Audio Spectrogram Transformer's extractor (transformers 5.23) makes a frame of 400 samples every 160 samples, and
# cuts what is beyond its `max_length` frames.
FRAME, HOP = 400, 160
SHORT, LONGER = 0.5, 1.0  # seconds of clips that tell whether an extractor makes inputs of one length


class AudioTask(PretrainedTask):
    """A base class of tasks whose model hears."""

    def inputs(self, spec: FineTuneJobSpec) -> tuple[str, ...]:
        return (spec.dataset.columns.audio,)

    def fitting(self, rows: Rows, spec: FineTuneJobSpec) -> Rows:
        return fitting(rows, spec.dataset.columns.audio, FIELD, self.columns(spec))

    def contents(self, rows: Rows, spec: FineTuneJobSpec) -> Iterator[Sequence[str | bytes]]:
        name = spec.dataset.columns.audio
        for batch in rows.data.select_columns([name]).iter(AT_ONCE):
            yield batch[name]

    def extractor(self, processor: Processor) -> FeatureExtractionMixin:
        """Return what makes inputs of audio: the processor of the model, or its part of one that reads texts, too."""
        return getattr(processor, "feature_extractor", processor)

    def read_processor(self, folder: Path, field: str) -> Processor:
        return processors.read_feature_extractor(folder, field)

    def check_model(self, model: Model, spec: FineTuneJobSpec, rows: int, labels: list[str] | None) -> None:
        hearing = Hearing.of(self.extractor(model.processor), spec)
        super().check_model(model, spec, rows, labels)
        notice_random(model.config, hearing)

    def check_encoded(self, data: DatasetDict, model: Model, labels: list[str] | None) -> None:
        super().check_encoded(data, model, labels)
        skeleton = inspect.skeleton(model.config, self.task, inspect.MODEL)
        for split, rows in data.items():
            use = "training" if split == "train" else "held-out"
            check_shortest(rows[SAMPLES][:], skeleton, use, self.extractor(model.processor).sampling_rate)

    def example(self, model: Model, spec: FineTuneJobSpec, rows: Dataset | None, size: int = 1) -> Batch:
        """Return what the model gets of the longest row, `size` times, on the meta device."""
        hearing = Hearing.of(self.extractor(model.processor), spec)
        return hearing.example(max(rows[SAMPLES]) if rows is not None else hearing.most, size)

    def compute(
        self, model: Model, spec: FineTuneJobSpec, labels: list[str] | None, rows: Dataset | None
    ) -> Compute | None:
        """Return the multiply-adds of one row of the greatest length."""
        from luthier_trainer.models.compute import of_images
        from luthier_trainer.models.heads import heads_of

        bare = self.quiet(model, labels).eval()
        with contextlib.suppress(NotImplementedError, RuntimeError):  # the model reads values, which meta tensors lack
            whole = of_images(bare, self.example(model, spec, rows))
            return with_adapters(whole, bare, heads_of(bare, self.task), spec)
        return None

    def quiet(self, model: Model, labels: list[str] | None) -> PreTrainedModel:
        """Return the model on the meta device, without what it masks at random, for which it reads values."""
        config = with_labels(model.config, labels)
        if hasattr(config, "apply_spec_augment"):
            config.apply_spec_augment = False
        return inspect.skeleton(config, self.task, inspect.MODEL)

    def loader_workers(self, cores: int) -> int:
        return loader_workers(cores)


def fitting(rows: Rows, name: str, field: str, taken: Sequence[str]) -> Rows:
    """Return the rows with the audio files themselves in the column `name`. `taken`: all columns that the task reads.

    Raises Failure if a file is missing or cannot be read.
    """
    from datasets import Audio, Features, Value

    others = [other for other in taken if other != name]
    columns.require(rows, name, field, taken=others)
    feature = rows.data.features[name]
    data = rows.data.cast_column(name, Audio(decode=False)) if isinstance(feature, Audio) else rows.data
    if name in rows.mixed or not holds_audio(data.features[name]):
        kind = rows.mixed.get(name) or getattr(feature, "dtype", None) or feature
        raise columns.invalid(
            f'{field}: column "{name}" of {rows.origin} holds {kind}, and neither audio nor paths of files. Write the'
            " path of a WAV, FLAC or MP3 file, or the file itself as bytes"
        )
    kept = [column for column in data.column_names if column != name]

    def read(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        folders = [file.parent if (file := rows.file_of(i)) else None for i in indices]
        with ThreadPoolExecutor(cores.available()) as threads:
            found = list(threads.map(usable, batch[name], folders))
        made = {column: batch[column] for column in kept}
        for part, column in enumerate((name, PROBLEM, SILENT)):
            made[column] = [each[part] for each in found]
        return made

    types = {column: data.features[column] for column in kept}
    types |= {name: Value("large_binary"), PROBLEM: Value("string"), SILENT: Value("bool")}
    options: dict[str, Any] = {"with_indices": True, "new_fingerprint": secrets.token_hex(8), **FEW}
    stored = tokens.mapped(data, read, Features(types), **options)
    problems = [(i, problem) for i, problem in enumerate(stored[PROBLEM]) if problem]
    if problems:
        row, first = problems[0]
        raise columns.invalid(
            f"{field}: {len(problems)} audio files of {rows.origin} cannot be used. The first is {rows.place(row)}:"
            f" {first}. Replace or remove them"
        )
    if silent := [i for i, one in enumerate(stored[SILENT]) if one]:
        notice(
            f"{field}: {len(silent)} audio files of {rows.origin} are silent from beginning to end. The first is"
            f" {rows.place(silent[0])}"
        )
    return replace(rows, data=stored.remove_columns([PROBLEM, SILENT]))


def holds_audio(feature: Any) -> bool:
    """Return whether a column of this feature of `datasets` can hold audio files, or paths of them."""
    if isinstance(feature, dict):
        return {"bytes", "path"} <= feature.keys()
    files = ("Audio", "binary", "large_binary")
    return columns.is_text(feature) or getattr(feature, "dtype", None) in files or type(feature).__name__ in files


def usable(cell: Any, folder: Path | None) -> tuple[bytes | None, str | None, bool]:
    """Return (the audio file of a cell, why it cannot be used, whether it is silent). `folder`: of relative paths."""
    try:
        file = audio.content(cell, folder)
        return file, None, audio.check(file).silent
    except BadAudio as problem:
        name = audio.name_of(cell)
        return None, f"{name}: {problem}" if name else str(problem), False


@dataclass(frozen=True)
class Hearing:
    """How a model hears audio."""

    extractor: FeatureExtractionMixin
    seconds: float
    """Of a clip at most."""
    fixed: bool
    """Whether it makes inputs of one length of all clips, and fills short ones up."""

    @classmethod
    def of(cls, extractor: FeatureExtractionMixin, spec: FineTuneJobSpec) -> Hearing:
        """Return how the model of a feature extractor hears. Raises Failure if the spec asks for more."""
        return cls.up_to(extractor, spec.training.max_seconds)

    @classmethod
    def up_to(cls, extractor: FeatureExtractionMixin, asked: float | None) -> Hearing:
        """Return the same for `asked` seconds of a clip; None: as many as suit the model. Raises Failure."""
        rate = extractor.sampling_rate
        lengths = set()
        for seconds in (SHORT, LONGER):
            made = extractor([numpy.zeros(round(seconds * rate), dtype="float32")], sampling_rate=rate)
            lengths.add(numpy.asarray(made[extractor.model_input_names[0]][0]).shape)
        if len(lengths) > 1:
            return cls(extractor, asked or USUAL_SECONDS, fixed=False)
        window = window_of(extractor)
        if window is None:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{inspect.MODEL}: its feature extractor ({type(extractor).__name__}) makes inputs of one length of all"
                " audio, and how much it hears is not known here; choose another model",
            )
        if asked is not None and asked > window:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{SECONDS}: the model hears {window:.4g} s at once, and would not hear the rest; set"
                f" {window:.4g} at most",
            )
        return cls(extractor, asked or window, fixed=True)

    @property
    def rate(self) -> int:
        """Return the samples of a second."""
        return int(self.extractor.sampling_rate)

    @property
    def most(self) -> int:
        """Return the samples of a clip at most."""
        return round(self.seconds * self.rate)

    def heard(self, file: bytes) -> numpy.ndarray:
        """Return the samples of an audio file that the model hears, float32 [samples]."""
        return audio.samples(file, self.rate, self.seconds)

    def batch(self, clips: Sequence[numpy.ndarray]) -> Batch:
        """Return what the model gets of clips, by their names there: tensors [clips, ...].

        Each clip is normalised alone, so that it does not depend on the others, and then filled up to the longest one.
        """
        import torch

        made = [self.extractor([clip], sampling_rate=self.rate) for clip in clips]
        inputs = {name: [one[name][0] for one in made] for name in made[0]}
        if self.fixed:
            return {name: torch.stack([torch.as_tensor(value) for value in inputs[name]]) for name in inputs}
        return dict(self.extractor.pad(inputs, padding=True, return_tensors="pt"))

    def example(self, samples: int, size: int = 1) -> Batch:
        """Return what the model gets of `size` clips of so many samples, on the meta device.

        A mask for padding is left out: whether there is one depends on the batch, and what models do with it reads
        values, which meta tensors lack.
        """
        import torch

        made = self.batch([numpy.zeros(min(samples, self.most), dtype="float32")])
        return {
            name: torch.empty((size, *value.shape[1:]), dtype=value.dtype, device="meta")
            for name, value in made.items()
            if name != "attention_mask"
        }


def window_of(extractor: FeatureExtractionMixin) -> float | None:
    """Return the seconds of audio of which an extractor makes inputs of one length; None: not known."""
    samples = getattr(extractor, "n_samples", None)
    if samples is None and type(extractor).__name__ == "ASTFeatureExtractor":
        samples = (extractor.max_length - 1) * HOP + FRAME
    return None if samples is None else samples / extractor.sampling_rate


def encoded(rows: Rows, name: str, hearing: Hearing, use: str) -> Dataset:
    """Return the columns `AUDIO`, the files in the column `name`, and `SAMPLES`. What is changed of them is said.

    `use`: "training" or "held-out".
    """
    from datasets import Features, Value

    def measure(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        clips = [audio.clip_of(file) for file in batch[name]]
        return {
            AUDIO: batch[name],
            SAMPLES: [clip.samples_at(hearing.rate) for clip in clips],
            "rate": [clip.rate for clip in clips],
            "channels": [clip.channels for clip in clips],
        }

    types = {AUDIO: Value("large_binary"), **dict.fromkeys((SAMPLES, "rate", "channels"), Value("int64"))}
    data = tokens.mapped(rows.data.select_columns([name]), measure, Features(types), **FEW)
    tell_converted(Counter(data["rate"][:]), data["channels"][:], hearing.rate, use)
    return data.remove_columns(["rate", "channels"])


def tell_converted(rates: Counter[int], channels: Sequence[int], rate: int, use: str) -> None:
    """Give notice of clips whose sampling rate is another than the model's, or that have several channels."""
    total = sum(rates.values())
    others = {own: number for own, number in sorted(rates.items()) if own != rate}
    if others:
        listed = ", ".join(f"{number} from {own:,} Hz" for own, number in others.items())
        notice(
            f"{FIELD}: {sum(others.values())} of {total} {use} clips are converted to the {rate:,} Hz of the model"
            f" ({listed})"
        )
    if several := sum(number > 1 for number in channels):
        notice(f"{FIELD}: {several} of {total} {use} clips have several channels, of which the model hears the mean")


def tell_cut(samples: Sequence[int], hearing: Hearing, use: str) -> None:
    """Give notice of clips of which the model does not hear the end."""
    if cut := sum(number > hearing.most for number in samples):
        notice(
            f"{SECONDS}: {cut} of {len(samples)} {use} clips are longer than {hearing.seconds:.4g} s and are cut; the"
            f" longest has {max(samples) / hearing.rate:.4g} s"
        )


def notice_random(config: PreTrainedConfig, hearing: Hearing) -> None:
    """Give notice of what a model of this configuration does with audio that users may not expect."""
    masks = [
        f"{name} {value:g}"
        for name in ("mask_time_prob", "mask_feature_prob")
        if getattr(config, "apply_spec_augment", False) and (value := getattr(config, name, 0))
    ]
    if masks:
        notice(
            f"{inspect.MODEL}: parts of the clips are masked at random while it learns, as its config.json says"
            f" (SpecAugment: {', '.join(masks)})"
        )
    if not hearing.fixed and not getattr(hearing.extractor, "return_attention_mask", True):
        notice(
            f"{inspect.MODEL}: it has no mask for silence with which short clips of a batch are filled up (its feature"
            " extractor has return_attention_mask: false), so its answers depend a little on the clips of a micro-batch"
        )


def check_shortest(samples: Sequence[int], model: PreTrainedModel, use: str, rate: int) -> None:
    """Check that no clip is too short for the model. `samples`: of each clip, at `rate`. Raises Failure if one is."""
    import torch

    frames_of = getattr(model, "_get_feat_extract_output_lengths", None)
    if frames_of is None:
        return
    config = model.config
    masks = getattr(config, "apply_spec_augment", False) and getattr(config, "mask_time_prob", 0) > 0
    needed = config.mask_time_length if masks else 1
    frames = frames_of(torch.tensor(samples)).tolist()
    short = [i for i, number in enumerate(frames) if number < needed]
    if not short:
        return
    first = short[0]
    why = f" to mask a part of it (mask_time_length {needed})" if masks else ""
    raise Failure(
        ExitCode.INVALID_DATASET,
        f"{FIELD}: {len(short)} of {len(frames)} {use} clips are too short for the model. The first is row {first} of"
        f" those that are used, counted from 0: its {samples[first] / rate:.3f} s are {max(frames[first], 0)} frames,"
        f" and {needed} are needed{why}. Leave such clips out"
        + (", or set apply_spec_augment: false in the model's config.json" if masks else ""),
    )
