"""What a task makes of a model: the loss that training minimises, and the head of a classifier."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import DatasetDict
from prepared_workspace import (
    causal_lm_data,
    classification_data,
    image_data,
    loaded,
    losses,
    prepared_run,
    prose,
    save_encoder,
)
from trainer.digits import save_model as save_vit
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from transformers.trainer_utils import EvalPrediction

from luthier_api.status import ResolvedSource
from luthier_trainer.tasks.base import Model
from luthier_trainer.tasks.causal_lm import TokenMetrics
from luthier_trainer.tasks.classification import LabelMetrics
from luthier_trainer.tasks.headed import what_becomes_of_the_head
from luthier_trainer.training import main as train


def save_model(name: str, folder: Path, llama: Path) -> Path:
    """A small model without dropout, with the tokenizer of `llama`."""
    tokenizer = AutoTokenizer.from_pretrained(llama)
    vocabulary = len(tokenizer)
    bert = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    if name == "gpt2":
        GPT2LMHeadModel(
            GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=1, n_head=2, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0)
        ).save_pretrained(folder)
    elif name == "bart":
        BartForCausalLM(
            BartConfig(
                vocab_size=vocabulary,
                d_model=32,
                decoder_layers=1,
                encoder_layers=1,
                decoder_attention_heads=2,
                encoder_attention_heads=2,
                decoder_ffn_dim=64,
                encoder_ffn_dim=64,
                max_position_embeddings=64,
                dropout=0.0,
            )
        ).save_pretrained(folder)
    elif name == "bert decoder":
        BertLMHeadModel(BertConfig(**bert, is_decoder=True)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


MINIMISED: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"type": "full"}),
    ("gpt2", {"type": "full"}),
    (
        "bart",
        {"type": "lora", "targetModules": ["fc1"]},
    ),  # alone, its decoder has an attention to an encoder that nothing uses
    ("bert decoder", {"type": "full"}),
    ("classifier", {"type": "full"}),
    ("classifier", {"type": "lora"}),
    ("images", {"type": "full"}),
    ("images", {"type": "lora"}),
]


@pytest.mark.parametrize(("name", "method"), MINIMISED, ids=[f"{name} {method['type']}" for name, method in MINIMISED])
def test_what_is_minimised_is_what_is_measured(
    name: str, method: dict[str, Any], tmp_path: Path, llama: Path, paragraphs: list[str]
) -> None:
    """The loss of the first step, in four micro-batches, is that of the same rows when they are held out: the mean over
    all items.
    """
    tokenizer = AutoTokenizer.from_pretrained(llama)
    spec: dict[str, Any] = {}
    if name == "images":
        base, whole = save_vit(tmp_path / "model"), image_data()
        spec = {"task": "image-classification", "labels": ["zero", "one"]}
    elif name == "classifier":
        spec = {"task": "text-classification", "labels": ["code", "prose"]}
        base, whole = save_encoder(tmp_path / "model", tokenizer), classification_data(tokenizer, paragraphs)
    else:
        base = llama if name == "llama" else save_model(name, tmp_path / "model", llama)
        whole = causal_lm_data(tokenizer, prose(paragraphs))
    rows = whole["train"].select(range(8))
    training = {"maxSteps": 1, "microBatchSize": 2, "learningRate": 1e-9}
    run = prepared_run(
        tmp_path / "job", base, DatasetDict(train=rows, eval=rows), method=method, training=training, **spec
    )
    metrics = train.main(run).metrics
    assert metrics is not None
    assert losses(run) == pytest.approx([metrics["evalLossBefore"]], abs=1e-4)


def classifier(kind: str, folder: Path, labels: list[str], head: bool = True) -> torch.nn.Module:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    names: dict[str, Any] = {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}}
    model: Any = (
        BertForSequenceClassification(BertConfig(**sizes, **names))
        if kind == "bert"
        else RobertaForSequenceClassification(RobertaConfig(**sizes, **names))
    )
    (model if head else model.base_model).save_pretrained(folder)
    return model


def rows(model: Any) -> dict[str, list[float]]:
    """Label → weights and bias of its row."""
    layer = model.classifier if isinstance(model.classifier, torch.nn.Linear) else model.classifier.out_proj
    return {name: [*layer.weight[i].tolist(), layer.bias[i].item()] for i, name in model.config.id2label.items()}


@dataclass(frozen=True)
class HeadCase:
    name: str
    architecture: str
    base_labels: list[str]  # for which the head of the base was made
    labels: list[str]
    rows_kept: bool
    notice: str


HEADS = [
    HeadCase(
        name="the same labels",
        architecture="bert",
        base_labels=["a", "b"],
        labels=["a", "b"],
        rows_kept=True,
        notice="its head is for the same labels (a, b) and is kept",
    ),
    HeadCase(
        name="another order",
        architecture="bert",
        base_labels=["c", "a", "b"],
        labels=["a", "b", "c"],
        rows_kept=True,
        notice="its head knows the labels in another order (c, a, b) and is put into ours (a, b, c)",
    ),
    HeadCase(
        name="a layer before",
        architecture="roberta",
        base_labels=["b", "a"],
        labels=["a", "b"],
        rows_kept=True,
        notice="its head knows the labels in another order (b, a) and is put into ours (a, b)",
    ),
    HeadCase(
        name="other labels",
        architecture="bert",
        base_labels=["x", "y"],
        labels=["a", "b"],
        rows_kept=False,
        notice="its head is for other labels (x, y); a new one for a, b begins with random weights",
    ),
    HeadCase(
        name="one label more",
        architecture="bert",
        base_labels=["a", "b"],
        labels=["a", "b", "c"],
        rows_kept=False,
        notice="its head is for other labels (a, b); a new one for a, b, c begins with random weights",
    ),
    HeadCase(
        name="no names, and numbers",
        architecture="bert",
        base_labels=["LABEL_0", "LABEL_1"],
        labels=["0", "1"],
        rows_kept=True,
        notice="its head names no labels and is kept: LABEL_0 is 0, and so on",
    ),
    HeadCase(
        name="eleven of them",
        architecture="bert",
        base_labels=[f"LABEL_{i}" for i in range(11)],
        labels=[str(i) for i in range(11)],
        rows_kept=True,
        notice="its head names no labels and is kept: LABEL_0 is 0, and so on",
    ),
    HeadCase(
        name="no names, and a number more",
        architecture="bert",
        base_labels=["LABEL_0", "LABEL_1"],
        labels=["0", "1", "2"],
        rows_kept=False,
        notice="its head is for other labels (LABEL_0, LABEL_1); a new one for 0, 1, 2 begins with random weights",
    ),
    HeadCase(
        name="no names, and numbers from 1",
        architecture="bert",
        base_labels=["LABEL_0", "LABEL_1"],
        labels=["1", "2"],
        rows_kept=False,
        notice=(
            "its head is for other labels (LABEL_0, LABEL_1); a new one for 1, 2 begins with random weights. If LABEL_0"
            " is 1, and so on, name them so under id2label in its config.json, and it is kept"
        ),
    ),
    HeadCase(
        name="no names",
        architecture="roberta",
        base_labels=["LABEL_0", "LABEL_1"],
        labels=["a", "b"],
        rows_kept=False,
        notice=(
            "its head is for other labels (LABEL_0, LABEL_1); a new one for a, b begins with random weights. If LABEL_0"
            " is a, and so on, name them so under id2label in its config.json, and it is kept"
        ),
    ),
    HeadCase(
        name="names, and numbers",
        architecture="bert",
        base_labels=["neg", "pos"],
        labels=["0", "1"],
        rows_kept=False,
        notice=(
            "its head is for other labels (neg, pos); a new one for 0, 1 begins with random weights. If 0 is neg, and"
            " so on, write these names into the rows, and it is kept"
        ),
    ),
]


@pytest.mark.parametrize("case", HEADS, ids=lambda case: case.name)
def test_a_head_is_kept_for_the_labels_it_knows(case: HeadCase, tmp_path: Path) -> None:
    before = rows(classifier(case.architecture, tmp_path, case.base_labels))
    assert said_in_prepare(tmp_path, case.labels) == case.notice
    model = loaded("text-classification", tmp_path, case.labels)
    after = rows(model.model)
    assert list(after) == case.labels
    assert model.new_modules == ["classifier"]
    if case.rows_kept:
        assert after == {label.removeprefix("LABEL_"): row for label, row in before.items()}
    else:
        assert not {tuple(row) for row in after.values()} & {tuple(row) for row in before.values()}


def test_a_model_without_a_head_gets_one(tmp_path: Path) -> None:
    classifier("bert", tmp_path, ["x", "y"], head=False)
    assert (
        said_in_prepare(tmp_path, ["a", "b"])
        == "it has no head for labels; a new one for a, b begins with random weights"
    )
    model = loaded("text-classification", tmp_path, ["a", "b"])
    assert list(rows(model.model)) == ["a", "b"]


def said_in_prepare(folder: Path, wanted: list[str]) -> str:
    model = Model(ResolvedSource(source=str(folder)), folder, AutoConfig.from_pretrained(folder), None)
    return what_becomes_of_the_head(model, "text-classification", wanted)


@dataclass(frozen=True)
class PerplexityCase:
    name: str
    loss: float
    metrics: dict[str, float]


PERPLEXITIES = [
    PerplexityCase(
        name="a small loss",
        loss=1.0,
        metrics={"loss": 1.0, "perplexity": math.e},
    ),
    PerplexityCase(
        name="a huge loss",
        loss=800.0,
        metrics={"loss": 800.0},
    ),
    PerplexityCase(
        name="no number",
        loss=math.nan,
        metrics={"loss": math.nan},
    ),
]


@pytest.mark.parametrize("case", PERPLEXITIES, ids=lambda case: case.name)
def test_a_perplexity_is_a_number_or_missing(case: PerplexityCase) -> None:
    gathered = EvalPrediction(predictions=torch.tensor([[case.loss * 2, 2.0]]), label_ids=torch.zeros(1, 2))
    assert TokenMetrics()(gathered, compute_result=True) == pytest.approx(case.metrics, nan_ok=True)


@dataclass(frozen=True)
class F1Case:
    name: str
    truth: list[int]
    answers: list[int]
    classes: int
    f1: float


F1 = [
    F1Case(
        name="all classes are held out",
        truth=[0, 1, 2],
        answers=[0, 1, 2],
        classes=3,
        f1=1.0,
    ),
    F1Case(
        name="one is neither held out nor given",
        truth=[0, 1],
        answers=[0, 1],
        classes=3,
        f1=2 / 3,
    ),
    F1Case(
        name="one is given and not held out",
        truth=[0, 1, 1],
        answers=[0, 1, 2],
        classes=3,
        f1=(1 + 2 / 3 + 0) / 3,
    ),
]


@pytest.mark.parametrize("case", F1, ids=lambda case: case.name)
def test_f1_counts_every_class_of_the_training(case: F1Case) -> None:
    """sklearn alone would leave out a class that occurs nowhere."""
    figures, labels = LabelMetrics(), torch.tensor(case.truth)
    rows = figures.reduce(torch.nn.functional.one_hot(torch.tensor(case.answers), case.classes).float(), labels)
    assert figures(EvalPrediction(rows, labels), compute_result=True)["f1Macro"] == pytest.approx(case.f1)
