"""`prepare` of a FineTuneJob: rows, model, what `train` reads, plan; in the order in which a mistake is cheapest to
find.

Neighbours: `data.texts` and `data.images`, for what depends on what rows hold.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import FineTuneJobSpec
from luthier_api.run import FineTuneRun, PreparedRecord
from luthier_api.spec import NewModel
from luthier_api.status import Plan, ResolvedDataset, ResolvedSource
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.data import columns, files, labels, tokens
from luthier_trainer.data.load import Loader, Rows, ranges
from luthier_trainer.methods import checks as method_checks
from luthier_trainer.methods import experts
from luthier_trainer.methods.trainable import weights_of
from luthier_trainer.models import checks, embedding, inspect, processors, sources, weight_check, weight_files
from luthier_trainer.models.materialize import whole_model
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice
from luthier_trainer.runtime.taskfacts import FACTS
from luthier_trainer.tasks import images, texts
from luthier_trainer.workspace import provenance, space
from luthier_trainer.workspace.plan import CHECKPOINTING, check_course, plan_space, plan_training

if TYPE_CHECKING:
    import numpy
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedConfig

DATASET, MODEL = "spec.dataset", "spec.model"
LABEL = f"{DATASET}.columns.label"
TEXTS_AT_ONCE = 1000
ADD_ROWS = (
    "Set model.resizeEmbeddings: true with method.type: full, which adds rows that learn; or take the tokenizer that"
    " belongs to the model"
)
SHOWN = 5  # labels in a notice


class Inputs(Protocol):
    """What depends on what rows hold."""

    def column(self, spec: FineTuneJobSpec) -> str: ...

    def fitting(self, rows: Rows, spec: FineTuneJobSpec) -> Rows: ...

    def check(self, config: PreTrainedConfig, processor: Any, spec: FineTuneJobSpec, rows: int) -> None: ...

    def encoded(
        self, rows: Rows, ids: numpy.ndarray | None, processor: Any, spec: FineTuneJobSpec, use: str
    ) -> Dataset: ...


INPUTS: Mapping[str, Inputs] = {"text": texts, "image": images}


@dataclass(frozen=True)
class Examples:
    """Rows that fit the task, before they are what `train` reads."""

    train: Rows
    eval: Rows | None
    labels: list[str] | None = None


@dataclass(frozen=True)
class Model:
    """The model to start from, in a folder."""

    resolved: ResolvedSource
    path: Path
    config: PreTrainedConfig
    processor: Any
    """The tokenizer, or the image processor."""
    beyond: embedding.Tokens = field(default_factory=dict)
    """Tokens without a row in the embedding; none of them occurs in every text."""


def prepare(run: FineTuneRun, folder: WorkspaceFolder, cache: Path) -> PreparedRecord:
    """Everything but the record itself. Raises Failure."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    for stale in ("dataset", "processor"):
        shutil.rmtree(folder.prepared / stale, ignore_errors=True)

    spec = run.spec
    located = sources.locate(spec.model, run, MODEL) if spec.model.config is None else None
    if spec.model.config is not None:
        from luthier_trainer.models.new_model import new_config

        checks.check_length(new_config(spec.model.config), spec.training.max_length, tokens.MAX_LENGTH)
    examples = read_examples(run, cache)
    model = (
        new_model(spec.model.config, examples, run, folder)
        if spec.model.config
        else existing_model(located, run, folder)
    )
    check_fit(model, run, len(examples.train.data))
    if examples.labels:
        notice(f"{MODEL}: {what_becomes_of_the_head(model, spec.task, examples.labels)}")

    data = encode(examples, model.processor, run)
    embedding.check_rows(model.beyond, data, model.processor, MODEL, ADD_ROWS)
    notice_unmeasured_labels(data, examples.labels)
    dataset_path = folder.prepared / "dataset"
    data.save_to_disk(str(dataset_path))
    model.processor.save_pretrained(folder.prepared / "processor")
    train = data["train"]
    open_on_gpus = spec.training.gradient_checkpointing is None and spec.resources.gpus_per_node > 0
    trouble = checks.cannot_recompute(model.config, spec.task) if open_on_gpus else None
    plan = plan_training(spec, len(train), weight_files.count(model.path, MODEL), trouble)
    check_course(spec, plan, len(train))
    weights = weights_of(model.config, spec, plan, examples.labels, model.path)
    plan = plan_space(plan, weights, space.folder_bytes(folder.prepared / "processor"))
    space.check_room(spec, plan, folder.root)
    notice_short_grace(spec, plan)
    read = {origin.path: origin for rows in (examples.train, examples.eval) if rows for origin in rows.origins}
    revision = provenance.combined(origin.digest for origin in read.values()) if read else examples.train.revision
    source = spec.dataset.id or ", ".join(spec.dataset.files or [])
    return PreparedRecord(
        model=model.resolved,
        dataset=ResolvedDataset(
            source=source[:300],
            revision=revision,
            rows=len(train),
            eval_rows=len(data["eval"]) if "eval" in data else 0,
            tokens=tokens.count_tokens(train) if FACTS[spec.task].inputs == "text" else None,
            labels=examples.labels,
        ),
        plan=plan,
        model_path=str(model.path),
        origins=[*(located.origins if located else ()), *read.values()],
        dataset_path=str(dataset_path),
    )


def notice_short_grace(spec: FineTuneJobSpec, plan: Plan) -> None:
    """Whether the job gives its pods less time than they need to save."""
    asked = spec.scheduling.grace_period_seconds
    if asked is not None and plan.grace_seconds and asked < plan.grace_seconds:
        notice(
            f"spec.scheduling.gracePeriodSeconds: a pod that is stopped gets {asked} s, and needs about"
            f" {plan.grace_seconds} s to save a checkpoint of {space.amount(plan.checkpoint_bytes or 0)}. What was"
            " learnt since the last save may be lost; raise it, or lower training.saveSteps"
        )


def read_examples(run: FineTuneRun, cache: Path) -> Examples:
    """The rows of training and evaluation, with the columns that the task needs."""
    spec, data = run.spec, run.spec.dataset
    task = FACTS[spec.task]
    inputs = INPUTS[task.inputs]
    needed = (inputs.column(spec), *((data.columns.label,) if task.labelled else ()))
    loader = Loader(data, DATASET, cache, columns=needed, others=False, documents=spec.training.packing)
    train = loader.split(data.split, "split")
    evaluation = None
    if data.eval_split:
        evaluation = loader.split(data.eval_split, "evalSplit")
        refuse_overlap(run, loader)
    elif data.eval_files:
        evaluation = loader.files(data.eval_files, "evalFiles")
        files.refuse_shared(train.origins, evaluation.origins)

    train = inputs.fitting(train, spec)
    names = (
        labels.names_of(train, data.columns.label, LABEL, data.merge_labels, taken=needed[:1])
        if task.labelled
        else None
    )
    evaluation = inputs.fitting(evaluation, spec) if evaluation else None
    if evaluation and names:
        class_ids(evaluation, run, names)
    if data.eval_fraction is not None and not train.documents:
        classes = class_ids(train, run, names) if names else None
        kept, held = tokens.hold_out(
            len(train.data), data.eval_fraction, spec.training.seed, f"{DATASET}.evalFraction", classes
        )
        train, evaluation = train.select(kept), train.select(held)
    return Examples(train, evaluation, names)


def class_ids(rows: Rows, run: FineTuneRun, names: list[str]) -> numpy.ndarray:
    """The class of each row. Raises Failure on one that is not in `names`."""
    return labels.ids_of(rows, run.spec.dataset.columns.label, LABEL, names, run.spec.dataset.merge_labels)


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
            f"{DATASET}.evalSplit: {both} of its rows are in split {data.split} too, and would be learnt and measured"
            f" on. Choose parts that do not overlap, such as {split}[:90%] and {split}[90%:]",
        )


def notice_unmeasured_labels(data: DatasetDict, labels: list[str] | None) -> None:
    """Say which labels of the training no held-out row has: f1Macro counts each of them as 0."""
    if labels is None or "eval" not in data:
        return
    measured = set(data["eval"].unique("labels"))
    if absent := [name for label, name in enumerate(labels) if label not in measured]:
        shown = ", ".join(absent[:SHOWN]) + ", ..." * (len(absent) > SHOWN)
        notice(
            f"{LABEL}: {len(absent)} of {len(labels)} labels are in no held-out row ({shown}). f1Macro counts each as"
            " 0, and the other figures say nothing about them. Hold out more rows, or rows of each label"
        )


def new_model(new: NewModel, examples: Examples, run: FineTuneRun, folder: WorkspaceFolder) -> Model:
    """A tokenizer from the training rows, and weights from the seed. Of files whose blocks are held out, the tokenizer
    sees all.
    """
    from luthier_trainer.models.new_model import new_config, save_new_model, train_tokenizer

    tokenizer = train_tokenizer(
        texts_of(examples.train, run.spec.dataset.columns.text), new.vocab_size, new_config(new)
    )
    config = new_config(new, tokenizer)
    if limit := inspect.max_positions(config):
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
    """The model that was located, as a folder that `from_pretrained` loads; an adapter of another job is merged into
    its base.
    """
    assert located is not None
    path = whole_model(located, run, folder)
    config = inspect.read_config(path, located.field)
    checks.check_task(config, run.spec.task, MODEL)
    # Adapters can be trained beside 4-bit weights; to go on from quantised weights without them would be to train their
    # rounding.
    checks.check_quantisation(config, {"bitsandbytes"} if run.spec.method.type == "qlora" else set(), MODEL)
    named_by_adapter = run.spec.method.type != "full" and run.spec.model.id is not None
    path = weight_check.fitting(path, config, run.spec.task, located.field, folder, named_by_adapter)
    processor = processors.read_processor(located.folder or path, run.spec.task, located.field)
    model = Model(located.resolved, path, config, processor)
    return with_rows(model, run, located.field, folder) if FACTS[run.spec.task].inputs == "text" else model


def with_rows(model: Model, run: FineTuneRun, field: str, folder: WorkspaceFolder) -> Model:
    """The model with a row of its embedding for each token that can occur. Raises Failure."""
    spec = run.spec
    beyond = embedding.without_row(model.config, model.processor, spec.task, field)
    if not spec.model.resize_embeddings:
        embedding.check(beyond, model.processor, field, ADD_ROWS)
        return replace(model, beyond=beyond)
    if not beyond:
        notice(
            f"{embedding.RESIZE}: each token of the tokenizer has a row in the embedding already, and nothing was"
            " changed"
        )
        return model
    path = embedding.resized(model.path, model.config, beyond, spec.task, spec.training.seed, field, folder)
    return replace(model, path=path, config=inspect.read_config(path, field))


def what_becomes_of_the_head(model: Model, task: str, labels: list[str]) -> str:
    """Whether the head of a classifier goes on learning, or starts anew."""
    from luthier_trainer.models.heads import describe_head, labels_in

    there = weight_files.shapes(weight_files.loaded(model.path, MODEL))
    return describe_head(inspect.skeleton(model.config, task, MODEL), there, labels_in(str(model.path)), labels)


def check_fit(model: Model, run: FineTuneRun, rows: int) -> None:
    """What of the spec depends on the model, and on the number of training rows. Raises Failure."""
    spec = run.spec
    INPUTS[FACTS[spec.task].inputs].check(model.config, model.processor, spec, rows)
    if spec.strategy.startswith("zero3"):
        checks.check_sharding(model.config, spec.task, "spec.strategy")
    if spec.training.gradient_checkpointing and (trouble := checks.cannot_recompute(model.config, spec.task)):
        raise Failure(ExitCode.INVALID_SPEC, f"{CHECKPOINTING}: {trouble}; remove it, or use a smaller microBatchSize")
    if spec.method.type != "full":
        method_checks.check_adapters(model.config, spec.task, spec.method.target_modules, "spec.method.targetModules")
        experts.check_adapters(model.config, spec)
    if spec.method.type == "qlora":
        experts.check_four_bits(model.config, spec.task)
    if spec.method.type == "qlora" and not spec.resources.gpus_per_node:
        method_checks.check_quantisable(model.config, "spec.method.type")


def encode(examples: Examples, processor: Any, run: FineTuneRun) -> DatasetDict:
    """The splits `train` and, when rows are held out, `eval`: as `train` reads them."""
    from datasets import DatasetDict

    spec, data = run.spec, run.spec.dataset

    def encoded(rows: Rows, use: str) -> Dataset:
        ids = class_ids(rows, run, examples.labels) if examples.labels else None
        return INPUTS[FACTS[spec.task].inputs].encoded(rows, ids, processor, spec, use)

    splits = {"train": encoded(examples.train, "training")} | (
        {"eval": encoded(examples.eval, "held-out")} if examples.eval else {}
    )
    if data.eval_fraction is not None and examples.train.documents:
        # A file has no rows to hold out: blocks of it are.
        blocks = splits["train"]
        kept, held = tokens.hold_out(len(blocks), data.eval_fraction, spec.training.seed, f"{DATASET}.evalFraction")
        splits = {"train": blocks.select(kept), "eval": blocks.select(held)}
    for name, rows in splits.items():
        if len(rows) == 0:
            raise columns.invalid(f"{texts.FIELD}: no row of the {name} split has {tokens.SHORTEST} tokens or more")
    return DatasetDict(splits)
