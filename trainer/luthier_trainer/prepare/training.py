"""`prepare` of a FineTuneJob: checks rows and model, encodes the rows, plans the run; the cheapest checks come first.

Everything that depends on the task is a method of its object (`tasks.base.Task`).
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import FineTuneJobSpec
from luthier_api.run import FineTuneRun, PreparedRecord
from luthier_api.status import Plan, ResolvedDataset
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.data import full_lengths, parallel, tokens
from luthier_trainer.data.holdout import hold_out
from luthier_trainer.data.lengths import notice_padding
from luthier_trainer.models import sources, weight_files
from luthier_trainer.prepare import data_report, first_row, streamed
from luthier_trainer.prepare.examples import FRACTION, Examples, read_examples, sources_of
from luthier_trainer.prepare.memory import memory_facts
from luthier_trainer.runtime import compiler, notices
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice
from luthier_trainer.tasks.base import Processor, Task
from luthier_trainer.tasks.table import task_of
from luthier_trainer.workspace import layout, provenance, space
from luthier_trainer.workspace.course import check_course
from luthier_trainer.workspace.fitting import fitted
from luthier_trainer.workspace.layout import Facts
from luthier_trainer.workspace.plan import plan_space, plan_training, smallest_batch
from luthier_trainer.workspace.remedies import FactsFor

if TYPE_CHECKING:
    from datasets import DatasetDict

MODEL = "spec.model"
SAMPLE, SAMPLED_ROWS = "sampled", 500
FEW_ROWS = 20 * SAMPLED_ROWS  # are encoded without being asked how much they take
FILES_OF_ROWS = 2  # `datasets` writes what it encodes into a file of its cache, from which the rows are saved
SURELY = 0.8  # of the size that the sample tells: no job is refused because its sample was unlucky


def prepare(run: FineTuneRun, folder: WorkspaceFolder, cache: Path) -> PreparedRecord:
    """Prepare everything in `folder` except the record, which is returned.

    `cache`: folder for downloaded data. Raises Failure if the job cannot run.
    """
    import datasets
    import numpy
    from datasets import DatasetDict
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    for stale in ("dataset", "processor"):
        shutil.rmtree(folder.prepared / stale, ignore_errors=True)

    spec, task = run.spec, task_of(run.spec)
    compiler.check(spec)
    parallel.use(parallel.asked(spec.prepare))
    located = None
    if spec.model.config is not None:
        task.check_new_model(spec)
    else:
        located = sources.locate(spec.model, run, MODEL)
    examples = (streamed.read_examples if spec.dataset.streaming else read_examples)(task, run, cache)
    if located is not None:
        model = task.read_model(located, run, folder, examples.train)
    else:
        model = task.new_model(examples.train, run, folder)
    others = task.other_models(examples.train, run, folder)
    task.check_model(model, spec, len(examples.train.data), examples.labels)

    class_weights = task.class_weights(examples.train, spec, examples.labels)
    check_room_for_rows(task, examples, model.processor, spec, folder.prepared)
    data = encode(task, examples, model.processor, spec)
    # Of a stream, a new token that the first rows do not have may be in any other one.
    known = model if examples.stream is None else dataclasses.replace(model, new_tokens=())
    task.check_encoded(data, known, examples.labels)
    data_report.keep(
        data_report.describe(task, examples, spec, task.added_tokens(model.processor)),
        folder.prepared,
    )
    train = data["train"]
    dataset_path = folder.prepared / "dataset"
    kept = data if examples.stream is None else DatasetDict({name: data[name] for name in data if name != "train"})
    data_bytes = sum(space.rows_bytes(split) for split in kept.values())
    kept_bytes = task.kept_bytes(model, spec, kept)
    space.check_save(folder.prepared, data_bytes + kept_bytes, "the encoded rows need")
    kept.save_to_disk(str(dataset_path))
    if model.processor is not None:
        model.processor.save_pretrained(folder.prepared / "processor")
    first_row.keep(train, task, model.processor, folder.prepared)
    trouble = task.cannot_recompute(model, spec) if spec.resources.gpus_per_node > 0 else None
    learnt = len(train) if examples.stream is None else streamed.rows_learnt(spec)
    groups = task.groups(train)
    group_rows = [] if groups is None else numpy.unique(groups, return_counts=True)[1].tolist()
    rows = task.epoch_rows(spec, learnt, group_rows)
    whole = task.whole_logits(model)
    attention = task.attention(model, spec)
    plan = plan_training(spec, rows, weight_files.count(model.path, MODEL), trouble, whole, attention)
    check_course(spec, plan, rows)
    weights = task.weights(model, spec, plan, examples.labels)
    beside = [other.path for other in others]
    facts = Facts(
        memory=memory_facts(task, model, spec, plan, weights, examples.labels, train, beside),
        weights=weights,
        compute=task.compute(model, spec, examples.labels, train),
        cannot_recompute=trouble,
    )

    def other(changed: FineTuneJobSpec) -> Facts:
        counted = task.weights(model, changed, plan, examples.labels)
        known = train if changed.training.max_length == spec.training.max_length else None
        memory = memory_facts(task, model, changed, plan, counted, examples.labels, known, beside)
        return Facts(memory, counted, task.compute(model, changed, examples.labels, known), trouble)

    plan = laid_out(run, plan, facts, folder, data_bytes + kept_bytes, other=other)
    if (
        spec.training.group_by_length is False
        and "length" in train.column_names
        and "seq_lengths" not in train.features
    ):
        notice_padding(
            train["length"][:],
            spec.training.batch_size,
            plan.micro_batch_size or 1,
            can_pack=spec.training.packing is not None,
            can_group=examples.stream is None,
        )
    space.check_room(spec, plan, folder.root, beside=kept_bytes)
    notice_short_grace(spec, plan)
    read = {origin.path: origin for rows in (examples.train, examples.eval) if rows for origin in rows.origins}
    parts = [part.model_copy(update={"source": part.source[:300]}) for part in examples.sources]
    if parts:
        revision: str | None = provenance.combined(f"{part.revision}" for part in parts)
    else:
        revision = provenance.combined(origin.digest for origin in read.values()) if read else examples.train.revision
    source = ", ".join(source.name for source in sources_of(spec))
    return PreparedRecord(
        model=model.resolved,
        dataset=ResolvedDataset(
            source=source[:300],
            revision=revision,
            rows=learnt,
            eval_rows=len(data["eval"]) if "eval" in data else 0,
            tokens=task.count_tokens(train) if examples.stream is None else None,
            labels=examples.labels,
            sources=parts or None,
        ),
        plan=plan,
        weights=weights,
        compute=facts.compute,
        memory_facts=facts.memory,
        cannot_recompute=trouble,
        class_weights=class_weights,
        group_rows=group_rows,
        whole_logits=whole,
        attention=attention,
        model_path=str(model.path),
        new_tokens=list(model.new_tokens),
        piece_parts=dict(model.piece_parts),
        stream=examples.stream and examples.stream.model_copy(update={"missing_tokens": dict(model.missing_tokens)}),
        other_model_paths=[str(path) for path in beside],
        origins=[
            *(located.origins if located else ()),
            *(origin for other in others for origin in other.origins),
            *read.values(),
        ],
        dataset_path=str(dataset_path),
    )


def with_present_plan(run: FineTuneRun, record: PreparedRecord, folder: WorkspaceFolder) -> PreparedRecord:
    """`record` with the plan for the layout that the spec asks for now. It may have changed since; model and data have
    not, and are not read again.

    Raises Failure if the job cannot run so.
    """
    if record.weights is None or record.memory_facts is None:
        return record
    rows = task_of(run.spec).epoch_rows(run.spec, record.dataset.rows, record.group_rows)
    plan = plan_training(
        run.spec, rows, record.plan.parameters, record.cannot_recompute, record.whole_logits, record.attention
    )
    facts = Facts(record.memory_facts, record.weights, record.compute, record.cannot_recompute)
    begun = run.spec.strategy == "auto" and any(folder.checkpoints.glob("checkpoint-*"))
    kept = record.plan.strategy if begun else None
    plan = laid_out(run, plan, facts, folder, record.plan.data_bytes, kept)
    if plan == record.plan:
        return record
    if plan.normalizes_over_batch and smallest_batch(run.spec, rows) == 1:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"spec.training.microBatchSize: the model normalises over a batch, and with {rows} rows there is a batch of"
            " one in each epoch; choose a size of 2 or more that leaves another rest",
        )
    space.check_room(run.spec, plan, folder.root)
    return record.model_copy(update={"plan": plan})


def laid_out(
    run: FineTuneRun,
    plan: Plan,
    facts: Facts,
    folder: WorkspaceFolder,
    data_bytes: int | None,
    kept: str | None = None,
    other: FactsFor | None = None,
) -> Plan:
    """Return the plan with the layout that suits the memory of the job, and what it takes of memory, disk and time.

    `data_bytes`: of the prepared rows. `kept`: the strategy of the checkpoints that the training resumes from. `other`:
    facts for another spec. Raises Failure if no layout fits.
    """
    plan = fitted(run, plan, facts, kept, other)
    plan = plan_space(plan, facts.weights, space.folder_bytes(folder.prepared / "processor"), data_bytes)
    return layout.estimated(run, plan, facts)


def notice_short_grace(spec: FineTuneJobSpec, plan: Plan) -> None:
    """Give notice if the grace period of the job is shorter than the time that a save needs."""
    asked = spec.scheduling.grace_period_seconds
    if asked is not None and plan.grace_seconds and asked < plan.grace_seconds:
        notice(
            f"spec.scheduling.gracePeriodSeconds: a pod that is stopped gets {asked} s, and needs about"
            f" {plan.grace_seconds} s to save a checkpoint of {space.amount(plan.checkpoint_bytes or 0)}. What was"
            " learnt since the last save may be lost; raise it, or lower training.saveSteps"
        )


def check_room_for_rows(
    task: Task, examples: Examples, processor: Processor, spec: FineTuneJobSpec, folder: Path
) -> None:
    """Check that the encoded rows fit the volume that `folder` is on, before all of them are encoded.

    Some rows at random, the same each time, tell the size of all. Few rows are encoded at once.
    Raises Failure(STORAGE_ERROR).
    """
    import numpy

    rows = len(examples.train.data)
    if rows < FEW_ROWS or examples.stream is not None:
        return
    chosen = numpy.sort(numpy.random.default_rng(0).choice(rows, SAMPLED_ROWS, replace=False))
    some = examples.train.select(chosen)
    with notices.collecting(), tokens.in_memory():
        try:
            encoded = task.encode(some, processor, spec, examples.labels, SAMPLE)
        except Failure:
            return  # of these rows alone; what is wrong with all of them is found when they are encoded
        finally:
            full_lengths.take(SAMPLE)
            full_lengths.take_left_out(SAMPLE)
    size = round(space.rows_bytes(encoded) * rows / len(chosen))
    space.check_save(folder, round(size * FILES_OF_ROWS * SURELY), f"{rows:,} rows, encoded, need about")


def encode(task: Task, examples: Examples, processor: Processor, spec: FineTuneJobSpec) -> DatasetDict:
    """Return the encoded rows: split `train` and, if rows are held out, `eval`. Raises Failure if they do not fit."""
    from datasets import DatasetDict

    splits = {"train": task.encode(examples.train, processor, spec, examples.labels, "training")}
    if examples.eval:
        splits["eval"] = task.encode(examples.eval, processor, spec, examples.labels, "held-out")
    fraction = spec.dataset.eval_fraction
    if fraction is not None and examples.train.documents:
        # A text file has no rows that could be held out, so blocks of it are held out.
        blocks = splits["train"]
        kept, held = hold_out(len(blocks), fraction, spec.training.seed, FRACTION)
        splits = {"train": blocks.select(kept), "eval": blocks.select(held)}
    return DatasetDict(splits)
