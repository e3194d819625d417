"""The classes of rows: which labels are one class, which row has which, and how they are held out."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from luthier_api.finetune import TrainingData
from luthier_trainer.data import labels, tokens
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


CLASSES: list[tuple[str, str, list[Any], bool, list[str], list[int]]] = [
    # name, file, labels, merged, names, ids
    ("text that looks like numbers", "x.csv", ["007", "7", "7.0", "007"], False, ["007", "7", "7.0"], [0, 1, 2, 0]),
    ("the same, merged", "x.csv", ["007", "7", "7.0", "007", "8"], True, ["007", "8"], [0, 0, 0, 0, 1]),
    ("blanks and capitals", "x.csv", ["neg", " neg", "NEG", "pos"], False, [" neg", "NEG", "neg", "pos"], [2, 0, 1, 3]),
    ("the same, merged", "x.csv", ["neg", " neg", "NEG", "pos", "neg"], True, ["neg", "pos"], [0, 0, 0, 1, 0]),
    ("called as most rows call it", "x.csv", ["Neg", "neg", "Neg", "pos"], True, ["Neg", "pos"], [0, 0, 0, 1]),
    ("numbers of JSON", "x.jsonl", [10, 2, 10], False, ["2", "10"], [1, 0, 1]),
    ("text of JSON", "x.jsonl", ["10", "02", "10"], False, ["02", "10"], [1, 0, 1]),
    ("whole numbers with a point", "x.jsonl", [1.0, 0.0, 1.0], False, ["0", "1"], [1, 0, 1]),
    ("true and false", "x.jsonl", [True, False], False, ["false", "true"], [1, 0]),
    ("accents in two forms", "x.jsonl", ["é", "e\u0301", "a"], True, ["a", "e\u0301"], [1, 1, 0]),
]


@pytest.mark.parametrize(("name", "file", "given", "merge", "names", "ids"), CLASSES, ids=[c[0] for c in CLASSES])
def test_labels_become_classes(
    name: str, file: str, given: list[Any], merge: bool, names: list[str], ids: list[int], tmp_path: Path
) -> None:
    rows = of_file(tmp_path, file, given)
    assert labels.names_of(rows, "label", LABEL, merge) == names
    assert labels.ids_of(rows, "label", LABEL, names, merge).tolist() == ids


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


REFUSED: list[tuple[str, str, list[Any], bool, str]] = [
    (
        "two types",
        "x.jsonl",
        ["a"] * 1500 + [1] * 2 + ["b"],
        False,
        (
            'column "label" of x.jsonl holds text in 1501 rows and numbers in 2 rows. The first of the fewest is row'
            " 1500, counted from 0 (line 1501 of x.jsonl). Write all"
        ),
    ),
    (
        "fractions",
        "x.jsonl",
        [1, 0, 0.5],
        False,
        (
            'column "label" of x.jsonl holds 0.5; a label is a name or a whole number. The first is row 2, counted from'
            " 0 (line 3 of x.jsonl)"
        ),
    ),
    (
        "blanks alone",
        "x.csv",
        ["a", "  ", "b"],
        False,
        'column "label" of x.csv has no label in 1 rows. The first is row 1, counted from 0 (line 3 of x.csv)',
    ),
    (
        "one class once they are merged",
        "x.csv",
        ["a", "A"],
        True,
        'all 2 rows of x.csv have the label "a"; two classes at least are needed',
    ),
]


@pytest.mark.parametrize(("name", "file", "given", "merge", "message"), REFUSED, ids=[c[0] for c in REFUSED])
def test_labels_that_are_refused(
    name: str, file: str, given: list[Any], merge: bool, message: str, tmp_path: Path
) -> None:
    with pytest.raises(Failure) as failure:
        labels.names_of(of_file(tmp_path, file, given), "label", LABEL, merge)
    assert failure.value.message.startswith(f"{LABEL}: {message}")


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


HELD: list[tuple[str, list[int], float, list[int]]] = [
    # name, rows of each class, fraction, rows held out of each class
    ("even", [50, 50], 0.2, [10, 10]),
    ("uneven", [900, 90, 10], 0.1, [90, 9, 1]),
    ("remainders", [7, 7, 6], 0.25, [2, 2, 1]),
    ("a class of one row is learnt", [10, 1, 1], 0.25, [3, 0, 0]),
    ("one row of each stays", [2, 2, 2], 0.9, [1, 1, 1]),
    ("a class that no row has", [5, 0, 5], 0.4, [2, 0, 2]),
]


@pytest.mark.parametrize(("name", "sizes", "fraction", "held"), HELD, ids=[c[0] for c in HELD])
def test_the_same_share_of_each_class_is_held_out(
    name: str, sizes: list[int], fraction: float, held: list[int]
) -> None:
    classes = numpy.random.default_rng(0).permutation(numpy.repeat(numpy.arange(len(sizes)), sizes))
    splits = [tokens.hold_out(len(classes), fraction, seed, "f", classes) for seed in (1, 2)]
    for learnt, measured in splits:
        assert sorted([*learnt, *measured]) == list(range(len(classes)))
        counts = Counter(classes[measured].tolist())
        assert [counts[number] for number in range(len(sizes))] == held
    assert splits[0][1].tolist() != splits[1][1].tolist(), "another seed holds out others"


def test_classes_of_one_row_cannot_be_held_out() -> None:
    with pytest.raises(Failure, match="every class has one row"):
        tokens.hold_out(10, 0.2, 1, "f", numpy.arange(10))
