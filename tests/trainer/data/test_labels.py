"""The classes of rows: which labels are one class, which row has which, and how they are held out."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from luthier_api.dataset import TrainingData
from luthier_trainer.data import labels
from luthier_trainer.data.holdout import hold_out
from luthier_trainer.data.load import Loader, Rows
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.failure import Failure

LABEL = "spec.dataset.columns.label"


@pytest.fixture(autouse=True)
def fresh_notices() -> None:
    notices.forget()


def of_file(folder: Path, name: str, given: list[Any]) -> Rows:
    """Rows with these labels, from CSV or JSON lines."""
    path = folder / name
    if name.endswith(".csv"):
        path.write_text("text,label\n" + "".join(f"t,{label}\n" for label in given))
    else:
        path.write_text("".join(json.dumps({"text": "t", "label": label}) + "\n" for label in given))
    source = TrainingData.model_validate({"files": [str(path)]})
    return Loader(source, "spec.dataset", folder / "cache", columns=("text", "label"), others=False).split(
        "train", "split"
    )


@dataclass(frozen=True)
class ClassCase:
    name: str
    file: str
    labels: list[Any]
    merge: bool
    names: list[str]
    ids: list[int]


CLASSES = [
    ClassCase(
        name="text that looks like numbers",
        file="x.csv",
        labels=["007", "7", "7.0", "007"],
        merge=False,
        names=["007", "7", "7.0"],
        ids=[0, 1, 2, 0],
    ),
    ClassCase(
        name="the same, merged",
        file="x.csv",
        labels=["007", "7", "7.0", "007", "8"],
        merge=True,
        names=["007", "8"],
        ids=[0, 0, 0, 0, 1],
    ),
    ClassCase(
        name="blanks and capitals",
        file="x.csv",
        labels=["neg", " neg", "NEG", "pos"],
        merge=False,
        names=[" neg", "NEG", "neg", "pos"],
        ids=[2, 0, 1, 3],
    ),
    ClassCase(
        name="the same, merged",
        file="x.csv",
        labels=["neg", " neg", "NEG", "pos", "neg"],
        merge=True,
        names=["neg", "pos"],
        ids=[0, 0, 0, 1, 0],
    ),
    ClassCase(
        name="called as most rows call it",
        file="x.csv",
        labels=["Neg", "neg", "Neg", "pos"],
        merge=True,
        names=["Neg", "pos"],
        ids=[0, 0, 0, 1],
    ),
    ClassCase(
        name="numbers of JSON",
        file="x.jsonl",
        labels=[10, 2, 10],
        merge=False,
        names=["2", "10"],
        ids=[1, 0, 1],
    ),
    ClassCase(
        name="text of JSON",
        file="x.jsonl",
        labels=["10", "02", "10"],
        merge=False,
        names=["02", "10"],
        ids=[1, 0, 1],
    ),
    ClassCase(
        name="whole numbers with a point",
        file="x.jsonl",
        labels=[1.0, 0.0, 1.0],
        merge=False,
        names=["0", "1"],
        ids=[1, 0, 1],
    ),
    ClassCase(
        name="true and false",
        file="x.jsonl",
        labels=[True, False],
        merge=False,
        names=["false", "true"],
        ids=[1, 0],
    ),
    ClassCase(
        name="accents in two forms",
        file="x.jsonl",
        labels=["é", "e\u0301", "a"],
        merge=True,
        names=["a", "e\u0301"],
        ids=[1, 1, 0],
    ),
]


@pytest.mark.parametrize("case", CLASSES, ids=lambda case: case.name)
def test_labels_become_classes(case: ClassCase, tmp_path: Path) -> None:
    rows = of_file(tmp_path, case.file, case.labels)
    assert labels.names_of(rows, "label", LABEL, case.merge) == case.names
    assert labels.ids_of(rows, "label", LABEL, case.names, case.merge).tolist() == case.ids


def test_labels_that_nearly_agree_are_shown(tmp_path: Path) -> None:
    rows = of_file(tmp_path, "x.csv", ["neg"] * 90 + [" neg"] * 3 + ["NEG", "pos", "7", "007"])
    labels.names_of(rows, "label", LABEL, merge=False)
    assert notices.given() == [
        f'{LABEL}: "007" (1 rows) and "7" (1 rows); " neg" (3 rows) and "NEG" (1 rows) and "neg" (90 rows) differ only'
        " in blanks, in capitals or in how a number is written, and are classes of their own. To make one class of"
        " them, set spec.dataset.mergeLabels: true"
    ]
    notices.forget()
    labels.names_of(rows, "label", LABEL, merge=True)
    assert notices.given()[0].startswith(
        'spec.dataset.mergeLabels: "007" (1 rows) and "7" (1 rows); " neg" (3 rows) and "NEG" (1 rows)'
    )
    notices.forget()
    labels.names_of(of_file(tmp_path, "y.csv", ["neg", "pos"]), "label", LABEL, merge=False)
    assert notices.given() == []


@dataclass(frozen=True)
class RefusedCase:
    name: str
    file: str
    labels: list[Any]
    merge: bool
    message: str


REFUSED = [
    RefusedCase(
        name="two types",
        file="x.jsonl",
        labels=["a"] * 1500 + [1] * 2 + ["b"],
        merge=False,
        message=(
            'column "label" of x.jsonl holds text in 1501 rows and numbers in 2 rows. The first of the fewest is row'
            " 1500, counted from 0 (line 1501 of x.jsonl). Write all"
        ),
    ),
    RefusedCase(
        name="fractions",
        file="x.jsonl",
        labels=[1, 0, 0.5],
        merge=False,
        message=(
            'column "label" of x.jsonl holds 0.5; a label is a name or a whole number. The first is row 2, counted from'
            " 0 (line 3 of x.jsonl)"
        ),
    ),
    RefusedCase(
        name="blanks alone",
        file="x.csv",
        labels=["a", "  ", "b"],
        merge=False,
        message='column "label" of x.csv has no label in 1 rows. The first is row 1, counted from 0 (line 3 of x.csv)',
    ),
    RefusedCase(
        name="one class once they are merged",
        file="x.csv",
        labels=["a", "A"],
        merge=True,
        message='all 2 rows of x.csv have the label "a"; two classes at least are needed',
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_labels_that_are_refused(case: RefusedCase, tmp_path: Path) -> None:
    with pytest.raises(Failure) as failure:
        labels.names_of(of_file(tmp_path, case.file, case.labels), "label", LABEL, case.merge)
    assert failure.value.message.startswith(f"{LABEL}: {case.message}")


def test_a_label_that_was_never_learnt_names_its_row(tmp_path: Path) -> None:
    rows = of_file(tmp_path, "x.csv", ["a", "B", "b", "c"])
    assert labels.ids_of(rows, "label", LABEL, ["a", "b", "c"], merge=True).tolist() == [0, 1, 1, 2]
    with pytest.raises(
        Failure,
        match=(
            r"labels that the training rows do not have: B \(theirs: a, b, c\)\. The first is row 1, .*line 3 of x\.csv"
        ),
    ):
        labels.ids_of(rows, "label", LABEL, ["a", "b", "c"], merge=False)


def test_classes_of_the_hub_keep_their_order() -> None:
    features = Features({"label": ClassLabel(names=["pos", "neg", "Neg"]), "text": Value("string")})
    rows = Rows(Dataset.from_dict({"label": [1, 0, 2, 1], "text": list("abcd")}, features=features), "hub")
    assert labels.names_of(rows, "label", LABEL, merge=False) == ["pos", "neg", "Neg"]
    assert labels.names_of(rows, "label", LABEL, merge=True) == ["pos", "neg"]
    assert labels.ids_of(rows, "label", LABEL, ["pos", "neg"], merge=True).tolist() == [1, 0, 1, 1]
    missing = Rows(Dataset.from_dict({"label": [1, -1, None], "text": list("abc")}, features=features), "hub")
    with pytest.raises(Failure, match=r"has no label in 2 rows. The first is row 1, counted from 0"):
        labels.names_of(missing, "label", LABEL, merge=False)


def test_a_million_labels_take_eight_bytes_each() -> None:
    """A list of Python texts would take many times as much."""
    count = 1_000_000
    rows = Rows(Dataset.from_dict({"label": [f"class {i % 5}" for i in range(count)]}), "memory")
    tracemalloc.start()
    ids = labels.ids_of(rows, "label", LABEL, [f"class {i}" for i in range(5)], merge=False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (ids.nbytes, len(numpy.unique(ids))) == (8 * count, 5)
    assert peak < 2.5 * ids.nbytes


@dataclass(frozen=True)
class HoldOutCase:
    name: str
    class_sizes: list[int]
    fraction: float
    held_out: list[int]  # rows of each class


HELD = [
    HoldOutCase(
        name="even",
        class_sizes=[50, 50],
        fraction=0.2,
        held_out=[10, 10],
    ),
    HoldOutCase(
        name="uneven",
        class_sizes=[900, 90, 10],
        fraction=0.1,
        held_out=[90, 9, 1],
    ),
    HoldOutCase(
        name="remainders",
        class_sizes=[7, 7, 6],
        fraction=0.25,
        held_out=[2, 2, 1],
    ),
    HoldOutCase(
        name="a class of one row is learnt",
        class_sizes=[10, 1, 1],
        fraction=0.25,
        held_out=[3, 0, 0],
    ),
    HoldOutCase(
        name="one row of each stays",
        class_sizes=[2, 2, 2],
        fraction=0.9,
        held_out=[1, 1, 1],
    ),
    HoldOutCase(
        name="a class that no row has",
        class_sizes=[5, 0, 5],
        fraction=0.4,
        held_out=[2, 0, 2],
    ),
]


@pytest.mark.parametrize("case", HELD, ids=lambda case: case.name)
def test_the_same_share_of_each_class_is_held_out(case: HoldOutCase) -> None:
    classes = numpy.random.default_rng(0).permutation(
        numpy.repeat(numpy.arange(len(case.class_sizes)), case.class_sizes)
    )
    splits = [hold_out(len(classes), case.fraction, seed, "f", classes) for seed in (1, 2)]
    for learnt, measured in splits:
        assert sorted([*learnt, *measured]) == list(range(len(classes)))
        counts = Counter(classes[measured].tolist())
        assert [counts[number] for number in range(len(case.class_sizes))] == case.held_out
    assert splits[0][1].tolist() != splits[1][1].tolist(), "another seed holds out others"


def test_classes_of_one_row_cannot_be_held_out() -> None:
    with pytest.raises(Failure, match="every class has one row"):
        hold_out(10, 0.2, 1, "f", numpy.arange(10))
