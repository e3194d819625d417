"""One process: each method and task learns from real text, and what it delivers is what it measured."""

from __future__ import annotations

import json
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from cases.quick import quick
from datasets import DatasetDict
from peft import AutoPeftModelForCausalLM
from prepared_workspace import (
    causal_lm_data,
    classification_data,
    code,
    image_data,
    losses,
    prepared_run,
    save_encoder,
    sign,
)
from trainer.digits import save_model as save_vit
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from luthier_api.exitcodes import ExitCode
from luthier_api.metrics import checkpoint_step, read_samples, training_progress
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.run_folder import run_dir
from luthier_trainer.training import main as train
from luthier_trainer.workspace.manifest import problems
from luthier_trainer.workspace.prepared import read_prepared, write_prepared


@pytest.fixture(scope="module")
def other_data(llama: Path, paragraphs: list[str]) -> DatasetDict:
    """Another register than the base has learnt."""
    return causal_lm_data(AutoTokenizer.from_pretrained(llama), code(paragraphs))


@pytest.fixture(scope="module")
def learnt(llama: Path, prose_data: DatasetDict, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A full training of 25 steps: its run, its message, and a base for the adapters."""
    folder = tmp_path_factory.mktemp("learnt")
    (folder / "run").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTHIER_RUN_DIR", str(folder / "run"))
        run = prepared_run(
            folder / "job", llama, prose_data, training={"maxSteps": 25, "learningRate": 1e-2, "saveSteps": 10}
        )
        return run, train.main(run)


def test_full(learnt: Any) -> None:
    run, message = learnt
    result = Path(run.workspace) / "result"
    assert (message.code, message.reason, message.step) == (0, "Completed", 25)
    assert message.metrics["evalLoss"] < message.metrics["evalLossBefore"] - 0.7
    assert set(message.metrics) == {
        "evalLossBefore",
        "evalLoss",
        "perplexity",
        "trainLoss",
        "lastLoss",
        "steps",
        "tokens",
        "paddingShare",
        "seconds",
        "peakMemoryGB",
    }
    assert json.loads((result / "metrics.json").read_text()) == message.metrics
    assert problems(result) == []
    assert not list(Path(run.workspace).rglob("training_args.bin"))
    model = AutoModelForCausalLM.from_pretrained(result)
    assert model.config.use_cache
    assert AutoTokenizer.from_pretrained(result).pad_token_id == model.config.pad_token_id
    # The default of keepCheckpoints is 2; the last step is always saved.
    assert sorted(p.name for p in (Path(run.workspace) / "checkpoints").iterdir()) == ["checkpoint-20", "checkpoint-25"]


@dataclass(frozen=True)
class AdapterCase:
    name: str
    method: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)
    rounding: float = 1e-4
    """How far the loss on the base as it is may be from that on the base as it was quantised."""


ADAPTERS = [
    AdapterCase(
        name="lora",
        method={"type": "lora", "rank": 16},
    ),
    AdapterCase(
        name="some modules",
        method={"type": "lora", "targetModules": ["q_proj", "v_proj", "down_proj"], "dropout": 0.1},
    ),
    AdapterCase(
        name="qlora",
        method={"type": "qlora", "rank": 8},
        rounding=0.1,
    ),
    AdapterCase(
        name="lora on fp4",
        method={"type": "lora", "rank": 8},
        model={"quantization": {"type": "fp4"}},
        rounding=0.15,
    ),
    AdapterCase(
        name="lora on int8",
        method={"type": "lora", "rank": 8},
        model={"quantization": {"type": "int8"}},
        rounding=0.02,
    ),
]


@pytest.mark.parametrize("case", quick(ADAPTERS, "some modules", "qlora"))
def test_adapter(case: AdapterCase, tmp_path: Path, learnt: Any, other_data: DatasetDict) -> None:
    base = Path(learnt[0].workspace) / "result"
    run = prepared_run(
        tmp_path / "job",
        base,
        other_data,
        model={"path": str(base)} | case.model,
        method=case.method,
        training={"maxSteps": 25, "learningRate": 1e-2},
    )
    metrics = train.main(run).metrics
    print(metrics)
    assert metrics is not None
    assert metrics["evalLoss"] < metrics["evalLossBefore"] - 0.05
    model = AutoPeftModelForCausalLM.from_pretrained(Path(run.workspace) / "result")
    assert model.peft_config["default"].base_model_name_or_path == str(base)
    assert not getattr(model.base_model.model, "is_quantized", False)
    assert plain_loss(model, other_data) == pytest.approx(metrics["evalLoss"], abs=case.rounding)


def plain_loss(model: Any, data: DatasetDict) -> float:
    """Mean loss over the held-out tokens, row by row, without any code of ours."""
    loss = tokens = 0.0
    for row in data["eval"]:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            loss += model(input_ids=ids, labels=ids).loss.item() * (ids.numel() - 1)
        tokens += ids.numel() - 1
    return loss / tokens


def test_an_adapter_of_a_model_of_the_hub_names_it(tmp_path: Path, llama: Path, prose_data: DatasetDict) -> None:
    run = prepared_run(
        tmp_path / "job", llama, prose_data, method={"type": "lora"}, model={"id": "org/base"}, training={"maxSteps": 1}
    )
    record = tmp_path / "job/prepared/prepared.json"
    prepared = json.loads(record.read_text())
    record.write_text(json.dumps(prepared | {"model": {"source": "org/base", "revision": "0" * 40}}))
    train.main(run)
    config = json.loads((tmp_path / "job/result/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "0" * 40)


LABELS = {"task": "text-classification", "labels": ["code", "prose"]}
IMAGES = {"task": "image-classification", "labels": ["zero", "one"]}


@dataclass(frozen=True)
class SameTraceCase:
    name: str
    method: str
    training: dict[str, Any]
    tolerance: float
    task: dict[str, Any] = field(default_factory=dict)


SAME_TRACE = [
    SameTraceCase(
        name="accumulation",
        method="full",
        training={"microBatchSize": 2},
        tolerance=1e-4,
    ),
    SameTraceCase(
        name="accumulation of labels",
        method="full",
        task=LABELS,
        training={"microBatchSize": 2},
        tolerance=1e-4,
    ),
    SameTraceCase(
        name="labels, lora",
        method="lora",
        task=LABELS,
        training={"microBatchSize": 2},
        tolerance=1e-4,
    ),
    SameTraceCase(
        name="gradient checkpointing",
        method="full",
        training={"gradientCheckpointing": True},
        tolerance=1e-6,
    ),
    SameTraceCase(
        name="checkpointing of lora",
        method="lora",
        training={"gradientCheckpointing": True},
        tolerance=1e-6,
    ),
    SameTraceCase(
        name="bf16",
        method="full",
        training={"precision": "bf16"},
        tolerance=2e-2,
    ),
    SameTraceCase(
        name="bf16 of lora",
        method="lora",
        training={"precision": "bf16"},
        tolerance=2e-2,
    ),
    SameTraceCase(
        name="bf16 of qlora",
        method="qlora",
        training={"precision": "bf16"},
        tolerance=2e-2,
    ),
    SameTraceCase(
        name="bf16 of labels, lora",
        method="lora",
        task=LABELS,
        training={"precision": "bf16"},
        tolerance=2e-2,
    ),
    SameTraceCase(
        name="accumulation of images",
        method="full",
        task=IMAGES,
        training={"microBatchSize": 2},
        tolerance=1e-4,
    ),
    SameTraceCase(
        name="checkpointing of images",
        method="lora",
        task=IMAGES,
        training={"gradientCheckpointing": True},
        tolerance=1e-6,
    ),
    SameTraceCase(
        name="bf16 of images",
        method="lora",
        task=IMAGES,
        training={"precision": "bf16"},
        tolerance=2e-2,
    ),
]


@pytest.mark.parametrize(
    "case", quick(SAME_TRACE, "accumulation of labels", "gradient checkpointing", "bf16 of qlora", "bf16 of images")
)
def test_the_same_losses(
    case: SameTraceCase, tmp_path: Path, llama: Path, prose_data: DatasetDict, paragraphs: list[str]
) -> None:
    base, data = llama, prose_data
    if case.task is IMAGES:
        base, data = save_vit(tmp_path / "vit"), image_data()
    elif case.task:
        tokenizer = AutoTokenizer.from_pretrained(llama)
        base, data = save_encoder(tmp_path / "encoder", tokenizer), classification_data(tokenizer, paragraphs)
    plain, other = (
        prepared_run(tmp_path / n, base, data, method={"type": case.method}, training={"maxSteps": 4} | t, **case.task)
        for n, t in (("plain", {}), ("other", case.training))
    )
    messages = [train.main(run) for run in (plain, other)]
    assert losses(other) == pytest.approx(losses(plain), abs=case.tolerance)
    assert messages[1].metrics["evalLoss"] == pytest.approx(messages[0].metrics["evalLoss"], abs=case.tolerance)  # type: ignore[index]


@dataclass(frozen=True)
class EvaluationCase:
    name: str
    eval_steps: int | None
    evaluated_after: list[int]


EVALUATIONS = [
    EvaluationCase(
        name="at the end alone",
        eval_steps=None,
        evaluated_after=[0, 4],
    ),
    EvaluationCase(
        name="that meet the end",
        eval_steps=2,
        evaluated_after=[0, 2, 4],
    ),
    EvaluationCase(
        name="that miss it",
        eval_steps=3,
        evaluated_after=[0, 3, 4],
    ),
]


@pytest.mark.parametrize("case", EVALUATIONS, ids=lambda case: case.name)
def test_evaluations(
    case: EvaluationCase, tmp_path: Path, llama: Path, prose_data: DatasetDict, capsys: pytest.CaptureFixture[str]
) -> None:
    """What an evaluation costs is paid once a step."""
    train.main(
        prepared_run(
            tmp_path / "job",
            llama,
            prose_data,
            training={"maxSteps": 4} | ({"evalSteps": case.eval_steps} if case.eval_steps else {}),
        )
    )
    said = [line.split("/")[0] for line in capsys.readouterr().out.splitlines() if "held-out" in line]
    assert said == [f"step {step}" for step in case.evaluated_after]


def test_the_time_left_knows_nothing_of_the_first_evaluation(
    tmp_path: Path,
    llama: Path,
    prose_data: DatasetDict,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Slow(train.Heartbeat):
        def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            time.sleep(0.6 * (state.global_step == 0))

    monkeypatch.setattr(train, "Heartbeat", Slow)
    train.main(prepared_run(tmp_path / "job", llama, prose_data, training={"maxSteps": 21}))
    first = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("step 1/21"))
    assert 0 <= int(first.split()[-2].split(":")[-1]) < 20 * 0.6  # seconds; the evaluation alone would be as much


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_an_evaluation_changes_nothing(method: str, tmp_path: Path, llama: Path, prose_data: DatasetDict) -> None:
    """bitsandbytes once went without the gradients of 4-bit weights after an evaluation on CPU."""
    without = DatasetDict(train=prose_data["train"])
    runs = [
        prepared_run(tmp_path / n, llama, data, method={"type": method}, training={"maxSteps": 4, "learningRate": 1e-2})
        for n, data in (("with", prose_data), ("without", without))
    ]
    for run in runs:
        train.main(run)
    assert losses(runs[0]) == losses(runs[1])


@dataclass(frozen=True)
class ClassifierCase:
    name: str
    method: dict[str, Any]
    steps: int


CLASSIFIERS = [
    ClassifierCase(
        name="full",
        method={"type": "full"},
        steps=60,
    ),
    ClassifierCase(
        name="lora",
        method={"type": "lora", "rank": 8},
        steps=60,
    ),
    ClassifierCase(
        name="qlora",
        method={"type": "qlora", "rank": 8},
        steps=10,
    ),
]


@pytest.mark.parametrize("case", CLASSIFIERS, ids=lambda case: case.name)
def test_classification(case: ClassifierCase, tmp_path: Path, llama: Path, paragraphs: list[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    encoder = save_encoder(tmp_path / "encoder", tokenizer)
    data = classification_data(tokenizer, paragraphs)
    run = prepared_run(
        tmp_path / "job",
        encoder,
        data,
        labels=["code", "prose"],
        task="text-classification",
        method=case.method,
        training={"maxSteps": case.steps, "learningRate": 1e-2, "batchSize": 16},
    )
    metrics = train.main(run).metrics
    print(metrics)
    assert metrics is not None
    assert {"accuracy", "f1Macro", "majorityShare"} < set(metrics)
    if case.steps >= 60:
        assert metrics["accuracy"] > metrics["majorityShare"] + 0.1
    if case.method["type"] == "full":
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "job/result")
        assert model.config.id2label == {0: "code", 1: "prose"}


def test_metrics_are_served(tmp_path: Path, llama: Path, prose_data: DatasetDict) -> None:
    run = prepared_run(tmp_path / "job", llama, prose_data, training={"maxSteps": 3, "saveSteps": 2})
    metrics = train.main(run).metrics
    port = (run_dir() / "metrics-port").read_text()
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    samples = read_samples(text)
    progress = training_progress([samples])
    assert progress is not None
    assert (progress.step, progress.max_steps, progress.percent, progress.eta_seconds) == (3, 3, 100, 0)
    assert checkpoint_step(samples) == 3
    tokens = sum(prose_data["train"]["length"])
    assert metrics is not None
    assert 0 < samples["luthier_train_tokens_total"] == metrics["tokens"] < tokens
    assert "\nluthier_train_step_duration_seconds_count 3.0\n" in text
    assert samples["luthier_train_eval_loss"] == metrics["evalLoss"]
    assert (run_dir() / "heartbeat").exists()


def test_a_finished_run_is_not_repeated(learnt: Any) -> None:
    run, message = learnt
    assert train.main(run).metrics == message.metrics


def changed(run: Any, **training: Any) -> Any:
    return run.model_copy(
        update={"spec": run.spec.model_copy(update={"training": run.spec.training.model_copy(update=training)})}
    )


def fail(run: Any) -> tuple[ExitCode, str]:
    with pytest.raises(Failure) as caught:
        train.main(run)
    return caught.value.code, caught.value.message


def test_a_result_of_other_settings_is_not_taken_for_ours(learnt: Any) -> None:
    other = changed(learnt[0], learning_rate=0.5)
    sign(other)  # as if `prepare` had been run again
    code, message = fail(other)
    sign(learnt[0])
    assert code == ExitCode.INVALID_SPEC
    assert "spec.training.learningRate is 0.5, there it was 0.01" in message
    assert "another metadata.name" in message


def test_a_module_that_is_not_there(tmp_path: Path, llama: Path, prose_data: DatasetDict) -> None:
    run = prepared_run(tmp_path / "job", llama, prose_data, method={"type": "lora", "targetModules": ["query"]})
    code, message = fail(run)
    assert code == ExitCode.INVALID_SPEC
    assert message.startswith("spec.method.targetModules: query does not suit LlamaForCausalLM")
    assert "q_proj" in message


def test_weights_that_would_never_learn(tmp_path: Path, llama: Path, prose_data: DatasetDict) -> None:
    """Cross-attention that nothing attends to: transformers alone would train the rest and say nothing."""
    tokenizer = AutoTokenizer.from_pretrained(llama)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, add_cross_attention=True)
    ).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    code, message = fail(prepared_run(tmp_path / "job", tmp_path / "model", prose_data))
    assert code == ExitCode.MISCONFIGURED
    assert "got no gradient, among them transformer.h.0.crossattention" in message


@dataclass(frozen=True)
class NotFiniteCase:
    name: str
    splits: list[str]
    message: str


NOT_FINITE = [
    NotFiniteCase(
        name="seen by an evaluation",
        splits=["train", "eval"],
        message="spec.model: the held-out loss is nan before the first step",
    ),
    NotFiniteCase(
        name="seen by the gradients",
        splits=["train"],
        message=(
            "spec.training.learningRate: the gradients of 3 steps in a row, up to step 3, were not finite (the loss is"
            " nan)"
        ),
    ),
]


@pytest.mark.parametrize("case", NOT_FINITE, ids=lambda case: case.name)
def test_a_loss_that_is_no_number(case: NotFiniteCase, tmp_path: Path, llama: Path, prose_data: DatasetDict) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.model.norm.weight.data[0] = torch.inf
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "model")
    data = DatasetDict({split: prose_data[split] for split in case.splits})
    code, message = fail(prepared_run(tmp_path / "job", tmp_path / "model", data, training={"saveSteps": 5}))
    assert code == ExitCode.DIVERGED
    assert message.startswith(case.message)
    assert list((tmp_path / "job/checkpoints").iterdir()) == []


def test_a_process_alone_that_should_be_one_of_two(tmp_path: Path, llama: Path, prose_data: DatasetDict) -> None:
    code, message = fail(prepared_run(tmp_path / "job", llama, prose_data, resources={"processesPerNode": 2}))
    assert code == ExitCode.MISCONFIGURED
    assert message.startswith("spec.strategy: ddp over 2 processes was asked for, but processes is 1 instead of 2")


@dataclass(frozen=True)
class OtherCase:
    name: str
    change: dict[str, Any]
    """Arguments of transformers' trainer that are others than the plan's."""
    message: str


OTHERS = [
    OtherCase(
        name="steps",
        change={"max_steps": 7},
        message="steps is 7 instead of 10",
    ),
    OtherCase(
        name="rows",
        change={"per_device_train_batch_size": 4},
        message="rows in a micro-batch is 4 instead of 8",
    ),
    OtherCase(
        name="accumulation",
        change={"gradient_accumulation_steps": 2},
        message="micro-batches in a step is 2 instead of 1",
    ),
    OtherCase(
        name="activations",
        change={"activation_checkpointing": True},
        message="recomputed activations is True instead of False",
    ),
    OtherCase(
        name="precision",
        change={"mixed_precision": "bf16"},
        message="precision is 'bf16' instead of 'fp32'",
    ),
]


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.name)
def test_what_runs_is_compared_with_the_plan(
    case: OtherCase, tmp_path: Path, llama: Path, prose_data: DatasetDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = train.training_arguments

    def others(*args: Any, **options: Any) -> Any:
        arguments = planned(*args, **options)
        for name, value in case.change.items():
            setattr(arguments, name, value)
        return arguments

    monkeypatch.setattr(train, "training_arguments", others)
    code, message = fail(prepared_run(tmp_path / "job", llama, DatasetDict(train=prose_data["train"])))
    assert (code, case.message in message) == (ExitCode.MISCONFIGURED, True), message


def test_another_number_of_weights_than_planned_is_said(
    tmp_path: Path, llama: Path, prose_data: DatasetDict, capsys: pytest.CaptureFixture[str]
) -> None:
    run = prepared_run(
        tmp_path / "job",
        llama,
        DatasetDict(train=prose_data["train"]),
        method={"type": "lora"},
        training={"maxSteps": 1},
    )
    record = read_prepared(run)
    write_prepared(run, record.model_copy(update={"plan": record.plan.model_copy(update={"trainable_parameters": 1})}))
    train.main(run)
    assert " weights learn, and the plan has counted 1. Its memory" in capsys.readouterr().out
