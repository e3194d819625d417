"""The data report on real text with planted repeats, compared with pandas and with the similarity of every pair."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy
import pandas
import pytest
from transformers import AutoTokenizer

from luthier_api.run import FineTuneRun
from luthier_trainer.data import near_duplicates, scripts
from luthier_trainer.prepare import data_report, inspection
from luthier_trainer.prepare.examples import read_examples
from luthier_trainer.prepare.main import main
from luthier_trainer.publish import model_card
from luthier_trainer.runtime import notices
from luthier_trainer.tasks.table import task_of
from luthier_trainer.workspace.prepared import read_prepared

MakeRun = Callable[..., FineTuneRun]
TRAIN, HELD_OUT = 500, 100
TOKEN = re.compile(r"[\u0800-\U0010ffff][^\s\u0800-\U0010ffff]*|[^\s\u0800-\U0010ffff]+")


def compared(text: str) -> str:
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text).lower()).strip()


def triples(text: str) -> set[tuple[str, ...]]:
    """Three tokens in a row, each with the blank that follows it."""
    tokens = [match.group() + text[match.end() : match.end() + 1].strip(r"\S") for match in TOKEN.finditer(text + " ")]
    return {tuple(tokens[i : i + 3]) for i in range(max(len(tokens) - 2, 1))}


def jaccard(one: set[Any], other: set[Any]) -> float:
    return len(one & other) / max(len(one | other), 1)


def planted(paragraphs: list[str]) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """Training and held-out rows of the language reference, with rows that repeat."""
    rows = list(dict.fromkeys(paragraphs))
    train, held_out = rows[:TRAIN], rows[TRAIN : TRAIN + HELD_OUT]
    words = [text.split(" ") for text in train]
    train += train[10:25]
    train += [text.upper() for text in train[30:35]]
    train += [f"  {text.replace(' ', chr(0x3000))}\n" for text in train[40:45]]  # NFKC makes it a blank
    long = [row for row in words if len(row) > 60]
    train += [" ".join([*row[:20], "changed", *row[21:]]) for row in long[:20]]
    train += [
        "语言模型从大量文本中学习，并且预测句子里下一个最可能出现的词是什么。" + ending for ending in ("好", "坏")
    ]
    held_out += [train[3], train[4].lower(), train[5] + " "]
    held_out += [" ".join([*row[:-9], "and", *row[-8:]]) for row in long[30:36]]
    return pandas.DataFrame({"text": train}), pandas.DataFrame({"text": held_out})


@pytest.fixture
def tables(paragraphs: list[str], tmp_path: Path) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    train, held_out = planted(paragraphs)
    train.to_json(tmp_path / "train.jsonl", orient="records", lines=True)
    held_out.to_json(tmp_path / "eval.jsonl", orient="records", lines=True)
    return train, held_out


def report_of(run: FineTuneRun) -> dict[str, Any]:
    main(run)
    found: dict[str, Any] = json.loads((Path(run.workspace) / "prepared" / "data-report.json").read_text())
    return found


def test_the_report_is_what_pandas_finds(
    make_run: MakeRun, tables: tuple[pandas.DataFrame, pandas.DataFrame], tmp_path: Path, tiny_model: Path
) -> None:
    train, held_out = tables
    dataset = {"files": [str(tmp_path / "train.jsonl")], "evalFiles": [str(tmp_path / "eval.jsonl")]}
    run = make_run(dataset=dataset, training={"maxLength": 128, "batchSize": 4})
    report = report_of(run)

    learnt, measured = train.text.map(compared), held_out.text.map(compared)
    part = report["splits"]["train"]
    assert part["exactDuplicates"] == int(learnt.duplicated().sum()) == 25
    assert report["splits"]["eval"]["exactDuplicates"] == int(measured.duplicated().sum())
    assert report["shared"]["exact"] == int(measured.isin(learnt).sum()) == 3

    # The similarity of every pair of different rows: a row is near if any earlier one is at least 0.8.
    every = pandas.concat([learnt, measured], ignore_index=True).drop_duplicates()
    sets = {number: triples(text) for number, text in every.items()}
    alike = [pair for pair in combinations(sets, 2) if jaccard(sets[pair[0]], sets[pair[1]]) >= 0.8]
    near = {"train": set(), "eval": set(), "shared": set()}
    for one, other in alike:
        kind = "train" if other < len(train) else "eval" if one >= len(train) else "shared"
        near[kind].add(other)
    assert len(train) - 1 in near["train"]
    assert part["nearDuplicates"] == len(near["train"]) >= 20
    assert report["splits"]["eval"]["nearDuplicates"] == len(near["eval"])
    assert report["shared"]["near"] == len(near["shared"]) >= 6

    lengths = numpy.array(
        [len(ids) + 1 for ids in AutoTokenizer.from_pretrained(tiny_model)(list(train.text)).input_ids]
    )
    tokens = part["tokens"]
    assert tokens["total"] == lengths.sum()
    assert (tokens["rowsCut"], tokens["tokensCut"]) == ((lengths > 128).sum(), (lengths - 128).clip(0).sum())
    bounds = pandas.Series(lengths).map(lambda n: 1 << (int(n) - 1).bit_length()).value_counts().sort_index()
    assert tokens["histogram"] == {f"<= {bound}": count for bound, count in bounds.items()}
    assert part["scripts"] == {"Latin": len(train) - 2, scripts.EAST_ASIAN: 2}

    record = read_prepared(run)
    leak = next(text for text in record.notices if "held-out" in text and "equal to a training row" in text)
    assert leak.startswith("spec.dataset: 3 of 109 held-out rows")
    assert "row 100, counted from 0" in leak
    assert sum("maxLength" in text and "training rows" in text for text in record.notices) == 1
    card = model_card.card(run, record, tmp_path)
    assert "| Held-out rows equal to a training row |  | 3 |" in card
    assert f"| Nearly equal to an earlier row | {len(near['train'])} | {len(near['eval'])} |" in card


def test_inspect_shows_the_same_report(
    make_run: MakeRun, tables: tuple[pandas.DataFrame, pandas.DataFrame], tmp_path: Path
) -> None:
    run = make_run(dataset={"files": [str(tmp_path / "train.jsonl")], "evalFraction": 0.1})
    shown = inspection.inspect(run, tmp_path / "work")
    prepared = report_of(run)
    assert shown["report"] == prepared
    assert ["Equal to an earlier row", *(str(s["exactDuplicates"]) for s in prepared["splits"].values())] in shown[
        "reportTable"
    ]


def test_rows_that_repeat_are_on_one_side_of_a_drawn_division(
    make_run: MakeRun, paragraphs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each row is there twice, once in capitals; one more has no token but the end-of-text token."""
    texts = list({compared(text): text for text in paragraphs}.values())[:40]
    rows = pandas.DataFrame({"text": [*texts, *map(str.upper, texts), "<|endoftext|>"]})
    rows.to_json(tmp_path / "rows.jsonl", orient="records", lines=True)
    dataset = {"files": [str(tmp_path / "rows.jsonl")], "evalFraction": 0.25, "parseSpecialTokens": True}
    run = make_run(dataset=dataset)
    report = report_of(run)
    found = report["splits"]["train"], report["splits"]["eval"]
    assert report["shared"]["exact"] == 0
    assert sum(part["exactDuplicates"] for part in found) == int(rows.text.map(compared).duplicated().sum()) == 40
    assert [part["tokens"]["tooShort"] for part in found] in ([1, 0], [0, 1])
    assert "spec.dataset.evalFraction: 40 of 81 rows are equal to an earlier row" in capsys.readouterr().out
    notices = read_prepared(run).notices
    assert any("1 of" in text and "rows have one token or none, and are left out" in text for text in notices)
    assert not any("equal to a training row" in text for text in notices)


def test_labels_that_contradict_and_one_that_prevails(make_run: MakeRun, paragraphs: list[str], tmp_path: Path) -> None:
    rows = pandas.DataFrame({"text": paragraphs[:100], "label": ["prose"] * 95 + ["code"] * 5})
    rows = pandas.concat([rows, pandas.DataFrame({"text": paragraphs[:3], "label": ["code"] * 3})])
    rows.to_csv(tmp_path / "rows.csv", index=False)
    run = make_run(task="text-classification", dataset={"files": [str(tmp_path / "rows.csv")]})
    part = report_of(run)["splits"]["train"]
    disputed = rows.groupby("text").label.transform("nunique") > 1
    assert part["otherLabelForSameContent"] == int(disputed.sum()) == 6
    assert part["labels"] == rows.label.value_counts().to_dict()
    notices = read_prepared(run).notices
    assert any(text.startswith("spec.dataset.columns.label: 6 of 103 training rows have the same") for text in notices)
    assert any('95 of 103 training rows have the label "prose"' in text for text in notices)


@dataclass(frozen=True)
class FormCase:
    name: str
    task: str
    rows: list[dict[str, Any]]
    exact: int
    shared: int
    """If the last of the rows is held out."""


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]


FORMS = [
    FormCase(
        name="prompts and completions: both must be equal",
        task="causal-lm",
        rows=[
            {"prompt": "Is it so?", "completion": " yes"},
            {"prompt": "Is it so?", "completion": " no"},
            {"prompt": "is  it so?", "completion": " Yes"},
            {"prompt": "Is it so?", "completion": " no"},
        ],
        exact=1,
        shared=1,
    ),
    FormCase(
        name="conversations",
        task="causal-lm",
        rows=[{"messages": chat("Is it?")}, {"messages": chat("Or not?")}, {"messages": chat("IS it?")}],
        exact=0,
        shared=1,
    ),
    FormCase(
        name="preferences",
        task="preference",
        rows=[
            {"prompt": "Is it so?", "chosen": " yes", "rejected": " no"},
            {"prompt": "Is it so?", "chosen": " yes", "rejected": " no"},
            {"prompt": "Is it so?", "chosen": " no", "rejected": " yes"},
        ],
        exact=1,
        shared=0,
    ),
]


@pytest.mark.parametrize("case", FORMS, ids=lambda case: case.name)
def test_all_forms_of_text(case: FormCase, make_run: MakeRun, tmp_path: Path) -> None:
    for name, rows in (("train", case.rows[:-1]), ("eval", case.rows[-1:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset: dict[str, Any] = {"files": [str(tmp_path / "train.jsonl")], "evalFiles": [str(tmp_path / "eval.jsonl")]}
    if "messages" in case.rows[0]:
        dataset["chatTemplate"] = {"name": "zephyr"}
    report = report_of(make_run(task=case.task, dataset=dataset, training={"maxLength": 64, "batchSize": 1}))
    assert (report["splits"]["train"]["exactDuplicates"], report["shared"]["exact"]) == (case.exact, case.shared)


def test_images_are_compared_by_their_files(classify: MakeRun, digits: Path, tmp_path: Path) -> None:
    pictures = shutil.copytree(digits, tmp_path / "pictures")
    for source in sorted((pictures / "1").iterdir())[:4]:
        shutil.copy(source, pictures / "7" / f"again-{source.name}")
    run = classify(dataset={"files": [str(pictures)], "evalFraction": None})
    report = report_of(run)
    assert inspection.inspect(run, tmp_path / "work")["report"] == report
    files = pandas.DataFrame(
        [(p.parent.name, hashlib.sha256(p.read_bytes()).digest()) for p in pictures.rglob("*.png")]
    )
    part = report["splits"]["train"]
    assert part["exactDuplicates"] == int(files[1].duplicated().sum())
    assert part["otherLabelForSameContent"] == int((files.groupby(1)[0].transform("nunique") > 1).sum()) >= 8
    assert part["labels"] == files[0].value_counts().sort_index().sort_values(ascending=False, kind="stable").to_dict()
    assert "nearDuplicates" not in part


@pytest.mark.parametrize(
    ("text", "expect"),
    [
        ("The cat. 123", ("Latin", False)),
        ("123, 456", (scripts.NONE, False)),
        ("Кошка сидит на окне", ("Cyrillic", False)),
        ("Кошка sits on окне", ("Cyrillic", True)),
        ("日本語のテキスト", (scripts.EAST_ASIAN, False)),
        ("مرحبا بالعالم", ("Arabic", False)),
        ("नमस्ते दुनिया", ("Devanagari", False)),
        ("Γειά σου Κόσμε", ("Greek", False)),
    ],
)
def test_scripts(text: str, expect: tuple[str, bool]) -> None:
    assert scripts.of([text]) == [expect]


def test_similar_texts_are_found_as_often_as_is_said(paragraphs: list[str]) -> None:
    """2,000 pairs of known similarity, from 0.8 to 0.85, at the limit of what is reported."""
    random = numpy.random.default_rng(3)
    texts = []
    for i in range(2_000):
        words = [f"w{n}" for n in random.integers(0, 1 << 40, 120)]
        places = random.choice(118 // 3, 3 + i % 2, replace=False) * 3  # each change replaces three shingles
        other = list(words)
        for place in places:
            other[place + 1] = "x"
        texts += [" ".join(words), " ".join(other)]
    truth = [jaccard(triples(a), triples(b)) for a, b in zip(texts[::2], texts[1::2], strict=True)]
    assert all(0.8 <= similarity <= 0.9 for similarity in truth)
    keys = numpy.concatenate([near_duplicates.band_keys(chunk) for chunk in near_duplicates.chunks(texts)], axis=1)
    numbers = numpy.arange(len(texts))
    found = near_duplicates.find(keys, numbers, len(texts), lambda at: [texts[i] for i in at])
    assert {tuple(pair) for pair in found.within.tolist()} <= {(i, i + 1) for i in range(0, len(texts), 2)}
    assert len(found.within) >= 0.995 * 2_000


def test_too_many_candidates_are_said(
    make_run: MakeRun,
    tables: tuple[pandas.DataFrame, pandas.DataFrame],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(near_duplicates, "PAIRS", 5)
    run = make_run(dataset={"files": [str(tmp_path / "train.jsonl")]})
    report = report_of(run)
    found = report["splits"]["train"]["nearDuplicates"]
    assert (0 < found <= 5, report["near"]["allCandidatesCompared"]) == (True, False)
    assert ["Nearly equal to an earlier row", f"at least {found}"] in data_report.table(report)
    assert any(f"and at least {found} nearly equal" in text for text in read_prepared(run).notices)


def test_the_bounds_are_said_when_they_are_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "PAIRS", 10)
    texts = [f"one two three four five six seven eight nine ten eleven twelve and number {n}" for n in range(50)]
    keys = near_duplicates.band_keys(texts)
    found = near_duplicates.find(keys, numpy.arange(50), 50, lambda at: [texts[i] for i in at])
    assert not found.complete
    assert 0 < len(found.within) <= 10


@pytest.mark.parametrize("form", ["text", "prompt", "messages", "label"])
def test_rows_are_chosen_by_their_tokens(
    form: str, make_run: MakeRun, paragraphs: list[str], tmp_path: Path, tiny_model: Path
) -> None:
    """Of the same rows without a filter, those with 30 to 60 tokens are left, uncut; the others are counted."""
    given: dict[str, Callable[[str], dict[str, Any]]] = {
        "text": lambda text: {"text": text},
        "prompt": lambda text: {"prompt": text[:20], "completion": text[20:]},
        "messages": lambda text: {"messages": chat(text)},
        "label": lambda text: {"text": text, "label": text[0].isupper()},
    }
    rows = pandas.DataFrame([given[form](text[:150]) for text in paragraphs[:60]])
    rows.to_json(tmp_path / "rows.jsonl", orient="records", lines=True)
    dataset: dict[str, Any] = {"files": [str(tmp_path / "rows.jsonl")]}
    dataset |= {"chatTemplate": {"name": "zephyr"}} if form == "messages" else {}
    name = "text-classification" if form == "label" else "causal-lm"
    found = []
    for wanted, longest in (({}, 256), ({"filter": {"minTokens": 45, "maxTokens": 70}}, 70)):
        notices.forget()
        run = make_run(task=name, dataset=dataset | wanted, training={"maxLength": longest, "batchSize": 4})
        task = task_of(run.spec)
        examples = read_examples(task, run, tmp_path / "cache")
        tokenizer = task.read_processor(tiny_model, "spec.model")
        encoded = task.encode(examples.train, tokenizer, run.spec, examples.labels, "training")
        report = data_report.describe(task, examples, run.spec, task.added_tokens(tokenizer))
        found.append((encoded, report["splits"]["train"], notices.given()))
    whole, (chosen, part, said) = found[0][0].to_pandas(), found[1]
    fits = whole.length.between(45, 70)
    assert 5 < fits.sum() < 55
    assert [list(ids) for ids in whole[fits].input_ids] == chosen["input_ids"][:]
    assert part["leftOut"] == {
        "filter.minTokens": int((whole.length < 45).sum()),
        "filter.maxTokens": int((whole.length > 70).sum()),
    }
    assert part["tokens"]["rowsCut"] == 0
    assert sum(text.startswith("spec.dataset.filter.m") for text in said) == 2
    assert not any("are cut" in text for text in said)
