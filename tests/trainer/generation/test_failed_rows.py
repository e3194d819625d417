"""Rows that cannot be worked on: each is the record of an error, and `maxFailedRows` decides what they cost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from trainer.generating import generate_run, generate_shards, result_lines, sample
from transformers import AutoTokenizer

from luthier_api.exitcodes import ExitCode
from luthier_api.run import GenerateRun
from luthier_api.variables import Variables
from luthier_trainer.generation import main as generate
from luthier_trainer.generation.engines.base import Batched
from luthier_trainer.generation.engines.text import TextEngine
from luthier_trainer.generation.poison import Poisoned
from luthier_trainer.generation.samples import Output, Sample
from luthier_trainer.prepare import main as prepare
from luthier_trainer.runtime.failure import Failure

LONG = "x " * 3000
EXAMPLE = Path(__file__).resolve().parents[3] / "examples/generate-sweep.yaml"


def job(tmp_path: Path, tiny_model: Path, **spec: Any) -> GenerateRun:
    rows = [{"prompt": "The class"}, {"prompt": LONG}, {"prompt": "An import"}, {"prompt": LONG + "y"}]
    given = {"task": "text-generation", "model": {"path": str(tiny_model)}, "text": {"maxNewTokens": 2}}
    return generate_run(tmp_path / "job", rows, **given | spec)


def test_the_others_are_made(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = job(tmp_path, tiny_model)
    (message,) = generate_shards(run, monkeypatch)
    assert message.metrics
    assert (message.metrics["rows"], message.metrics["failedRows"]) == (4, 2)
    assert message.message.startswith("2 outputs; 2 cannot be made, first: row 1: prompt: ")
    lines = result_lines(run)
    assert [line["error"] is None for line in lines] == [True, False, True, False]
    assert [line["finishReason"] for line in lines] == ["length", "error", "length", "error"]


def test_the_limit_is_that_of_all_shards(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of each shard fails. With a higher limit, nothing is made again."""
    run = job(tmp_path, tiny_model, shards=2, maxFailedRows=1)
    with pytest.raises(Failure) as failure:
        generate_shards(run, monkeypatch)
    assert failure.value.code is ExitCode.INVALID_DATASET
    assert failure.value.message.startswith("spec.maxFailedRows: 2 outputs cannot be made, and 1 are allowed.")
    monkeypatch.setattr(TextEngine, "load", lambda *_: pytest.fail("the model was loaded"))
    raised = run.model_copy(update={"spec": run.spec.model_copy(update={"max_failed_rows": 2})})
    for shard in range(2):
        monkeypatch.setenv(Variables.NODE_RANK, str(shard))
        assert generate.main(raised).code == 0
    assert [line["row"] for line in result_lines(run)] == [0, 1, 2, 3]


def test_a_shard_ends_when_its_own_rows_are_too_many(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextEngine, "work", lambda *_: pytest.fail("a batch was made"))
    with pytest.raises(Failure, match=r"spec\.maxFailedRows: 2 outputs cannot be made, and 0 are allowed"):
        generate_shards(job(tmp_path, tiny_model, maxFailedRows=0), monkeypatch)


class Fussy(Batched):
    """An engine that raises for batches with a row whose prompt is poison."""

    batch_size = 3

    def group(self, sample: Sample) -> int:
        return 0

    def make(self, samples: Sequence[Sample]) -> list[Output]:
        if any(s.prompt == "poison" for s in samples):
            raise ValueError("cannot read\nthis")
        return [Output(s, text=s.prompt) for s in samples]


@dataclass(frozen=True)
class PoisonCase:
    name: str
    prompts: tuple[str, ...]
    errors: list[int] | None  # rows; None: the exception is raised


POISON = [
    PoisonCase(
        name="none",
        prompts=("a", "b"),
        errors=[],
    ),
    PoisonCase(
        name="one of a batch, and one of another",
        prompts=("a", "poison", "b", "c", "poison"),
        errors=[1, 4],
    ),
    PoisonCase(
        name="many, after others were made",
        prompts=("a", "b", "c", *["poison"] * 5),
        errors=[3, 4, 5, 6, 7],
    ),
    PoisonCase(
        name="all",
        prompts=("poison",) * 5,
        errors=None,
    ),
]


@pytest.mark.parametrize("case", POISON, ids=lambda case: case.name)
def test_a_row_at_which_the_engine_fails_is_an_error(case: PoisonCase) -> None:
    samples = [sample(prompt, row=i) for i, prompt in enumerate(case.prompts)]
    engine: Any = Fussy()
    if case.errors is None:
        with pytest.raises(ValueError, match="cannot read"):
            list(Poisoned().worked(engine, samples))
        return
    made = {o.sample.row: o.error for outputs in Poisoned().worked(engine, samples) for o in outputs}
    assert made == {i: "ValueError: cannot read this" if i in case.errors else None for i in range(len(samples))}


def test_the_example(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """examples/generate-sweep.yaml on a small model: two rows, one of them without a name, each four times."""
    spec = yaml.safe_load(EXAMPLE.read_text())["spec"]
    shutil.copytree(tiny_model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    products = tmp_path / "products.csv"
    products.write_text("sku,name,length\na1,a lute,3\na2,,2\n")
    spec["inputs"]["dataset"]["files"] = [str(products)]
    spec |= {"model": {"path": str(tmp_path / "model")}, "resources": {"gpus": 0}}
    spec["text"]["maxNewTokens"] = 2
    run = GenerateRun.model_validate({"name": "a", "workspace": str(tmp_path / "job"), "metricsPort": 0, "spec": spec})
    generate_shards(run, monkeypatch, prepare.main)
    lines = result_lines(run)
    assert [(line["id"], line["input"]["language"], line["settings"]["temperature"]) for line in lines[:4]] == [
        ("a1", language, temperature) for language in ("English", "German") for temperature in (0.0, 0.8)
    ]
    assert lines[0]["prompt"] == "user: Describe a lute in English, in a few words."
    assert [line["newTokens"] <= 3 for line in lines[:4]] == [True] * 4
    assert [line["error"] for line in lines[4:]] == ["template: the row has no name; it has language"] * 4
    assert json.dumps(lines[0]["settings"]) == '{"maxNewTokens": 3, "temperature": 0.0}'
