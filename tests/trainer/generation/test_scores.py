"""Metrics of outputs with references: against other programs, for any number of shards, and after a kill."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import jiwer
import numpy
import pytest
from sacrebleu import corpus_bleu
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, mean_squared_error
from sklearn.preprocessing import MultiLabelBinarizer
from trainer.generating import TEXT, generate_run, generate_shards, result_lines
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

from luthier_api.tasks import GENERATION_TASKS, GenerateTask
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.generation import ledger
from luthier_trainer.generation.engines.table import engine_class
from luthier_trainer.generation.ledger import Shard
from luthier_trainer.generation.result import total_sums
from luthier_trainer.generation.rows import span_of_shard
from luthier_trainer.generation.samples import Output, Sample
from luthier_trainer.generation.scores import SCORERS, metrics_of
from luthier_trainer.prepare.bad_rows import BadRow
from luthier_trainer.prepare.generation_rows import read_inputs
from luthier_trainer.prepare.main import main as prepare
from luthier_trainer.prepare.references import check_labels, reference
from luthier_trainer.publish import model_card
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.telemetry import Telemetry
from luthier_trainer.workspace.prepared import read_prepared

DRAWN = random.Random(5)
LABELS = ("sad", "glad", "mad")
Made = list[tuple[Any, Any]]
"""Output and reference of each row."""

PAIRS = [
    ("The quick brown dog jumps on the log.", "The quick brown fox jumps over the lazy dog"),
    ("on the mat sat the cat", "the cat sat on the mat"),
    ("Version 3.11 is state-of-the-art", "version 3 is the State of art"),
    ("", "a word"),
    ("as it is", "as it is"),
]
ROUGE = {
    "rouge1": [0.7058823529411765, 1.0, 0.9333333333333333, 0.0, 1.0],
    "rouge2": [0.26666666666666666, 0.6, 0.30769230769230765, 0.0, 1.0],
    "rougeL": [0.5882352941176471, 0.5, 0.8, 0.0, 1.0],
}
"""F of each pair, as rouge-score 0.1.2 has computed it."""
NAMES = [(DRAWN.choice(LABELS), DRAWN.choice(LABELS)) for _ in range(20)]
LISTS = [([*DRAWN.sample(LABELS, i % 3)], [*DRAWN.sample(LABELS, i % 4 % 3)]) for i in range(20)]
NUMBERS = [(DRAWN.gauss(0, 3), f"{DRAWN.gauss(1, 2):.3f}") for _ in range(20)]
ANSWERED = [
    ("the Lute!", ["lute"]),
    ("in old Rome", ["Athens", "Rome"]),
    ("", []),
    ("lute", []),
    ("", ["lute"]),
]
ENTITIES = [
    ([("PER", 0, 4), ("LOC", 8, 12)], [("PER", 0, 4), ("LOC", 8, 11)]),
    ([], [("ORG", 1, 2)]),
    ([("ORG", 3, 5)], [("ORG", 3, 5)]),
    ([("MISC", 3, 5)], []),
]


def of_texts(made: Made) -> dict[str, float]:
    written, wanted = zip(*made, strict=True)
    rouge = {name: float(numpy.mean(values)) for name, values in ROUGE.items()}
    exact = float(numpy.mean([given == right for given, right in made]))
    return {"exactMatch": exact, **rouge, "bleu": corpus_bleu(written, [wanted]).score}


def of_names(made: Made) -> dict[str, float]:
    given, wanted = zip(*made, strict=True)
    return {
        "accuracy": accuracy_score(wanted, given),
        "f1Macro": f1_score(wanted, given, average="macro"),
        "majorityShare": max(wanted.count(name) for name in LABELS) / len(wanted),
    }


def of_lists(made: Made) -> dict[str, float]:
    coded = MultiLabelBinarizer(classes=LABELS)
    given, wanted = (coded.fit_transform(part) for part in zip(*made, strict=True))
    return {
        "accuracy": accuracy_score(wanted, given),
        "f1Macro": f1_score(wanted, given, average="macro"),
        "f1Micro": f1_score(wanted, given, average="micro"),
    }


def of_numbers(made: Made) -> dict[str, float]:
    given, wanted = numpy.array(made, dtype=numpy.float64).T
    return {
        "mse": mean_squared_error(wanted, given),
        "mae": mean_absolute_error(wanted, given),
        "pearson": numpy.corrcoef(given, wanted)[0, 1],
    }


def of_answers(made: Made) -> dict[str, float]:
    """By hand, by the rules of SQuAD 2.0: F1 is 1, 0.5, 1, 0 and 0, and the first and the third match exactly."""
    return {"exactMatch": 0.4, "f1": 0.5, "f1Answerable": 0.5, "unanswerableAccuracy": 0.5}


def of_entities(made: Made) -> dict[str, float]:
    given, wanted = ({(row, *one) for row, pair in enumerate(made) for one in pair[side]} for side in (0, 1))

    def f1(kind: str | None = None) -> float:
        some = [[one for one in part if kind in (None, one[1])] for part in (given & wanted, given, wanted)]
        return 2 * len(some[0]) / (len(some[1]) + len(some[2]))

    return {
        "precision": len(given & wanted) / len(given),
        "recall": len(given & wanted) / len(wanted),
        "f1": f1(),
        "f1Macro": float(numpy.mean([f1(kind) for kind in {one[1] for one in given | wanted}])),
    }


def label_values(given: Any) -> dict[str, Any]:
    """What a classifier writes: one label, any number of them, or a number."""
    return {
        "label": given if isinstance(given, str) else None,
        "labels": given if isinstance(given, list) else None,
        "scores": [{"label": "value", "score": given if isinstance(given, float) else 1.0}],
    }


def spans_of(given: Sequence[tuple[str, int, int]]) -> list[dict[str, Any]]:
    return [{"label": kind, "start": start, "end": end} for kind, start, end in given]


def answer_values(given: str) -> dict[str, Any]:
    return {"answer": given, "start": None, "end": None, "score": 1.0, "answers": []}


@dataclass(frozen=True)
class Case:
    name: str
    task: GenerateTask
    made: Made
    values: Callable[[Any], dict[str, Any]]
    stored: Callable[[Any], Any]
    expect: Callable[[Made], dict[str, float]]


def of_speech(made: Made) -> dict[str, float]:
    plain = BasicTextNormalizer()
    given, wanted = ([" ".join(plain(pair[i]).split()) for pair in made] for i in range(2))
    return {"wer": jiwer.wer(wanted, given), "cer": jiwer.cer(wanted, given)}


CASES = [
    Case(
        name="texts",
        task="summarization",
        made=PAIRS,
        values=lambda given: {"output": given},
        stored=str,
        expect=of_texts,
    ),
    Case(
        name="what was said",
        task="automatic-speech-recognition",
        made=PAIRS,
        values=lambda given: {"output": given},
        stored=str,
        expect=of_speech,
    ),
    Case(
        name="one label each",
        task="text-classification",
        made=NAMES,
        values=label_values,
        stored=str,
        expect=of_names,
    ),
    Case(
        name="any number of labels",
        task="zero-shot-classification",
        made=LISTS,
        values=label_values,
        stored=list,
        expect=of_lists,
    ),
    Case(
        name="numbers",
        task="text-classification",
        made=NUMBERS,
        values=label_values,
        stored=str,
        expect=of_numbers,
    ),
    Case(
        name="answers",
        task="question-answering",
        made=ANSWERED,
        values=answer_values,
        stored=list,
        expect=of_answers,
    ),
    Case(
        name="entities",
        task="token-classification",
        made=ENTITIES,
        values=lambda given: {"entities": spans_of(given)},
        stored=spans_of,
        expect=of_entities,
    ),
]


def outputs_of(case: Case) -> list[Output]:
    """Those of the case, and after them one that cannot be made and one without a reference."""
    roles = dict.fromkeys(GENERATION_TASKS[case.task].columns, "-")
    made = [
        Output(Sample(i, 0, roles, None, TEXT, number=i, reference=case.stored(wanted)), values=case.values(given))
        for i, (given, wanted) in enumerate(case.made)
    ]
    given, wanted = case.made[0]
    failed, free = (
        Sample(len(made) + i, 0, roles, None, TEXT, number=len(made) + i, reference=value)
        for i, value in enumerate((case.stored(wanted), None))
    )
    return [*made, Output(failed, error="too long"), Output(free, values=case.values(given))]


def metrics(folder: Path, case: Case, shards: int, killed: bool) -> dict[str, float]:
    """The metrics of a job; if `killed`, each shard resumes after every output."""
    made, settings = outputs_of(case), {"task": case.task}
    workspace = WorkspaceFolder(folder)
    for index in range(shards):
        span = span_of_shard(len(made), shards, index)

        def opened(index: int = index, span: range = span) -> Shard:
            records = engine_class(case.task).records
            shard = Shard(workspace, index, shards, records, span, settings, "here")
            shard.resume()
            return shard

        shard = opened()
        for number in random.Random(shards).sample(list(span), len(span)):
            shard.append([made[number]])
            shard = opened() if killed else shard
        assert total_sums(workspace, shards, settings) is None
        shard.finish({"rows": len(span), "failedRows": shard.failed})
    total = total_sums(workspace, shards, settings)
    assert total is not None
    assert total["rows"] == len(case.made)
    assert total_sums(workspace, shards, {"task": "of another job"}) is None
    return metrics_of(case.task, total)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_metrics_are_those_of_other_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    """And the same to the last bit for other shards, and for shards that were killed."""
    monkeypatch.setattr(ledger, "SEGMENT", 2)
    found = metrics(tmp_path / "1", case, shards=1, killed=False)
    assert found == pytest.approx(case.expect(case.made))
    assert found.keys() <= {metric.name for metric in GENERATION_TASKS[case.task].metrics}
    for shards, killed in ((1, True), (2, False), (3, True)):
        assert metrics(tmp_path / f"{shards}{killed}", case, shards, killed) == found


def test_each_task_with_metrics_has_a_scorer() -> None:
    assert SCORERS.keys() == {name for name, task in GENERATION_TASKS.items() if task.metrics}


@dataclass(frozen=True)
class Form:
    name: str
    task: GenerateTask
    cell: Any
    expect: Any


TEXT_OF_TAGS = {"text": "Anna went to  New York"}
FORMS = [
    Form(name="a text", task="text-generation", cell=" as it is ", expect=" as it is "),
    Form(name="a number as text", task="text-generation", cell=42, expect="42"),
    Form(name="no text", task="text-generation", cell=["a"], expect=BadRow),
    Form(name="an empty cell", task="text-generation", cell="", expect=None),
    Form(name="a label", task="text-classification", cell="glad", expect="glad"),
    Form(name="a whole number", task="text-classification", cell=3.0, expect="3"),
    Form(name="truth", task="text-classification", cell=True, expect="true"),
    Form(name="labels", task="text-classification", cell=["glad", 1], expect=["glad", "1"]),
    Form(name="labels as JSON", task="text-classification", cell='["glad"]', expect=["glad"]),
    Form(name="not a number", task="text-classification", cell=float("nan"), expect=BadRow),
    Form(name="no label", task="text-classification", cell={"a": 1}, expect=BadRow),
    Form(name="an answer", task="question-answering", cell="Rome", expect=["Rome"]),
    Form(name="answers", task="question-answering", cell=["Rome", "Roma"], expect=["Rome", "Roma"]),
    Form(name="SQuAD's", task="question-answering", cell={"text": ["Rome"], "answer_start": [0]}, expect=["Rome"]),
    Form(name="SQuAD's as JSON", task="question-answering", cell='{"text": [], "answer_start": []}', expect=[]),
    Form(name="objects", task="question-answering", cell=[{"text": "Rome", "answer_start": 0}], expect=["Rome"]),
    Form(name="no answer", task="question-answering", cell=[""], expect=BadRow),
    Form(
        name="tags",
        task="token-classification",
        cell=["B-PER", "O", "O", "B-LOC", "I-LOC"],
        expect=spans_of([("PER", 0, 4), ("LOC", 14, 22)]),
    ),
    Form(
        name="tags in a text",
        task="token-classification",
        cell="B-PER O O O O",
        expect=spans_of([("PER", 0, 4)]),
    ),
    Form(name="too few tags", task="token-classification", cell=["O"], expect=BadRow),
    Form(name="tags of another scheme", task="token-classification", cell="S-PER O O O O", expect=BadRow),
    Form(
        name="entities",
        task="token-classification",
        cell=[{"label": "PER", "start": 0, "end": 4, "score": 1.0}],
        expect=spans_of([("PER", 0, 4)]),
    ),
    Form(
        name="entities as lists",
        task="token-classification",
        cell={"label": ["PER"], "start": [0], "end": [4]},
        expect=spans_of([("PER", 0, 4)]),
    ),
    Form(
        name="entities as JSON",
        task="token-classification",
        cell='[{"label": "PER", "start": 0, "end": 4}]',
        expect=spans_of([("PER", 0, 4)]),
    ),
    Form(name="no entities", task="token-classification", cell=[], expect=[]),
    Form(
        name="an entity beyond the text",
        task="token-classification",
        cell=[{"label": "PER", "start": 0, "end": 23}],
        expect=BadRow,
    ),
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.task}: {form.name}")
def test_references_are_read(form: Form) -> None:
    if form.expect is BadRow:
        with pytest.raises(BadRow):
            reference(form.task, form.cell, TEXT_OF_TAGS)
    else:
        assert reference(form.task, form.cell, TEXT_OF_TAGS) == form.expect
        assert json.dumps(form.expect)


@dataclass(frozen=True)
class Labels:
    name: str
    references: list[Any]
    problem: str | None
    expect: str | None


LABEL_CASES = [
    Labels(name="all known", references=["sad", "glad"], problem=None, expect=None),
    Labels(name="none known", references=["0", "1"], problem=None, expect="no reference is a label of the model: 0, 1"),
    Labels(
        name="a list for one label",
        references=[["sad"]],
        problem="single_label_classification",
        expect="row 0: the model gives a text one label",
    ),
    Labels(name="a list for several", references=[["sad"], []], problem="multi_label_classification", expect=None),
    Labels(name="a name for a number", references=["sad"], problem="regression", expect="'sad' is none"),
    Labels(name="not a number", references=["1", "nan"], problem="regression", expect="row 1: .* 'nan' is none"),
    Labels(name="numbers", references=["1", "2.5"], problem="regression", expect=None),
]


@pytest.mark.parametrize("case", LABEL_CASES, ids=lambda case: case.name)
def test_references_are_compared_with_the_labels_of_the_model(case: Labels) -> None:
    rows = [{"row": i, "reference": value} for i, value in enumerate(case.references)]
    if case.expect is None:
        check_labels(rows, ["sad", "glad"], case.problem)
    else:
        with pytest.raises(Failure, match=case.expect):
            check_labels(rows, ["sad", "glad"], case.problem)


def test_metrics_reach_the_end_of_the_job_its_page_and_its_card(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"prompt": "The class statement", "reference": " and of"},
        {"prompt": "A function is", "reference": " called a"},
        {"prompt": "An import", "reference": ""},
        {"prompt": " ", "reference": "blank"},
    ]
    table = tmp_path / "rows.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    served: dict[str, float] = {}
    kept = Telemetry.set

    def keep(self: Telemetry, metric: Any, value: float, *labels: str) -> None:
        served["".join((metric.name, *labels))] = value
        kept(self, metric, value, *labels)

    monkeypatch.setattr(Telemetry, "set", keep)
    inputs = {"dataset": {"files": [str(table)]}, "columns": {"reference": "reference"}}
    run = generate_run(
        tmp_path / "job",
        [],
        task="text-generation",
        model={"path": str(tiny_model)},
        inputs=inputs,
        text={"maxNewTokens": 4},
        shards=2,
    )
    first, last = (message.metrics for message in generate_shards(run, monkeypatch, prepare))
    lines = result_lines(run)
    written, wanted = zip(*((line["text"], line["reference"]) for line in lines[:2]), strict=True)
    assert first
    assert last
    assert first.keys() == {"rows", "failedRows", "scoredRows", "seconds", "rowsPerSecond"}
    assert "scoredRows" not in last
    assert last["bleu"] == pytest.approx(corpus_bleu(written, [wanted]).score)
    assert last["exactMatch"] == sum(a.strip() == b.strip() for a, b in zip(written, wanted, strict=True)) / 2
    assert served["luthier_generate_scored_rows"] == 2
    assert served["luthier_generate_scorebleu"] == last["bleu"]
    assert any(
        "of 4 outputs, 2 are compared with their references; 1 cannot be made" in said for said in notices.given()
    )
    card = model_card.card(run, read_prepared(run), tmp_path / "job/result")
    assert f"| BLEU (0 to 100; sacrebleu, 13a, smoothing exp) | {last['bleu']:.6g} |" in card
    assert "Over the 2 outputs that have a reference" in card


def test_a_reference_changes_no_seed(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def seeds(name: str, **reference: str) -> list[int]:
        spec = {"task": "text-generation", "model": {"path": str(tiny_model)}, "text": {"maxNewTokens": 4}}
        run = generate_run(tmp_path / name, [{"prompt": "A class", **reference}], **spec)
        prepare(run)
        return [json.loads(line)["seed"] for line in Path(read_prepared(run).dataset_path).read_text().splitlines()]

    assert seeds("without") == seeds("with", reference="is")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_column_may_hold_lists(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """Of JSON files they come as text, of Parquet as lists."""
    wanted = [["lute"], ["a harp", "harp"], []]
    table = datasets.Dataset.from_dict({"question": ["?"] * 3, "context": ["a lute"] * 3, "wanted": wanted})
    (table.to_json if suffix == "jsonl" else table.to_parquet)(str(tmp_path / f"rows.{suffix}"))
    run = generate_run(
        tmp_path / "job",
        [],
        task="question-answering",
        model={"path": str(tiny_model)},
        inputs={"dataset": {"files": [str(tmp_path / f"rows.{suffix}")]}, "columns": {"reference": "wanted"}},
    )
    rows, _, _ = read_inputs(run, tmp_path / "cache")
    assert [row["reference"] for row in rows] == wanted
