"""`prepare` of a GenerateJob: rows with their seeds, and inputs that do not fit."""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from diffusers import StableDiffusionXLPipeline
from transformers import AutoTokenizer

from luthier_api.exitcodes import ExitCode
from luthier_api.run import GenerateRun
from luthier_trainer.data.load import Rows
from luthier_trainer.prepare import carried_columns
from luthier_trainer.prepare.generation_rows import read_inputs
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
    assert rows_of(run) == [{"row": 0, "prompt": "a", "seed": 4274544021}, {"row": 1, "prompt": "b", "seed": 5}]
    assert (read_prepared(run).plan.rows_per_shard, read_prepared(run).plan.precision) == (1, "fp32")


@dataclass(frozen=True)
class FileCase:
    name: str
    file: str
    content: str
    expect: list[tuple[str, int | None]]  # prompt and own seed of each row
    columns: dict[str, Any] = field(default_factory=dict)


FILES = [
    FileCase(
        name="CSV with gaps in the seeds",
        file="p.csv",
        content="prompt,seed\na,7\nb,\n",
        expect=[("a", 7), ("b", None)],
    ),
    FileCase(
        name="JSON lines, columns by other names",
        file="p.jsonl",
        content='{"q": "a", "s": 1}\n{"q": "b", "s": 2}\n',
        columns={"prompt": "q", "seed": "s"},
        expect=[("a", 1), ("b", 2)],
    ),
    FileCase(
        name="text, a prompt a line",
        file="p.txt",
        content="a\n\nb\n",
        expect=[("a", None), ("b", None)],
    ),
    FileCase(
        name="text with a byte order mark",
        file="p.txt",
        content="\ufeffa\n\ufeffb\n",
        expect=[("a", None), ("b", None)],
    ),
    FileCase(
        name="TSV with ordinary quotation marks",
        file="p.tsv",
        content='prompt\tn\n"a\t1\nb"\t2\n',
        expect=[('"a', None), ('b"', None)],
    ),
]


@pytest.mark.parametrize("case", FILES, ids=lambda case: case.name)
def test_rows_of_files(case: FileCase, make_generate_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / case.file).write_text(case.content)
    rows = rows_of(
        make_generate_run(inputs={"dataset": {"files": [str(tmp_path / case.file)]}, "columns": case.columns})
    )
    assert [
        (r["prompt"], r["seed"] if own is not None else None) for r, (_, own) in zip(rows, case.expect, strict=True)
    ] == case.expect


@dataclass(frozen=True)
class CarriedCase:
    name: str
    file: str
    content: str
    expect: list[Any]
    columns: dict[str, Any] = field(default_factory=dict)


CARRIED = [
    CarriedCase(
        name="all other columns",
        file="p.csv",
        content="id,prompt,seed,note\nx7,a,1,\nx8,b,2,hm\n",
        expect=[{"id": "x7", "note": ""}, {"id": "x8", "note": "hm"}],
    ),
    CarriedCase(
        name="those that are named",
        file="p.csv",
        content="id,prompt,note\nx7,a,\nx8,b,hm\n",
        columns={"carry": ["id"]},
        expect=[{"id": "x7"}, {"id": "x8"}],
    ),
    CarriedCase(
        name="none",
        file="p.csv",
        content="id,prompt\nx7,a\n",
        columns={"carry": []},
        expect=[None],
    ),
    CarriedCase(
        name="the role of a column takes it out",
        file="p.jsonl",
        content='{"q": "a", "id": 7}\n',
        columns={"prompt": "q"},
        expect=[{"id": 7}],
    ),
    CarriedCase(
        name="numbers, and true and false",
        file="p.jsonl",
        content='{"prompt": "a", "n": 7, "x": 0.5, "t": true, "z": null}\n',
        expect=[{"n": 7, "x": 0.5, "t": True, "z": None}],
    ),
    CarriedCase(
        name="the line of a text file",
        file="p.txt",
        content="\na\n\n  \nb\n",
        expect=[{"line": 2}, {"line": 5}],
    ),
]


@pytest.mark.parametrize("case", CARRIED, ids=lambda case: case.name)
def test_other_columns_are_carried(case: CarriedCase, make_generate_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / case.file).write_text(case.content)
    rows = rows_of(
        make_generate_run(inputs={"dataset": {"files": [str(tmp_path / case.file)]}, "columns": case.columns})
    )
    assert [row.get("input") for row in rows] == case.expect
    assert [row["row"] for row in rows] == list(range(len(case.expect)))


def test_lines_of_several_files_and_of_a_slice_are_named(make_generate_run: MakeRun, tmp_path: Path) -> None:
    for name in ("p", "q"):
        (tmp_path / f"{name}.txt").write_text("\na\n\nb\n")
    files = [str(tmp_path / name) for name in ("p.txt", "q.txt")]
    rows = rows_of(make_generate_run(inputs={"dataset": {"files": files, "split": "train[1:3]"}}))
    assert [row["input"] for row in rows] == [{"line": 4, "file": "p.txt"}, {"line": 2, "file": "q.txt"}]


@dataclass(frozen=True)
class CellCase:
    name: str
    feature: Any
    value: Any
    expect: Any


CELLS = [
    CellCase(
        name="a class",
        feature=ClassLabel(names=["no", "yes"]),
        value=1,
        expect="yes",
    ),
    CellCase(
        name="no class",
        feature=ClassLabel(names=["no", "yes"]),
        value=-1,
        expect=None,
    ),
    CellCase(
        name="a date",
        feature=Value("date32"),
        value=datetime.date(2026, 1, 2),
        expect="2026-01-02",
    ),
    CellCase(
        name="not a number",
        feature=Value("float64"),
        value=float("nan"),
        expect=None,
    ),
    CellCase(
        name="a number of a column that may go beyond 63 bits",
        feature=Value("uint64"),
        value=7,
        expect="7",
    ),
    CellCase(
        name="a list of objects",
        feature=List({"at": Value("timestamp[s]")}),
        value=[{"at": datetime.datetime(2026, 1, 2)}],
        expect=[{"at": "2026-01-02T00:00:00"}],
    ),
    CellCase(
        name="a decimal",
        feature=Value("decimal128(10,2)"),
        value=Decimal("1.50"),
        expect="1.50",
    ),
]


@pytest.mark.parametrize("case", CELLS, ids=lambda case: case.name)
def test_cells_become_json(case: CellCase) -> None:
    data = Dataset.from_dict({"x": [case.value]}, features=Features({"x": case.feature}))
    assert carried_columns.plain(data[0]["x"], data.features["x"]) == case.expect


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


@dataclass(frozen=True)
class MistakeCase:
    name: str
    content: str
    code: ExitCode
    message: str
    spec: dict[str, Any] = field(default_factory=dict)


MISTAKES = [
    MistakeCase(
        name="no prompts",
        content="text,n\na,1\n",
        code=ExitCode.INVALID_DATASET,
        message=(
            'spec.inputs.columns.prompt: no column "prompt" in p.csv (columns: text, n). Name the one that plays this'
            " role. The first line of a table is read as the names of its columns"
        ),
    ),
    MistakeCase(
        name="not one prompt",
        content="prompt,n\n,1\n ,2\n",
        code=ExitCode.INVALID_DATASET,
        message=("spec.inputs: not one row can be worked on. First of them: row 0: prompt: blank; write a text"),
    ),
    MistakeCase(
        name="more bad rows than the job allows",
        content="prompt,n\na,1\n,2\n",
        spec={"maxFailedRows": 0},
        code=ExitCode.INVALID_DATASET,
        message=(
            "spec.maxFailedRows: 1 of 2 rows cannot be worked on, and 0 are allowed. First of them: row 1: prompt:"
            " blank; write a text. Correct the rows, or raise maxFailedRows"
        ),
    ),
    MistakeCase(
        name="an unquoted comma, one column",
        content="prompt\na, b\n",
        code=ExitCode.INVALID_DATASET,
        message=(
            "spec.inputs.dataset.files: row 0, counted from 0 (line 2 of {folder}/p.csv) has 2 fields, and the header"
            ' has 1 (prompt). With the first as an index, as pandas has it, it would be prompt=" b"; with the first'
            " ones joined, prompt=\"a, b\". Put quotation marks around cells that hold ',', or name every column in the"
            " header"
        ),
    ),
    MistakeCase(
        name="an unquoted comma, two columns",
        content="prompt,n\na,1\nb, c,2\n",
        code=ExitCode.INVALID_DATASET,
        message=(
            "spec.inputs.dataset.files: row 1, counted from 0 (line 3 of {folder}/p.csv) has 3 fields, and the header"
            ' has 2 (prompt, n). With the first as an index, as pandas has it, it would be prompt=" c", n="2"; with the'
            ' first ones joined, prompt="b, c", n="2". Put quotation marks around cells that hold \',\', or name every'
            " column in the header"
        ),
    ),
    MistakeCase(
        name="a named column that is not there",
        content="prompt,seeed\na,1\n",
        spec={"columns": {"seed": "seeds"}},
        code=ExitCode.INVALID_DATASET,
        message='spec.inputs.columns.seed: no column "seeds" in p.csv (columns: prompt, seeed). Did you mean "seeed"?',
    ),
    MistakeCase(
        name="a seed that is none",
        content="prompt,seed\na,x7\n",
        code=ExitCode.INVALID_DATASET,
        message=(
            "spec.inputs: not one row can be worked on. First of them: row 0: seed: 'x7' is no seed, which is a whole"
            " number from 0 to 2^32 - 1"
        ),
    ),
    MistakeCase(
        name="a seed that is true",
        content='{"prompt": "a", "seed": true}\n',
        code=ExitCode.INVALID_DATASET,
        message=(
            "spec.inputs: not one row can be worked on. First of them: row 0: seed: True is no seed, which is a whole"
            " number from 0 to 2^32 - 1"
        ),
    ),
    MistakeCase(
        name="negative prompts for text",
        content="prompt,negative_prompt\na,b\n",
        code=ExitCode.INVALID_SPEC,
        message="spec.inputs: negative prompts are for text-to-image and image-to-image; remove them for"
        " text-generation",
    ),
    MistakeCase(
        name="images from a language model",
        content="prompt,n\na,1\n",
        spec={"task": "text-to-image"},
        code=ExitCode.INVALID_SPEC,
        message="spec.model.path: a diffusers pipeline is needed, but there is no model_index.json",
    ),
]


@pytest.mark.parametrize("case", MISTAKES, ids=lambda case: case.name)
def test_a_mistake_names_its_field(case: MistakeCase, make_generate_run: MakeRun, tmp_path: Path) -> None:
    file = tmp_path / ("p.jsonl" if case.content.startswith("{") else "p.csv")
    file.write_text(case.content)
    inputs = {"dataset": {"files": [str(file)]}} | ({"columns": case.spec["columns"]} if "columns" in case.spec else {})
    with pytest.raises(Failure) as failure:
        main(make_generate_run(inputs=inputs, **{k: v for k, v in case.spec.items() if k != "columns"}))
    assert (failure.value.code, failure.value.message) == (case.code, case.message.replace("{folder}", str(tmp_path)))


def test_a_system_prompt_stands_before_messages_without_one(
    make_generate_run: MakeRun, tiny_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    asked, told = {"role": "user", "content": "Why?"}, {"role": "system", "content": "Be long."}
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({"prompt": messages}) + "\n" for messages in ([asked], [told, asked])))
    text = {"chat": True, "systemPrompt": "Be brief.", "maxNewTokens": 8}
    run = make_generate_run(
        model={"path": str(tmp_path / "model")}, inputs={"dataset": {"files": [str(file)]}}, text=text
    )
    main(run)
    assert [row["prompt"] for row in rows_of(run)] == ["<system>Be brief.<user>Why?", "<system>Be long.<user>Why?"]


TOOL = {"type": "function", "function": {"name": "weather", "description": "The weather of a city"}}
WITH_TOOLS = "{% if tools %}[{{ tools | tojson }}]{% endif %}"
MESSAGES = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


@dataclass(frozen=True)
class ToolsCase:
    name: str
    tools: Any
    written: list[Any] | None = None
    error: str | None = None
    template: str = WITH_TOOLS + MESSAGES


TOOLS = [
    ToolsCase(name="a list", tools=[TOOL], written=[TOOL]),
    ToolsCase(name="its JSON text", tools=json.dumps([TOOL]), written=[TOOL]),
    ToolsCase(name="functions alone", tools=[TOOL["function"]], written=[TOOL]),
    ToolsCase(name="none", tools=None),
    ToolsCase(name="an empty list", tools=[]),
    ToolsCase(name="no list", tools="soon", error='tools: column "can": "soon" is no list of JSON schemas'),
    ToolsCase(
        name="a tool without a name",
        tools=[{"type": "function", "function": {"parameters": {}}}],
        error='tools: column "can": {"type": "function", "function": {"parameters": {}}} has no name',
    ),
    ToolsCase(
        name="a template without tools",
        tools=[TOOL],
        template=MESSAGES,
        error="tools: the chat template leaves them out; remove them, or choose a model that knows tools",
    ),
]


@pytest.mark.parametrize("case", TOOLS, ids=lambda case: case.name)
def test_tools_are_written_by_the_template(
    case: ToolsCase, make_generate_run: MakeRun, tiny_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = case.template
    tokenizer.save_pretrained(tmp_path / "model")
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"prompt": "Why?", "can": case.tools}) + '\n{"prompt": "Why not?", "can": null}\n')
    inputs = {"dataset": {"files": [str(file)]}, "columns": {"tools": "can"}}
    run = make_generate_run(
        model={"path": str(tmp_path / "model")}, inputs=inputs, text={"chat": True, "maxNewTokens": 8}
    )
    first, second = rows_of(run)
    asked = [{"role": "user", "content": "Why?"}]
    written = tokenizer.apply_chat_template(
        asked, tools=case.written, tokenize=False, add_generation_prompt=True, return_dict=False
    )
    assert (first.get("error"), second["prompt"]) == (case.error, "<user>Why not?")
    if case.error is None:
        assert first["prompt"] == written
        assert "tools" not in first


def test_tools_of_inline_rows(make_generate_run: MakeRun, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = WITH_TOOLS + MESSAGES
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": "Why?", "tools": json.dumps([TOOL])}, {"prompt": "Why?", "tools": "{}x"}, {"prompt": "Why?"}]
    run = make_generate_run(
        model={"path": str(tmp_path / "model")}, inputs={"rows": rows}, text={"chat": True, "maxNewTokens": 8}
    )
    first, second, third = rows_of(run)
    assert first["prompt"] == f"[{json.dumps([TOOL])}]<user>Why?"
    assert second["error"] == 'tools: "{}x" is no list of JSON schemas'
    assert third["prompt"] == "<user>Why?"


def test_a_constraint_that_cannot_be_compiled_is_refused(make_generate_run: MakeRun) -> None:
    with pytest.raises(Failure, match="regex: cannot be used: ") as failure:
        main(make_generate_run(inputs={"rows": [{"prompt": "a"}]}, text={"maxNewTokens": 8, "regex": "(a"}))
    assert failure.value.code is ExitCode.INVALID_SPEC


def test_a_pipeline(make_generate_run: MakeRun, sdxl: Path) -> None:
    run = make_generate_run(
        task="text-to-image", model={"path": str(sdxl)}, inputs={"rows": [{"prompt": "a", "negativePrompt": "b"}]}
    )
    assert rows_of(run)[0]["negativePrompt"] == "b"
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl)
    assert read_prepared(run).plan.parameters == sum(
        m.num_parameters() for m in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
    )
