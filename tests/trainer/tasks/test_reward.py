"""Reward models: pairs are rated as TRL rates them, and the result gives the same numbers without Luthier."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_from_disk
from peft import LoraConfig, PeftModel, get_peft_model
from prepared_workspace import losses
from safetensors.torch import load_file
from trainer.tasks.stopping import stopped_at
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from luthier_api.run import FineTuneRun
from luthier_trainer.models.materialize import whole_model
from luthier_trainer.models.sources import locate
from luthier_trainer.prepare import main as prepare
from luthier_trainer.publish.model_card import card
from luthier_trainer.runtime import notices
from luthier_trainer.training import main as train
from luthier_trainer.workspace.prepared import read_prepared

FULL = {"type": "full"}
LORA = {"type": "lora", "rank": 4}
QLORA = {"type": "qlora", "rank": 4}
COURSE = {"maxLength": 96, "batchSize": 4, "maxSteps": 6, "learningRate": 1e-3, "logSteps": 1, "evalSteps": 3}


@pytest.fixture
def rate(make_run: Any, tmp_path: Path, pairs: list[dict[str, str]]) -> Callable[..., FineTuneRun]:
    """The run config of a job over `rows`, the last 8 of which are held out."""

    def make(name: str = "job", rows: list[dict[str, Any]] | None = None, **spec: Any) -> FineTuneRun:
        given = rows or pairs
        dataset = {}
        for role, some in (("files", given[:-8]), ("evalFiles", given[-8:])):
            file = tmp_path / f"{name}-{role}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in some))
            dataset[role] = [str(file)]
        given_spec = {"task": "reward", "dataset": dataset, "method": LORA, "training": COURSE}
        return make_run(name, **given_spec | spec)

    return make


@dataclass(frozen=True)
class Learning:
    name: str
    method: dict[str, Any]
    reward: dict[str, Any] = field(default_factory=dict)


LEARNINGS = [
    Learning(name="all weights", method=FULL),
    Learning(name="adapters, rewards held at 0", method=LORA, reward={"centerRewardsCoefficient": 0.5}),
]


def plain_trl(run: FineTuneRun, folder: Path, base: Path, pairs: list[dict[str, str]]) -> tuple[Any, Any]:
    """A script of TRL's documentation over the same rows: its trainer after training, and the ids that it read."""
    from trl import RewardConfig, RewardTrainer

    torch.manual_seed(run.spec.training.seed)  # the head is drawn first, then the adapters
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    adapters = LoraConfig(
        r=4, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"]
    )
    if run.spec.method.type == "lora":
        model = get_peft_model(model, adapters)
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(
            output_dir=str(folder),
            max_steps=6,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            learning_rate=1e-3,
            max_length=96,
            center_rewards_coefficient=run.spec.reward.center_rewards_coefficient,
            seed=run.spec.training.seed,
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(pairs[:-8]),
        eval_dataset=Dataset.from_list(pairs[-8:]),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    trainer.train()
    return trainer, trainer.train_dataset


@pytest.mark.parametrize("case", LEARNINGS, ids=lambda case: case.name)
def test_ids_losses_and_rewards_are_those_of_trl(
    case: Learning, rate: Callable[..., FineTuneRun], pairs: list[dict[str, str]], tiny_model: Path, tmp_path: Path
) -> None:
    run = rate(method=case.method, reward=case.reward)
    prepare.main(run)
    metrics = train.main(run).metrics
    assert metrics is not None
    trainer, read = plain_trl(run, tmp_path / "trl", tiny_model, pairs)
    data = load_from_disk(read_prepared(run).dataset_path)["train"]
    for name in ("chosen_ids", "rejected_ids"):
        assert data[name][:] == read[name][:]
    expect = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses(run) == pytest.approx(expect, abs=1e-5)
    assert expect[-1] < expect[0]
    measured = trainer.evaluate()
    for ours, theirs in (
        ("evalLoss", "eval_loss"),
        ("rewardAccuracy", "eval_accuracy"),
        ("rewardMargin", "eval_margin"),
        ("rewardMean", "eval_mean_reward"),
    ):
        assert metrics[ours] == pytest.approx(measured[theirs], abs=1e-5), ours
    assert metrics["rewardMin"] < metrics["rewardMean"] < metrics["rewardMax"]


def scores(model: Any, run: FineTuneRun) -> list[float]:
    """The rewards of the held-out answers, one by one."""
    data = load_from_disk(read_prepared(run).dataset_path)["eval"]
    with torch.no_grad():
        rows = [ids for name in ("chosen_ids", "rejected_ids") for ids in data[name]]
        return [float(model.eval()(input_ids=torch.tensor([ids])).logits[0, 0]) for ids in rows]


@pytest.mark.parametrize(
    "method",
    [pytest.param(FULL, marks=pytest.mark.slow), pytest.param(LORA, marks=pytest.mark.slow), QLORA],
    ids=lambda method: method["type"],
)
def test_a_stopped_run_goes_on_to_the_last_bit_and_the_result_is_loaded(
    method: dict[str, Any],
    rate: Callable[..., FineTuneRun],
    make_run: Any,
    monkeypatch: pytest.MonkeyPatch,
    llama: Path,
) -> None:
    spec = {"method": method, "model": {"path": str(llama)}}
    if method != FULL:
        spec["method"] = method | {"dropout": 0.1}
    runs = [rate(name, **spec) for name in ("whole", "stopped")]
    for run in runs:
        prepare.main(run)
    metrics = train.main(runs[0]).metrics or {}
    message = stopped_at(runs[1], 3, monkeypatch)
    assert (message.code, message.step, message.saved) == (75, 3, True)
    train.main(runs[1])
    assert losses(runs[1]) == losses(runs[0])
    results = [Path(run.workspace) / "result" for run in runs]
    weights = [
        {name: weight for file in sorted(result.glob("*.safetensors")) for name, weight in load_file(file).items()}
        for result in results
    ]
    assert all(weight.equal(weights[1][name]) for name, weight in weights[0].items())
    assert any("score" in name for name in weights[0])

    # as the model card says
    if method == FULL:
        model = AutoModelForSequenceClassification.from_pretrained(results[0])
    else:
        config = AutoConfig.from_pretrained(results[0])
        base = AutoModelForSequenceClassification.from_pretrained(llama, config=config, ignore_mismatched_sizes=True)
        model = PeftModel.from_pretrained(base, results[0])
    found = scores(model, runs[0])
    if method != QLORA:  # whose base is not in 4 bits here
        assert sum(found) / len(found) == pytest.approx(metrics["rewardMean"], abs=1e-5)
        assert max(found) == pytest.approx(metrics["rewardMax"], abs=1e-5)
    assert model.config.id2label == {0: "reward"}

    # and as another job finds it
    other = make_run("other", model={"job": "whole"}).model_copy(update={"sources": {"whole": runs[0].workspace}})
    located = locate(other.spec.model, other, "spec.model")
    folder = whole_model(located, other, _folder(other), "whole", "model")
    again = AutoModelForSequenceClassification.from_pretrained(folder)
    assert again.config.num_labels == 1
    assert scores(again, runs[0]) == pytest.approx(found, abs=1e-5)


def _folder(run: FineTuneRun) -> Any:
    from luthier_api.workspace import WorkspaceFolder

    folder = WorkspaceFolder(Path(run.workspace))
    folder.prepared.mkdir(parents=True, exist_ok=True)
    return folder


def test_an_adapter_holds_new_tokens(rate: Callable[..., FineTuneRun], make_run: Any, llama: Path) -> None:
    """Another job finds them, too."""
    model = {"path": str(llama), "addSpecialTokens": ["<|a|>", "<|b|>"]}
    prepare.main(run := rate(model=model, training=COURSE | {"maxSteps": 2, "evalSteps": None}))
    metrics = train.main(run).metrics or {}
    assert any("2 of 2 new tokens occur in no row" in text for text in notices.given())
    other = make_run("other", model={"job": "job"}).model_copy(update={"sources": {"job": run.workspace}})
    located = locate(other.spec.model, other, "spec.model")
    folder = whole_model(located, other, _folder(other), "job", "model")
    again = AutoModelForSequenceClassification.from_pretrained(folder)
    assert again.get_input_embeddings().num_embeddings == AutoConfig.from_pretrained(llama).vocab_size + 2
    found = scores(again, run)
    assert sum(found) / len(found) == pytest.approx(metrics["rewardMean"], abs=1e-5)


def test_equal_pairs_are_left_out_once_asked(rate: Callable[..., FineTuneRun], pairs: list[dict[str, str]]) -> None:
    asked = rate(rows=[pairs[0], *pairs]).spec
    prepare.main(run := rate(rows=[pairs[0], *pairs], dataset=asked.dataset.dump() | {"deduplicate": "exact"}))
    assert len(load_from_disk(read_prepared(run).dataset_path)["train"]) == len(pairs) - 8
    assert any("1 of 17 training rows" in text for text in notices.given())


def test_answers_that_are_too_long_are_left_out(rate: Callable[..., FineTuneRun], pairs: list[dict[str, str]]) -> None:
    long = " ".join(pair["chosen"] for pair in pairs)
    prepare.main(run := rate(rows=[pairs[0] | {"chosen": long}, *pairs[1:]]))
    assert len(load_from_disk(read_prepared(run).dataset_path)["train"]) == 15
    assert any(
        "1 of 16 training rows" in text and "have an answer of more than 96 tokens" in text for text in notices.given()
    )


def test_the_card_says_how_answers_are_rated(rate: Callable[..., FineTuneRun]) -> None:
    run = rate(training=COURSE | {"maxSteps": 1, "evalSteps": None}, reward={"centerRewardsCoefficient": 0.01})
    prepare.main(run)
    train.main(run)
    text = card(run, read_prepared(run), Path(run.workspace) / "result")
    for expected in ("- reward-model", "| Task | reward |", "| centerRewardsCoefficient | 0.01 |", "Highest reward"):
        assert expected in text
    assert "AutoModelForSequenceClassification.from_pretrained(" in text
    assert "PeftModel.from_pretrained(base," in text
