"""embedding: learn vectors of texts that are alike for texts that belong together (in-batch negatives).

Rows are pairs of texts, or triplets with a text that does not belong. A text has to find its own partner among the
partners, and the texts that do not belong, of all rows of its micro-batch (MultipleNegativesRankingLoss of
sentence-transformers, InfoNCE). So the loss depends on `training.microBatchSize`, unlike that of other tasks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import FineTuneJobSpec
from luthier_api.tasks import TASKS
from luthier_trainer.data import columns, full_lengths, tokens
from luthier_trainer.data.load import Rows
from luthier_trainer.models import embedding as token_rows
from luthier_trainer.models import inspect
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice
from luthier_trainer.tasks.base import Batch, LoadedModel, Model, Shown, TrainerSetup, TrainingContext
from luthier_trainer.tasks.batches import LabelledBatches, padded
from luthier_trainer.tasks.texts import ADD_ROWS, TextTask, reader_of

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase, TrainingArguments

    from luthier_trainer.models.memory import Trial

COLUMNS = "spec.dataset.columns"
ROLES = ("anchor", "positive", "negative")
"""A text, its partner, and, in triplets, one that does not belong to it."""
POOLING_FILE = "1_Pooling/config.json"  # of sentence-transformers, beside a model
MODES = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "last": "pooling_mode_lasttoken"}
"""How the vector of a text is made of those of its tokens → its name in `POOLING_FILE`."""


class EmbeddingTask(LabelledBatches, TextTask):
    """The task embedding."""

    task = "embedding"

    # ---- prepare

    def inputs(self, spec: FineTuneJobSpec) -> tuple[str, ...]:
        given = spec.dataset.columns
        return tuple(getattr(given, role) for role in ROLES if getattr(given, role))

    def columns(self, spec: FineTuneJobSpec) -> tuple[str, ...]:
        return self.inputs(spec)

    def fitting(self, rows: Rows, spec: FineTuneJobSpec) -> Rows:
        for role, name in zip(ROLES, self.inputs(spec), strict=False):
            columns.require(rows, name, f"{COLUMNS}.{role}", self.inputs(spec))
        for role, name in zip(ROLES, self.inputs(spec), strict=False):
            rows = columns.texts(rows, name, f"{COLUMNS}.{role}", drop_blank=True)
        return rows

    def check_model(self, model: Model, spec: FineTuneJobSpec, rows: int, labels: list[str] | None) -> None:
        """Check that the model makes vectors, and tell which. Raises Failure if it does not suit."""
        if model.config.is_encoder_decoder:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{inspect.MODEL}: {model.config.model_type} has a decoder, which makes no vectors of texts; choose an"
                " encoder such as BERT, or a model that reads forward",
            )
        super().check_model(model, spec, rows, labels)
        mode, source = pooling(model.path, spec)
        notice(f"spec.embedding.pooling: {mode}, {source}")

    def encode(
        self,
        rows: Rows,
        processor: PreTrainedTokenizerBase,
        spec: FineTuneJobSpec,
        labels: list[str] | None,
        use: str,
    ) -> Dataset:
        """Return the tokens of each text of a row, cut at `training.maxLength`. `length` counts those of all."""
        from datasets import Features, List, Value

        named, longest = dict(zip(ROLES, self.inputs(spec), strict=False)), spec.training.max_length
        for role, name in named.items():
            reader = reader_of(rows, name, f"{COLUMNS}.{role}", processor, spec, use)
        _tell_shared(rows, named["positive"], use)

        def tokenize(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
            read = {role: reader.truncated(batch[name], longest) for role, name in named.items()}
            return {
                **{f"{role}_ids": ids for role, (ids, _) in read.items()},
                "length": [sum(map(len, texts)) for texts in zip(*(ids for ids, _ in read.values()), strict=True)],
                tokens.FULL_LENGTH: [
                    max(found) for found in zip(*(lengths for _, lengths in read.values()), strict=True)
                ],
            }

        features = {f"{role}_ids": List(Value("int32")) for role in named} | {"length": Value("int32")}
        found = tokens.mapped(rows.data, tokenize, tokens.with_notes(Features(features)), parallel=True)
        lengths = found[tokens.FULL_LENGTH][:]
        cut = sum(length > longest for length in lengths)
        if cut:
            notice(
                f"{tokens.MAX_LENGTH}: {cut} of {len(found)} {use} rows have a text of more than {longest} tokens,"
                " which is cut"
            )
        full_lengths.keep(use, lengths)
        return found.remove_columns(tokens.FULL_LENGTH)

    def check_encoded(self, data: DatasetDict, model: Model, labels: list[str] | None) -> None:
        names = tuple(name for name in data["train"].column_names if name.endswith("_ids"))
        token_rows.check_rows(model.missing_tokens, data, model.processor, inspect.MODEL, ADD_ROWS, names)
        token_rows.notice_absent(model.new_tokens, data, model.processor, names)

    def shown(self, row: Mapping[str, Any]) -> Mapping[str, Shown]:
        return {role: (ids, [0] * len(ids)) for role in ROLES if (ids := row.get(f"{role}_ids"))}

    def trial(self, model: Model, spec: FineTuneJobSpec, labels: list[str] | None, rows: Dataset | None) -> Trial | str:
        import torch

        from luthier_trainer.models.memory import Trial
        from luthier_trainer.tasks.ranking import ranking_loss, vectors

        made = inspect.skeleton(model.config, self.task, inspect.MODEL)
        texts, longest = len(self.inputs(spec)), spec.training.max_length
        if rows is not None:
            longest = max(len(ids) for role in ROLES[:texts] for ids in rows[f"{role}_ids"])
        mode, scale = pooling(model.path, spec)[0], spec.embedding.scale

        def batch(size: int) -> Batch:
            with torch.device("meta"):
                ids = torch.empty((texts * size, longest), dtype=torch.int64)
                return {"input_ids": ids, "attention_mask": torch.empty_like(ids), "labels": ids[:size, 0]}

        def loss(outputs: Any, wanted: torch.Tensor) -> torch.Tensor:
            states = outputs["last_hidden_state"]
            mask = torch.ones(states.shape[:2], dtype=torch.int64, device=states.device)
            return ranking_loss(vectors(states, mask, mode), wanted, scale)

        return Trial(made, batch, loss, [], longest, mixed_lengths=True)

    # ---- training

    def tokens(self, batch: Batch) -> Any:
        return batch["attention_mask"].sum()

    def arguments(self, spec: FineTuneJobSpec, common: Mapping[str, Any]) -> TrainingArguments:
        return super().arguments(spec, {**common, "remove_unused_columns": False})

    def load_model(self, context: TrainingContext) -> LoadedModel:
        from transformers import AutoModel

        model = AutoModel.from_pretrained(context.model_path, **context.weights)
        # A pooler, which some encoders have, makes another vector, which nothing here reads. It would get an adapter,
        # and one with new weights cannot be quantised. Models without it have None there.
        for name in TASKS[self.task].unused:
            if getattr(model, name, None) is not None:
                setattr(model, name, None)
        return LoadedModel(model)

    def trainer(self, context: TrainingContext, model: Any) -> TrainerSetup:
        from luthier_trainer.tasks.ranking import RankingTrainer, VectorScore

        settings = context.spec.embedding
        mode = pooling(context.model_path, context.spec)[0]
        score = VectorScore(mode, settings.scale, context.spec.training.batch_size)
        options = {"score": score, "mode": mode, "scale": settings.scale}
        return TrainerSetup(RankingTrainer, TextsCollator(context.processor.pad_token_id), options)

    def complete_result(self, folder: Path, model: Any, context: TrainingContext) -> None:
        """Add the files by which sentence-transformers computes the vectors as the training has."""
        mode = pooling(context.model_path, context.spec)[0]
        width = model.config.hidden_size
        parts = ["sentence_transformers.models.Transformer", "sentence_transformers.models.Pooling"]
        folders = ["", Path(POOLING_FILE).parent.name]
        modules = [
            {"idx": i, "name": str(i), "path": path, "type": kind}
            for i, (path, kind) in enumerate(zip(folders, parts, strict=True))
        ]
        written = {name: key == mode for key, name in MODES.items()}
        for path, content in (
            ("modules.json", modules),
            (POOLING_FILE, {"word_embedding_dimension": width, **written}),
            ("sentence_bert_config.json", {"max_seq_length": context.spec.training.max_length, "do_lower_case": False}),
        ):
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_text(json.dumps(content, indent=2))


def pooling(folder: Path, spec: FineTuneJobSpec) -> tuple[str, str]:
    """Return (how the vector of a text is made of those of its tokens, why)."""
    if spec.embedding.pooling:
        return spec.embedding.pooling, "as the job says"
    try:
        found = json.loads((folder / POOLING_FILE).read_text())
    except (OSError, ValueError):
        return "mean", f"because the model has no {POOLING_FILE}. It may be mean, cls or last"
    chosen = [mode for mode, name in MODES.items() if found.get(name)]
    if len(chosen) == 1:
        return chosen[0], f"as {POOLING_FILE} of the model says"
    return (
        "mean",
        f"because {POOLING_FILE} of the model asks for what this task does not have. It may be mean, cls or last",
    )


def _tell_shared(rows: Rows, column: str, use: str) -> None:
    """Give notice of partners that several rows have: in a batch they would count as wrong for each other."""
    repeated = len(rows.data) - len(set(rows.data[column][:]))
    if repeated:
        notice(
            f"{COLUMNS}.positive: {repeated} of {len(rows.data)} {use} rows have a text that another row has, too."
            " Where both are in a micro-batch, the text counts as a wrong one for one of them"
        )


class TextsCollator:
    """Makes batches of all texts of the rows: first the anchors, then their partners, then those that do not belong."""

    def __init__(self, padding: int) -> None:
        """`padding`: id of the token that fills up texts."""
        self.padding = padding

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        """Return input_ids and attention_mask, int64 [texts of a row × rows, length], and labels, zeros [rows].

        Texts are padded on the right.
        """
        import torch

        names = [f"{role}_ids" for role in ROLES if f"{role}_ids" in rows[0]]
        ids = [torch.tensor(row[name]) for name in names for row in rows]
        return {
            "input_ids": padded(ids, self.padding),
            "attention_mask": padded([torch.ones_like(tokens) for tokens in ids], 0),
            "labels": torch.zeros(len(rows), dtype=torch.int64),
        }
