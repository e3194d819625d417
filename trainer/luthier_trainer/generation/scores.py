"""Compares outputs with the references of their rows.

An output with a reference becomes numbers, which are added up exactly (`scoring.sums`): by the ledger, with each
segment that it moves into a table, and over all shards by the last one that ends. The metrics follow from the sums
alone, so they are the same for any number of shards, and after a kill. Outputs without a reference, and records of
errors, are not compared; `scoredRows` says how many were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from luthier_api.tasks import REFERENCE, GenerateTask
from luthier_trainer.scoring import labels, spans, speech, texts
from luthier_trainer.scoring.answers import exact_and_f1
from luthier_trainer.scoring.sums import Numbers, Sums, below

Line = Mapping[str, Any]
SCORED = "scoredRows"
"""Name of the metric that says how many outputs were compared."""
ROWS = "rows"
"""Name of the sum of the outputs that were compared."""


@dataclass(frozen=True)
class Scorer:
    """How outputs of a task are compared."""

    numbers: Callable[[Line], Numbers]
    """Returns the numbers of the line of an output that has a reference."""
    figures: Callable[[Sums, int], dict[str, float]]
    """Returns the metrics of so many outputs, at least one, from the sums of their numbers."""


def numbers_of(task: GenerateTask, line: Line) -> Numbers:
    """Return the numbers of a line; none if its output is not compared."""
    if task not in SCORERS or line["error"] is not None or line[REFERENCE] is None:
        return {}
    return {ROWS: 1, **SCORERS[task].numbers(line)}


def metrics_of(task: GenerateTask, sums: Sums) -> dict[str, float]:
    """Return the metrics of the outputs that were compared; none if none was."""
    rows = int(sums.get(ROWS, 0))
    return SCORERS[task].figures(sums, rows) if rows else {}


def written(output: str) -> Scorer:
    """Return the scorer of texts, which stand under the key `output`."""

    def numbers(line: Line) -> Numbers:
        return {f"{i:02d}": number for i, number in enumerate(texts.numbers(line[output], line[REFERENCE]))}

    def figures(sums: Sums, rows: int) -> dict[str, float]:
        return texts.figures([float(sums[f"{i:02d}"]) for i in range(texts.SIZE)], rows)

    return Scorer(numbers, figures)


def speech_numbers(line: Line) -> Numbers:
    """Return the numbers of what was said, after Whisper's normaliser for all languages."""
    found = speech.numbers(line["output"], line[REFERENCE], "basic")
    return {f"{i:02d}": number for i, number in enumerate(found)}


def speech_figures(sums: Sums, rows: int) -> dict[str, float]:
    """Return the error rates of what was said."""
    return speech.figures([float(sums[f"{i:02d}"]) for i in range(speech.SIZE)])


def label_numbers(line: Line) -> Numbers:
    """Return the numbers of a line with a label, with any number of labels, or with a number."""
    reference = line[REFERENCE]
    if line["label"] is not None:
        return {"single": 1, **labels.numbers([line["label"]], [reference])}
    if line["labels"] is not None:
        return {
            "several": 1,
            **labels.numbers(line["labels"], [reference] if isinstance(reference, str) else reference),
        }
    return labels.of_number(line["scores"][0]["score"], float(reference))


def label_figures(sums: Sums, rows: int) -> dict[str, float]:
    """Return the metrics of classification. All rows of a job are of one kind."""
    if "right" not in sums:
        return labels.figures_of_numbers(sums, rows)
    return labels.figures(sums, rows, one_each="single" in sums)


def answer_numbers(line: Line) -> Numbers:
    """Return the numbers of an answer by SQuAD's rules. A question with an empty list of references has no answer."""
    exact, f1 = exact_and_f1(line["answer"], line[REFERENCE])
    own = {"answerable": 1.0, "f1Answerable": f1} if line[REFERENCE] else {"unanswerable": 1.0, "none": exact}
    return {"exact": exact, "f1": f1, **own}


def answer_figures(sums: Sums, rows: int) -> dict[str, float]:
    """Return the metrics of answers; without those of a kind of question that no row asks."""
    found = {"exactMatch": float(sums["exact"]) / rows, "f1": float(sums["f1"]) / rows}
    if "answerable" in sums:
        found["f1Answerable"] = float(sums["f1Answerable"] / sums["answerable"])
    if "unanswerable" in sums:
        found["unanswerableAccuracy"] = float(sums["none"] / sums["unanswerable"])
    return found


def entity_numbers(line: Line) -> Numbers:
    """Return the entities of each type that are right, answered and wanted. Right are those with type and both ends."""
    given, wanted = (
        {(one["label"], one["start"], one["end"]) for one in found} for found in (line["entities"], line[REFERENCE])
    )
    types = sorted({kind for kind, _, _ in given | wanted})
    counts = iter(spans.counted(given, wanted, types))
    return {f"{what}:{kind}": next(counts) for kind in types for what in COUNTED}


def entity_figures(sums: Sums, rows: int) -> dict[str, float]:
    """Return the metrics of entities, over the types that are answered or wanted somewhere."""
    found, answered, wanted = (below(sums, f"{what}:") for what in COUNTED)
    total = [count for kind in wanted for count in (found[kind], answered[kind], wanted[kind])]
    return spans.SpanScore(list(wanted)).figures(total)


COUNTED = ("found", "answered", "wanted")
"""What `spans.counted` counts of each type."""
SCORERS: Mapping[GenerateTask, Scorer] = {
    "text-generation": written("text"),
    "automatic-speech-recognition": Scorer(speech_numbers, speech_figures),
    "summarization": written("output"),
    "translation": written("output"),
    "text2text-generation": written("output"),
    "text-classification": Scorer(label_numbers, label_figures),
    "zero-shot-classification": Scorer(label_numbers, label_figures),
    "question-answering": Scorer(answer_numbers, answer_figures),
    "token-classification": Scorer(entity_numbers, entity_figures),
}
"""Task → how its outputs are compared, of the tasks that have metrics."""
