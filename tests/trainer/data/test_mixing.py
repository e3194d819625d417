"""Mixes of several sources: compared with `interleave_datasets` on the same files, and with pandas."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest

from luthier_api.run import FineTuneRun
from luthier_trainer.prepare import data_report
from luthier_trainer.prepare.examples import Examples, read_examples
from luthier_trainer.prepare.main import main
from luthier_trainer.publish import model_card
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.tasks.table import task_of
from luthier_trainer.workspace.prepared import read_prepared

MakeRun = Callable[..., FineTuneRun]


@pytest.fixture
def tables(paragraphs: list[str], tmp_path: Path) -> list[pandas.DataFrame]:
    """30, 60 and 90 texts, in a.jsonl, b.csv (where they are called body) and c.jsonl."""
    texts = list(dict.fromkeys(paragraphs))
    made = [texts[:30], texts[30:90], texts[90:180]]
    frames = [pandas.DataFrame({"text": part}) for part in made]
    frames[0].to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    frames[1].rename(columns={"text": "body"}).to_csv(tmp_path / "b.csv", index=False)
    frames[2].to_json(tmp_path / "c.jsonl", orient="records", lines=True)
    return frames


def mix(folder: Path, *weights: float | None, **settings: Any) -> dict[str, Any]:
    sources: list[dict[str, Any]] = [
        {"files": [str(folder / "a.jsonl")]},
        {"files": [str(folder / "b.csv")], "rename": {"body": "text"}},
        {"files": [str(folder / "c.jsonl")]},
    ]
    for source, weight in zip(sources, weights, strict=False):
        if weight is not None:
            source["weight"] = weight
    return {"sources": sources, **settings}


def examples(make_run: MakeRun, folder: Path, **dataset: Any) -> Examples:
    notices.forget()
    run = make_run(dataset=dataset)
    return read_examples(task_of(run.spec), run, folder / "cache")


@pytest.mark.parametrize("strategy", ["first_exhausted", "all_exhausted"])
@pytest.mark.parametrize("weights", [(5, 3, 2), (0.1, 0.1, 0.8)])
def test_an_epoch_is_that_of_interleave_datasets(
    strategy: str, weights: tuple[float, ...], tables: list[pandas.DataFrame], make_run: MakeRun, tmp_path: Path
) -> None:
    found = examples(make_run, tmp_path, mix=mix(tmp_path, *weights, stoppingStrategy=strategy))
    expect = datasets.interleave_datasets(
        [datasets.Dataset.from_pandas(frame) for frame in tables],
        probabilities=[weight / sum(weights) for weight in weights],
        seed=make_run().spec.training.seed,
        stopping_strategy=strategy,
    )
    assert found.train.data["text"][:] == expect["text"][:]
    counts = pandas.Series(expect["text"][:])
    assert [part.rows for part in found.sources] == [int(counts.isin(frame.text).sum()) for frame in tables]
    assert counts.duplicated().any() == (strategy == "all_exhausted")
    given = [text for text in notices.given() if "rows of an epoch are from it" in text]
    assert len(given) == 3
    assert (" are repeats" in "".join(given)) == (strategy == "all_exhausted")
    assert (" are left out" in "".join(given)) == (strategy == "first_exhausted")


def test_without_weights_each_row_is_there_once(
    tables: list[pandas.DataFrame], make_run: MakeRun, tmp_path: Path
) -> None:
    found = examples(make_run, tmp_path, mix=mix(tmp_path))
    assert found.train.data["text"][:] == pandas.concat(tables).text.tolist()
    assert [part.rows for part in found.sources] == [30, 60, 90]
    places = [found.train.place(row).rpartition(" of ")[2] for row in (0, 29, 30, 89, 90, 179)]
    assert places == ["a.jsonl)", "a.jsonl)", "b.csv)", "b.csv)", "c.jsonl)", "c.jsonl)"]


def test_the_same_share_of_each_source_is_held_out(
    tables: list[pandas.DataFrame], make_run: MakeRun, tmp_path: Path
) -> None:
    found = examples(make_run, tmp_path, mix=mix(tmp_path, 1, 1, 1), evalFraction=0.1)
    assert [part.eval_rows for part in found.sources] == [3, 6, 9]
    assert found.eval is not None
    assert not {*found.train.data["text"][:]} & {*found.eval.data["text"][:]}


def test_a_source_has_held_out_rows_of_its_own(
    tables: list[pandas.DataFrame], make_run: MakeRun, tmp_path: Path
) -> None:
    given = mix(tmp_path)
    given["sources"][2] |= {"split": "train[:80]", "evalSplit": "train[80:]"}
    found = examples(make_run, tmp_path, mix=given)
    assert found.eval is not None
    assert found.eval.data["text"][:] == tables[2].text[80:].tolist()
    assert [(part.rows, part.eval_rows) for part in found.sources] == [(30, 0), (60, 0), (80, 10)]


def test_a_filter_and_repeats_count_over_all_sources(
    tables: list[pandas.DataFrame], make_run: MakeRun, tmp_path: Path
) -> None:
    pandas.concat([tables[2], tables[0]]).to_json(tmp_path / "c.jsonl", orient="records", lines=True)
    columns = [{"column": "text", "matches": "e"}]
    found = examples(make_run, tmp_path, mix=mix(tmp_path), deduplicate="exact", filter={"columns": columns})
    expect = pandas.concat(tables).text
    assert found.train.data["text"][:] == expect[expect.str.contains("e")].tolist()
    assert found.left_out["train"]["deduplicate"] == int(tables[0].text.str.contains("e").sum())


def test_conversations_of_several_forms_are_mixed(make_run: MakeRun, tmp_path: Path) -> None:
    rows: dict[str, dict[str, Any]] = {
        "chats": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "sharegpt": {"conversations": [{"from": "human", "value": "c"}, {"from": "gpt", "value": "d"}]},
        "alpaca": {"instruction": "e", "input": "", "output": "f"},
    }
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    found = examples(make_run, tmp_path, mix={"sources": [{"files": [str(tmp_path / f"{n}.jsonl")]} for n in rows]})
    chats = [json.loads(chat)["messages"] for chat in found.train.data["chat"]]
    assert [[message["content"] for message in chat] for chat in chats] == [["a", "b"], ["c", "d"], ["e", "f"]]
    assert found.train.form is not None
    assert found.train.form.name == "messages"


@dataclass(frozen=True)
class RefusedCase:
    name: str
    message: str
    files: dict[str, str] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)


REFUSED = [
    RefusedCase(
        name="a source without the column",
        files={"c.jsonl": '{"body": "x", "other": "y"}\n'},
        message="spec.dataset.columns: c.jsonl has no columns by which its rows could be read",
    ),
    RefusedCase(
        name="texts and conversations",
        files={"c.jsonl": '{"messages": [{"role": "user", "content": "x"}]}\n'},
        message="spec.dataset.mix.sources[2]: the rows of c.jsonl are conversations, and those of a.jsonl are texts,"
        " which cannot be mixed",
    ),
    RefusedCase(
        name="a source of which no row is left",
        files={"c.jsonl": '{"text": "x"}\n'},
        dataset={"filter": {"minCharacters": 10}},
        message="spec.dataset.filter.minCharacters: none of the 1 training rows of c.jsonl",
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_a_mix_is_refused(case: RefusedCase, tables: list[pandas.DataFrame], make_run: MakeRun, tmp_path: Path) -> None:
    for name, content in case.files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(Failure) as failure:
        examples(make_run, tmp_path, mix=mix(tmp_path), **case.dataset)
    assert failure.value.message.startswith(case.message)


def test_a_mix_is_in_the_record_the_report_and_the_card(
    tables: list[pandas.DataFrame], make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run(dataset={"mix": mix(tmp_path, 1, 2, 3), "evalFraction": 0.1})
    main(run)
    record = read_prepared(run)
    parts = record.dataset.sources
    assert parts is not None
    assert [part.source for part in parts] == [str(tmp_path / name) for name in ("a.jsonl", "b.csv", "c.jsonl")]
    assert len({part.revision for part in parts} | {record.dataset.revision}) == 4
    assert sum(part.rows for part in parts) == record.dataset.rows
    report = json.loads((Path(run.workspace) / "prepared" / "data-report.json").read_text())
    assert report["splits"]["train"]["epoch"] == {part.source: part.rows for part in parts}
    assert ["Rows", "162", "18"] in data_report.table(report)
    card = model_card.card(run, record, tmp_path)
    for number, part in enumerate(parts, 1):
        assert f"| Source {number} of the mix | {part.source} @ {part.revision}, {part.rows} rows of an epoch" in card
    (tmp_path / "b.csv").write_text("body\nother\n")
    with pytest.raises(Failure, match=r"^spec\.dataset\.mix\.sources\[1\]\.files: .*has changed"):
        main(run)
