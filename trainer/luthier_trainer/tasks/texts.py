"""Shared code of tasks whose rows hold texts: checks of the model and its tokenizer, and how texts are tokenized."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import FineTuneJobSpec
from luthier_api.methods import METHODS
from luthier_api.run import FineTuneRun
from luthier_api.spec import TOKENIZER_TYPE, TokenizerTraining
from luthier_api.status import ResolvedSource
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.data import tokens
from luthier_trainer.data.load import Rows
from luthier_trainer.data.reading import Reader, rows_at_once
from luthier_trainer.models import checks, embedding, extended_tokenizer, inspect, processors
from luthier_trainer.models.sources import Located
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice
from luthier_trainer.tasks.base import Batch, Model
from luthier_trainer.tasks.pretrained import PretrainedTask
from luthier_trainer.workspace import provenance
from luthier_trainer.workspace.manifest import sha256
from luthier_trainer.workspace.model_files import MODEL_CONFIG

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from luthier_trainer.models.memory import Trial

FIELD = "spec.dataset.columns.text"
ADD_ROWS = (
    "Set model.resizeEmbeddings: true, which adds rows that learn; or take the tokenizer that belongs to the model"
)
TOKENIZER = "tokenizer.json"
TEXTS_AT_ONCE = 1_000
WORKERS = 2  # enough to pad batches while the GPU computes


class TextTask(PretrainedTask):
    """A base class of tasks whose model reads texts."""

    def inputs(self, spec: FineTuneJobSpec) -> tuple[str, ...]:
        return (spec.dataset.columns.text,)

    def read_processor(self, folder: Path, field: str) -> PreTrainedTokenizerBase:
        return processors.read_tokenizer(folder, field)

    def read_model(self, located: Located, run: FineTuneRun, folder: WorkspaceFolder, rows: Rows) -> Model:
        """Return the model, and its tokenizer with the tokens that the spec adds and the pieces that it learns.

        There is a row of its embedding for each token that can occur; that of an adapter gets them when it is trained.
        Raises Failure if rows are missing and the spec does not ask to add them, or if an adapter cannot hold them.
        """
        model, spec, field = super().read_model(located, run, folder, rows), run.spec, located.field
        added = dict(embedding.add(model.processor, spec.model.add_special_tokens or []))
        parts: Mapping[int, list[int]] = {}
        if asked := spec.model.tokenizer and spec.model.tokenizer.train:
            added |= embedding.add(
                model.processor, asked.special_tokens or [], f"{embedding.PIECES}.train.specialTokens"
            )
            if asked.vocab_size:
                texts = Again(lambda: self.texts(rows, spec))
                made = extended_tokenizer.extended(model.processor, texts, asked.vocab_size, model.config)
                notice(extended_tokenizer.describe(made, asked.vocab_size))
                model, parts = replace(model, processor=made.tokenizer), made.parts
                added |= made.pieces
        missing = embedding.without_row(model.config, model.processor, self.task, field)
        if not spec.model.resize_embeddings and not added:
            embedding.check(missing, model.processor, field, ADD_ROWS)
            return replace(model, missing_tokens=missing)
        if not missing and not added:
            notice(
                f"{embedding.RESIZE}: each token of the tokenizer has a row in the embedding already, and nothing was"
                " changed"
            )
            return model
        if METHODS[spec.method.type].adapter:
            held = embedding.held_by_adapter(missing, added, model.config, self.task, field, parts)
            return replace(model, new_tokens=held, piece_parts=parts)
        new = tuple({*added.values(), *missing.values()})
        if not missing and not parts:
            notice(
                f"{embedding.ADD}: {len(added)} tokens were added ({embedding.some(added)}). The embedding has unused"
                " rows for them, which learn from the values that they have"
            )
            return replace(model, new_tokens=new)
        path = embedding.resized(
            model.path,
            model.config,
            {**added, **missing} if parts else missing,
            self.task,
            spec.training.seed,
            field,
            folder,
            parts,
        )
        return replace(model, path=path, config=inspect.read_config(path, field), new_tokens=new)

    def check_new_model(self, spec: FineTuneJobSpec) -> None:
        from luthier_trainer.models.new_model import new_config

        assert spec.model.config is not None
        checks.check_length(new_config(spec.model.config, task=self.task), spec.training.max_length, tokens.MAX_LENGTH)

    def texts(self, rows: Rows, spec: FineTuneJobSpec) -> Iterator[str]:
        """Yield the texts of the training rows, of which the tokenizer of a new model is made, row by row."""
        names = self.inputs(spec)
        texts = rows.data.select_columns(list(names))
        for batch in texts.iter(rows_at_once(texts, TEXTS_AT_ONCE)):
            for cells in zip(*(batch[name] for name in names), strict=True):
                yield from cells

    def new_model(self, rows: Rows, run: FineTuneRun, folder: WorkspaceFolder) -> Model:
        """Create a tokenizer from the training rows and a model with weights drawn from the seed."""
        from luthier_trainer.models.new_model import new_config, save_new_model
        from luthier_trainer.models.new_tokenizer import describe, train_tokenizer

        spec, new = run.spec, run.spec.model.config
        assert new is not None
        asked = spec.model.tokenizer.train if spec.model.tokenizer else TokenizerTraining()
        size = spec.model.vocabulary
        empty = new_config(new, task=self.task)
        special = asked.special_tokens or []
        texts = Again(lambda: self.texts(rows, spec))
        kind = asked.type or TOKENIZER_TYPE
        tokenizer = train_tokenizer(texts, size, empty, self.task, kind, special)
        config = new_config(new, tokenizer, self.task)
        if limit := inspect.max_positions(config):
            tokenizer.model_max_length = limit
        path = folder.prepared / "model"
        save_new_model(config, path, spec.training.seed, self.task)
        tokenizer.save_pretrained(path)
        # The weights are not part of it: they follow from the seed, and may be rounded otherwise on another machine.
        revision = provenance.combined(f"{name} {sha256(path / name)}" for name in (MODEL_CONFIG, TOKENIZER))
        notice(describe(tokenizer, kind, size, sha256(path / TOKENIZER)))
        resolved = ResolvedSource(source=f"new {new.model_type}", revision=revision)
        return Model(resolved, path, config, self.read_processor(path, inspect.MODEL))

    def check_model(self, model: Model, spec: FineTuneJobSpec, rows: int, labels: list[str] | None) -> None:
        check(model.config, model.processor, spec)
        super().check_model(model, spec, rows, labels)

    def contents(self, rows: Rows, spec: FineTuneJobSpec) -> Iterator[Sequence[str | bytes]]:
        names = self.compared(rows, spec)
        texts = rows.data.select_columns(list(names))
        for batch in texts.iter(rows_at_once(texts, TEXTS_AT_ONCE)):
            yield ["\n".join(cells) for cells in zip(*(batch[name] for name in names), strict=True)]

    def compared(self, rows: Rows, spec: FineTuneJobSpec) -> tuple[str, ...]:
        """Return the columns of text that make up a row for the data report."""
        return self.inputs(spec)

    def added_tokens(self, processor: PreTrainedTokenizerBase) -> int:
        return int(processor.num_special_tokens_to_add())

    def check_encoded(self, data: DatasetDict, model: Model, labels: list[str] | None) -> None:
        embedding.check_rows(model.missing_tokens, data, model.processor, inspect.MODEL, ADD_ROWS)
        embedding.notice_absent(model.new_tokens, data, model.processor, ("input_ids",))

    def count_tokens(self, data: Dataset) -> int:
        return tokens.count_tokens(data)

    def loader_workers(self, cores: int) -> int:
        return WORKERS


@dataclass(frozen=True)
class Again:
    """Texts that can be read several times."""

    begin: Callable[[], Iterator[str]]

    def __iter__(self) -> Iterator[str]:
        return self.begin()


def check(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, spec: FineTuneJobSpec) -> None:
    """Check that model and tokenizer support texts of the length that the spec asks for. Raises Failure if not."""
    checks.check_length(config, spec.training.max_length, tokens.MAX_LENGTH)
    if config.model_type in inspect.SEE_PADDING and spec.training.micro_batch_size != 1:
        notice(
            f"{inspect.MODEL}: {config.model_type} does not mask padding, so what it makes of a text depends a"
            " little on the length of the texts beside it. Set spec.training.microBatchSize: 1 to learn without"
            " padding"
        )
    if tokenizer.pad_token_id is None:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{inspect.MODEL}: its tokenizer has neither a padding nor an end-of-text token; rows cannot form batches",
        )


def check_ends(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the tokenizer has an end-of-text token. Raises Failure if not."""
    if tokenizer.eos_token_id is None:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{inspect.MODEL}: its tokenizer has no end-of-text token, so the model could not learn where a text"
            " ends. Choose another model, or add eos_token to its tokenizer_config.json",
        )


def reader_of(
    rows: Rows, column: str, field: str, tokenizer: PreTrainedTokenizerBase, spec: FineTuneJobSpec, use: str
) -> Reader:
    """Return the reader that tokenizes the texts of a column.

    It gives notice of texts that spell control tokens. Raises Failure if the tokenizer cannot treat them as plain text.
    """
    reader = Reader(tokenizer, spec.dataset.parse_special_tokens)
    lines = "lines" if rows.documents else "rows"
    reader.check_spellings(rows.data, column, field, f"{use} {lines} of {rows.origin}")
    return reader


def token_trial(
    model: Model, task: str, spec: FineTuneJobSpec, data: Dataset | None, labels_of_tokens: bool, labels: int = 0
) -> Trial:
    """Return a step over the longest rows of tokens, on the meta device.

    `labels_of_tokens`: whether each token has a label; otherwise each row has one of `labels`.
    """
    import torch

    from luthier_trainer.models.heads import heads_of
    from luthier_trainer.models.memory import Trial

    config = copy.deepcopy(model.config)
    if labels:
        config.num_labels = labels
    made = inspect.skeleton(config, task, inspect.MODEL)
    made.config.pad_token_id = model.processor.pad_token_id
    packed = spec.training.packing == "isolated"
    unknown = data is None or spec.dataset.streaming
    lengths = [spec.training.max_length] if data is None or unknown else data["length"][:]
    longest = max(lengths)

    def batch(rows: int) -> Batch:
        ids = torch.empty((rows, longest), dtype=torch.int64, device="meta")
        beside = {"position_ids": ids, "use_cache": False} if packed else {"attention_mask": torch.empty_like(ids)}
        return {"input_ids": ids, "labels": torch.empty_like(ids if labels_of_tokens else ids[:, 0]), **beside}

    mixed = min(lengths) < longest or (unknown and spec.training.packing in (None, "none"))
    return Trial(made, batch, None, heads_of(made, task), longest, mixed, packed)


def refuse_adapter_on_head(model: Model, spec: FineTuneJobSpec, task: str) -> None:
    """Raise Failure if an adapter would be on the head, whose weights TRL reads without it."""
    if spec.method.type == "full":
        return
    skeleton = inspect.skeleton(model.config, task, inspect.MODEL)
    head = next(name for name, module in skeleton.named_modules() if module is skeleton.get_output_embeddings())
    for i, target in enumerate(spec.method.target_modules):
        if f".{head}".endswith(f".{target}"):
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"spec.method.targetModules[{i}]: TRL reads the weights of {head} without an adapter, which would never"
                f" learn; leave {target} out",
            )
