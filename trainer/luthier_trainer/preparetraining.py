"""`prepare` of a FineTuneJob: rows, tokenizer, tokens, plan; in the order in which a mistake is cheapest to find."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from luthier_api.exitcodes import ExitCode
from luthier_api.run import FineTuneRun, PreparedRecord
from luthier_api.spec import NewModel
from luthier_api.status import ResolvedDataset, ResolvedSource
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer import modelfacts, origins, sources
from luthier_trainer.data import columns, files, tokens
from luthier_trainer.data.load import Loader, Rows, ranges
from luthier_trainer.ending import Failure
from luthier_trainer.plan import plan_training
from luthier_trainer.wholemodel import whole_model

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

DATASET, MODEL = "spec.dataset", "spec.model"
TEXT, LABEL = f"{DATASET}.columns.text", f"{DATASET}.columns.label"
TEXTS_AT_ONCE = 1000


@dataclass(frozen=True)
class Examples:
    """Rows that fit the task, before they are tokens."""

    train: Rows
    eval: Rows | None
    labels: list[str] | None = None


@dataclass(frozen=True)
class Model:
    """The model to start from, in a folder."""

    resolved: ResolvedSource
    path: Path
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase


def prepare(run: FineTuneRun, folder: WorkspaceFolder, cache: Path) -> PreparedRecord:
    """Everything but the record itself. Raises Failure."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    for stale in ("dataset", "tokenizer"):
        shutil.rmtree(folder.prepared / stale, ignore_errors=True)

    spec = run.spec
    located = sources.locate(spec.model, run, MODEL) if spec.model.config is None else None
    if spec.model.config is not None:
        from luthier_trainer.newmodel import new_config

        modelfacts.check_length(new_config(spec.model.config), spec.training.max_length, "spec.training.maxLength")
    examples = read_examples(run, cache)
    model = new_model(spec.model.config, examples, run, folder) if spec.model.config else existing_model(located, run, folder)
    check_fit(model, run)

    data = tokenize(examples, model.tokenizer, run)
    dataset_path = folder.prepared / "dataset"
    data.save_to_disk(str(dataset_path))
    model.tokenizer.save_pretrained(folder.prepared / "tokenizer")
    train = data["train"]
    read = {origin.path: origin for rows in (examples.train, examples.eval) if rows for origin in rows.origins}
    revision = origins.combined(origin.digest for origin in read.values()) if read else examples.train.revision
    source = spec.dataset.id or ", ".join(spec.dataset.files or [])
    return PreparedRecord(
        model=model.resolved,
        dataset=ResolvedDataset(
            source=source[:300], revision=revision, rows=len(train), eval_rows=len(data["eval"]) if "eval" in data else 0,
            tokens=tokens.count_tokens(train), labels=examples.labels,
        ),
        plan=plan_training(spec, len(train), modelfacts.count_weights(model.path)),
        model_path=str(model.path),
        origins=[*(located.origins if located else ()), *read.values()],
        dataset_path=str(dataset_path),
    )  # fmt: skip


def read_examples(run: FineTuneRun, cache: Path) -> Examples:
    """The rows of training and evaluation, with the columns that the task needs."""
    spec, data = run.spec, run.spec.dataset
    loader = Loader(data, DATASET, cache, documents=spec.training.packing)
    train = loader.split(data.split, "split")
    evaluation = None
    if data.eval_split:
        evaluation = loader.split(data.eval_split, "evalSplit")
        refuse_overlap(run, loader)
    elif data.eval_files:
        evaluation = loader.files(data.eval_files, "evalFiles")
        files.refuse_shared(train.origins, evaluation.origins)

    classifies = spec.task == "text-classification"
    text = data.columns.text

    def fitting(rows: Rows) -> Rows:
        return replace(rows, data=columns.texts(rows, text, TEXT, drop_blank=not classifies))

    train = fitting(train)
    labels = columns.labels_of(train, data.columns.label, LABEL, taken=[text]) if classifies else None
    evaluation = fitting(evaluation) if evaluation else None
    if evaluation and labels:
        columns.label_ids(evaluation, data.columns.label, LABEL, labels)
    if data.eval_fraction is not None and not train.documents:
        kept, held = tokens.hold_out(train.data, data.eval_fraction, spec.training.seed, f"{DATASET}.evalFraction")
        train, evaluation = replace(train, data=kept), replace(train, data=held)
    return Examples(train, evaluation, labels)


def refuse_overlap(run: FineTuneRun, loader: Loader) -> None:
    """Rows that are both learnt and measured on make every figure look better than it is."""
    data = run.spec.dataset
    split, other = data.split.partition("[")[0], str(data.eval_split).partition("[")[0]
    if split != other:
        return
    whole = loader.split(split, "split").data
    learnt, measured = (
        {i for start, end in ranges(whole, s, [split], f"{DATASET}.{f}") for i in range(start, end)}
        for s, f in ((data.split, "split"), (str(data.eval_split), "evalSplit"))
    )
    if both := len(learnt & measured):
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{DATASET}.evalSplit: {both} of its rows are in split {data.split} too, and would be learnt and measured on."
            f" Choose parts that do not overlap, such as {split}[:90%] and {split}[90%:]",
        )


def new_model(new: NewModel, examples: Examples, run: FineTuneRun, folder: WorkspaceFolder) -> Model:
    """A tokenizer from the training rows, and weights from the seed. Of files whose blocks are held out, the tokenizer sees all."""
    from luthier_trainer.newmodel import new_config, save_new_model, train_tokenizer

    tokenizer = train_tokenizer(texts_of(examples.train, run.spec.dataset.columns.text), new.vocab_size)
    config = new_config(new, tokenizer)
    if limit := modelfacts.room(config):
        tokenizer.model_max_length = limit
    path = folder.prepared / "model"
    save_new_model(config, path, run.spec.training.seed)
    tokenizer.save_pretrained(path)
    return Model(ResolvedSource(source=f"new {new.model_type}"), path, config, tokenizer)


def texts_of(rows: Rows, column: str) -> Iterator[str]:
    """The texts; lines of a file are put together again, so that pairs across line breaks count."""
    for start in range(0, len(rows.data), TEXTS_AT_ONCE):
        batch = rows.data[start : start + TEXTS_AT_ONCE][column]
        if rows.documents:
            yield "".join(batch)
        else:
            yield from batch


def existing_model(located: sources.Located | None, run: FineTuneRun, folder: WorkspaceFolder) -> Model:
    """The model that was located, as a folder that `from_pretrained` loads; an adapter of another job is merged into its base."""
    assert located is not None
    path = whole_model(located, run, folder)
    config = modelfacts.read_config(path, located.field)
    tokenizer = modelfacts.read_tokenizer(located.folder or path, located.field)
    return Model(located.resolved, path, config, tokenizer)


def check_fit(model: Model, run: FineTuneRun) -> None:
    """What of the spec depends on the model. Raises Failure."""
    spec = run.spec
    modelfacts.check_task(model.config, spec.task, MODEL)
    # Adapters can be trained beside 4-bit weights; to go on from quantised weights without them would be to train their rounding.
    modelfacts.check_quantisation(model.config, {"bitsandbytes"} if spec.method.type == "qlora" else set(), MODEL)
    modelfacts.check_length(model.config, spec.training.max_length, "spec.training.maxLength")
    if spec.task == "causal-lm" and model.tokenizer.eos_token_id is None:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{MODEL}: its tokenizer has no end-of-text token, so the model could not learn where a text ends. Choose another model, or add"
            " eos_token to its tokenizer_config.json",
        )
    if model.tokenizer.pad_token_id is None:
        raise Failure(ExitCode.INVALID_SPEC, f"{MODEL}: its tokenizer has neither a padding nor an end-of-text token; rows cannot form batches")
    if spec.method.type != "full":
        modelfacts.check_target_modules(model.config, spec.task, spec.method.target_modules, "spec.method.targetModules")
    if spec.method.type == "qlora" and not spec.resources.gpus_per_node:
        modelfacts.check_quantisable(model.config, "spec.method.type")


def tokenize(examples: Examples, tokenizer: PreTrainedTokenizerBase, run: FineTuneRun) -> DatasetDict:
    """The splits `train` and, when rows are held out, `eval`."""
    from datasets import DatasetDict

    spec, data = run.spec, run.spec.dataset

    def encoded(rows: Rows) -> Dataset:
        if examples.labels is not None:
            ids = columns.label_ids(rows, data.columns.label, LABEL, examples.labels)
            return tokens.classification_rows(rows.data, data.columns.text, ids, tokenizer, spec.training.max_length)
        if spec.training.packing:
            return tokens.language_blocks(rows.data, data.columns.text, tokenizer, spec.training.max_length, rows.documents)
        return tokens.language_rows(rows.data, data.columns.text, tokenizer, spec.training.max_length)

    splits = {"train": encoded(examples.train)} | ({"eval": encoded(examples.eval)} if examples.eval else {})
    if data.eval_fraction is not None and examples.train.documents:
        # A file has no rows to hold out: blocks of it are.
        blocks = tokens.hold_out(splits["train"], data.eval_fraction, spec.training.seed, f"{DATASET}.evalFraction")
        splits = dict(zip(("train", "eval"), blocks, strict=True))
    for name, rows in splits.items():
        if len(rows) == 0:
            raise columns.invalid(f"{TEXT}: no row of the {name} split has {tokens.SHORTEST} tokens or more")
    return DatasetDict(splits)
