"""The rows of a GenerateJob as the shards read them: identifiers, seeds, overrides, templates and sweeps.

What a sweep or a template makes is compared with pandas.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas
import pytest

from luthier_api.exitcodes import ExitCode
from luthier_api.run import GenerateRun
from luthier_trainer.generation.overrides import with_overrides
from luthier_trainer.generation.rows import EVERY, Samples, read, span_of_shard, write
from luthier_trainer.prepare.generation_rows import read_inputs, write_rows
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.failure import Failure

Line = dict[str, Any]


def prepared(tmp_path: Path, inputs: dict[str, Any], **spec: Any) -> list[Line]:
    """The rows of a job, without its model."""
    given = {"task": "text-to-image", "model": {"path": "/m"}, "inputs": inputs} | spec
    run = GenerateRun.model_validate({"name": "rows", "workspace": str(tmp_path), "spec": given})
    notices.forget()
    found, _, _ = read_inputs(run, tmp_path / "cache")
    write_rows(run, found, tmp_path / "prepared.jsonl", lambda line: line)
    return list(read(tmp_path / "prepared.jsonl"))


def table(tmp_path: Path, data: pandas.DataFrame) -> dict[str, Any]:
    """A dataset with these rows."""
    path = tmp_path / "rows.jsonl"
    data.to_json(path, orient="records", lines=True)
    return {"files": [str(path)]}


def inline(*rows: Line, **more: Any) -> dict[str, Any]:
    return {"rows": list(rows), **more}


def seeds(lines: list[Line]) -> dict[str, int]:
    return {line.get("id", line["prompt"]): line["seed"] for line in lines}


def test_a_seed_follows_from_the_row_and_not_from_its_neighbours(tmp_path: Path) -> None:
    rows = [{"prompt": f"lute {i}"} for i in range(50)]
    straight = seeds(prepared(tmp_path, inline(*rows)))
    assert len(set(straight.values())) == 50
    assert seeds(prepared(tmp_path, inline({"prompt": "an oud"}, *reversed(rows)))) == straight | {
        "an oud": seeds(prepared(tmp_path, inline({"prompt": "an oud"})))["an oud"]
    }
    assert seeds(prepared(tmp_path, inline(*rows), seed=1)).values() != straight.values()
    # With an identifier, it follows from that alone.
    named = prepared(tmp_path, inline({"id": "x", "prompt": "a"}, {"id": "y", "prompt": "a"}))
    again = prepared(tmp_path, inline({"id": "y", "prompt": "b"}, {"id": "x", "prompt": "c"}))
    assert seeds(named) == seeds(again)


def test_equal_rows_have_other_seeds_and_are_reported(tmp_path: Path) -> None:
    lines = prepared(tmp_path, inline(*[{"prompt": "a"}] * 3, {"prompt": "b"}))
    assert len({line["seed"] for line in lines}) == 4
    assert notices.given() == [
        "spec.inputs: 2 of 4 rows are the same as an earlier one; each gets outputs and a seed of its own. The first is"
        " row 1"
    ]
    prepared(tmp_path, inline({"id": "x", "prompt": "a"}, {"id": "x", "prompt": "b"}))
    assert notices.given() == [
        "spec.inputs: 1 of 2 rows have the id of an earlier one; each gets outputs and a seed of its own. The first is"
        " row 1 (x)"
    ]


def test_columns_identify_and_override(tmp_path: Path) -> None:
    data = pandas.DataFrame(
        {
            "prompt": ["a", "b", "c", "d"],
            "key": [7, 8, 9, 10],
            "n_steps": [20, None, 30, 0],
            "sampler": ["euler", None, "", "ddim"],
            "copies": [None, 3, None, None],
        }
    )
    columns = {"id": "key", "settings": {"steps": "n_steps", "scheduler": "sampler", "perPrompt": "copies"}}
    lines = prepared(tmp_path, {"dataset": table(tmp_path, data), "columns": columns}, image={"perPrompt": 2})
    assert [line["id"] for line in lines] == ["7", "8", "9", "10"]
    assert [line.get("settings") for line in lines[:3]] == [{"steps": 20, "scheduler": "euler"}, None, {"steps": 30}]
    assert [line.get("outputs") for line in lines] == [None, 3, None, 1]
    assert [line.get("error") for line in lines] == [
        None,
        None,
        None,
        "image.steps: Input should be greater than or equal to 1, and not 0.0",
    ]
    assert all("input" not in line for line in lines)


@dataclass(frozen=True)
class SweepCase:
    name: str
    sweep: dict[str, Any]
    expect: pandas.DataFrame  # its columns: field of the settings, seed, or text of the template


GRID = pandas.DataFrame({"guidance": [3.0, 6.0]}).merge(pandas.DataFrame({"seed": [1, 2, 3]}), how="cross")
SWEEPS = [
    SweepCase(
        name="product",
        sweep={"product": {"seed": [1, 2, 3], "image": {"guidance": [3.0, 6.0]}}},
        expect=GRID.sort_values(["seed", "guidance"]),
    ),
    SweepCase(
        name="zip",
        sweep={"zip": {"fields": {"style": ["oil", "ink"]}, "image": {"guidance": [3.0, 6.0], "steps": [10, 20]}}},
        expect=pandas.DataFrame({"style": ["oil", "ink"], "guidance": [3.0, 6.0], "steps": [10, 20]}),
    ),
]


@pytest.mark.parametrize("case", SWEEPS, ids=lambda case: case.name)
def test_a_sweep_makes_rows_of_each_row(tmp_path: Path, case: SweepCase) -> None:
    rows = pandas.DataFrame({"thing": ["a lute", "an {oud}"], "style": ["plain", "plain"]})
    inputs = {"dataset": table(tmp_path, rows), "template": "{thing}, {style} {{x}}", "sweep": case.sweep}
    lines = prepared(tmp_path, inputs)
    swept = [name for name in case.expect if name in rows]
    expect = rows.drop(columns=swept).merge(case.expect, how="cross")
    assert [line["prompt"] for line in lines] == [f"{r.thing}, {r.style} {{x}}" for r in expect.itertuples()]
    assert [line["row"] for line in lines] == list(range(len(expect)))
    settings = [name for name in ("guidance", "steps") if name in expect]
    assert [line["settings"] for line in lines] == expect[settings].to_dict("records")
    if "seed" in expect:
        assert [line["seed"] for line in lines] == list(expect["seed"])
    else:
        # Points of one row share its seed, so that their outputs can be compared.
        assert [line["seed"] for line in lines] == [lines[0]["seed"]] * 2 + [lines[2]["seed"]] * 2
        assert lines[0]["seed"] != lines[2]["seed"]


def test_rows_of_the_job_fill_a_template_and_override(tmp_path: Path) -> None:
    lines = prepared(
        tmp_path,
        inline(
            {"fields": {"thing": "a lute"}, "overrides": {"image": {"steps": 5}}},
            {"prompt": "an oud", "fields": {"thing": "two"}},
            {"prompt": "nothing"},
            template="{thing} of maple",
        ),
    )
    assert [line.get("prompt") for line in lines] == ["a lute of maple", "two of maple", None]
    assert [line.get("settings") for line in lines] == [{"steps": 5}, None, None]
    assert [line.get("input") for line in lines] == [{"thing": "a lute"}, {"thing": "two"}, None]
    assert lines[2]["error"] == "template: the row has no thing; it has prompt"


@dataclass(frozen=True)
class MistakeCase:
    name: str
    inputs: dict[str, Any]
    message: str
    code: ExitCode = ExitCode.INVALID_SPEC
    spec: dict[str, Any] = field(default_factory=dict)


A = {"prompt": "a"}
MISTAKES = [
    MistakeCase(
        name="lists of other lengths",
        inputs=inline(A, sweep={"zip": {"seed": [1, 2], "image": {"steps": [1]}}}),
        message="spec.inputs.sweep.zip: the lists must have the same number of values: seed has 2, steps has 1",
    ),
    MistakeCase(
        name="no list",
        inputs=inline(A, sweep={"product": {}}),
        message="spec.inputs.sweep: has no values; list some, or remove it",
    ),
    MistakeCase(
        name="more than a name",
        inputs=inline(A, template="{a:>5}"),
        message="spec.inputs.template: {a} must be a name alone, such as {thing}",
    ),
    MistakeCase(
        name="a brace alone",
        inputs=inline(A, template="{a"),
        message="spec.inputs.template: expected '}' before end of string. Write {name} for a text of the row, and {{ or"
        " }} for a brace",
    ),
    MistakeCase(
        name="settings that do not go together",
        inputs=inline(A, sweep={"product": {"text": {"perPrompt": [2, 3]}}}),
        spec={"task": "text-generation"},
        code=ExitCode.INVALID_DATASET,
        message="spec.inputs: not one row can be worked on. First of them: row 0: text.perPrompt: several texts for a"
        " row would be the same without a temperature; set text.temperature",
    ),
    MistakeCase(
        name="a negative prompt without guidance",
        inputs=inline(A | {"negativePrompt": "b", "overrides": {"image": {"guidance": 1}}}),
        code=ExitCode.INVALID_DATASET,
        message="spec.inputs: not one row can be worked on. First of them: row 0: negativePrompt: has no effect with"
        " image.guidance up to 1; remove it, or set guidance above 1",
    ),
]


@pytest.mark.parametrize("case", MISTAKES, ids=lambda case: case.name)
def test_a_mistake_names_its_field(tmp_path: Path, case: MistakeCase) -> None:
    with pytest.raises(Failure) as failure:
        prepared(tmp_path, case.inputs, **case.spec)
    assert (failure.value.code, failure.value.message) == (case.code, case.message)


@pytest.mark.parametrize("shards", [1, 3, 7, 5000])
def test_shards_read_each_output_once_and_in_order(tmp_path: Path, shards: int) -> None:
    """Also where rows have other numbers of outputs, and the first output of a shard is in the middle of a row."""
    rows = [{"row": i, "prompt": "a", "seed": i} | ({"outputs": 1 + i % 4} if i % 3 else {}) for i in range(2 * EVERY)]
    written = write(tmp_path / "rows.jsonl", rows, per_prompt=2)
    run = GenerateRun.model_validate(
        {"name": "a", "workspace": "/", "spec": {"task": "text-to-image", "model": {"path": "/m"}, "inputs": inline(A)}}
    )
    samples = Samples(tmp_path / "rows.jsonl", run.spec.settings, 2, with_overrides)
    expect = pandas.DataFrame(rows).fillna({"outputs": 2})
    expect = expect.loc[expect.index.repeat(expect["outputs"].astype(int))]
    assert written.outputs == len(expect)
    spans = [span_of_shard(written.outputs, shards, i) for i in range(shards)]
    chosen = spans if shards < 10 else spans[:2] + spans[2500:2502] + spans[-1:]
    for span in chosen:
        found = list(samples.between(span.start, span.stop))
        assert [s.number for s in found] == list(span)
        part = expect.iloc[span.start : span.stop]
        assert [s.row for s in found] == list(part["row"])
        assert [s.seed for s in found] == [s.row + s.index for s in found]
    assert sum(map(len, spans)) == written.outputs
    assert max(map(len, spans)) - min(map(len, spans)) <= 1


def test_overridden_settings_reach_the_sample(tmp_path: Path) -> None:
    lines = prepared(tmp_path, inline({"prompt": "a", "overrides": {"image": {"steps": 5, "perPrompt": 2}}}, A))
    assert json.dumps(lines[0]["settings"]) == '{"steps": 5}'
    run = GenerateRun.model_validate(
        {"name": "a", "workspace": "/", "spec": {"task": "text-to-image", "model": {"path": "/m"}, "inputs": inline(A)}}
    )
    samples = list(Samples(tmp_path / "prepared.jsonl", run.spec.settings, 1, with_overrides).between(0, 3))
    assert [(s.row, s.index, s.settings.steps, s.variant) for s in samples] == [
        (0, 0, 5, '{"steps": 5}'),
        (0, 1, 5, '{"steps": 5}'),
        (1, 0, 30, ""),
    ]
