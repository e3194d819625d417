"""speech-recognition: learn to write down what is said, with an encoder that hears and a decoder (Whisper).

An evaluation measures the loss of the held-out texts, and compares the texts that the model writes by itself, greedily
or by beams, with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import FineTuneJobSpec
from luthier_api.speech import Speech
from luthier_api.task_settings import TranscribeSettings
from luthier_api.tasks import TRAINING_TASKS
from luthier_trainer.data import columns, full_lengths, tokens
from luthier_trainer.data.columns import nothing_left
from luthier_trainer.data.load import Rows
from luthier_trainer.models import inspect, processors
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice
from luthier_trainer.scoring import speech
from luthier_trainer.tasks.audio import AUDIO, SAMPLES, SECONDS, AudioTask, Hearing, encoded
from luthier_trainer.tasks.base import Batch, LoadedModel, Model, Processor, TrainerSetup, TrainingContext
from luthier_trainer.tasks.batches import IGNORED, LabelledBatches, padded

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import GenerationConfig, Trainer, TrainingArguments

    from luthier_trainer.models.memory import Trial

TEXT = "spec.dataset.columns.text"
REFERENCE = "reference"  # a column of held-out rows: the text as it was written
TARGET_IDS = "target_ids"


class SpeechRecognition(LabelledBatches, AudioTask):
    """The task speech-recognition."""

    task = "speech-recognition"

    # ---- prepare

    def columns(self, spec: FineTuneJobSpec) -> tuple[str, ...]:
        return spec.dataset.columns.audio, spec.dataset.columns.text

    def fitting(self, rows: Rows, spec: FineTuneJobSpec) -> Rows:
        rows = columns.texts(rows, spec.dataset.columns.text, TEXT, drop_blank=True)
        return super().fitting(rows, spec)

    def read_processor(self, folder: Path, field: str) -> Processor:
        return processors.read_speech_processor(folder, field)

    def check_model(self, model: Model, spec: FineTuneJobSpec, rows: int, labels: list[str] | None) -> None:
        """Check that the model writes texts as the spec asks. Raises Failure if it does not."""
        checked(model.path, model.config, model.processor, spec.speech, "speech", needs_language=True)
        longest, most = spec.training.max_length, model.config.max_target_positions
        if longest > most:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{tokens.MAX_LENGTH}: the model has {most} positions for texts; set {most} at most",
            )
        super().check_model(model, spec, rows, labels)

    def encode(
        self, rows: Rows, processor: Processor, spec: FineTuneJobSpec, labels: list[str] | None, use: str
    ) -> Dataset:
        """Return the columns `AUDIO`, still encoded files, `SAMPLES` and `TARGET_IDS`: the tokens of each text.

        Rows whose audio or text is too long are left out: the model would learn to leave out what it has heard, or to
        write what it has not. Raises Failure if none is left. Held-out rows keep the text.
        """
        from datasets import Features, List, Value

        names, longest = spec.dataset.columns, spec.training.max_length
        hearing = Hearing.of(self.extractor(processor), spec)
        tokenizer = told(processor, spec.speech).tokenizer
        keeps_text = use != "training"

        def tokenize(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
            texts = batch[names.text]
            # What a text spells of control tokens is ordinary text.
            ids = tokenizer(texts, split_special_tokens=True, verbose=False)["input_ids"]
            return {TARGET_IDS: ids} | ({REFERENCE: texts} if keeps_text else {})

        types = {TARGET_IDS: List(Value("int32"))} | ({REFERENCE: Value("string")} if keeps_text else {})
        texts = tokens.mapped(rows.data.select_columns([names.text]), tokenize, Features(types), parallel=True)
        data = encoded(rows, names.audio, hearing, use)
        for column in texts.column_names:
            data = data.add_column(column, texts[column][:], feature=types[column])
        lengths = [len(ids) for ids in data[TARGET_IDS]]
        kept = []
        for i, (samples, length) in enumerate(zip(data[SAMPLES], lengths, strict=True)):
            if samples <= hearing.most and length <= longest:
                kept.append(i)
        tell_left_out(data[SAMPLES][:], lengths, hearing, longest, use)
        if not kept:
            raise nothing_left(f"{SECONDS}: no {use} row has audio and a text that are short enough")
        full_lengths.keep(use, [lengths[i] for i in kept])
        return data.select(kept) if len(kept) < len(data) else data

    def example(self, model: Model, spec: FineTuneJobSpec, rows: Dataset | None, size: int = 1) -> Batch:
        import torch

        longest = spec.training.max_length if rows is None else max(len(ids) for ids in rows[TARGET_IDS])
        written = torch.empty((size, longest - 1), dtype=torch.int64, device="meta")
        return super().example(model, spec, rows, size) | {"decoder_input_ids": written}

    def trial(self, model: Model, spec: FineTuneJobSpec, labels: list[str] | None, rows: Dataset | None) -> Trial | str:
        import torch

        from luthier_trainer.models.memory import Trial
        from luthier_trainer.tasks import token_loss

        def batch(size: int) -> Batch:
            inputs = self.example(model, spec, rows, size)
            return inputs | {"labels": torch.empty_like(inputs["decoder_input_ids"])}

        return token_loss.planned(Trial(self.quiet(model, None), batch, None, []), spec, None, shifted=False)

    # ---- training

    def tokens(self, batch: Batch) -> torch.Tensor | None:
        return batch["labels"].ne(IGNORED).sum()

    def computed_tokens(self, batch: Batch) -> int | None:
        return int(batch["labels"].numel())

    def arguments(self, spec: FineTuneJobSpec, common: Mapping[str, Any]) -> TrainingArguments:
        # The trainer would remove the files and the texts before they reach the collator.
        return super().arguments(spec, {**common, "remove_unused_columns": False})

    def load_model(self, context: TrainingContext) -> LoadedModel:
        from transformers import AutoModelForSpeechSeq2Seq

        model = AutoModelForSpeechSeq2Seq.from_pretrained(context.model_path, **context.weights)
        if context.spec.speech.language is not None:
            # So that the result writes what it has learnt to write, where nothing else is asked for.
            model.generation_config.language = context.spec.speech.language
            model.generation_config.task = context.spec.speech.task
        return LoadedModel(model)

    def trainer(self, context: TrainingContext, model: Any) -> TrainerSetup:
        from luthier_trainer.tasks.measured import MeasuringTrainer
        from luthier_trainer.tasks.token_loss import TokenLoss

        spec = context.spec
        processor = told(context.processor, spec.speech)
        hearing = Hearing.of(self.extractor(processor), spec)
        score = SpeechScore(processor.tokenizer, spec.speech, spec.training.max_length)
        collator = SpeechCollator(hearing, model.config)
        loss = TokenLoss(model, True, spec.training.label_smoothing, shifted=False)
        return TrainerSetup(MeasuringTrainer, collator, {"score": score, "loss": None}, loss.described)

    def metric_names(self, spec: FineTuneJobSpec) -> list[str]:
        written = [metric.name for metric in TRAINING_TASKS[self.task].metrics]
        return written if spec.speech.beams else []


class SpeechCollator:
    """Makes batches of rows: what the model hears, and the texts, filled up on the right to the longest one."""

    def __init__(self, hearing: Hearing, config: Any) -> None:
        """`config`: of the model, which says with which token a text begins, and which one fills up."""
        from transformers.models.whisper.modeling_whisper import shift_tokens_right

        self.hearing = hearing
        self.read_by = partial(
            shift_tokens_right, pad_token_id=config.pad_token_id, decoder_start_token_id=config.decoder_start_token_id
        )

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        """Return what the model gets of the clips, and labels and decoder_input_ids, int64 [rows, tokens].

        A text without its first token is the labels: its control tokens are learnt, too, as transformers' own examples
        do. Held-out rows have `REFERENCE` beside them, the texts as they were written.
        """
        import torch

        inputs = self.hearing.batch([self.hearing.heard(row[AUDIO]) for row in rows])
        labels = padded([torch.tensor(row[TARGET_IDS][1:]) for row in rows], IGNORED)
        batch = inputs | {"labels": labels, "decoder_input_ids": self.read_by(labels)}
        return batch | ({REFERENCE: [row[REFERENCE] for row in rows]} if REFERENCE in rows[0] else {})


class SpeechScore:
    """Computes the loss of texts (nats a token), and compares the texts that the model writes with them."""

    beside = (REFERENCE,)

    def __init__(self, tokenizer: Any, settings: Speech, longest: int) -> None:
        """`longest`: tokens of a text, with its control tokens."""
        self.tokenizer, self.settings = tokenizer, settings
        self.new_tokens = longest - len(tokenizer.prefix_tokens)

    def rows(self, outputs: Any, batch: Batch, trainer: Trainer) -> torch.Tensor:
        import torch

        losses: torch.Tensor = outputs["logits"]  # of `token_loss.row_sums`
        if not self.settings.beams:
            return losses
        written = self.tokenizer.batch_decode(self._written(batch, trainer), skip_special_tokens=True)
        compared = [
            speech.numbers(text, wanted, self.settings.normalize)
            for text, wanted in zip(written, batch[REFERENCE], strict=True)
        ]
        return torch.cat([losses, torch.tensor(compared, dtype=torch.float64, device=losses.device)], dim=1)

    def _written(self, batch: Batch, trainer: Trainer) -> torch.Tensor:
        """Return the tokens of the texts that the model writes, int64 [rows, tokens]."""
        with trainer.accelerator.autocast():
            written: torch.Tensor = trainer.model.generate(
                input_features=batch["input_features"],
                **asked_of(self.settings),
                num_beams=self.settings.beams,
                do_sample=False,
                max_new_tokens=self.new_tokens,
                return_timestamps=False,
            )
        return written

    def metrics(self, rows: torch.Tensor) -> dict[str, float]:
        total = rows.sum(dim=0).tolist()
        return {"loss": total[0] / total[1]} | (speech.figures(total[2:]) if self.settings.beams else {})


def asked_of(settings: Speech) -> dict[str, str]:
    """Return the arguments of Whisper's `generate` for a language; none for models of one language."""
    return {} if settings.language is None else {"language": settings.language, "task": settings.task}


def told(processor: Processor, settings: Speech | TranscribeSettings) -> Processor:
    """Return the processor, whose tokenizer begins texts with the language and what is to be written."""
    if settings.language is not None:
        processor.tokenizer.set_prefix_tokens(language=settings.language, task=settings.task or "transcribe")
    return processor


def checked(
    path: Path,
    config: Any,
    processor: Processor,
    settings: Speech | TranscribeSettings,
    block: str,
    needs_language: bool = False,
) -> None:
    """Check that a model writes texts in the language that the spec asks for. Raises Failure if it does not.

    `path`: the folder of the model. `block`: of the spec, whose `settings` these are. `needs_language`: whether a model
    of several languages has to be told which one is spoken.
    """
    language, task = f"spec.{block}.language", f"spec.{block}.task"
    if config.model_type != "whisper":
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{inspect.MODEL}: speech has been proven with Whisper alone, and this is {config.model_type}; choose a"
            " Whisper model",
        )
    generation = generation_settings(path)
    languages = languages_of(generation)
    if not languages and settings.task == "translate":
        raise Failure(ExitCode.INVALID_SPEC, f"{task}: the model knows one language and does not translate; remove it")
    if settings.language is None:
        if languages and needs_language:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{language}: the model knows {len(languages)} languages ({columns.some(languages)}); name the one that"
                " is spoken",
            )
        return
    if not languages:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{language}: the model knows one language, or its generation_config.json names none (lang_to_id); remove"
            " it, or copy that file beside the model",
        )
    if settings.language not in languages:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{language}: the model does not know {settings.language} (it knows: {', '.join(languages)})",
        )
    begins = [
        config.decoder_start_token_id,
        generation.lang_to_id[f"<|{settings.language}|>"],
        generation.task_to_id[settings.task or "transcribe"],
        generation.no_timestamps_token_id,
    ]
    if told(processor, settings).tokenizer.prefix_tokens != begins:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{inspect.MODEL}: its tokenizer and its generation_config.json disagree on the tokens with which a text"
            " begins; copy the files that belong together",
        )


def languages_of(generation: GenerationConfig) -> list[str]:
    """Return the codes of the languages of a model, of which it has to be told one; none of a model of one language."""
    codes = sorted(name.strip("<|>") for name in getattr(generation, "lang_to_id", None) or ())
    return codes if getattr(generation, "is_multilingual", True) else []


def generation_settings(path: Path) -> GenerationConfig:
    """Return the settings with which the model in a folder writes; the usual ones if it has none."""
    from transformers import GenerationConfig

    if not (path / "generation_config.json").is_file():
        return GenerationConfig()
    return GenerationConfig.from_pretrained(path)


def tell_left_out(samples: list[int], lengths: list[int], hearing: Hearing, longest: int, use: str) -> None:
    """Give notice of rows that are left out because their audio, or their text, is too long."""
    for field, over, what in (
        (SECONDS, sum(number > hearing.most for number in samples), f"audio of more than {hearing.seconds:.4g} s"),
        (tokens.MAX_LENGTH, sum(length > longest for length in lengths), f"a text of more than {longest} tokens"),
    ):
        if over:
            notice(f"{field}: {over} of {len(samples)} {use} rows have {what} and are left out")
