"""`luthier plan --quick` plans a training from its manifest and the configuration of a model alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from luthier_api.exitcodes import ExitCode
from luthier_api.run import FineTuneRun, Gpu
from luthier_api.spec import NewTokenizer, TokenizerTraining
from luthier_cli.commands import app
from luthier_trainer.prepare.estimate import Request, answer
from luthier_trainer.runtime.failure import Failure

MakeRun = Callable[..., FineTuneRun]
GB = 10**9
CONFIG = LlamaConfig(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=1000,
    dtype="bfloat16",
)
WEIGHTS = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(CONFIG).parameters())
ADAPTER = 2 * 8 * (4 * (256 + 256) + 3 * (256 + 512))  # layers × rank × (inputs + outputs) of its linear modules


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration, and nothing else."""
    folder = tmp_path_factory.mktemp("config")
    CONFIG.save_pretrained(folder)
    return folder


def request(make_run: MakeRun, config: Path, **changes: Any) -> Request:
    run = make_run(
        model={"path": str(config)},
        method={"type": "lora", "rank": 8},
        training={"batchSize": 16, "maxLength": 128},
        resources={"gpusPerNode": 1, "gpuClass": "own"},
    )
    run = run.model_copy(update={"gpu": Gpu(memory=24 * GB, peak_flops=121e12)})
    return replace(Request(run, config=None, rows=1000, classes={}), **changes)


def test_a_plan_of_a_configuration(make_run: MakeRun, config: Path, tmp_path: Path) -> None:
    plan = answer(request(make_run, config), tmp_path)["plan"]
    assert (plan["parameters"], plan["trainableParameters"]) == (WEIGHTS, ADAPTER)
    assert (plan["strategy"], plan["microBatchSize"], plan["gradientCheckpointing"]) == ("none", 16, False)
    assert (plan["steps"], plan["tokens"]) == (63, 63 * 16 * 128)
    assert plan["flops"] == pytest.approx(63 * 16 * 128 * (4 * (WEIGHTS - 256_000) + 6 * ADAPTER), rel=0.1)
    assert plan["memory"]["gpuBytes"] == sum(plan["memory"]["gpu"].values())
    assert plan["gpuHours"] == pytest.approx(plan["seconds"] / 3600, abs=0.01)
    assert plan["checkpointBytes"] > plan["resultBytes"] >= 4 * ADAPTER


@pytest.mark.parametrize(
    ("method", "parameters", "learning"),
    [("lora", WEIGHTS, ADAPTER + 2 * 24 * 256), ("full", WEIGHTS + 2 * 24 * 256, WEIGHTS + 2 * 24 * 256)],
)
def test_the_rows_of_pieces_and_tokens_count(
    method: str, parameters: int, learning: int, make_run: MakeRun, config: Path, tmp_path: Path
) -> None:
    """In the embedding and in the output. The tokenizer is not there, and counts as the rows of the model."""
    given = request(make_run, config)
    model = given.run.spec.model.model_copy(
        update={"tokenizer": NewTokenizer(train=TokenizerTraining(vocab_size=1024, special_tokens=["<|a|>"]))}
    )
    spec = given.run.spec.model_copy(
        update={"model": model, "method": given.run.spec.method.model_copy(update={"type": method})}
    )
    found = answer(replace(given, run=given.run.model_copy(update={"spec": spec})), tmp_path)
    assert (found["plan"]["parameters"], found["plan"]["trainableParameters"]) == (parameters, learning)
    assert "the rows have as many pieces as model.tokenizer.train.vocabSize asks for" in found["assumptions"]


def test_without_rows_nothing_is_said_of_the_whole_training(make_run: MakeRun, config: Path, tmp_path: Path) -> None:
    found = answer(request(make_run, config, rows=None), tmp_path)
    assert not {"steps", "tokens", "flops", "seconds", "gpuHours"} & set(found["plan"])
    assert found["assumptions"] == [
        "each row has training.maxLength tokens (128)",
        "the number of rows is not known: name it with --rows, or set training.maxSteps, for steps and time",
        "a GPU multiplies with 80% of its peak, and moves data with 60% of the speed of its memory",
    ]


def test_classes_are_compared(make_run: MakeRun, config: Path, tmp_path: Path) -> None:
    classes = {"small": Gpu(memory=GB, peak_flops=65e12), "large": Gpu(memory=80 * GB, peak_flops=989e12)}
    small, large = answer(request(make_run, config, classes=classes), tmp_path)["classes"]
    assert (small["gpuClass"], small["fits"]) == ("small", False)
    assert small["message"].startswith("spec.resources.gpuClass: the training takes at least 1.")
    assert "and one of class small has 1.0 GB. " in small["message"]
    assert (large["gpuClass"], large["memory"], large["fits"]) == ("large", 80 * GB, True)
    assert large["plan"]["seconds"] >= 0


def test_what_does_not_fit_is_refused(make_run: MakeRun, config: Path, tmp_path: Path) -> None:
    given = request(make_run, config)
    with pytest.raises(Failure) as refused:
        answer(replace(given, run=given.run.model_copy(update={"gpu": Gpu(memory=GB)})), tmp_path)
    assert refused.value.code == ExitCode.DOES_NOT_FIT


def test_a_model_of_the_hub_needs_a_configuration(make_run: MakeRun, config: Path, tmp_path: Path) -> None:
    run = make_run(
        model={"id": "nobody/has-this"}, resources={"gpusPerNode": 1}, training={"batchSize": 16, "maxLength": 128}
    )
    given = Request(run, config=None, rows=None, classes={})
    with pytest.raises(Failure) as refused:
        answer(given, tmp_path)
    assert refused.value.code == ExitCode.NOT_FOUND
    renamed = tmp_path / "llama.json"
    renamed.write_bytes((config / "config.json").read_bytes())
    assert answer(replace(given, config=renamed), tmp_path)["plan"]["parameters"] == WEIGHTS
    with pytest.raises(Failure, match="there is no such file"):
        answer(replace(given, config=tmp_path / "nothing.json"), tmp_path)


@pytest.mark.slow
def test_the_command(config: Path, tmp_path: Path) -> None:
    """Classes are those of a file of the chart's values, and those that are known by name."""
    manifest = {
        "apiVersion": "luthier.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "sound"},
        "spec": {
            "task": "causal-lm",
            "model": {"path": str(config)},
            "dataset": {"files": ["/on/the/cluster.jsonl"]},
            "training": {"batchSize": 16, "maxLength": 128, "maxSteps": 10},
        },
    }
    job, values = tmp_path / "job.yaml", tmp_path / "values.yaml"
    job.write_text(yaml.safe_dump(manifest))
    values.write_text(yaml.safe_dump({"gpuClasses": {"mine": {"memory": "10Gi", "peakFlops": 100e12}}}))
    words = ["plan", str(job), "--gpu-class", "mine,l4", "--gpu-classes", str(values), "-o", "json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.stderr
    [answered] = json.loads(done.stdout)["jobs"]
    assert [(entry["gpuClass"], entry["memory"], entry["fits"]) for entry in answered["classes"]] == [
        ("mine", 10 << 30, True),
        ("l4", 24 * GB, True),
    ]
    assert answered["classes"][0]["plan"]["steps"] == 10
