"""Which rows are used, and on which side they are: compared with what pandas chooses of the same rows."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import pandas
import pytest

from luthier_api.run import FineTuneRun
from luthier_trainer.data.holdout import hold_out
from luthier_trainer.prepare.examples import Examples, read_examples
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.tasks.table import task_of

MakeRun = Callable[..., FineTuneRun]


@pytest.fixture
def frame(paragraphs: list[str]) -> pandas.DataFrame:
    """300 rows, of which about half are equal to another one after normalisation, with columns to choose by."""
    random = numpy.random.default_rng(0)
    texts = random.choice(numpy.array(list(dict.fromkeys(p for p in paragraphs if len(p) < 600))[:200]), 300)
    changed = [
        (text, text.upper(), f"  {text}\n", text.replace(" ", "\u3000"))[i]
        for text, i in zip(texts.tolist(), random.integers(0, 4, 300), strict=True)
    ]
    return pandas.DataFrame(
        {
            "text": changed,
            "language": random.choice(["en", "de", "fr"], 300),
            "score": random.integers(0, 50, 300) / 10,
            "checked": random.choice([True, False], 300),
            "url": random.choice(["https://a.org/x", "http://b.org", "ftp://https://c"], 300),
        }
    )


def compared(text: str) -> str:
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text).lower()).strip()


def examples(make_run: MakeRun, frame: pandas.DataFrame, path: Path, **dataset: Any) -> Examples:
    """The rows that `prepare` would use of a file of this name."""
    frame.to_csv(path, index=False) if path.suffix == ".csv" else frame.to_json(path, orient="records", lines=True)
    notices.forget()
    run = make_run(dataset={"files": [str(path)], **dataset})
    return read_examples(task_of(run.spec), run, path.parent / "cache")


@dataclass(frozen=True)
class FilterCase:
    name: str
    filter: dict[str, Any]
    expect: Callable[[pandas.DataFrame], pandas.Series]
    """Of the frame: which rows are kept."""


FILTERS = [
    FilterCase(
        name="one value",
        filter={"columns": [{"column": "language", "values": ["en"]}]},
        expect=lambda f: f.language == "en",
    ),
    FilterCase(
        name="several values",
        filter={"columns": [{"column": "language", "values": ["de", "fr", "it"]}]},
        expect=lambda f: f.language.isin(["de", "fr"]),
    ),
    FilterCase(
        name="a part matches",
        filter={"columns": [{"column": "url", "matches": "https:"}]},
        expect=lambda f: f.url.str.contains("https:"),
    ),
    FilterCase(
        name="the whole matches",
        filter={"columns": [{"column": "url", "matches": "^https?://[a-z.]+$"}]},
        expect=lambda f: f.url.str.fullmatch("https?://[a-z.]+"),
    ),
    FilterCase(
        name="numbers",
        filter={"columns": [{"column": "score", "min": 1.5, "max": 4}]},
        expect=lambda f: f.score.between(1.5, 4),
    ),
    FilterCase(
        name="several filters",
        filter={"columns": [{"column": "score", "min": 2}, {"column": "language", "values": ["en"], "matches": "e"}]},
        expect=lambda f: (f.score >= 2) & (f.language == "en"),
    ),
    FilterCase(
        name="the column that is learnt",
        filter={"columns": [{"column": "text", "matches": "class"}]},
        expect=lambda f: f.text.str.contains("class"),
    ),
    FilterCase(
        name="characters",
        filter={"minCharacters": 100, "maxCharacters": 300},
        expect=lambda f: f.text.str.len().between(100, 300),
    ),
]


@pytest.mark.parametrize("file", ["rows.csv", "rows.jsonl"])
@pytest.mark.parametrize("case", FILTERS, ids=lambda case: case.name)
def test_a_filter_keeps_what_pandas_keeps(
    case: FilterCase, file: str, frame: pandas.DataFrame, make_run: MakeRun, tmp_path: Path
) -> None:
    found = examples(make_run, frame, tmp_path / file, filter=case.filter)
    kept = case.expect(frame)
    assert 0 < kept.sum() < 300
    assert found.train.data["text"][:] == frame.text[kept].tolist()
    assert sum(found.left_out["train"].values()) == int((~kept).sum())
    counted = [re.match(r"spec\.dataset\.filter\.\S+: (\d+) of", text) for text in notices.given()]
    assert sum(int(match[1]) for match in counted if match) == int((~kept).sum())


def test_truth_is_compared_as_json_writes_it(frame: pandas.DataFrame, make_run: MakeRun, tmp_path: Path) -> None:
    columns = [{"column": "checked", "values": ["true"]}]
    found = examples(make_run, frame, tmp_path / "rows.jsonl", filter={"columns": columns})
    assert found.train.data["text"][:] == frame.text[frame.checked].tolist()


def test_rows_that_the_task_cannot_read_are_filtered_first(make_run: MakeRun, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "kind": "chat"}] * 2
    frame = pandas.DataFrame([*rows, {"messages": ["no message"], "kind": "broken"}])
    columns = [{"column": "kind", "values": ["chat"]}]
    assert len(examples(make_run, frame, tmp_path / "x.jsonl", filter={"columns": columns}).train.data) == 2
    with pytest.raises(Failure, match="cannot be read as conversations"):
        examples(make_run, frame, tmp_path / "x.jsonl")


def test_of_equal_rows_the_first_is_learnt(frame: pandas.DataFrame, make_run: MakeRun, tmp_path: Path) -> None:
    held_out = frame[:30]
    held_out.to_json(tmp_path / "eval.jsonl", orient="records", lines=True)
    dataset = {"evalFiles": [str(tmp_path / "eval.jsonl")], "deduplicate": "exact"}
    found = examples(make_run, frame[30:], tmp_path / "rows.jsonl", **dataset)
    learnt, measured = frame[30:].text.map(compared), held_out.text.map(compared)
    kept = ~learnt.duplicated() & ~learnt.isin(measured)
    assert found.eval is not None
    assert found.train.data["text"][:] == frame[30:].text[kept].tolist()
    assert found.eval.data["text"][:] == held_out.text[~measured.duplicated()].tolist()
    assert found.left_out == {
        "train": {"deduplicate": int((~kept).sum())},
        "eval": {"deduplicate": int(measured.duplicated().sum())},
    }


@dataclass(frozen=True)
class RefusedCase:
    name: str
    dataset: dict[str, Any]
    message: str
    training: dict[str, Any] = field(default_factory=dict)


COLUMN = "spec.dataset.filter.columns[0]"
REFUSED = [
    RefusedCase(
        name="no row is left",
        dataset={"filter": {"columns": [{"column": "language", "values": ["it", "es"]}]}},
        message=f"{COLUMN}: none of the 300 training rows of rows.jsonl that were left is kept. A row is kept if column"
        " \"language\" is one of 'it', 'es'",
    ),
    RefusedCase(
        name="no such column",
        dataset={"filter": {"columns": [{"column": "lang", "values": ["en"]}]}},
        message=f'{COLUMN}.column: no column "lang" in rows.jsonl (columns: text, language, score, checked, url). Did'
        ' you mean "language"?',
    ),
    RefusedCase(
        name="no regular expression",
        dataset={"filter": {"columns": [{"column": "language", "matches": "("}]}},
        message=f"{COLUMN}.matches: '(' is no regular expression of RE2",
    ),
    RefusedCase(
        name="no number",
        dataset={"filter": {"columns": [{"column": "language", "min": 1}]}},
        message=f'{COLUMN}: column "language" of rows.jsonl holds',
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_a_filter_is_refused(case: RefusedCase, frame: pandas.DataFrame, make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(Failure) as failure:
        examples(make_run, frame, tmp_path / "rows.jsonl", **case.dataset)
    assert failure.value.message.startswith(case.message)


def test_lines_of_text_files_cannot_be_left_out(make_run: MakeRun, corpus_file: Path, tmp_path: Path) -> None:
    training = {"maxLength": 64, "batchSize": 4, "packing": "concatenate"}
    run = make_run(dataset={"files": [str(corpus_file)], "deduplicate": "exact"}, training=training)
    with pytest.raises(Failure, match=r"^spec\.dataset\.deduplicate: packing concatenate reads"):
        read_examples(task_of(run.spec), run, tmp_path / "cache")


def test_equal_rows_are_on_one_side(frame: pandas.DataFrame, make_run: MakeRun, tmp_path: Path) -> None:
    sides = []
    for name in ("a", "b"):
        found = examples(make_run, frame, tmp_path / f"{name}.jsonl", evalFraction=0.2)
        assert found.eval is not None
        learnt, measured = (pandas.Series(rows.data["text"][:]) for rows in (found.train, found.eval))
        assert not learnt.map(compared).isin(measured.map(compared)).any()
        assert len(learnt) + len(measured) == 300
        assert 58 <= len(measured) <= 60
        sides.append(measured.tolist())
    assert sides[0] == sides[1]


@dataclass(frozen=True)
class GroupCase:
    name: str
    groups: list[int]
    fraction: float
    held_out: int
    """Rows."""
    classes: list[int] | None = None


GROUPS = [
    GroupCase(
        name="all rows differ",
        groups=list(range(100)),
        fraction=0.2,
        held_out=20,
    ),
    GroupCase(
        name="pairs",
        groups=[i // 2 for i in range(100)],
        fraction=0.25,
        held_out=24,
    ),
    GroupCase(
        name="half of the rows are equal, and are too many to be held out",
        groups=[0] * 50 + list(range(1, 51)),
        fraction=0.2,
        held_out=20,
    ),
    GroupCase(
        name="classes in pairs",
        groups=[i // 2 for i in range(100)],
        classes=[0] * 80 + [1] * 20,
        fraction=0.2,
        held_out=20,
    ),
    GroupCase(
        name="the only rows of a class are equal to those of another",
        groups=[0, 0, *range(1, 9)],
        classes=[0, 1, *[0] * 8],
        fraction=0.5,
        held_out=5,
    ),
]


@pytest.mark.parametrize("case", GROUPS, ids=lambda case: case.name)
def test_groups_are_divided(case: GroupCase) -> None:
    groups = numpy.array(case.groups)
    classes = None if case.classes is None else numpy.array(case.classes)
    for seed in range(20):
        learnt, measured = hold_out(len(groups), case.fraction, seed, "f", classes, groups)
        assert sorted([*learnt, *measured]) == list(range(len(groups)))
        assert not {*groups[learnt].tolist()} & {*groups[measured].tolist()}
        assert len(measured) == case.held_out
        if classes is not None:
            assert {*classes[learnt].tolist()} == {*classes.tolist()}


def test_groups_that_are_all_too_large_are_refused() -> None:
    with pytest.raises(Failure, match=r"^f: 0\.1 of 10 rows is 1, and each row has others that are equal to it"):
        hold_out(10, 0.1, 1, "f", groups=numpy.arange(10) // 5)
