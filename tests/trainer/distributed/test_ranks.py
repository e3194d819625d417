"""Several processes, started as in pods: they train one model together, stop together, and go on where they stopped.

Each start costs some ten seconds of imports, so each test asks several questions of the same processes.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import DatasetDict
from peft import AutoPeftModelForCausalLM
from prepared_workspace import (
    classification_data,
    image_data,
    losses,
    packed_data,
    pod,
    prepared_run,
    prose,
    save_encoder,
)
from safetensors.torch import load_file
from trainer.digits import save_model as save_vit
from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification, AutoTokenizer

from luthier_api.run import FineTuneRun
from luthier_api.termination import TerminationMessage
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.methods import trainable
from luthier_trainer.training import main as train
from luthier_trainer.workspace import space
from luthier_trainer.workspace.prepared import read_prepared

LORA = {"type": "lora", "rank": 4}
TRAINING = {"maxSteps": 6, "learningRate": 1e-2}
TIMEOUT = 240  # of one start, on a machine that has other things to do


@pytest.fixture(scope="module")
def data(llama: Path, paragraphs: list[str]) -> DatasetDict:
    """Row counts that no number of processes divides: of nine rows, the last step of an epoch has one, on one process
    of two. Each row has several texts, of which a part is learnt, so that the processes have different numbers of
    labels.
    """
    return packed_data(AutoTokenizer.from_pretrained(llama), prose(paragraphs), 9)


@pytest.fixture(scope="module")
def alone(
    llama: Path, data: DatasetDict, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[float], dict[str, float]]:
    """The losses and figures of one process with the whole batch: what any number of processes must come to."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTHIER_RUN_DIR", str(folder))
        run = prepared_run(folder / "job", llama, data, method=LORA, training=TRAINING)
        metrics = train.main(run).metrics
    assert metrics is not None
    return losses(run), metrics


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def make(root: Path, llama: Path, data: DatasetDict, **spec: Any) -> FineTuneRun:
    return prepared_run(root / "job", llama, data, port=free_port(), **({"method": LORA, "training": TRAINING} | spec))


def finish(run: FineTuneRun, folder: Path, nodes: int = 1) -> list[TerminationMessage]:
    """Start all pods of the run, wait for them, and return the message of each rank."""
    with ExitStack() as pods:
        processes = [pods.enter_context(pod(run, folder / f"pod-{node}", node)) for node in range(nodes)]
        codes = [process.wait(TIMEOUT) for process in processes]
    return messages(folder, codes)


def messages(folder: Path, codes: list[int]) -> list[TerminationMessage]:
    assert codes == [0] * len(codes), "\n".join(log.read_text()[-3000:] for log in folder.glob("pod-*/log"))
    files = sorted(folder.glob("pod-*/result-*.json"), key=lambda p: p.name)
    return [TerminationMessage.model_validate_json(file.read_bytes()) for file in files]


def test_two_processes_are_one(tmp_path: Path, llama: Path, data: DatasetDict, alone: Any) -> None:
    run = make(tmp_path, llama, data, resources={"processesPerNode": 2})
    ended = finish(run, tmp_path)
    assert [(m.code, m.rank) for m in ended] == [(0, 0), (0, 1)]
    assert losses(run) == pytest.approx(alone[0], abs=1e-4)
    for figure in ("evalLossBefore", "evalLoss", "tokens"):
        assert (ended[0].metrics or {})[figure] == pytest.approx(alone[1][figure], abs=1e-4)


def test_two_pods_stop_together_and_go_on(tmp_path: Path, llama: Path, data: DatasetDict) -> None:
    """The pod of rank 1 is told to go, the other hears of it from its peer only, or later; both leave at one step."""
    steps = {"maxSteps": 40, "saveSteps": 1000, "logSteps": 10, "batchSize": 4}
    run = make(tmp_path, llama, data, resources={"nodes": 2}, training=steps)
    with ExitStack() as pods:
        processes = [pods.enter_context(pod(run, tmp_path / f"pod-{node}", node)) for node in (0, 1)]
        deadline = time.monotonic() + TIMEOUT
        # During the evaluation before it, there would be nothing to save
        while "step 1/40" not in (tmp_path / "pod-0/log").read_text():
            assert time.monotonic() < deadline, (tmp_path / "pod-1/log").read_text()
            time.sleep(0.05)
        (tmp_path / "pod-1/stop").touch()
        time.sleep(0.3)
        (tmp_path / "pod-0/stop").touch()
        codes = [process.wait(TIMEOUT) for process in processes]
    stopped = messages(tmp_path, codes)
    assert [(m.code, m.saved) for m in stopped] == [(75, True), (75, True)]
    assert stopped[0].step == stopped[1].step
    step = stopped[0].step
    assert step is not None
    assert 0 < step < 40
    folder = tmp_path / f"job/checkpoints/checkpoint-{step}"
    assert {"rng_state_0.pth", "rng_state_1.pth", "MANIFEST.json"} <= {p.name for p in folder.iterdir()}

    for node in (0, 1):
        shutil.rmtree(tmp_path / f"pod-{node}")
    ended = finish(run, tmp_path, nodes=2)
    assert [(m.code, m.step) for m in ended] == [(0, 40), (0, 40)]
    assert f"resuming from checkpoint-{step}" in (tmp_path / "pod-0/log").read_text()
    assert "step " not in (tmp_path / "pod-1/log").read_text()  # one log a run
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "job/result")


@pytest.fixture(scope="session")
def deepspeed_operators() -> None:
    """DeepSpeed compiles two operators for CPU: three minutes once, then they are found in TORCH_EXTENSIONS_DIR."""
    load = (
        "from deepspeed.ops.op_builder.cpu import CPUAdamBuilder, ShareMemCommBuilder; CPUAdamBuilder().load();"
        " ShareMemCommBuilder().load()"
    )
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run(
        [sys.executable, "-c", load],
        env=os.environ | {"PATH": path, "DS_ACCELERATOR": "cpu"},
        check=True,
        capture_output=True,
    )


@pytest.mark.usefixtures("deepspeed_operators")
@pytest.mark.parametrize("micro_batch", [4, 2], ids=["", "with half the micro-batch"])
def test_zero2_offload(micro_batch: int, tmp_path: Path, llama: Path, data: DatasetDict, alone: Any) -> None:
    """Stopped after its first step, and resumed from DeepSpeed's own shards: still the losses of one process. With half
    the micro-batch, as after CUDA has run out of memory, too.

    Without rows to evaluate on: a run that is to stop from the beginning would leave the evaluation before its first
    step.
    """
    run = make(
        tmp_path, llama, DatasetDict(train=data["train"]), resources={"processesPerNode": 2}, strategy="zero2-offload"
    )
    (tmp_path / "pod-0").mkdir()
    (tmp_path / "pod-0/stop").touch()
    stopped = finish(run, tmp_path)
    assert [(m.code, m.step, m.saved) for m in stopped] == [(75, 1, True), (75, 1, True)]
    assert (tmp_path / "job/checkpoints/checkpoint-1/global_step1").is_dir()

    shutil.rmtree(tmp_path / "pod-0")
    training = run.spec.training.model_copy(update={"micro_batch_size": micro_batch})
    ended = finish(run.model_copy(update={"spec": run.spec.model_copy(update={"training": training})}), tmp_path)
    assert [m.code for m in ended] == [0, 0]
    assert f"2 × {micro_batch} rows × {4 // micro_batch} accumulated" in (tmp_path / "pod-0/log").read_text()
    assert losses(run) == pytest.approx(alone[0], abs=2e-4)


@pytest.mark.usefixtures("deepspeed_operators")
def test_zero3_offload(tmp_path: Path, llama: Path, data: DatasetDict, alone: Any) -> None:
    """With recomputed activations, as is the default on GPUs: weights are gathered once more for them."""
    training = TRAINING | {"gradientCheckpointing": True}
    run = make(tmp_path, llama, data, resources={"processesPerNode": 2}, strategy="zero3-offload", training=training)
    assert [m.code for m in finish(run, tmp_path)] == [0, 0]
    assert losses(run) == pytest.approx(alone[0], abs=2e-4)
    weights = load_file(tmp_path / "job/result/adapter_model.safetensors")
    assert len(weights) == 2 * 2 * 7  # two matrices for each of seven linear modules of two layers
    assert all(torch.isfinite(w).all() and w.abs().sum() > 0 for w in weights.values())
    assert json.loads((tmp_path / "job/result/metrics.json").read_text())["evalLoss"] == pytest.approx(
        alone[1]["evalLoss"], abs=2e-4
    )


@dataclass(frozen=True)
class Case:
    inputs: str
    strategy: str
    labels: list[str]  # for which the head of the base was made


CLASSIFIERS = [
    Case(
        inputs="text",
        strategy="ddp",
        labels=["a", "b"],
    ),
    Case(
        inputs="text",
        strategy="zero3-offload",
        labels=["x", "y", "z"],
    ),
    # whose rows are spread over the processes when they have to change places
    Case(
        inputs="text",
        strategy="zero3-offload",
        labels=["b", "a"],
    ),
    Case(
        inputs="image",
        strategy="ddp",
        labels=["b", "a"],
    ),
    Case(
        inputs="image",
        strategy="zero2-offload",
        labels=["a", "b"],
    ),
]


@pytest.mark.usefixtures("deepspeed_operators")
@pytest.mark.parametrize("case", CLASSIFIERS, ids=lambda case: f"{case.inputs}, {case.strategy}")
def test_two_processes_are_one_classifier(case: Case, tmp_path: Path, llama: Path, paragraphs: list[str]) -> None:
    """Each takes two micro-batches a step; the mean is over the rows of all."""
    if case.inputs == "image":
        base, rows, auto = save_vit(tmp_path / "base"), image_data(), AutoModelForImageClassification
    else:
        tokenizer = AutoTokenizer.from_pretrained(llama)
        base, rows = save_encoder(tmp_path / "base", tokenizer), classification_data(tokenizer, paragraphs)
        auto = AutoModelForSequenceClassification
    # Three steps an epoch. In the last, of its two micro-batches one process has two rows and one, the other two and
    # none.
    rows = DatasetDict(train=rows["train"].select(range(21)), eval=rows["eval"])
    auto.from_pretrained(base, id2label=dict(enumerate(case.labels))).save_pretrained(base)
    training = TRAINING | {"learningRate": 1e-3}
    spec: dict[str, Any] = {"task": f"{case.inputs}-classification", "labels": ["a", "b"], "method": {"type": "full"}}
    alone = prepared_run(tmp_path / "alone", base, rows, training=training, **spec)
    metrics = train.main(alone).metrics or {}
    run = make(
        tmp_path,
        base,
        rows,
        resources={"processesPerNode": 2},
        strategy=case.strategy,
        training=training | {"microBatchSize": 2},
        **spec,
    )
    ended = finish(run, tmp_path)
    names = [load_file(tmp_path / folder / "result/model.safetensors").keys() for folder in ("alone", "job")]
    assert names[0] == names[1]
    assert losses(run) == pytest.approx(losses(alone), abs=2e-4)
    for figure in {"evalLossBefore", "evalLoss", "accuracy", "tokens"} & metrics.keys():
        assert (ended[0].metrics or {})[figure] == pytest.approx(metrics[figure], abs=2e-4)
    if case.strategy.startswith("zero"):
        writes_what_was_foreseen(run, base)


def writes_what_was_foreseen(run: FineTuneRun, base: Path) -> None:
    """Checkpoints of DeepSpeed hold its shards alone: no copy of all weights beside them."""
    folder, plan = WorkspaceFolder(Path(run.workspace)), read_prepared(run).plan
    weights = trainable.weights_of(AutoConfig.from_pretrained(base, num_labels=2), run.spec, plan, base)
    foreseen = space.checkpoint_bytes(weights, plan.strategy, plan.world_size, processor_bytes=0)
    saved = folder.checkpoints / f"checkpoint-{plan.steps}"
    assert space.folder_bytes(saved) == pytest.approx(foreseen, rel=0.08)
    assert not list(saved.glob("*.safetensors"))
    processor = space.folder_bytes(folder.prepared / "processor")
    assert space.folder_bytes(folder.result) == pytest.approx(
        space.result_bytes(weights, plan.strategy, processor), rel=0.05
    )
