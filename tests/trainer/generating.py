"""Runs of `generate` in this process, on what `prepare` would have left: shared by its tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from luthier_api.run import GenerateRun, PreparedRecord
from luthier_api.status import Plan, ResolvedDataset, ResolvedSource
from luthier_api.task_settings import ImageSettings, Settings, TextSettings
from luthier_api.termination import TerminationMessage
from luthier_api.variables import Variables
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.generation import main as generate
from luthier_trainer.generation import rows as prepared_rows
from luthier_trainer.generation.encoding import About
from luthier_trainer.generation.engines.images import ImageEngine
from luthier_trainer.generation.engines.table import engine_class
from luthier_trainer.generation.hardware import Hardware
from luthier_trainer.generation.result import shard_name
from luthier_trainer.generation.samples import Sample
from luthier_trainer.workspace.prepared import FINGERPRINT, fingerprint, write_prepared

Row = dict[str, Any]
TEXT, IMAGE = TextSettings(), ImageSettings()


def sample(
    prompt: str,
    seed: int = 7,
    row: int = 0,
    index: int = 0,
    negative: str | None = None,
    settings: Settings = TEXT,
    **more: Any,
) -> Sample:
    """A sample; its settings are those of a job that says nothing of them, unless they are given."""
    cells: Mapping[str, Any] = {"prompt": prompt} | ({} if negative is None else {"negativePrompt": negative})
    return Sample(row, index, cells, seed, settings, **more)


def generate_run(workspace: Path, rows: list[Row], **spec: Any) -> GenerateRun:
    """A run on CPU over `rows`; keywords are fields of its spec, as users write them. Its model must be a path."""
    given = {"inputs": {"rows": rows}, "resources": {"gpus": 0}} | spec
    return GenerateRun.model_validate({"name": "lutes", "workspace": str(workspace), "metricsPort": 0, "spec": given})


def prepare_by_hand(run: GenerateRun) -> None:
    """Leave what `prepare` leaves for a job whose model and adapters are paths and whose rows stand in the spec."""
    folder, spec = WorkspaceFolder(Path(run.workspace)), run.spec
    folder.prepared.mkdir(parents=True, exist_ok=True)
    rows = folder.prepared / "rows.jsonl"
    lines = [{"row": i, "seed": 100 * i, **row.dump()} for i, row in enumerate(spec.inputs.rows or [])]
    written = prepared_rows.write(rows, lines, spec.per_prompt)
    (folder.prepared / FINGERPRINT).write_text(fingerprint(run))
    record = PreparedRecord(
        model=ResolvedSource(source=str(spec.model.path)),
        dataset=ResolvedDataset(source="spec.inputs.rows", rows=written.rows, outputs=written.outputs),
        adapters=[ResolvedSource(source=str(a.path)) for a in spec.adapters],
        plan=Plan(strategy="none"),
        model_path=str(spec.model.path),
        adapter_paths=[str(a.path) for a in spec.adapters],
        dataset_path=str(rows),
        rows_sha256=written.sha256,
    )
    write_prepared(run, record)


def generate_shards(
    run: GenerateRun, monkeypatch: pytest.MonkeyPatch, prepare: Callable[[GenerateRun], object] = prepare_by_hand
) -> list[TerminationMessage]:
    """Prepare, then run every shard, one after the other."""
    prepare(run)
    # main() sets it for its own process; here it must not outlive the test.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    messages = []
    for shard in range(run.spec.shards):
        monkeypatch.setenv(Variables.NODE_RANK, str(shard))
        messages.append(generate.main(run))
    return messages


def result_lines(run: GenerateRun) -> list[Row]:
    """The lines of the result, over all shards, in order of row and sample."""
    result = WorkspaceFolder(Path(run.workspace)).result
    records, shards = engine_class(run.spec.task).records, run.spec.shards
    files = [result / records.table(shard_name(i, shards)) for i in range(shards)]
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return sorted(lines, key=lambda line: (line["row"], line["sample"]))


def image_engine(model: Path, image: dict[str, Any], batch_size: int = 2, precision: str = "fp32") -> ImageEngine:
    """The engine of text-to-image on CPU, without adapters. `image`: the block of the spec."""
    run = generate_run(Path("/"), [{"prompt": "-"}], task="text-to-image", model={"path": str(model)}, image=image)
    about = About({"model": {"source": "org/lutes", "revision": "abc"}, "adapters": []}, "torch 2, cpu")
    return ImageEngine(run.spec, model, [], Hardware("cpu", precision), batch_size, about)
