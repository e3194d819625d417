"""Trainings of packed rows and of rows of similar lengths: their losses, and their resumption."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import DatasetDict
from prepared_workspace import (
    classification_data,
    losses,
    packed_data,
    prepared_run,
    prose,
    save_encoder,
    without_the_machine,
)
from torch.nn.functional import cross_entropy
from trainer.training.test_resume import stopped_at
from transformers import AutoModelForCausalLM, AutoTokenizer

from luthier_trainer.training import main as train

RATE = 1e-3
ROWS = 6


@pytest.fixture(scope="module")
def bins(llama: Path, paragraphs: list[str]) -> DatasetDict:
    return packed_data(AutoTokenizer.from_pretrained(llama), prose(paragraphs), ROWS)


@pytest.mark.parametrize("attention", ["auto", "varlen"])
def test_the_loss_of_a_step_is_the_mean_over_its_labels(
    tmp_path: Path, llama: Path, bins: DatasetDict, attention: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """In three micro-batches, and step by step the losses of a plain loop over documents, each of them alone."""
    training = {"batchSize": ROWS, "microBatchSize": 2, "maxSteps": 3, "learningRate": RATE, "schedule": "constant"}
    packed = {"packing": "isolated", "attention": attention}
    run = prepared_run(tmp_path / "job", llama, bins, training=training | packed)
    metrics = train.main(run).metrics
    assert f", attention {'sdpa' if attention == 'auto' else attention}," in capfd.readouterr().out
    assert metrics is not None

    model = AutoModelForCausalLM.from_pretrained(llama)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    expect = []
    for _ in range(3):
        loss = mean_loss(model, bins["train"])
        expect.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert losses(run) == pytest.approx(expect, abs=2e-5)
    with torch.no_grad():
        assert metrics["evalLoss"] == pytest.approx(mean_loss(model, bins["eval"]).item(), abs=2e-5)
    assert metrics["tokens"] == 3 * sum(bins["train"]["length"][:])
    assert 0 < metrics["paddingShare"] < 0.1


def mean_loss(model: Any, rows: Any) -> torch.Tensor:
    """Cross-entropy of the labels of all documents, each alone in the model: their sum by their number."""
    total, labels = torch.zeros(()), 0
    for row in rows:
        end = 0
        for length in row["seq_lengths"]:
            begin, end = end, end + length
            ids = torch.tensor(row["input_ids"][begin:end])
            learnt = torch.tensor(row["loss_mask"][begin:end])[1:] == 1
            logits = model(input_ids=ids[None]).logits[0, :-1]
            total = total + cross_entropy(logits[learnt], ids[1:][learnt], reduction="sum")
            labels += int(learnt.sum())
    return total / labels


@dataclass(frozen=True)
class Case:
    name: str
    training: dict[str, Any]


CASES = [
    Case(
        name="packed",
        training={"packing": "isolated"},
    ),
    Case(
        name="grouped by length",
        training={"groupByLength": True},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_run_that_is_stopped_twice_has_the_same_losses(
    case: Case,
    tmp_path: Path,
    llama: Path,
    bins: DatasetDict,
    prose_data: DatasetDict,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the last bit: stopped in the middle of the second epoch, and of the third."""
    rows = prose_data["train"].select(range(ROWS))
    data = bins if case.name == "packed" else DatasetDict(train=rows, eval=rows)
    training = {"batchSize": 2, "microBatchSize": 1, "maxSteps": 9, "learningRate": 1e-2} | case.training
    method = {"type": "lora", "rank": 4, "dropout": 0.1}
    runs = [
        prepared_run(tmp_path / name, llama, data, method=method, training=training) for name in ("whole", "stopped")
    ]
    whole = train.main(runs[0]).metrics
    assert [stopped_at(runs[1], step, monkeypatch).step for step in (4, 8)] == [4, 8]
    stopped = train.main(runs[1]).metrics
    assert losses(runs[1]) == losses(runs[0])
    assert whole is not None
    assert stopped is not None
    assert without_the_machine(stopped) == without_the_machine(whole)


def test_classifiers_group_by_length_too(tmp_path: Path, llama: Path, paragraphs: list[str]) -> None:
    """Their trainer removes the lengths from the rows, which the model does not take."""
    tokenizer = AutoTokenizer.from_pretrained(llama)
    data = classification_data(tokenizer, paragraphs)
    data = DatasetDict(train=data["train"].take(16), eval=data["eval"].take(8))
    base, labels = save_encoder(tmp_path / "model", tokenizer), ["code", "prose"]
    evaluations = []
    for grouped in (False, True):
        run = prepared_run(
            tmp_path / f"job-{grouped}",
            base,
            data,
            labels,
            task="text-classification",
            training={"maxSteps": 2, "groupByLength": grouped},
        )
        metrics = train.main(run).metrics
        assert metrics is not None
        evaluations.append(metrics["evalLossBefore"])
    assert evaluations[1] == pytest.approx(evaluations[0], abs=1e-5)
