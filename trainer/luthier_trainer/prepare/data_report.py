"""The data report: what a user would want to know of the rows before paying for a training.

It is kept beside the encoded rows (`data-report.json`), and shown by `luthier inspect` and in the model card. What
makes metrics wrong or a training poor is a notice, too. Rows are named by their numbers: the report holds no text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier_api.finetune import FineTuneJobSpec
from luthier_api.workspace import DATA_REPORT
from luthier_trainer.data import full_lengths, near_duplicates, repeats
from luthier_trainer.data.load import Rows
from luthier_trainer.data.repeats import Repeats, Split
from luthier_trainer.data.tokens import SHORTEST
from luthier_trainer.prepare.examples import Examples
from luthier_trainer.runtime.notices import notice
from luthier_trainer.tasks.base import Task
from luthier_trainer.workspace.manifest import replace_file

if TYPE_CHECKING:
    import numpy

USES = {"train": "training", "eval": "held-out"}
PERCENTILES = (50, 90, 95, 99, 100)
SHOWN = 5  # pairs of rows in the report, for each kind
LABELS_SHOWN = 50
REPEATED = 0.01  # share of repeated rows from which on there is a notice
DATASET, LABEL = "spec.dataset", "spec.dataset.columns.label"
SKEWED = 0.8  # share of the most frequent label from which on there is a notice

ENTRIES_SHOWN = 12  # scripts, labels or lengths in a table
# Title → path in the part of a split
TITLES = {
    "Rows": "rows",
    "Rows that prepare looked at (streaming)": "lookedAt",
    "Rows of an epoch, by source": "epoch",
    "Rows left out: blank or unusable": "unusable",
    "Rows left out, by the field of spec.dataset": "leftOut",
    "Equal to an earlier row": "exactDuplicates",
    "Nearly equal to an earlier row": "nearDuplicates",
    "Tokens": "tokens.total",
    "Tokens of a row, median": "tokens.p50",
    "Tokens of a row, 99 of 100 rows at most": "tokens.p99",
    "Tokens of a row, most": "tokens.p100",
    "Rows by tokens": "tokens.histogram",
    "Rows of one token or none": "tokens.oneTokenOrNone",
    "Rows cut at maxLength": "tokens.rowsCut",
    "Tokens cut off": "tokens.tokensCut",
    "Rows by script": "scripts",
    "Rows of several scripts": "mixedScripts",
    "Rows by label": "labels",
    "Rows with the same content and another label": "otherLabelForSameContent",
}
SHARED_TITLES = {"Held-out rows equal to a training row": "exact", "Held-out rows nearly equal to one": "near"}


def describe(task: Task, examples: Examples, spec: FineTuneJobSpec, added_tokens: int) -> dict[str, Any]:
    """Return the report on the training and the held-out rows, and give its notices.

    `added_tokens`: tokens of each row that are not its text. The lengths are those of the rows that have been encoded
    since the last report.
    """
    splits, labels = examples.splits, examples.labels
    report: dict[str, Any] = {"splits": {}}
    for name, rows in splits.items():
        report["splits"][name] = {"rows": len(rows.data), "unusable": examples.unusable.get(name, 0)}
        if left_out := {**examples.left_out.get(name, {}), **full_lengths.take_left_out(USES[name])}:
            report["splits"][name]["leftOut"] = left_out
        lengths = full_lengths.take(USES[name])
        if len(lengths):
            described = _lengths(
                lengths, spec.training.max_length, spec.training.packing in (None, "none"), added_tokens
            )
            report["splits"][name]["tokens"] = described
    if examples.stream is not None:
        report["splits"]["train"]["lookedAt"] = len(splits["train"].data)
    if examples.sources:
        report["splits"]["train"]["epoch"] = {part.source: part.rows for part in examples.sources}
        report["splits"].get("eval", {})["epoch"] = {part.source: part.eval_rows for part in examples.sources}
    if not splits["train"].documents:
        held_out = _split(task, splits["eval"], spec) if "eval" in splits else None
        found = repeats.find(_split(task, splits["train"], spec), held_out)
        _add_repeats(report, found, splits)
        if labels is not None:
            _add_labels(report, task, splits, labels, spec, found)
    _give_notices(report, splits, spec)
    return report


def keep(report: Mapping[str, Any], folder: Path) -> None:
    """Write the report into `folder`."""
    replace_file(folder / DATA_REPORT, json.dumps(report, ensure_ascii=False, indent=1).encode())


def _split(task: Task, rows: Rows, spec: FineTuneJobSpec) -> Split:
    def at(positions: numpy.ndarray) -> list[str | bytes]:
        chosen = rows.select(positions)
        return [content for batch in task.contents(chosen, spec) for content in batch]

    return Split(lambda: task.contents(rows, spec), at)


def _lengths(lengths: numpy.ndarray, longest: int, cuts: bool, added: int) -> dict[str, Any]:
    """Return percentiles and histogram of the tokens of rows, and what of them is cut at `longest` if `cuts`."""
    import numpy

    bounds, counts = numpy.unique(_bound(lengths), return_counts=True)
    found: dict[str, Any] = {
        "total": int(lengths.sum(dtype=numpy.int64)),
        **{f"p{p}": int(n) for p, n in zip(PERCENTILES, numpy.percentile(lengths, PERCENTILES), strict=True)},
        "histogram": {f"<= {bound}": int(count) for bound, count in zip(bounds, counts, strict=True)},
        "oneTokenOrNone": int((lengths <= added + 1).sum()),
        "tooShort": int((lengths < SHORTEST).sum()),
    }
    if cuts:
        over = numpy.maximum(lengths.astype(numpy.int64) - longest, 0)
        found |= {"maxLength": longest, "rowsCut": int((over > 0).sum()), "tokensCut": int(over.sum())}
    return found


def _bound(lengths: numpy.ndarray) -> numpy.ndarray:
    """Return the least power of two that is not below each length."""
    import numpy

    return (2 ** numpy.ceil(numpy.log2(numpy.maximum(lengths, 1)))).astype(numpy.int64)


def _add_repeats(report: dict[str, Any], found: Repeats, splits: Mapping[str, Rows]) -> None:
    for name, rows in splits.items():
        part = report["splits"][name]
        part["exactDuplicates"] = len(found.exact[name])
        if not found.scripts[name]:  # images
            continue
        part["nearDuplicates"] = len(found.near[name])
        part["nearExamples"] = [[_number(rows, a), _number(rows, b)] for a, b in found.near[name][:SHOWN].tolist()]
        part["scripts"] = dict(found.scripts[name].most_common())
        part["mixedScripts"] = found.mixed[name]
    if "eval" in splits:
        report["shared"] = {"exact": len(found.shared), "exampleRows": _pairs(found.shared, splits)}
        if found.scripts["eval"]:
            report["shared"] |= {
                "near": len(found.nearly_shared),
                "nearExampleRows": _pairs(found.nearly_shared, splits),
            }
    if found.scripts["train"]:
        report["near"] = {
            "jaccard": near_duplicates.ALIKE,
            "shingle": near_duplicates.SHINGLE,
            "charactersCompared": near_duplicates.CHARACTERS,
            "allCandidatesCompared": found.complete,
        }


def _pairs(pairs: numpy.ndarray, splits: Mapping[str, Rows]) -> list[list[int]]:
    return [[_number(splits["train"], a), _number(splits["eval"], b)] for a, b in pairs[:SHOWN].tolist()]


def _number(rows: Rows, position: int) -> int:
    """Return the number that a row has in its source, counted from 0."""
    return position if rows.numbers is None else int(rows.numbers[position])


def _add_labels(
    report: dict[str, Any],
    task: Task,
    splits: Mapping[str, Rows],
    labels: list[str],
    spec: FineTuneJobSpec,
    found: Repeats,
) -> None:
    """Add the rows of each label, and the rows that are equal to one with another label."""
    import numpy

    for name, rows in splits.items():
        ids = task.label_ids(rows, spec, labels)
        if ids is None:
            return
        counts = numpy.bincount(ids, minlength=len(labels))
        shown = numpy.argsort(-counts, kind="stable")[:LABELS_SHOWN]
        groups = found.groups[name]
        kinds = numpy.unique(numpy.stack([groups, ids]), axis=1)[0]
        disputed = numpy.flatnonzero(numpy.bincount(kinds) > 1)
        part = report["splits"][name]
        part["labels"] = {labels[i]: int(counts[i]) for i in shown}
        part["rarestLabel"] = {labels[int(counts.argmin())]: int(counts.min())}
        part["otherLabelForSameContent"] = int(numpy.isin(groups, disputed).sum())


def _give_notices(report: Mapping[str, Any], splits: Mapping[str, Rows], spec: FineTuneJobSpec) -> None:
    train = report["splits"]["train"]
    repeated, near = train.get("exactDuplicates", 0), train.get("nearDuplicates", 0)
    if repeated + near >= max(REPEATED * train["rows"], 1):
        rows = _equal_rows(repeated, near, report, f"{train['rows']} training rows", "an earlier one")
        remedy = "" if spec.dataset.streaming else "; dataset.deduplicate: exact does it for equal rows"
        notice(f"{DATASET}: {rows}. Each is learnt as often as it occurs. Remove them if that is not meant{remedy}")
    if "shared" in report:
        drawn = spec.dataset.eval_fraction is not None
        apart = "Remove such rows from one of the two"
        if not spec.dataset.streaming:
            apart += "; dataset.deduplicate: exact does it for equal ones"
        remedy = "Remove the repeats from the data" if drawn else apart
        _give_notice_of_shared(report, splits, remedy)
    for name, part in report["splits"].items():
        short = part.get("tokens", {}).get("tooShort", 0)
        if short and "labels" not in part:
            notice(f"{DATASET}: {short} of {part['rows']} {USES[name]} rows have one token or none, and are left out")
    if "labels" in train:
        _give_notices_of_labels(train)


def _give_notice_of_shared(report: Mapping[str, Any], splits: Mapping[str, Rows], remedy: str) -> None:
    shared = report["shared"]
    exact, near = shared["exact"], shared.get("near", 0)
    if not exact + near:
        return
    one, other = (shared["exampleRows"] or shared["nearExampleRows"])[0]
    rows = _equal_rows(exact, near, report, f"{len(splits['eval'].data)} held-out rows", "a training row")
    notice(
        f"{DATASET}: {rows}, which makes the held-out metrics too good. {remedy}. The first is"
        f" {splits['eval'].place_of(other)}; in training {splits['train'].place_of(one)}"
    )


def _equal_rows(exact: int, near: int, report: Mapping[str, Any], of: str, another: str) -> str:
    """Return how many rows are equal or nearly equal to `another`, as the beginning of a sentence."""
    least = _least(report)
    if not exact:
        return f"{least}{near} of {of} are nearly equal to {another}"
    return f"{exact} of {of} are equal to {another}" + (f", and {least}{near} nearly equal" if near else "")


def _give_notices_of_labels(train: Mapping[str, Any]) -> None:
    if disputed := train["otherLabelForSameContent"]:
        notice(
            f"{LABEL}: {disputed} of {train['rows']} training rows have the same content as a row with another label,"
            " so that no model can learn both. Correct or remove them"
        )
    most, count = next(iter(train["labels"].items()))
    if len(train["labels"]) > 1 and count >= SKEWED * train["rows"]:
        rarest, rows = next(iter(train["rarestLabel"].items()))
        notice(
            f'{LABEL}: {count} of {train["rows"]} training rows have the label "{most}", and {rows} the rarest,'
            f' "{rarest}". Judge the model by f1Macro: accuracy is high already if "{most}" is always the answer'
        )


def table(report: Mapping[str, Any]) -> list[list[str]]:
    """Return the report as rows of a table: a name, then a value for each split."""
    made = [["", *report["splits"]]]
    for title, path in TITLES.items():
        values = [_at(part, path.split(".")) for part in report["splits"].values()]
        if any(value is not None for value in values):
            least = _least(report) if path == "nearDuplicates" else ""
            made.append([title, *("" if value is None else f"{least}{_shown(value)}" for value in values)])
    for title, name in SHARED_TITLES.items():
        if name in report.get("shared", {}):
            least = _least(report) if name == "near" else ""
            made.append([title, "", f"{least}{report['shared'][name]:,}"])
    return made


def _least(report: Mapping[str, Any]) -> str:
    """Return what stands before a number of nearly equal rows, of which not all may have been compared."""
    return "" if report.get("near", {}).get("allCandidatesCompared", True) else "at least "


def _at(value: Any, path: Sequence[str]) -> Any:
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        listed = [f"{name}: {count:,}" for name, count in list(value.items())[:ENTRIES_SHOWN]]
        return ", ".join(listed) + (", ..." if len(value) > ENTRIES_SHOWN else "")
    return f"{value:,}"
