"""masked-lm: learn to fill in masked tokens of texts, as BERT was trained.

Which tokens are masked depends on the seed, the step and the row alone. So a resumed run, or one with another number of
processes, has the same masks. Held-out rows have the same ones in each evaluation.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import FineTuneJobSpec
from luthier_api.texts import Masking
from luthier_trainer.data import columns, tokens
from luthier_trainer.data.load import Rows
from luthier_trainer.models import inspect
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.tasks.base import Batch, LoadedModel, Model, Shown, TrainerSetup, TrainingContext
from luthier_trainer.tasks.batches import IGNORED, LabelledBatches, padded
from luthier_trainer.tasks.causal_lm import MAX_PERPLEXING_LOSS
from luthier_trainer.tasks.texts import FIELD, TextTask, reader_of, token_trial

if TYPE_CHECKING:
    import numpy
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

    from luthier_trainer.models.memory import Trial

UNITS, ROW = "units", "row"
"""Columns: what each token is masked with, a number that the tokens of a word share and `ALONE` for control tokens; and
the number of the row in its split.
"""
ALONE = -1
MASKED, RANDOM = 0.8, 0.9
"""Of the tokens that are chosen, 80 % become the mask token, 10 % another one, and 10 % stay (arXiv:1810.04805)."""


class MaskedLM(LabelledBatches, TextTask):
    """The task masked-lm."""

    task = "masked-lm"

    # ---- prepare

    def columns(self, spec: FineTuneJobSpec) -> tuple[str, ...]:
        return self.inputs(spec)

    def fitting(self, rows: Rows, spec: FineTuneJobSpec) -> Rows:
        return columns.texts(rows, spec.dataset.columns.text, FIELD, drop_blank=True)

    def check_model(self, model: Model, spec: FineTuneJobSpec, rows: int, labels: list[str] | None) -> None:
        """Check that the tokenizer has a mask token, and words if they are masked. Raises Failure if it has not."""
        if model.processor.mask_token_id is None:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{inspect.MODEL}: its tokenizer has no mask token. Choose a model that was trained with one, such as"
                " BERT, or add mask_token to its tokenizer_config.json",
            )
        if spec.masking.unit == "word" and not model.processor.is_fast:
            raise Failure(
                ExitCode.INVALID_SPEC,
                "spec.masking.unit: this model's tokenizer does not say which tokens belong to a word; use token, or"
                " choose a model with a tokenizer.json",
            )
        super().check_model(model, spec, rows, labels)

    def encode(
        self,
        rows: Rows,
        processor: PreTrainedTokenizerBase,
        spec: FineTuneJobSpec,
        labels: list[str] | None,
        use: str,
    ) -> Dataset:
        """Return the tokens of each text, cut at `training.maxLength`, with the columns `UNITS` and `ROW`."""
        from datasets import Features, List, Value

        column, longest = spec.dataset.columns.text, spec.training.max_length
        reader = reader_of(rows, column, FIELD, processor, spec, use)
        of_words = spec.masking.unit == "word"
        control = {*processor.all_special_ids} - {processor.unk_token_id}

        def tokenize(batch: dict[str, list[str]], numbers: list[int]) -> dict[str, list[Any]]:
            ids, lengths = reader.truncated(batch[column], longest)
            units = [[i if token not in control else ALONE for i, token in enumerate(row)] for row in ids]
            if of_words:
                read = reader(batch[column], truncation=True, max_length=longest)
                units = [[ALONE if word is None else word for word in read.word_ids(i)] for i in range(len(ids))]
            return {
                "input_ids": ids,
                UNITS: units,
                ROW: numbers,
                "length": [len(row) for row in ids],
                tokens.FULL_LENGTH: lengths,
            }

        ints = List(Value("int32"))
        features = {"input_ids": ints, UNITS: ints, ROW: Value("int64"), "length": Value("int32")}
        types = tokens.with_notes(Features(features))
        found = tokens.mapped(rows.data, tokenize, types, with_indices=True, parallel=True)
        return tokens.without_lengths(found, longest, use, spec.dataset.filter)

    def shown(self, row: Mapping[str, Any]) -> Mapping[str, Shown]:
        return {"text": (row["input_ids"], [0] * len(row["input_ids"]))}

    def trial(self, model: Model, spec: FineTuneJobSpec, labels: list[str] | None, rows: Dataset | None) -> Trial | str:
        from luthier_trainer.tasks import token_loss

        made = token_trial(model, self.task, spec, rows, labels_of_tokens=True)
        return token_loss.planned(made, spec, self.whole_logits(model), shifted=False)

    def whole_logits(self, model: Model) -> str | None:
        from luthier_trainer.tasks import token_loss

        return token_loss.why_whole(model.config, self.task)

    # ---- training

    def arguments(self, spec: FineTuneJobSpec, common: Mapping[str, Any]) -> TrainingArguments:
        return super().arguments(spec, {**common, "remove_unused_columns": False})

    def load_model(self, context: TrainingContext) -> LoadedModel:
        from transformers import AutoModelForMaskedLM

        return LoadedModel(AutoModelForMaskedLM.from_pretrained(context.model_path, **context.weights))

    def trainer(self, context: TrainingContext, model: Any) -> TrainerSetup:
        from luthier_trainer.tasks.measured import MeasuringTrainer
        from luthier_trainer.tasks.token_loss import TokenLoss

        tokenizer, spec = context.processor, context.spec
        loss = TokenLoss(model, not context.whole_logits, shifted=False, counts_right=True)
        masker = Masker(spec.masking, tokenizer.mask_token_id, len(tokenizer), spec.training.seed)
        options = {"score": MaskScore(), "loss": None}
        collator = TextCollator(tokenizer.pad_token_id)
        return TrainerSetup(MeasuringTrainer, collator, options, loss.described, drawn=masker)


class TextCollator:
    """Makes batches of texts, padded on the right."""

    def __init__(self, padding: int) -> None:
        """`padding`: id of the token that fills up rows."""
        self.padding = padding

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        """Return input_ids, attention_mask and labels, int64 [rows, length], and what `Masker` needs on the CPU."""
        import numpy
        import torch

        ids = [torch.tensor(row["input_ids"]) for row in rows]
        batch: Batch = {
            "input_ids": padded(ids, self.padding),
            "attention_mask": padded([torch.ones_like(tokens) for tokens in ids], 0),
            UNITS: padded([torch.tensor(row[UNITS]) for row in rows], ALONE).numpy(),
            ROW: numpy.array([row[ROW] for row in rows]),
        }
        return batch | {"labels": torch.full_like(batch["input_ids"], IGNORED)}


@dataclass(frozen=True)
class Masker:
    """Masks tokens of batches. The random numbers of a row follow from the seed, the step and its number."""

    settings: Masking
    mask_token: int
    vocabulary: int
    """Tokens of the tokenizer."""
    seed: int

    def __call__(self, batch: Batch, step: int | None) -> Batch:
        """Return a batch with masked `input_ids`, and with the tokens at these places as `labels`.

        `step`: of the training; None for held-out rows.
        """
        import numpy
        import torch

        when = "held-out" if step is None else step
        drawn = [
            self.of_row(units, f"{self.seed}:{when}:{row}")
            for units, row in zip(batch[UNITS], batch[ROW].tolist(), strict=True)
        ]
        ids = batch["input_ids"]
        chosen, becomes = (torch.from_numpy(numpy.stack(part)).to(ids.device) for part in zip(*drawn, strict=True))
        kept = {name: value for name, value in batch.items() if name not in (UNITS, ROW)}
        masked = torch.where(becomes >= 0, becomes, ids)
        return kept | {"input_ids": masked, "labels": torch.where(chosen, ids, IGNORED)}

    def of_row(self, units: numpy.ndarray, key: str) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Return which tokens of a row are labels, bool [length], and what each becomes, int64 [length]; -1: it stays.

        One unit at least is chosen, so that each row has a label.
        """
        import numpy

        # Padding, whose length depends on the rows beside this one, must not change what is drawn.
        length = int(numpy.flatnonzero(units != ALONE).max(initial=-1)) + 1
        chosen, becomes = numpy.zeros(len(units), bool), numpy.full(len(units), -1)
        units = units[:length]
        if not length:
            return chosen, becomes
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        random = numpy.random.default_rng(int.from_bytes(digest, "big"))
        names, of_token = numpy.unique(units, return_inverse=True)
        number = random.random(len(names))
        number[names == ALONE] = 2.0
        taken = (number < max(self.settings.probability, numpy.nextafter(number.min(), 2)))[of_token]
        taken &= units != ALONE
        change, others = random.random(length), random.integers(self.vocabulary, size=length)
        changed = numpy.where(change < MASKED, self.mask_token, numpy.where(change < RANDOM, others, -1))
        chosen[:length], becomes[:length] = taken, numpy.where(taken, changed, -1)
        return chosen, becomes


class MaskScore:
    """Computes evalLoss (nats a masked token), its perplexity, and the share of masked tokens that are filled in."""

    beside = ()

    def rows(self, outputs: Any, batch: Batch, trainer: Trainer) -> torch.Tensor:
        sums: torch.Tensor = outputs["logits"]  # of `token_loss.row_sums`
        return sums

    def metrics(self, rows: torch.Tensor) -> dict[str, float]:
        loss, labels, right = rows.sum(dim=0).tolist()
        mean = loss / labels
        perplexity = {"perplexity": math.exp(mean)} if mean < MAX_PERPLEXING_LOSS else {}
        return {"loss": mean, "accuracy": right / labels, **perplexity}
