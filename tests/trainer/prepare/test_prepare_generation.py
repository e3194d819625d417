"""`prepare` of a GenerateJob: rows with their seeds, and inputs that do not fit."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from diffusers import StableDiffusionXLPipeline

from luthier_api.exitcodes import ExitCode
from luthier_api.run import GenerateRun
from luthier_trainer.data.load import Rows
from luthier_trainer.prepare import carried_columns
from luthier_trainer.prepare.generation import read_inputs
from luthier_trainer.prepare.main import main
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.workspace.prepared import read_prepared

MakeRun = Callable[..., GenerateRun]


def rows_of(run: GenerateRun) -> list[dict[str, Any]]:
    main(run)
    return [json.loads(line) for line in Path(read_prepared(run).dataset_path).read_text().splitlines()]


def test_rows_written_in_the_job(make_generate_run: MakeRun) -> None:
    run = make_generate_run(inputs={"rows": [{"prompt": "a"}, {"prompt": "b", "seed": 5}]}, seed=3, shards=2)
    assert rows_of(run) == [{"row": 0, "prompt": "a", "seed": 3889863157}, {"row": 1, "prompt": "b", "seed": 5}]
    assert (read_prepared(run).plan.rows_per_shard, read_prepared(run).plan.precision) == (1, "fp32")


FILES: list[tuple[str, str, str, dict[str, Any], list[tuple[str, int | None]]]] = [
    # name, file, content, columns, (prompt, own seed)
    ("CSV with gaps in the seeds", "p.csv", "prompt,seed\na,7\nb,\n", {}, [("a", 7), ("b", None)]),
    (
        "JSON lines, columns by other names",
        "p.jsonl",
        '{"q": "a", "s": 1}\n{"q": "b", "s": 2}\n',
        {"prompt": "q", "seed": "s"},
        [("a", 1), ("b", 2)],
    ),
    ("text, a prompt a line", "p.txt", "a\n\nb\n", {}, [("a", None), ("b", None)]),
    ("text with a byte order mark", "p.txt", "\ufeffa\n\ufeffb\n", {}, [("a", None), ("b", None)]),
    ("TSV with ordinary quotation marks", "p.tsv", 'prompt\tn\n"a\t1\nb"\t2\n', {}, [('"a', None), ('b"', None)]),
]


@pytest.mark.parametrize(("name", "file", "content", "columns", "expect"), FILES, ids=[c[0] for c in FILES])
def test_rows_of_files(
    name: str,
    file: str,
    content: str,
    columns: dict[str, Any],
    expect: list[tuple[str, int | None]],
    make_generate_run: MakeRun,
    tmp_path: Path,
) -> None:
    (tmp_path / file).write_text(content)
    rows = rows_of(make_generate_run(inputs={"dataset": {"files": [str(tmp_path / file)]}, "columns": columns}))
    assert [
        (r["prompt"], r["seed"] if own is not None else None) for r, (_, own) in zip(rows, expect, strict=True)
    ] == expect


# Name, file, content, columns, what each line has under `input`.
CARRIED: list[tuple[str, str, str, dict[str, Any], list[Any]]] = [
    (
        "all other columns",
        "p.csv",
        "id,prompt,seed,note\nx7,a,1,\nx8,b,2,hm\n",
        {},
        [{"id": "x7", "note": ""}, {"id": "x8", "note": "hm"}],
    ),
    (
        "those that are named",
        "p.csv",
        "id,prompt,note\nx7,a,\nx8,b,hm\n",
        {"carry": ["id"]},
        [{"id": "x7"}, {"id": "x8"}],
    ),
    ("none", "p.csv", "id,prompt\nx7,a\n", {"carry": []}, [None]),
    ("the role of a column takes it out", "p.jsonl", '{"q": "a", "id": 7}\n', {"prompt": "q"}, [{"id": 7}]),
    (
        "numbers, and true and false",
        "p.jsonl",
        '{"prompt": "a", "n": 7, "x": 0.5, "t": true, "z": null}\n',
        {},
        [{"n": 7, "x": 0.5, "t": True, "z": None}],
    ),
    ("the line of a text file", "p.txt", "\na\n\n  \nb\n", {}, [{"line": 2}, {"line": 5}]),
]


@pytest.mark.parametrize(("name", "file", "content", "columns", "expect"), CARRIED, ids=[c[0] for c in CARRIED])
def test_other_columns_are_carried(
    name: str,
    file: str,
    content: str,
    columns: dict[str, Any],
    expect: list[Any],
    make_generate_run: MakeRun,
    tmp_path: Path,
) -> None:
    (tmp_path / file).write_text(content)
    rows = rows_of(make_generate_run(inputs={"dataset": {"files": [str(tmp_path / file)]}, "columns": columns}))
    assert [row.get("input") for row in rows] == expect
    assert [row["row"] for row in rows] == list(range(len(expect)))


def test_lines_of_several_files_and_of_a_slice_are_named(make_generate_run: MakeRun, tmp_path: Path) -> None:
    for name in ("p", "q"):
        (tmp_path / f"{name}.txt").write_text("\na\n\nb\n")
    files = [str(tmp_path / name) for name in ("p.txt", "q.txt")]
    rows = rows_of(make_generate_run(inputs={"dataset": {"files": files, "split": "train[1:3]"}}))
    assert [row["input"] for row in rows] == [{"line": 4, "file": "p.txt"}, {"line": 2, "file": "q.txt"}]


CELLS: list[tuple[str, Any, Any, Any]] = [
    ("a class", ClassLabel(names=["no", "yes"]), 1, "yes"),
    ("no class", ClassLabel(names=["no", "yes"]), -1, None),
    ("a date", Value("date32"), datetime.date(2026, 1, 2), "2026-01-02"),
    ("not a number", Value("float64"), float("nan"), None),
    ("a number of a column that may go beyond 63 bits", Value("uint64"), 7, "7"),
    (
        "a list of objects",
        List({"at": Value("timestamp[s]")}),
        [{"at": datetime.datetime(2026, 1, 2)}],
        [{"at": "2026-01-02T00:00:00"}],
    ),
    ("a decimal", Value("decimal128(10,2)"), Decimal("1.50"), "1.50"),
]


@pytest.mark.parametrize(("cell", "feature", "value", "expect"), CELLS, ids=[c[0] for c in CELLS])
def test_cells_become_json(cell: str, feature: Any, value: Any, expect: Any) -> None:
    data = Dataset.from_dict({"x": [value]}, features=Features({"x": feature}))
    assert carried_columns.plain(data[0]["x"], data.features["x"]) == expect


def test_what_json_cannot_hold_is_left_out_or_refused() -> None:
    rows = Rows(Dataset.from_dict({"prompt": ["a"], "raw": [b"1"], "id": [1]}), "p.parquet")
    notices.forget()
    assert list(carried_columns.columns(rows, None, ["prompt"], "spec.inputs.columns.carry")) == ["id"]
    (said,) = notices.given()
    assert said.startswith("spec.inputs.columns.carry: the columns raw of p.parquet are not carried into the outputs")
    with pytest.raises(Failure, match=r'spec\.inputs\.columns\.carry: column "raw" of p.parquet holds'):
        carried_columns.columns(rows, ["raw"], ["prompt"], "spec.inputs.columns.carry")
    with pytest.raises(Failure, match='no column "ids"'):
        carried_columns.columns(rows, ["ids"], ["prompt"], "spec.inputs.columns.carry")


@pytest.mark.parametrize("inputs", ["rows", "file"])
def test_an_empty_negative_prompt_is_none(inputs: str, make_generate_run: MakeRun, tmp_path: Path) -> None:
    """Written in the job as in a file; without the model, which would be a whole pipeline."""
    (tmp_path / "p.csv").write_text("prompt,negative_prompt\na,\nb,rain\n")
    given = {"rows": [{"prompt": "a", "negativePrompt": ""}, {"prompt": "b", "negativePrompt": "rain"}]}
    run = make_generate_run(
        task="text-to-image", inputs=given if inputs == "rows" else {"dataset": {"files": [str(tmp_path / "p.csv")]}}
    )
    rows, _, _ = read_inputs(run, tmp_path / "cache")
    assert [row.get("negativePrompt") for row in rows] == [None, "rain"]


def test_seeds_depend_on_the_row_and_the_job_alone(make_generate_run: MakeRun) -> None:
    inputs = {"rows": [{"prompt": str(i)} for i in range(100)]}
    seeds = [
        [r["seed"] for r in rows_of(make_generate_run(f"g{i}", inputs=inputs, seed=s, shards=n))]
        for i, (s, n) in enumerate([(1, 1), (1, 5), (2, 1)])
    ]
    assert seeds[0] == seeds[1] != seeds[2]
    assert len(set(seeds[0])) == 100


MISTAKES: list[tuple[str, str, dict[str, Any], ExitCode, str]] = [
    (
        "no prompts",
        "text,n\na,1\n",
        {},
        ExitCode.INVALID_DATASET,
        'spec.inputs.columns.prompt: no column "prompt" in p.csv (columns: text, n). Name the one that plays this role',
    ),
    (
        "a blank prompt",
        "prompt,n\na,1\n,2\n",
        {},
        ExitCode.INVALID_DATASET,
        (
            'spec.inputs.columns.prompt: column "prompt" of p.csv is blank in 1 of 2 rows. The first is row 1, counted'
            " from 0 (line 3 of p.csv). Remove them"
        ),
    ),
    (
        "an unquoted comma, one column",
        "prompt\na, b\n",
        {},
        ExitCode.INVALID_DATASET,
        (
            "spec.inputs.dataset.files: row 0, counted from 0 (line 2 of {folder}/p.csv) has 2 fields, and the header"
            ' has 1 (prompt). With the first as an index, as pandas has it, it would be prompt=" b"; with the first'
            " ones joined, prompt=\"a, b\". Put quotation marks around cells that hold ',', or name every column in the"
            " header"
        ),
    ),
    (
        "an unquoted comma, two columns",
        "prompt,n\na,1\nb, c,2\n",
        {},
        ExitCode.INVALID_DATASET,
        (
            "spec.inputs.dataset.files: row 1, counted from 0 (line 3 of {folder}/p.csv) has 3 fields, and the header"
            ' has 2 (prompt, n). With the first as an index, as pandas has it, it would be prompt=" c", n="2"; with the'
            ' first ones joined, prompt="b, c", n="2". Put quotation marks around cells that hold \',\', or name every'
            " column in the header"
        ),
    ),
    (
        "a named column that is not there",
        "prompt,seeed\na,1\n",
        {"columns": {"seed": "seeds"}},
        ExitCode.INVALID_DATASET,
        'spec.inputs.columns.seed: no column "seeds" in p.csv (columns: prompt, seeed). Did you mean "seeed"?',
    ),
    (
        "a seed that is none",
        "prompt,seed\na,x7\n",
        {},
        ExitCode.INVALID_DATASET,
        "spec.inputs.columns.seed: row 0 of p.csv has the seed 'x7'; a seed is a whole number from 0 to 2^32 - 1",
    ),
    (
        "a seed that is true",
        '{"prompt": "a", "seed": true}\n',
        {},
        ExitCode.INVALID_DATASET,
        "spec.inputs.columns.seed: row 0 of p.jsonl has the seed True; a seed is a whole number from 0 to 2^32 - 1",
    ),
    (
        "negative prompts for text",
        "prompt,negative_prompt\na,b\n",
        {},
        ExitCode.INVALID_SPEC,
        "spec.inputs: only text-to-image has negative prompts; remove them for text-generation",
    ),
    (
        "images from a language model",
        "prompt,n\na,1\n",
        {"task": "text-to-image"},
        ExitCode.INVALID_SPEC,
        "spec.model.path: text-to-image needs a diffusers pipeline, but there is no model_index.json",
    ),
]


@pytest.mark.parametrize(("name", "content", "spec", "code", "message"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_mistake_names_its_field(
    name: str,
    content: str,
    spec: dict[str, Any],
    code: ExitCode,
    message: str,
    make_generate_run: MakeRun,
    tmp_path: Path,
) -> None:
    file = tmp_path / ("p.jsonl" if content.startswith("{") else "p.csv")
    file.write_text(content)
    inputs = {"dataset": {"files": [str(file)]}} | ({"columns": spec["columns"]} if "columns" in spec else {})
    with pytest.raises(Failure) as failure:
        main(make_generate_run(inputs=inputs, **{k: v for k, v in spec.items() if k != "columns"}))
    assert (failure.value.code, failure.value.message) == (code, message.replace("{folder}", str(tmp_path)))


def test_a_pipeline(make_generate_run: MakeRun, sdxl: Path) -> None:
    run = make_generate_run(
        task="text-to-image", model={"path": str(sdxl)}, inputs={"rows": [{"prompt": "a", "negativePrompt": "b"}]}
    )
    assert rows_of(run)[0]["negativePrompt"] == "b"
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl)
    assert read_prepared(run).plan.parameters == sum(
        m.num_parameters() for m in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
    )
