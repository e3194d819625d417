"""Reads the rows of a FineTuneJob, chooses those that are used, and divides them into training and held-out rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from luthier_api.dataset import TrainingData
from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import FineTuneJobSpec
from luthier_api.rows import MixedSource
from luthier_api.run import FineTuneRun, Stream
from luthier_api.status import ResolvedPart
from luthier_trainer.data import files, repeats
from luthier_trainer.data.holdout import hold_out
from luthier_trainer.data.load import Loader, Rows, ranges
from luthier_trainer.data.mixing import SOURCES, Joined, drawn, join, renamed
from luthier_trainer.data.remote import without_query
from luthier_trainer.data.selection import DEDUPLICATE, FILTER, Selection, deduplicated
from luthier_trainer.data.stores import refuse_unused
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice
from luthier_trainer.tasks.base import Task
from luthier_trainer.tasks.rows import columns_of, usable
from luthier_trainer.workspace import provenance

DATASET = "spec.dataset"
FRACTION = f"{DATASET}.evalFraction"


@dataclass(frozen=True)
class Source:
    """Rows that are read together: the dataset, or a part of its mix."""

    spec: TrainingData | MixedSource
    field: str
    """The path in the spec, for messages."""
    name: str
    rename: Mapping[str, str]


@dataclass(frozen=True)
class Examples:
    """The rows that fit the task, before they are encoded."""

    train: Rows
    """The training rows of an epoch. Rows of a mix may be there several times."""
    eval: Rows | None
    labels: list[str] | None = None
    unusable: Mapping[str, int] = field(default_factory=dict)
    """Split → rows of the source that the task cannot read."""
    left_out: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Split → field of `spec.dataset` → rows that it left out."""
    sources: Sequence[ResolvedPart] = ()
    """Of a mix: what its rows come from."""
    distinct: Rows | None = None
    """Of a mix: the training rows from which those of an epoch were drawn."""
    stream: Stream | None = None
    """Where the training rows are read while the model learns. Then `train` are the first of them."""

    @property
    def splits(self) -> dict[str, Rows]:
        """Return the rows by the name of their split, each row once."""
        return {"train": self.distinct or self.train} | ({"eval": self.eval} if self.eval else {})


def read_examples(task: Task, run: FineTuneRun, cache: Path) -> Examples:
    """Return the rows for training and evaluation, with the columns that the task needs.

    Raises Failure if the data does not suit the task, or if both overlap.
    """
    spec, data = run.spec, run.spec.dataset
    refuse_unused(spec.stores, data)
    selections = {"train": Selection("training"), "eval": Selection("held-out")}
    found: dict[str, dict[int, Rows]] = {"train": {}, "eval": {}}
    revisions, unusable = list[str | None](), Counter[str]()
    for number, source in enumerate(sources_of(spec)):
        read = _read(source, task, spec, cache)
        revisions.append(_revision(read.values()))
        for name, rows in read.items():
            fitting, lost = usable(renamed(rows, source.rename), task, spec, selections[name])
            found[name][number] = fitting
            unusable[name] += lost
    joined = {name: join(parts) for name, parts in found.items() if parts}
    train, held_out = joined["train"], joined.get("eval")

    labels = task.labels(train.rows, spec)
    if held_out:
        task.label_ids(held_out.rows, spec, labels)
    if data.deduplicate is not None:
        train, held_out = deduplicated(train, held_out, selections, lambda rows: task.contents(rows, spec))
    if data.eval_fraction is not None and not train.rows.documents:
        train, held_out = _divided(task, train, spec, labels)
    left_out = {name: selection.left_out for name, selection in selections.items()}
    evaluation = held_out.rows if held_out else None
    if data.mix is None:
        return Examples(train.rows, evaluation, labels, unusable, left_out)
    epoch = drawn(train, data.mix, spec.training.seed)
    parts = [
        ResolvedPart(
            source=source.name,
            revision=revision,
            rows=int((epoch.sources == number).sum()),
            eval_rows=int((held_out.sources == number).sum()) if held_out else 0,
        )
        for number, (source, revision) in enumerate(zip(sources_of(spec), revisions, strict=True))
    ]
    return Examples(epoch.rows, evaluation, labels, unusable, left_out, parts, train.rows)


def sources_of(spec: FineTuneJobSpec) -> list[Source]:
    """Return where rows come from, in the order of the spec."""
    data = spec.dataset
    if data.mix is None:
        return [Source(data, DATASET, _name(data), {})]
    return [
        Source(source, f"{SOURCES}[{number}]", _name(source), source.rename or {})
        for number, source in enumerate(data.mix.sources)
    ]


def _name(source: TrainingData | MixedSource) -> str:
    return source.id or ", ".join(map(without_query, source.files or []))


def _revision(read: Iterable[Rows]) -> str | None:
    """Return the version of what was read: a commit of the Hub, or a digest of the files."""
    rows = list(read)
    origins = {origin.path: origin.digest for part in rows for origin in part.origins}
    return provenance.combined(origins.values()) if origins else rows[0].revision


def _read(source: Source, task: Task, spec: FineTuneJobSpec, cache: Path) -> dict[str, Rows]:
    """Return the rows of a source by their split, as they are in it. Raises Failure if both splits overlap."""
    original = {new: old for old, new in source.rename.items()}
    loader = Loader(
        source.spec,
        source.field,
        cache,
        columns=tuple(original.get(name, name) for name in columns_of(task, spec)),
        others=False,
        documents=spec.training.packing == "concatenate",
        stores=spec.stores,
    )
    eval_files = source.spec.eval_files if isinstance(source.spec, TrainingData) else None
    read = {"train": loader.split(source.spec.split, "split")}
    if source.spec.eval_split:
        read["eval"] = loader.split(source.spec.eval_split, "evalSplit")
        refuse_overlap(source, loader)
    elif eval_files:
        read["eval"] = loader.files(eval_files, "evalFiles")
        files.refuse_shared(read["train"].origins, read["eval"].origins)
    _refuse_selection_of_lines(spec, read["train"])
    return read


def _divided(task: Task, joined: Joined, spec: FineTuneJobSpec, labels: list[str] | None) -> tuple[Joined, Joined]:
    """Return (training, held-out) rows by `dataset.evalFraction`. Rows that are alike are on the same side.

    The same share of each class is held out or, for tasks without classes, of each source.
    """
    fraction = spec.dataset.eval_fraction
    assert fraction is not None
    rows = joined.rows
    total = len(rows.data)
    alike = task.alike(rows, spec)
    groups = repeats.groups_of(alike.contents)
    classes = task.label_ids(rows, spec, labels)
    kinds = joined.sources if classes is None else classes
    kept, held = hold_out(total, fraction, spec.training.seed, FRACTION, kinds, groups, alike.named, alike.remedy)
    repeated = total - int(groups.max()) - 1
    if repeated:
        print(
            f"{FRACTION}: {repeated} of {total} rows {alike.named} an earlier row. Such rows are all learnt or all"
            " held out",
            flush=True,
        )
    wanted = round(total * fraction)
    if len(held) < wanted and repeated:
        notice(
            f"{FRACTION}: {len(held)} rows are held out, and not {wanted}. {repeated} of {total} rows {alike.named}"
            f" an earlier row, and such rows are all learnt or all held out. To choose others, {alike.remedy}"
        )
    return joined.select(kept), joined.select(held)


def _refuse_selection_of_lines(spec: FineTuneJobSpec, rows: Rows) -> None:
    """Raise Failure if rows are to be left out of text files that are read as they were written."""
    asked = [name for name, value in ((FILTER, spec.dataset.filter), (DEDUPLICATE, spec.dataset.deduplicate)) if value]
    if spec.dataset.mix is not None:
        asked.append(SOURCES)
    if rows.documents and asked:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{asked[0]}: packing concatenate reads text files as whole documents, which have no rows that could be"
            " left out or drawn. Remove it, choose another packing, or write the texts as rows of JSON lines",
        )


def refuse_overlap(source: Source, loader: Loader) -> None:
    """Raise Failure if rows are used for both training and evaluation, which makes all metrics too good."""
    learn, measure = source.spec.split, str(source.spec.eval_split)
    split, other = (instruction.partition("[")[0] for instruction in (learn, measure))
    if split != other:
        return
    whole = loader.split(split, "split").data
    learnt, measured = (
        {i for start, end in ranges(whole, instruction, [split], f"{source.field}.{name}") for i in range(start, end)}
        for instruction, name in ((learn, "split"), (measure, "evalSplit"))
    )
    if both := len(learnt & measured):
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{source.field}.evalSplit: {both} of its rows are in split {learn} too, and would be learnt and measured"
            f" on. Choose parts that do not overlap, such as {split}[:90%] and {split}[90%:]",
        )
