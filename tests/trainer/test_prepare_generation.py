"""`prepare` of a GenerateJob: rows with their seeds, and inputs that do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionXLPipeline

from luthier_api.exitcodes import ExitCode
from luthier_api.run import GenerateRun
from luthier_trainer.ending import Failure
from luthier_trainer.prepare import main
from luthier_trainer.prepared import read_prepared

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
    ("JSON lines, columns by other names", "p.jsonl", '{"q": "a", "s": 1}\n{"q": "b", "s": 2}\n', {"prompt": "q", "seed": "s"}, [("a", 1), ("b", 2)]),
    ("text, a prompt a line", "p.txt", "a\n\nb\n", {}, [("a", None), ("b", None)]),
]


@pytest.mark.parametrize(("name", "file", "content", "columns", "expect"), FILES, ids=[c[0] for c in FILES])
def test_rows_of_files(
    name: str, file: str, content: str, columns: dict[str, Any], expect: list[tuple[str, int | None]], make_generate_run: MakeRun, tmp_path: Path
) -> None:
    (tmp_path / file).write_text(content)
    rows = rows_of(make_generate_run(inputs={"dataset": {"files": [str(tmp_path / file)]}, "columns": columns}))
    assert [(r["prompt"], r["seed"] if own is not None else None) for r, (_, own) in zip(rows, expect, strict=True)] == expect


def test_seeds_depend_on_the_row_and_the_job_alone(make_generate_run: MakeRun) -> None:
    inputs = {"rows": [{"prompt": str(i)} for i in range(100)]}
    seeds = [[r["seed"] for r in rows_of(make_generate_run(f"g{i}", inputs=inputs, seed=s, shards=n))] for i, (s, n) in enumerate([(1, 1), (1, 5), (2, 1)])]
    assert seeds[0] == seeds[1] != seeds[2]
    assert len(set(seeds[0])) == 100


MISTAKES: list[tuple[str, str, dict[str, Any], ExitCode, str]] = [
    ("no prompts", "text,n\na,1\n", {}, ExitCode.INVALID_DATASET,
     'spec.inputs.columns.prompt: no column "prompt" in p.csv (columns: text, n). Name the one that plays this role'),
    ("a blank prompt", "prompt,n\na,1\n,2\n", {}, ExitCode.INVALID_DATASET,
     'spec.inputs.columns.prompt: column "prompt" of p.csv is blank in 1 of 2 rows. The first is row 1, counted from 0 (line 3 of p.csv). Remove them'),
    ("a named column that is not there", "prompt,seeed\na,1\n", {"columns": {"seed": "seeds"}}, ExitCode.INVALID_DATASET,
     'spec.inputs.columns.seed: no column "seeds" in p.csv (columns: prompt, seeed). Did you mean "seeed"?'),
    ("a seed that is none", "prompt,seed\na,x7\n", {}, ExitCode.INVALID_DATASET,
     "spec.inputs.columns.seed: row 0 of p.csv has the seed 'x7'; a seed is a whole number from 0 to 2^32 - 1"),
    ("negative prompts for text", "prompt,negative_prompt\na,b\n", {}, ExitCode.INVALID_SPEC,
     "spec.inputs: only text-to-image has negative prompts; remove them for text-generation"),
    ("images from a language model", "prompt,n\na,1\n", {"task": "text-to-image"}, ExitCode.INVALID_SPEC,
     "spec.model.path: text-to-image needs a diffusers pipeline, but there is no model_index.json"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "spec", "code", "message"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_mistake_names_its_field(
    name: str, content: str, spec: dict[str, Any], code: ExitCode, message: str, make_generate_run: MakeRun, tmp_path: Path
) -> None:
    (tmp_path / "p.csv").write_text(content)
    inputs = {"dataset": {"files": [str(tmp_path / "p.csv")]}} | ({"columns": spec["columns"]} if "columns" in spec else {})
    with pytest.raises(Failure) as failure:
        main(make_generate_run(inputs=inputs, **{k: v for k, v in spec.items() if k != "columns"}))
    assert (failure.value.code, failure.value.message) == (code, message)


def test_a_pipeline(make_generate_run: MakeRun, sdxl: Path) -> None:
    run = make_generate_run(task="text-to-image", model={"path": str(sdxl)}, inputs={"rows": [{"prompt": "a", "negativePrompt": "b"}]})
    assert rows_of(run)[0]["negativePrompt"] == "b"
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl)
    assert read_prepared(run).plan.parameters == sum(m.num_parameters() for m in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2))
