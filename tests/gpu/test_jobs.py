"""Jobs of every task, method and quantisation on a GPU: they learn, and end as on a CPU."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from prepared_workspace import pod
from trainer.generating import generate_run, result_lines

from luthier_api.exitcodes import ExitCode
from luthier_api.run import FineTuneRun
from luthier_api.variables import Variables
from luthier_trainer.generation import main as generate
from luthier_trainer.prepare.main import main as prepare
from luthier_trainer.runtime.classify import classify as classified
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.training import main as train
from luthier_trainer.workspace.prepared import read_prepared

MakeRun = Callable[..., Any]
GPU = {"gpusPerNode": 1}
TEXT = {"maxLength": 64, "batchSize": 8, "maxSteps": 12, "learningRate": 1e-2, "logSteps": 4}


@dataclass(frozen=True)
class Case:
    name: str
    method: dict[str, Any] = field(default_factory=lambda: {"type": "lora", "rank": 8})
    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    strategy: str = "auto"


LANGUAGE = [
    Case("full", method={"type": "full"}),
    Case("full-fp32", method={"type": "full"}, training={"precision": "fp32"}),
    Case("full-fp16", method={"type": "full"}, training={"precision": "fp16"}),
    Case("lora"),
    Case("dora", method={"type": "lora", "rank": 8, "dora": True}),
    Case("qlora", method={"type": "qlora", "rank": 8}),
    Case("fp4", model={"quantization": {"type": "fp4"}}),
    Case("int8", model={"quantization": {"type": "int8"}}),
    Case("isolated", training={"packing": "isolated"}),
    Case("concatenate", training={"packing": "concatenate"}),
    Case("no-recompute", training={"gradientCheckpointing": False}),
    Case("adamw-8bit", method={"type": "full"}, training={"optimizer": "adamw_8bit"}),
    Case("paged", method={"type": "full"}, training={"optimizer": "paged_adamw_8bit"}),
    Case("muon", method={"type": "full"}, training={"optimizer": "muon"}),
]
SHARDED = [
    Case("zero2", strategy="zero2"),
    Case("zero3", method={"type": "full"}, strategy="zero3"),
    Case("zero3-offload", strategy="zero3-offload"),
]
OVER_TWO = [
    Case("fsdp", method={"type": "full"}, training={"maxSteps": 24}, strategy="fsdp"),
    Case("fsdp-fp32", method={"type": "full"}, training={"maxSteps": 24, "precision": "fp32"}, strategy="fsdp"),
    Case("fsdp-lora", training={"maxSteps": 24}, strategy="fsdp"),
]


def gpu_run(make_run: MakeRun, case: Case, model: Path, files: Path, **spec: Any) -> FineTuneRun:
    given = {
        "model": {"path": str(model)} | case.model,
        "dataset": {"files": [str(files)], "evalFraction": 0.1},
        "method": case.method,
        "training": TEXT | case.training,
        "resources": GPU,
        "strategy": case.strategy,
    }
    return make_run(case.name, **given | spec)


@pytest.mark.parametrize("case", LANGUAGE, ids=lambda case: case.name)
def test_language_models(case: Case, make_run: MakeRun, llama: Path, corpus_file: Path, figure: Any) -> None:
    run = gpu_run(make_run, case, llama, corpus_file)
    prepare(run)
    began = time.monotonic()
    message = train.main(run)
    figure(
        seconds=round(time.monotonic() - began, 2),
        before=message.metrics["evalLossBefore"],
        after=message.metrics["evalLoss"],
        reasons=read_prepared(run).plan.reasons,
    )
    assert message.code == 0
    assert message.metrics["evalLoss"] < message.metrics["evalLossBefore"]


@pytest.mark.parametrize("case", SHARDED, ids=lambda case: case.name)
def test_with_deepspeed(
    case: Case, make_run: MakeRun, llama: Path, corpus_file: Path, tmp_path: Path, figure: Any
) -> None:
    """Over one process, started as the supervisor starts it."""
    pytest.importorskip("deepspeed")
    run = gpu_run(make_run, case, llama, corpus_file)
    prepare(run)
    began = time.monotonic()
    with pod(run, tmp_path / "pod") as process:
        code = process.wait(120)
    log = (tmp_path / "pod" / "log").read_text()
    figure(seconds=round(time.monotonic() - began, 2), code=code, end=log[-300:])
    assert code == 0
    metrics = json.loads((Path(run.workspace) / "result" / "metrics.json").read_text())
    assert metrics["evalLoss"] < metrics["evalLossBefore"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("case", OVER_TWO, ids=lambda case: case.name)
def test_over_two_gpus(case: Case, make_run: MakeRun, llama: Path, corpus_file: Path, tmp_path: Path) -> None:
    """The losses are those of DDP, in bf16 within its rounding; and each GPU holds no more than was planned."""
    found, peaks = {}, {}
    for strategy in ("ddp", case.strategy):
        run = gpu_run(make_run, case, llama, corpus_file, resources={"gpusPerNode": 2}, strategy=strategy)
        prepare(run)
        with pod(run, tmp_path / strategy) as process:
            assert process.wait(120) == 0, (tmp_path / strategy / "log").read_text()[-1000:]
        metrics = json.loads((Path(run.workspace) / "result" / "metrics.json").read_text())
        found[strategy], peaks[strategy] = metrics["evalLoss"], (metrics["peakMemoryGB"], metrics["plannedMemoryGB"])
        shutil.rmtree(run.workspace)
    assert found[case.strategy] == pytest.approx(found["ddp"], rel=1e-4 if "fp32" in case.name else 2e-2)
    assert peaks[case.strategy][0] <= 1.02 * peaks[case.strategy][1]


def test_losses_are_those_of_a_cpu(make_run: MakeRun, llama: Path, corpus_file: Path, figure: Any) -> None:
    """In fp32, over 12 steps."""
    metrics = {}
    for name, resources in (("gpu", GPU), ("cpu", {"gpusPerNode": 0})):
        case = Case(name, method={"type": "full"}, training={"precision": "fp32", "microBatchSize": 8})
        run = gpu_run(make_run, case, llama, corpus_file, resources=resources)
        prepare(run)
        metrics[name] = train.main(run).metrics
    figure(**{name: found["evalLoss"] for name, found in metrics.items()})
    assert metrics["gpu"]["evalLoss"] == pytest.approx(metrics["cpu"]["evalLoss"], abs=2e-3)
    assert metrics["gpu"]["evalLossBefore"] == pytest.approx(metrics["cpu"]["evalLossBefore"], abs=1e-4)


def test_the_run_that_is_resumed_ends_alike(make_run: MakeRun, llama: Path, corpus_file: Path, figure: Any) -> None:
    """One run of 12 steps, and the same run from its checkpoint of step 6."""
    case = Case("resumed", training={"saveSteps": 6, "keepCheckpoints": 3})
    run = gpu_run(make_run, case, llama, corpus_file)
    prepare(run)
    whole = train.main(run).metrics
    workspace = Path(run.workspace)
    result = json.loads((workspace / "result" / "metrics.json").read_text())
    for stale in (workspace / "result").rglob("*"):
        if stale.is_file():
            stale.unlink()
    shutil.rmtree(workspace / "result")
    shutil.rmtree(workspace / "checkpoints" / "checkpoint-12")
    again = train.main(run).metrics
    figure(whole=whole["evalLoss"], again=again["evalLoss"])
    assert result["evalLoss"] == whole["evalLoss"]
    assert again["evalLoss"] == pytest.approx(whole["evalLoss"], abs=1e-4)


def test_a_gpu_that_is_full(make_run: MakeRun, llama: Path, corpus_file: Path, figure: Any) -> None:
    """The error of the allocator itself is recognised, with the remedy."""
    torch.cuda.set_per_process_memory_fraction(0.0001)
    try:
        run = gpu_run(make_run, Case("full-gpu", method={"type": "full"}), llama, corpus_file)
        prepare(run)
        with pytest.raises((Failure, torch.OutOfMemoryError)) as caught:
            train.main(run)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    code, message = classified(caught.value)
    figure(code=code.name, message=message[:200])
    assert code == ExitCode.CUDA_OUT_OF_MEMORY


@dataclass(frozen=True)
class TaskCase:
    name: str
    task: str
    rows: str
    """Of what kind: labelled texts, pairs of answers, or answers with a verdict."""
    method: dict[str, Any] = field(default_factory=lambda: {"type": "lora", "rank": 8})
    spec: dict[str, Any] = field(default_factory=dict)


OTHERS = [
    TaskCase("classification", "text-classification", "texts"),
    TaskCase("dpo", "preference", "pairs"),
    TaskCase("dpo-full", "preference", "pairs", method={"type": "full"}),
    TaskCase("dpo-qlora", "preference", "pairs", method={"type": "qlora", "rank": 8}),
    TaskCase("dpo-precomputed", "preference", "pairs", spec={"preference": {"precomputeReference": True}}),
    TaskCase("kto", "preference", "verdicts", spec={"preference": {"lossType": "kto"}}),
    TaskCase("reward", "reward", "pairs"),
    TaskCase(
        "grpo",
        "grpo",
        "prompts",
        spec={"grpo": {"generations": 4, "maxCompletionLength": 16, "rewards": [{"type": "length", "tokens": 8}]}},
    ),
]


def rows_of(kind: str, pairs: list[dict[str, str]]) -> list[dict[str, Any]]:
    if kind == "pairs":
        return list(pairs)
    if kind == "verdicts":
        return [
            {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
            for pair in pairs
            for side in ("chosen", "rejected")
        ]
    if kind == "prompts":
        return [{"prompt": pair["prompt"]} for pair in pairs]
    raise KeyError(kind)


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.name)
def test_other_tasks(
    case: TaskCase,
    make_run: MakeRun,
    llama: Path,
    corpus_rows: Path,
    pairs: list[dict[str, str]],
    tmp_path: Path,
    figure: Any,
) -> None:
    files = corpus_rows
    if case.rows != "texts":
        files = tmp_path / "rows.jsonl"
        files.write_text("".join(json.dumps(row) + "\n" for row in rows_of(case.rows, pairs)))
    run = make_run(
        case.name,
        task=case.task,
        model={"path": str(llama)},
        dataset={"files": [str(files)]},
        method=case.method,
        training={"maxLength": 64, "batchSize": 4, "maxSteps": 8, "learningRate": 1e-3},
        resources=GPU,
        **case.spec,
    )
    prepare(run)
    message = train.main(run)
    figure(**{key: value for key, value in message.metrics.items() if isinstance(value, float)})
    assert message.code == 0
    assert math.isfinite(message.metrics["trainLoss"])


def test_images_are_classified(classify: MakeRun, figure: Any) -> None:
    run = classify(resources=GPU)
    prepare(run)
    message = train.main(run)
    figure(**message.metrics)
    assert message.metrics["accuracy"] > 0.8


def test_a_diffusion_model_learns(make_run: MakeRun, sdxl: Path, tmp_path: Path, figure: Any) -> None:
    from trainer.digits import write_digits

    folder = write_digits(tmp_path / "digits")
    rows = [
        {"file_name": str(path.relative_to(folder)), "text": f"the digit {path.parent.name}"}
        for path in sorted(folder.rglob("*.png"))[:32]
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = make_run(
        "drawn",
        task="text-to-image",
        model={"path": str(sdxl)},
        dataset={"files": [str(folder)], "format": "imagefolder"},
        image={"resolution": 32},
        method={"type": "lora", "rank": 4},
        training={"batchSize": 4, "maxSteps": 6, "learningRate": 1e-3},
        resources=GPU,
    )
    prepare(run)
    message = train.main(run)
    figure(**message.metrics)
    assert math.isfinite(message.metrics["trainLoss"])


@pytest.fixture(scope="module")
def larger(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 0.2 billion random weights: wide enough for the kernels that real models run on."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("larger")
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Generation:
    name: str
    model: str
    text: dict[str, Any]


GENERATIONS = [
    Generation("greedy", "llama", {"maxNewTokens": 12}),
    Generation("sampled", "llama", {"maxNewTokens": 12, "temperature": 0.8, "perPrompt": 2}),
    Generation("greedy-larger", "larger", {"maxNewTokens": 32}),
    Generation("sampled-larger", "larger", {"maxNewTokens": 32, "temperature": 0.8, "perPrompt": 2}),
]


def generated(run: Any, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    prepare(run)
    for shard in range(run.spec.shards):
        monkeypatch.setenv(Variables.NODE_RANK, str(shard))
        assert generate.main(run).code == 0
    return result_lines(run)


@pytest.mark.parametrize("case", GENERATIONS, ids=lambda case: case.name)
def test_texts_do_not_depend_on_the_number_of_shards(
    case: Generation,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    paragraphs: list[str],
    monkeypatch: pytest.MonkeyPatch,
    figure: Any,
) -> None:
    rows = [{"prompt": text[: 10 + 13 * i % 90]} for i, text in enumerate(paragraphs[:20])]
    found = []
    began = time.monotonic()
    for shards in (1, 3):
        run = generate_run(
            tmp_path / str(shards),
            rows,
            task="text-generation",
            model={"path": str(request.getfixturevalue(case.model))},
            resources={"gpus": 1},
            shards=shards,
            text=case.text,
        )
        found.append([(line["row"], line["sample"], line["text"]) for line in generated(run, monkeypatch)])
    differing = sum(one != other for one, other in zip(*found, strict=True))
    figure(texts=len(found[0]), differing=differing, seconds=round(time.monotonic() - began, 1))
    assert found[0] == found[1]


def test_images_do_not_depend_on_the_number_of_shards(
    sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: Any
) -> None:
    found = []
    for shards in (1, 2):
        run = generate_run(
            tmp_path / str(shards),
            [{"prompt": f"a lute {i}"} for i in range(5)],
            task="text-to-image",
            model={"path": str(sdxl)},
            resources={"gpus": 1},
            shards=shards,
            image={"width": 32, "height": 32, "steps": 3},
        )
        lines = generated(run, monkeypatch)
        found.append([(line["row"], line["sample"], line["sha256"]) for line in lines])
    figure(images=len(found[0]), differing=sum(one != other for one, other in zip(*found, strict=True)))
    assert found[0] == found[1]
