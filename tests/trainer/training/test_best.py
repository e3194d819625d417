"""The best evaluation is the one whose weights are delivered, and a training ends when evaluations get no better."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import DatasetDict
from prepared_workspace import losses, prepared_run, without_the_machine
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, Trainer, TrainerControl, TrainerState
from transformers import TrainingArguments as Arguments

from luthier_api.tasks import TRAINING_TASKS
from luthier_api.training import EarlyStopping, Training
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.run_folder import run_dir
from luthier_trainer.training import main as train
from luthier_trainer.training.best import Choice, Evaluation
from luthier_trainer.training.callbacks import Heartbeat


@pytest.fixture(autouse=True)
def no_notices() -> Iterator[None]:
    notices.forget()
    yield
    notices.forget()


def history(values: list[float], key: str) -> list[dict[str, Any]]:
    return [{"step": 0, key: -99.0}, *({"step": 10 * i, key: value} for i, value in enumerate(values, 1))]


@dataclass(frozen=True)
class RuleCase:
    name: str
    task: str
    metric: str | None
    key: str
    higher: bool
    patience: int
    threshold: float


RULES = [
    RuleCase(
        name="a loss",
        task="causal-lm",
        metric=None,
        key="eval_loss",
        higher=False,
        patience=1,
        threshold=0.0,
    ),
    RuleCase(
        name="a loss that has to fall by more than a threshold",
        task="causal-lm",
        metric="evalLoss",
        key="eval_loss",
        higher=False,
        patience=3,
        threshold=0.2,
    ),
    RuleCase(
        name="perplexity",
        task="causal-lm",
        metric="perplexity",
        key="eval_perplexity",
        higher=False,
        patience=2,
        threshold=0.1,
    ),
    RuleCase(
        name="accuracy",
        task="text-classification",
        metric="accuracy",
        key="eval_accuracy",
        higher=True,
        patience=2,
        threshold=0.05,
    ),
]


@pytest.mark.parametrize("case", RULES, ids=lambda case: case.name)
def test_the_rules_are_those_of_transformers(case: RuleCase, tmp_path: Path) -> None:
    """Compared with `_determine_best_metric` and `EarlyStoppingCallback` over many histories, after each evaluation."""
    training = Training(
        load_best_model=True,
        metric=case.metric,
        early_stopping=EarlyStopping(patience=case.patience, threshold=case.threshold),
    )
    choice = Choice.of(training, TRAINING_TASKS[case.task])
    assert choice is not None
    assert (choice.key, choice.higher) == (case.key, case.higher)
    arguments = Arguments(
        output_dir=str(tmp_path), metric_for_best_model=case.key, greater_is_better=case.higher, use_cpu=True
    )
    draw = random.Random(1)
    for _ in range(50):
        trainer = Trainer.__new__(Trainer)
        trainer.args, trainer.state = arguments, TrainerState()
        stopping, control = EarlyStoppingCallback(case.patience, case.threshold), TrainerControl()
        values = [round(draw.uniform(0, 1), 1) for _ in range(8)]
        for i, value in enumerate(values, 1):
            trainer.state.global_step = 10 * i
            stopping.on_evaluate(arguments, trainer.state, control, {case.key: value})
            trainer._determine_best_metric({case.key: value}, None)
            seen = history(values[:i], case.key)
            assert choice.has_stopped(seen) == (stopping.early_stopping_patience_counter >= case.patience)
            best = choice.best(choice.evaluations(seen))
            assert best == Evaluation(trainer.state.best_global_step, trainer.state.best_metric)


def test_nothing_is_chosen_unless_the_job_asks() -> None:
    assert Choice.of(Training(), TRAINING_TASKS["causal-lm"]) is None


RISING = {"maxSteps": 24, "learningRate": 3e-2, "evalSteps": 4, "saveSteps": 100, "keepCheckpoints": 1}
"""The held-out loss falls at first and then rises. None leaves a field out."""


@pytest.fixture(scope="module")
def data(prose_data: DatasetDict) -> DatasetDict:
    return DatasetDict(train=prose_data["train"].select(range(40)), eval=prose_data["eval"].select(range(8)))


def make(root: Path, llama: Path, data: DatasetDict, **training: Any) -> Any:
    method = training.pop("method", {"type": "full"})
    course = {name: value for name, value in (RISING | training).items() if value is not None}
    return prepared_run(root, llama, data, method=method, training=course)


def measured(folder: Path, data: DatasetDict) -> float:
    """Held-out loss of the model in `folder`, computed by transformers' own forward pass, a row at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    total = count = 0.0
    for row in data["eval"]["input_ids"]:
        ids = torch.tensor([row])
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss
        total, count = total + loss.item() * (len(row) - 1), count + len(row) - 1
    return total / count


def test_the_best_weights_are_delivered(
    tmp_path: Path, llama: Path, data: DatasetDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train.main(make(tmp_path / "plain", llama, data))
    run = make(tmp_path / "job", llama, data, loadBestModel=True)
    message = train.main(run)
    assert plain.metrics
    assert message.metrics
    assert 0 < message.metrics["bestStep"] < 24
    assert message.metrics["evalLoss"] < plain.metrics["evalLoss"] - 0.02
    assert measured(tmp_path / "job/result", data) == pytest.approx(message.metrics["evalLoss"], abs=1e-4)
    kept = sorted(path.name for path in (tmp_path / "job/checkpoints").iterdir())
    best = f"checkpoint-{message.metrics['bestStep']:.0f}"
    assert kept == sorted(["checkpoint-24", best])
    assert [text for text in notices.given() if text.startswith("spec.training.loadBestModel: the result has")]

    # Attempts that were stopped come to the same weights, to the last bit.
    again = make(tmp_path / "again", llama, data, loadBestModel=True)
    for step in (int(message.metrics["bestStep"]), 17, 24):
        stopped_at(again, step, monkeypatch)
    second = train.main(again)
    assert second.metrics is not None
    assert without_the_machine(second.metrics) == without_the_machine(message.metrics)
    whole, resumed = (load_file(tmp_path / name / "result/model.safetensors") for name in ("job", "again"))
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())


def stopped_at(run: Any, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Flag(Heartbeat):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == step - 1:
                (run_dir() / "stop").touch()

    with monkeypatch.context() as patch:
        patch.setattr(train, "Heartbeat", Flag)
        message = train.main(run)
    (run_dir() / "stop").unlink()
    assert (message.code, message.step) == (75, step)


@pytest.mark.slow
def test_a_training_that_gets_no_better_ends_early(
    tmp_path: Path, llama: Path, data: DatasetDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = {"type": "lora", "rank": 4}
    asked = {"loadBestModel": True, "earlyStopping": {"patience": 2}, "evalEvery": "epoch", "saveEvery": "epoch"}
    asked |= {"evalSteps": None, "saveSteps": None, "maxSteps": 200, "learningRate": 0.1, "method": lora}
    run = make(tmp_path / "job", llama, data, **asked)
    message = train.main(run)
    assert message.metrics is not None
    steps, best = message.metrics["steps"], message.metrics["bestStep"]
    assert steps == best + 10  # two epochs of five steps
    said = notices.given()
    assert any(
        text.startswith(
            f"spec.training.earlyStopping: stopped early at step {steps:.0f} of 200: eval_loss has not improved for 2"
            " evaluations"
        )
        for text in said
    )
    notices.forget()
    assert train.main(run).metrics == message.metrics  # the pod was restarted after the result was complete
    assert notices.given() == said

    again = make(tmp_path / "again", llama, data, **asked)
    for step in (int(best) + 3, int(steps) - 5, int(steps)):
        stopped_at(again, step, monkeypatch)
    second = train.main(again)
    assert second.metrics is not None
    assert second.metrics["evalLoss"] == message.metrics["evalLoss"]
    assert losses(again) == losses(run)
    whole, resumed = (load_file(tmp_path / name / "result/adapter_model.safetensors") for name in ("job", "again"))
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())


def test_a_best_checkpoint_that_is_broken_is_passed_over(
    tmp_path: Path, llama: Path, data: DatasetDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(tmp_path / "job", llama, data, loadBestModel=True, saveSteps=4, keepCheckpoints=9)
    deliver = train.deliver_best
    broken = []

    def after_damage(loop: Any) -> dict[str, float]:
        broken.append(loop.choice.best(loop.choice.evaluations(loop.state.log_history)).step)
        (tmp_path / f"job/checkpoints/checkpoint-{broken[0]}/model.safetensors").write_bytes(b"broken")
        return deliver(loop)

    monkeypatch.setattr(train, "deliver_best", after_damage)
    message = train.main(run)
    assert message.metrics is not None
    assert message.metrics["bestStep"] != broken[0]
    assert measured(tmp_path / "job/result", data) == pytest.approx(message.metrics["evalLoss"], abs=1e-4)
    assert [text for text in notices.given() if f"checkpoint-{broken[0]} had the best evalLoss" in text]
