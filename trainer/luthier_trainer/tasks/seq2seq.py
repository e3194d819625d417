"""seq2seq: learn to write a target text from a source text, with an encoder and a decoder (T5, mT0, BART).

An evaluation measures the loss of the held-out targets, and compares the texts that the model writes by itself,
greedily or by beams, with them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import FineTuneJobSpec
from luthier_api.tasks import TRAINING_TASKS
from luthier_trainer.data import columns, full_lengths, tokens
from luthier_trainer.data.load import Rows
from luthier_trainer.models import checks, embedding, inspect
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice
from luthier_trainer.scoring import texts
from luthier_trainer.tasks.base import Batch, LoadedModel, Model, Shown, TrainerSetup, TrainingContext
from luthier_trainer.tasks.batches import IGNORED, LabelledBatches, padded
from luthier_trainer.tasks.texts import ADD_ROWS, TextTask, check_ends, reader_of

if TYPE_CHECKING:
    import torch
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

    from luthier_trainer.models.memory import Forward, Trial

COLUMNS = "spec.dataset.columns"
ROLES = ("source", "target")
MAX_TARGET_LENGTH = "spec.seq2seq.maxTargetLength"
REFERENCE = "reference"  # a column of held-out rows: the target as it was written
SOURCE_IDS, TARGET_IDS = "input_ids", "target_ids"


class Seq2Seq(LabelledBatches, TextTask):
    """The task seq2seq."""

    task = "seq2seq"

    # ---- prepare

    def inputs(self, spec: FineTuneJobSpec) -> tuple[str, ...]:
        return spec.dataset.columns.source, spec.dataset.columns.target

    def columns(self, spec: FineTuneJobSpec) -> tuple[str, ...]:
        return self.inputs(spec)

    def fitting(self, rows: Rows, spec: FineTuneJobSpec) -> Rows:
        for role, name in zip(ROLES, self.inputs(spec), strict=True):
            columns.require(rows, name, f"{COLUMNS}.{role}", self.inputs(spec))
        for role, name in zip(ROLES, self.inputs(spec), strict=True):
            rows = columns.texts(rows, name, f"{COLUMNS}.{role}", drop_blank=True)
        return rows

    def check_model(self, model: Model, spec: FineTuneJobSpec, rows: int, labels: list[str] | None) -> None:
        """Check that the decoder has a first token and room for targets. Raises Failure if it has not."""
        check_ends(model.processor)
        super().check_model(model, spec, rows, labels)
        checks.check_length(model.config, spec.seq2seq.max_target_length, MAX_TARGET_LENGTH)
        if starts_with(model.config) is None:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{inspect.MODEL}: its config.json has no decoder_start_token_id, with which each target begins. Add"
                " it, as the model was trained; for T5 it is pad_token_id",
            )
        languages = [getattr(model.processor, name, None) for name in ("src_lang", "tgt_lang")]
        if any(languages):
            notice(
                f"{inspect.MODEL}: its tokenizer marks languages. Sources are read as {languages[0]} and targets as"
                f" {languages[1] or languages[0]}, as its tokenizer_config.json says (src_lang, tgt_lang)"
            )

    def encode(
        self,
        rows: Rows,
        processor: PreTrainedTokenizerBase,
        spec: FineTuneJobSpec,
        labels: list[str] | None,
        use: str,
    ) -> Dataset:
        """Return the tokens of each source, with the prefix before it, and of each target.

        Both end with the tokenizer's closing token, also where they are cut. `length` counts both. Held-out rows keep
        the target as text, because tokens do not hold all characters of a text.
        """
        from datasets import Features, List, Value

        source, target = self.inputs(spec)
        settings, longest = spec.seq2seq, spec.training.max_length
        for role, name in zip(ROLES, (source, target), strict=True):
            reader = reader_of(rows, name, f"{COLUMNS}.{role}", processor, spec, use)
        of_targets = reader.for_targets()
        keeps_text = use != "training"

        def tokenize(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
            read, lengths = reader.truncated([settings.prefix + text for text in batch[source]], longest)
            written, target_lengths = of_targets.truncated(batch[target], settings.max_target_length)
            return {
                SOURCE_IDS: read,
                TARGET_IDS: written,
                "length": [len(a) + len(b) for a, b in zip(read, written, strict=True)],
                tokens.FULL_LENGTH: lengths,
                "target_length": target_lengths,
                **({REFERENCE: batch[target]} if keeps_text else {}),
            }

        ids = List(Value("int32"))
        features = {SOURCE_IDS: ids, TARGET_IDS: ids, "length": Value("int32"), "target_length": Value("int32")}
        if keeps_text:
            features[REFERENCE] = Value("string")
        encoded = tokens.mapped(rows.data, tokenize, tokens.with_notes(Features(features)), parallel=True)
        _tell_cut(encoded[tokens.FULL_LENGTH][:], longest, tokens.MAX_LENGTH, "sources", use)
        _tell_cut(encoded["target_length"][:], settings.max_target_length, MAX_TARGET_LENGTH, "targets", use)
        full_lengths.keep(use, encoded[tokens.FULL_LENGTH][:])
        return encoded.remove_columns([tokens.FULL_LENGTH, "target_length"])

    def check_encoded(self, data: DatasetDict, model: Model, labels: list[str] | None) -> None:
        ids = (SOURCE_IDS, TARGET_IDS)
        embedding.check_rows(model.missing_tokens, data, model.processor, inspect.MODEL, ADD_ROWS, ids)
        embedding.notice_absent(model.new_tokens, data, model.processor, ids)

    def shown(self, row: Mapping[str, Any]) -> Mapping[str, Shown]:
        return {
            "source": (row[SOURCE_IDS], [0] * len(row[SOURCE_IDS])),
            "target": (row[TARGET_IDS], [1] * len(row[TARGET_IDS])),
        }

    def trial(self, model: Model, spec: FineTuneJobSpec, labels: list[str] | None, rows: Dataset | None) -> Trial | str:
        import torch

        from luthier_trainer.models.generation_trace import Search, searched
        from luthier_trainer.models.memory import Trial
        from luthier_trainer.tasks import token_loss

        made = inspect.skeleton(_with_start(model.config), self.task, inspect.MODEL)
        read, written = [spec.training.max_length], [spec.seq2seq.max_target_length]
        if rows is not None:
            read, written = ([len(ids) for ids in rows[name]] for name in (SOURCE_IDS, TARGET_IDS))

        def batch(size: int) -> Batch:
            with torch.device("meta"):
                source, target = (torch.empty((size, max(n)), dtype=torch.int64) for n in (read, written))
                beside = {"attention_mask": torch.empty_like(source), "decoder_input_ids": torch.empty_like(target)}
                return {"input_ids": source, "labels": target, **beside}

        def evaluate(forward: Forward, given: dict[str, Any]) -> None:
            outputs = forward(**given, use_cache=False)
            source = {name: given[name] for name in ("input_ids", "attention_mask")}
            searched(forward.of_base(), Search(source, spec.seq2seq.max_target_length, spec.seq2seq.beams))
            del outputs  # which are held while the model writes

        mixed = rows is None or min(read) < max(read) or min(written) < max(written)
        longest = max(read) + max(written)
        evaluates = evaluate if spec.seq2seq.beams else None
        trial = Trial(made, batch, None, [], longest, mixed, evaluates=evaluates)
        return token_loss.planned(trial, spec, self.whole_logits(model), shifted=False)

    def whole_logits(self, model: Model) -> str | None:
        from luthier_trainer.tasks import token_loss

        return token_loss.why_whole(model.config, self.task)

    def tokens_a_row(self, spec: FineTuneJobSpec, rows: Dataset | None) -> float:
        if rows:
            return super().tokens_a_row(spec, rows)
        return float(spec.training.max_length + spec.seq2seq.max_target_length)

    # ---- training

    def tokens(self, batch: Batch) -> torch.Tensor | None:
        return batch["attention_mask"].sum() + batch["labels"].ne(IGNORED).sum()

    def computed_tokens(self, batch: Batch) -> int | None:
        return int(batch["input_ids"].numel() + batch["labels"].numel())

    def arguments(self, spec: FineTuneJobSpec, common: Mapping[str, Any]) -> TrainingArguments:
        # The trainer would remove the targets, whose name no model knows, before they reach the collator.
        return super().arguments(spec, {**common, "remove_unused_columns": False})

    def load_model(self, context: TrainingContext) -> LoadedModel:
        from transformers import AutoModelForSeq2SeqLM

        model = AutoModelForSeq2SeqLM.from_pretrained(context.model_path, **context.weights)
        if model.config.decoder_start_token_id is None:
            model.config.decoder_start_token_id = starts_with(model.config)
        return LoadedModel(model)

    def trainer(self, context: TrainingContext, model: Any) -> TrainerSetup:
        from luthier_trainer.tasks.measured import MeasuringTrainer
        from luthier_trainer.tasks.token_loss import TokenLoss

        spec = context.spec
        loss = TokenLoss(model, not context.whole_logits, spec.training.label_smoothing, shifted=False)
        collator = PairCollator(context.processor.pad_token_id, model)
        score = TextScore(context.processor, spec.seq2seq.beams, spec.seq2seq.max_target_length)
        return TrainerSetup(MeasuringTrainer, collator, {"score": score, "loss": None}, loss.described)

    def metric_names(self, spec: FineTuneJobSpec) -> list[str]:
        written = [metric.name for metric in TRAINING_TASKS[self.task].metrics]
        return written if spec.seq2seq.beams else []


class PairCollator:
    """Makes batches of sources and targets, each padded on the right to its longest row."""

    def __init__(self, padding: int, model: Any) -> None:
        """`padding`: id of the token that fills up sources. `model` shifts targets to what its decoder reads."""
        self.padding, self.model = padding, model

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        """Return input_ids, attention_mask, labels and decoder_input_ids, each int64 [rows, length].

        Held-out rows have `REFERENCE` beside them, the targets as texts.
        """
        import torch

        ids = [torch.tensor(row[SOURCE_IDS]) for row in rows]
        labels = padded([torch.tensor(row[TARGET_IDS]) for row in rows], IGNORED)
        batch: Batch = {
            "input_ids": padded(ids, self.padding),
            "attention_mask": padded([torch.ones_like(tokens) for tokens in ids], 0),
            "labels": labels,
            # The model itself, and not a rule of ours, knows with which token a target begins.
            "decoder_input_ids": self.model.prepare_decoder_input_ids_from_labels(labels=labels),
        }
        return batch | ({REFERENCE: [row[REFERENCE] for row in rows]} if REFERENCE in rows[0] else {})


class TextScore:
    """Computes the loss of targets (nats a token), and compares the texts that the model writes with them."""

    beside = (REFERENCE,)

    def __init__(self, tokenizer: PreTrainedTokenizerBase, beams: int, longest: int) -> None:
        """`beams`: of the search for texts; 0: none are written. `longest`: tokens of a text."""
        self.tokenizer, self.beams, self.longest = tokenizer, beams, longest

    def rows(self, outputs: Any, batch: Batch, trainer: Trainer) -> torch.Tensor:
        import torch

        losses: torch.Tensor = outputs["logits"]  # of `token_loss.row_sums`
        if not self.beams:
            return losses
        written = self.tokenizer.batch_decode(self._written(batch, trainer), skip_special_tokens=True)
        compared = [texts.numbers(*pair) for pair in zip(written, batch[REFERENCE], strict=True)]
        return torch.cat([losses, torch.tensor(compared, dtype=torch.float64, device=losses.device)], dim=1)

    def _written(self, batch: Batch, trainer: Trainer) -> torch.Tensor:
        """Return the tokens of the texts that the model writes, int64 [rows, tokens]."""
        from transformers.integrations import deepspeed

        from luthier_trainer.models import fsdp

        with trainer.accelerator.autocast():
            written: torch.Tensor = trainer.model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                num_beams=self.beams,
                do_sample=False,
                max_new_tokens=self.longest,
                # With ZeRO-3 and FSDP each process needs the weights of all, so that all go on until the last is done.
                synced_gpus=deepspeed.is_deepspeed_zero3_enabled() or fsdp.is_sharded(trainer.model),
            )
        return written

    def metrics(self, rows: torch.Tensor) -> dict[str, float]:
        total = rows.sum(dim=0).tolist()
        loss = {"loss": total[0] / total[1]}
        return loss | (texts.figures(total[2:], len(rows)) if self.beams else {})


def starts_with(config: Any) -> int | None:
    """Return the id of the token with which the decoder begins; None if the configuration does not say it."""
    start: int | None = getattr(config, "decoder_start_token_id", None)
    return start if start is not None or config.model_type not in ("t5", "mt5", "umt5") else config.pad_token_id


def _with_start(config: Any) -> Any:
    """Return a copy of a configuration that says with which token the decoder begins."""
    config = copy.deepcopy(config)
    config.decoder_start_token_id = starts_with(config)
    return config


def _tell_cut(lengths: list[int], longest: int, field: str, what: str, use: str) -> None:
    """Give notice of texts that are longer than `longest` tokens."""
    cut = sum(length > longest for length in lengths)
    if cut:
        notice(f"{field}: {cut} of {len(lengths)} {use} {what} are longer than {longest} tokens and are cut")
