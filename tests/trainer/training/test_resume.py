"""An interrupted run goes on as if nothing had happened: the same losses, to the last bit, and the same figures at the
end.
"""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cases.quick import quick
from datasets import DatasetDict
from prepared_workspace import losses, prepared_run, without_the_machine
from safetensors.torch import load_file, save, save_file
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from luthier_api.exitcodes import ExitCode
from luthier_api.metrics import broken_checkpoints, checkpoint_step, read_samples
from luthier_api.termination import TerminationMessage
from luthier_api.workspace import MANIFEST
from luthier_trainer.distributed.ranks import Ranks
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.run_folder import run_dir
from luthier_trainer.training import checkpoint
from luthier_trainer.training import main as train
from luthier_trainer.training.callbacks import Heartbeat
from luthier_trainer.workspace.manifest import write_manifest
from luthier_trainer.workspace.prepared import FINGERPRINT, fingerprint, read_prepared, write_prepared

STEPS = 26  # an epoch has 25, so that one resumption crosses its border
LORA = {"type": "lora", "rank": 4, "dropout": 0.1}


@pytest.fixture(scope="module")
def data(prose_data: DatasetDict) -> DatasetDict:
    return DatasetDict(train=prose_data["train"].select(range(200)), eval=prose_data["eval"].select(range(8)))


def make(root: Path, llama: Path, data: DatasetDict, **training: Any) -> Any:
    return prepared_run(
        root, llama, data, method=LORA, training={"maxSteps": STEPS, "learningRate": 1e-2, "evalSteps": 10} | training
    )


@pytest.fixture(scope="module")
def uninterrupted(
    llama: Path, data: DatasetDict, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[float], dict[str, float]]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTHIER_RUN_DIR", str(folder))
        run = make(folder / "job", llama, data)
        metrics = train.main(run).metrics
    assert metrics is not None
    return losses(run), metrics


def stopped_at(run: Any, step: int, monkeypatch: pytest.MonkeyPatch) -> TerminationMessage:
    """Train until the stop flag appears, as it would be set by the supervisor, in the middle of `step`."""

    class Flag(Heartbeat):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == step - 1:
                (run_dir() / "stop").touch()

    with monkeypatch.context() as patch:
        patch.setattr(train, "Heartbeat", Flag)
        message = train.main(run)
    (run_dir() / "stop").unlink()
    return message


STOPS = [
    # name                    stopped at steps
    ("in the first epoch", [7]),
    ("at its end", [25]),
    ("twice", [3, 12]),
    ("at the last step", [STEPS]),
]


@pytest.mark.parametrize(("name", "stops"), STOPS, ids=[s[0] for s in STOPS])
def test_stopped(
    name: str,
    stops: list[int],
    tmp_path: Path,
    llama: Path,
    data: DatasetDict,
    uninterrupted: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = make(tmp_path / "job", llama, data)
    for step in stops:
        message = stopped_at(run, step, monkeypatch)
        assert (message.code, message.reason, message.step, message.saved) == (75, "Preempted", step, True)
        assert not (tmp_path / "job/result").exists()
    metrics = train.main(run).metrics
    assert metrics is not None
    assert losses(run) == uninterrupted[0]
    assert without_the_machine(metrics) == without_the_machine(uninterrupted[1])


def test_a_run_whose_circumstances_have_changed_goes_on(
    tmp_path: Path, llama: Path, data: DatasetDict, uninterrupted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(tmp_path / "job", llama, data)
    stopped_at(run, 7, monkeypatch)
    changes = {
        "resources": run.spec.resources.model_copy(update={"memory": "8Gi"}),
        "training": run.spec.training.model_copy(update={"save_steps": 4, "keep_checkpoints": 1}),
        "scheduling": run.spec.scheduling.model_copy(update={"node_selector": {"gpu": "h100"}}),
    }
    train.main(run.model_copy(update={"spec": run.spec.model_copy(update=changes)}))
    assert losses(run) == uninterrupted[0]
    kept = sorted(path.name for path in (tmp_path / "job/checkpoints").iterdir())
    assert kept == [f"checkpoint-{STEPS}"]


@dataclass(frozen=True)
class FirstCase:
    name: str
    steps: int
    saved: list[int]
    """Steps whose checkpoints are there at the end."""


FIRSTS = [
    FirstCase(name="before 5 % of it", steps=44, saved=[2, 44]),
    FirstCase(name="at the end of a short one", steps=19, saved=[19]),
]


@pytest.mark.parametrize("case", FIRSTS, ids=lambda case: case.name)
def test_the_first_save_of_a_training(case: FirstCase, tmp_path: Path, llama: Path, data: DatasetDict) -> None:
    run = make(tmp_path / "job", llama, DatasetDict(train=data["train"]), maxSteps=case.steps, batchSize=1)
    train.main(run)
    folders = (tmp_path / "job/checkpoints").iterdir()
    assert sorted(checkpoint.step_of(folder) for folder in folders) == case.saved


@dataclass(frozen=True)
class BackCase:
    name: str
    file: str
    damage: Callable[[bytes], bytes]
    message: str


BACK = [
    BackCase(
        name="other bytes",
        file="adapter_model.safetensors",
        damage=lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        message="adapter_model.safetensors has changed: its SHA-256 differs",
    ),
    BackCase(
        name="no tensors",
        file="adapter_model.safetensors",
        damage=lambda content: save({"a": torch.zeros(0)}),
        message="adapter_model.safetensors has empty tensors, among them a",
    ),
    BackCase(
        name="an optimiser that cannot be loaded",
        file="optimizer.pt",
        damage=lambda content: content[:100],
        message="optimizer.pt: ",
    ),
    BackCase(
        name="a state that cannot be read",
        file="trainer_state.json",
        damage=lambda content: content[:-2],
        message="trainer_state.json: JSONDecodeError",
    ),
]


@pytest.mark.parametrize("case", BACK, ids=lambda case: case.name)
def test_the_first_checkpoint_is_loaded_back(
    case: BackCase, tmp_path: Path, llama: Path, data: DatasetDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is damaged before it was described has the right digest, and cannot be loaded."""
    described, committed = checkpoint.describe, checkpoint.commit

    def damage(folder: Path) -> None:
        file = folder / case.file
        file.write_bytes(case.damage(file.read_bytes()))

    def describe(staged: Path, *ranks: int) -> Any:
        damage(staged)
        return described(staged, *ranks)

    def commit(*args: Any) -> Path:
        folder = committed(*args)
        damage(folder)
        return folder

    if "SHA-256" in case.message:
        monkeypatch.setattr(checkpoint, "commit", commit)
    else:
        monkeypatch.setattr(checkpoint, "describe", describe)
    with pytest.raises(Failure) as failure:
        train.main(make(tmp_path / "job", llama, DatasetDict(train=data["train"]), maxSteps=1))
    assert failure.value.code == ExitCode.STORAGE_ERROR
    assert f"checkpoint-1 was written, and cannot be read back: {case.message}" in failure.value.message


@dataclass(frozen=True)
class SmallerCase:
    name: str
    method: dict[str, Any]
    micro_batch: int
    """Of 8 rows a step: those in a forward pass before CUDA runs out of memory."""
    smaller: int
    """And after that."""


SMALLER = [
    SmallerCase(
        name="half of an adapter's",
        method=LORA | {"dropout": 0.0},
        micro_batch=8,
        smaller=4,
    ),
    SmallerCase(
        name="a whole model's, one row at last",
        method={"type": "full"},
        micro_batch=2,
        smaller=1,
    ),
]


@pytest.mark.parametrize("case", quick(SMALLER, "a whole model's, one row at last"))
def test_smaller_micro_batches_have_the_same_losses(
    case: SmallerCase, tmp_path: Path, llama: Path, data: DatasetDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the operator resumes a run after CUDA has run out of memory: the run config asks for a smaller micro-batch
    than `prepare` has planned. The end of an epoch comes after the resume.
    """
    length = {"maxSteps": STEPS, "learningRate": 2e-4, "microBatchSize": case.micro_batch}
    whole, run = (
        prepared_run(tmp_path / name, llama, data, method=case.method, training=length) for name in ("whole", "run")
    )
    train.main(whole)
    stopped_at(run, 7, monkeypatch)
    training = run.spec.training.model_copy(update={"micro_batch_size": case.smaller})
    reduced = run.model_copy(update={"spec": run.spec.model_copy(update={"training": training})})
    plan = read_prepared(reduced).plan
    assert (plan.micro_batch_size, plan.accumulation_steps) == (case.smaller, 8 // case.smaller)
    train.main(reduced)
    assert len(losses(run)) == STEPS
    assert losses(run) == pytest.approx(losses(whole), rel=1e-6)  # of losses of 6: three roundings of fp32


def test_only_the_strategy_and_the_processes_of_a_checkpoint_resume_from_it(
    tmp_path: Path, llama: Path, data: DatasetDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fields may change while the job is stopped, and `prepare` then plans again."""
    run = make(tmp_path / "job", llama, data)
    stopped_at(run, 7, monkeypatch)
    record = read_prepared(run)
    resources = run.spec.resources.model_copy(update={"processes_per_node": 2})
    shared = run.model_copy(update={"spec": run.spec.model_copy(update={"resources": resources})})
    with pytest.raises(Failure, match=r"the number of processes is 2, there it was 1\. Change it back to resume, or"):
        checkpoint.newest(tmp_path / "job/checkpoints", checkpoint.identity(shared, record), Ranks(10))
    write_prepared(run, record.model_copy(update={"plan": record.plan.model_copy(update={"strategy": "zero2"})}))
    with pytest.raises(Failure, match=r"spec\.strategy is 'zero2', there it was 'none'\. Change it back to resume, or"):
        train.main(run)


def test_a_checkpoint_of_another_result_is_refused_by_the_name_of_the_field(
    tmp_path: Path, llama: Path, data: DatasetDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(tmp_path / "job", llama, data)
    stopped_at(run, 7, monkeypatch)
    training = run.spec.training.model_copy(update={"weight_decay": 0.5})
    other = run.model_copy(update={"spec": run.spec.model_copy(update={"training": training})})
    (tmp_path / "job/prepared" / FINGERPRINT).write_text(fingerprint(other))  # as a `prepare` of the other run
    with pytest.raises(Failure, match=r"other settings: spec\.training\.weightDecay is 0\.5, there it was 0\.0\."):
        train.main(other)


def stopped_in_evaluation(run: Any, number: int, monkeypatch: pytest.MonkeyPatch) -> TerminationMessage:
    """Train until the stop flag appears in the middle of the evaluation of that number, counted from 1."""
    evaluated: list[int] = []

    class Flag(Heartbeat):
        def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            evaluated.append(state.global_step)
            if len(set(evaluated)) == number:
                (run_dir() / "stop").touch()

    with monkeypatch.context() as patch:
        patch.setattr(train, "Heartbeat", Flag)
        message = train.main(run)
    (run_dir() / "stop").unlink()
    assert len(set(evaluated)) == number, "nothing went on after the stop"
    return message


@dataclass(frozen=True)
class Case:
    name: str
    number: int
    save_steps: int
    step: int | None


IN_EVALUATIONS = [
    Case(
        name="before the first step",
        number=1,
        save_steps=100,
        step=None,
    ),
    Case(
        name="where a save is due, too",
        number=2,
        save_steps=10,
        step=10,
    ),
    Case(
        name="where none is due",
        number=3,
        save_steps=100,
        step=20,
    ),
    Case(
        name="of the result",
        number=4,
        save_steps=100,
        step=STEPS,
    ),
]


@pytest.mark.parametrize("case", quick(IN_EVALUATIONS, "before the first step", "where a save is due, too"))
def test_stopped_in_an_evaluation(
    case: Case,
    tmp_path: Path,
    llama: Path,
    data: DatasetDict,
    uninterrupted: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing is lost, and what was broken off is made by the next attempt."""
    run = make(tmp_path / "job", llama, data, saveSteps=case.save_steps)
    message = stopped_in_evaluation(run, case.number, monkeypatch)
    assert (message.code, message.step, message.saved) == (75, case.step, True if case.step else None)
    assert (
        f"step {case.step or 0}/{STEPS}  the pod has to go: the next attempt makes the evaluation of this step"
        in capsys.readouterr().out
    )
    metrics = train.main(run).metrics
    assert metrics is not None
    assert losses(run) == uninterrupted[0]
    assert without_the_machine(metrics) == without_the_machine(uninterrupted[1])
    assert [line.split("/")[0] for line in capsys.readouterr().out.splitlines() if "held-out" in line] == [
        f"step {at}" for at in (0, 10, 20, STEPS) if at >= (case.step or 0)
    ]


def test_experts_go_on_too(tmp_path: Path, data: DatasetDict, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In files each expert is a weight of its own, in memory all of a layer are one: resumed by the names in memory,
    they would begin anew.
    """
    tokenizer = AutoTokenizer.from_pretrained(llama)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    Qwen3MoeForCausalLM(
        Qwen3MoeConfig(vocab_size=len(tokenizer), head_dim=16, num_experts=4, num_experts_per_tok=2, **sizes)
    ).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    training = {"maxSteps": 6, "learningRate": 1e-2}
    whole, parts = (
        prepared_run(tmp_path / name, tmp_path / "m", data, training=training) for name in ("whole", "parts")
    )
    train.main(whole)
    assert stopped_at(parts, 3, monkeypatch).saved
    train.main(parts)
    assert losses(parts) == losses(whole)


def test_a_checkpoint_without_a_weight_is_not_gone_on_from(
    tmp_path: Path, llama: Path, data: DatasetDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared_run(tmp_path / "job", llama, data, training={"maxSteps": 4})
    assert stopped_at(run, 2, monkeypatch).saved
    folder = tmp_path / "job/checkpoints/checkpoint-2"
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    kept = json.loads((folder / MANIFEST).read_text())
    del kept["files"]
    (folder / MANIFEST).unlink()
    write_manifest(folder, **kept)
    with pytest.raises(
        Failure, match=r"checkpoint-2: 1 weights of the model are not in it, among them model\.norm\.weight"
    ):
        train.main(run)


def served_at_first(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """What the pod serves when its first step begins: filled by the runs to come."""
    served: list[dict[str, float]] = []

    class Reader(Heartbeat):
        read = False

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not self.read:
                self.read = True
                port = (run_dir() / "metrics-port").read_text()
                served.append(read_samples(urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()))

    monkeypatch.setattr(train, "Heartbeat", Reader)
    return served


def test_the_newest_checkpoint_is_broken(
    tmp_path: Path,
    llama: Path,
    data: DatasetDict,
    uninterrupted: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if the node had died while it wrote the result: the last checkpoint is damaged, the one before it good."""
    run, served = make(tmp_path / "job", llama, data, saveSteps=10), served_at_first(monkeypatch)
    train.main(run)
    shutil.rmtree(tmp_path / "job/result")
    newest = tmp_path / f"job/checkpoints/checkpoint-{STEPS}"
    weights = bytearray((newest / "adapter_model.safetensors").read_bytes())
    weights[-1] ^= 1
    (newest / "adapter_model.safetensors").write_bytes(weights)
    capsys.readouterr()
    train.main(run)
    output = capsys.readouterr().out
    assert (
        f"checkpoint-{STEPS} is broken and set aside as .corrupt-checkpoint-{STEPS}: adapter_model.safetensors has"
        " changed" in output
    )
    assert "resuming from checkpoint-20" in output
    assert losses(run)[20:] == uninterrupted[0][20:]
    assert [(checkpoint_step(s), broken_checkpoints(s)) for s in served] == [
        (0, 0),
        (20, 1),
    ], "told before the first save"
    written = "luthier_checkpoint_last_success_timestamp_seconds"
    assert [written in s for s in served] == [False, True]
    assert abs(served[1][written] - (tmp_path / "job/checkpoints/checkpoint-20").stat().st_mtime) < 1
    assert [s["luthier_train_nonfinite_total"] for s in served] == [0, 0]
    assert not [name for s in served for name in s if name.endswith("_created")]
