"""causal-lm: learn to predict the next token of texts, of completions, or of the assistant's turns in conversations.

The held-out loss is the mean over all labels, independent of the batch size and the number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from luthier_api.attention import ATTENTIONS
from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import FineTuneJobSpec
from luthier_trainer.data import bins, chats, columns, forms, labelled, packing, templates, tokens
from luthier_trainer.data.load import Rows
from luthier_trainer.data.masks import ChatReader
from luthier_trainer.models import isolation
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.tasks.base import LoadedModel, Model, TrainerSetup, TrainingContext
from luthier_trainer.tasks.batches import LabelledBatches, TokenCollator, measured_by
from luthier_trainer.tasks.texts import TextTask, check_ends, reader_of, token_trial

if TYPE_CHECKING:
    import torch
    from datasets import Dataset, DatasetDict
    from transformers import EvalPrediction, PreTrainedTokenizerBase, TrainingArguments

    from luthier_trainer.models.memory import Trial

TEXTS_AT_ONCE = 1000
MAX_PERPLEXING_LOSS = 100.0  # nats per token; above it, the perplexity (e^100) has no meaning and is left out


class CausalLM(LabelledBatches, TextTask):
    """The task causal-lm."""

    task = "causal-lm"

    def columns(self, spec: FineTuneJobSpec) -> tuple[str, ...]:
        return forms.wanted(spec)

    def fitting(self, rows: Rows, spec: FineTuneJobSpec) -> Rows:
        """Return the rows in the form that their columns tell; conversations as one column of JSON text.

        Raises Failure if they have no form, or if the job asks for something that rows of this form do not have.
        """
        form = forms.recognise(rows, spec)
        if form.name != "text" and spec.training.packing == "concatenate":
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"spec.training.packing: concatenate joins texts, and the rows of {rows.origin} are {form.info.title}."
                " Choose isolated, which keeps each row whole, or none",
            )
        forms.loss_on(form, spec, rows.origin)
        wanted = spec.dataset.filter
        if spec.training.packing == "concatenate" and wanted and (wanted.min_tokens or wanted.max_tokens):
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{tokens.FILTER}: packing concatenate joins texts before their tokens are counted; remove minTokens"
                " and maxTokens, or choose characters",
            )
        if chats.has_messages(rows, form):
            found = chats.conversations(rows, form)
        else:
            _refuse_template(spec, rows.origin, form)
            found = rows
            for role in form.info.columns:
                found = columns.texts(found, form.columns[role], f"{forms.COLUMNS}.{role}", drop_blank=True)
        return replace(found, form=form)

    def texts(self, rows: Rows, spec: FineTuneJobSpec) -> Iterator[str]:
        """Yield the texts of the training rows.

        If blocks of a text file are held out, these are the texts of the whole file.
        """
        return texts_of(rows)

    def check_model(self, model: Model, spec: FineTuneJobSpec, rows: int, labels: list[str] | None) -> None:
        check_ends(model.processor)
        super().check_model(model, spec, rows, labels)
        if spec.training.packing == "isolated":
            isolation.check(model.config, self.task, bins.PACKING)

    def encode(
        self,
        rows: Rows,
        processor: PreTrainedTokenizerBase,
        spec: FineTuneJobSpec,
        labels: list[str] | None,
        use: str,
    ) -> Dataset:
        assert rows.form is not None, "`fitting` has told the form"
        learnt = forms.loss_on(rows.form, spec, rows.origin)
        names = [rows.form.columns[role] for role in rows.form.info.columns]
        # Packing splits longer rows.
        longest = None if spec.training.packing == "isolated" else spec.training.max_length
        wanted = spec.dataset.filter
        if chats.CHAT in rows.data.column_names:
            templates.choose(processor, spec.dataset.chat_template, rows.form.name, learnt)
            reader = ChatReader(processor, learnt, spec.dataset.parse_special_tokens)
            encoded = labelled.chat_rows(rows, reader, longest, use, wanted)
        else:
            for role, name in zip(rows.form.info.columns, names, strict=True):
                texts = reader_of(rows, name, f"{forms.COLUMNS}.{role}", processor, spec, use)
            if spec.training.packing == "concatenate":
                return packing.blocks(rows.data, names[0], texts, spec.training.max_length, rows.documents)
            if rows.form.name == "text":
                encoded = tokens.language_rows(rows.data, names[0], texts, longest, use, wanted)
            else:
                encoded = labelled.completion_rows(
                    rows, names[0], names[1], texts, longest, use, learnt != "all", wanted
                )
        if spec.training.packing == "isolated":
            return bins.packed(encoded, spec.training.max_length, use)
        return encoded

    def contents(self, rows: Rows, spec: FineTuneJobSpec) -> Iterator[Sequence[str | bytes]]:
        if chats.CHAT in rows.data.column_names:
            return chats.joined(rows.data)
        return super().contents(rows, spec)

    def compared(self, rows: Rows, spec: FineTuneJobSpec) -> tuple[str, ...]:
        assert rows.form is not None, "`fitting` has told the form"
        return tuple(rows.form.columns[role] for role in rows.form.info.columns)

    def added_tokens(self, processor: PreTrainedTokenizerBase) -> int:
        return super().added_tokens(processor) + 1  # the end-of-text token

    def check_encoded(self, data: DatasetDict, model: Model, labels: list[str] | None) -> None:
        """Check that each split has rows and that the model knows their tokens. Raises Failure if not."""
        for name, rows in data.items():
            if len(rows) == 0:
                raise columns.invalid(
                    f"spec.dataset: no row of the {name} split has {tokens.SHORTEST} tokens or more, of which one is a"
                    " label"
                )
        super().check_encoded(data, model, labels)

    def trial(self, model: Model, spec: FineTuneJobSpec, labels: list[str] | None, rows: Dataset | None) -> Trial | str:
        from luthier_trainer.tasks import token_loss

        made = token_trial(model, self.task, spec, rows, labels_of_tokens=True)
        return token_loss.planned(made, spec, self.whole_logits(model))

    def whole_logits(self, model: Model) -> str | None:
        from luthier_trainer.tasks import token_loss

        return token_loss.why_whole(model.config)

    def arguments(self, spec: FineTuneJobSpec, common: Mapping[str, Any]) -> TrainingArguments:
        # The trainer would remove `loss_mask` and `seq_lengths`, which no model reads, before they reach the collator.
        return super().arguments(spec, {**common, "remove_unused_columns": False})

    def load_model(self, context: TrainingContext) -> LoadedModel:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(context.model_path, **context.weights)
        # transformers derives this from the name of the class, which fails for GPT-2 and others. It would then count
        # one token too many per row: the first, which is never predicted.
        model.loss_type = "ForCausalLM"
        return LoadedModel(model)

    def trainer(self, context: TrainingContext, model: Any) -> TrainerSetup:
        from transformers import Trainer

        from luthier_trainer.tasks.token_loss import TokenLoss

        model.config.pad_token_id = context.processor.pad_token_id
        loss = TokenLoss(model, not context.whole_logits, context.spec.training.label_smoothing)
        computed = ATTENTIONS.get(model.config._attn_implementation)
        tells_documents = computed is not None and computed.documents
        collator = TokenCollator(context.processor.pad_token_id, tells_documents)
        return TrainerSetup(Trainer, collator, measured_by(TokenMetrics()), loss.described)


def _refuse_template(spec: FineTuneJobSpec, origin: str, form: forms.Form) -> None:
    """Raise Failure if the job names a chat template for rows without messages, or a loss on an assistant's turns."""
    what = f"the rows of {origin} are {form.info.title}, which have no messages"
    if spec.dataset.chat_template is not None:
        remedy = ", or set dataset.form: alpaca to write them as messages" if form.name == "prompt-completion" else ""
        raise Failure(ExitCode.INVALID_SPEC, f"{templates.FIELD}: {what}; remove it{remedy}")
    if spec.training.loss_on == "assistant":
        raise Failure(ExitCode.INVALID_SPEC, f"{forms.LOSS_ON}: {what}. Choose completions or all, or remove it")


def texts_of(rows: Rows) -> Iterator[str]:
    """Yield the texts of all columns.

    The lines of text files are joined, `TEXTS_AT_ONCE` at a time, so that the tokenizer also learns pairs that span a
    line break.
    """
    assert rows.form is not None, "`fitting` has told the form"
    if chats.CHAT in rows.data.column_names:
        yield from chats.contents(rows.data)
        return
    for start in range(0, len(rows.data), TEXTS_AT_ONCE):
        batch = rows.data[start : start + TEXTS_AT_ONCE]
        for role in rows.form.info.columns:
            texts = batch[rows.form.columns[role]]
            if rows.documents:
                yield "".join(texts)
            else:
                yield from texts


class TokenMetrics:
    """Computes evalLoss (nats per token) and perplexity from the sums of rows (`token_loss.row_sums`)."""

    def __init__(self) -> None:
        self.loss = self.tokens = 0.0

    def reduce(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return summed loss (nats) and number of predicted tokens of each row, double [rows, 2].

        In evaluations, the model's output has them in the place of logits.
        """
        return logits

    def __call__(self, gathered: EvalPrediction, compute_result: bool) -> dict[str, float]:
        loss, tokens = gathered.predictions.sum(dim=0).tolist()
        self.loss, self.tokens = self.loss + loss, self.tokens + tokens
        if not compute_result:
            return {}
        mean = self.loss / self.tokens if self.tokens else math.nan
        self.loss = self.tokens = 0.0
        metrics = {"loss": mean}
        if mean < MAX_PERPLEXING_LOSS:
            metrics["perplexity"] = math.exp(mean)
        return metrics
