"""The jobs of examples/finetune-methods.yaml, made short, through `prepare` and `run`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from prepared_workspace import save_encoder
from trainer.conftest import MakeRun
from transformers import AutoTokenizer

from luthier_api.methods import METHODS
from luthier_trainer.prepare import main as prepare
from luthier_trainer.training import main as train

EXAMPLE = Path(__file__).resolve().parents[3] / "examples/finetune-methods.yaml"
JOBS: dict[str, dict[str, Any]] = {
    job["metadata"]["name"]: job["spec"] for job in yaml.safe_load_all(EXAMPLE.read_text())
}


@pytest.mark.parametrize("name", JOBS)
def test_it_is_prepared_and_trained(
    name: str, tmp_path: Path, make_run: MakeRun, llama: Path, corpus_rows: Path
) -> None:
    spec = JOBS[name]
    model = llama
    if spec["task"] == "text-classification":
        torch.manual_seed(1)
        model = save_encoder(tmp_path / "bert", AutoTokenizer.from_pretrained(llama))
    run = make_run(
        name,
        task=spec["task"],
        method=spec["method"],
        model={name: value for name, value in spec["model"].items() if name != "id"} | {"path": str(model)},
        dataset={"files": [str(corpus_rows)], "evalFraction": 0.1},
        training={"learningRate": spec["training"]["learningRate"], "maxLength": 32, "maxSteps": 4, "batchSize": 8},
    )
    prepare.main(run)
    metrics = train.main(run).metrics
    assert metrics is not None
    assert metrics["evalLoss"] < metrics["evalLossBefore"]
    adapter = METHODS[run.spec.method.type].adapter
    assert (Path(run.workspace) / "result/adapter_config.json").exists() is adapter
