"""What a task makes of a model: the loss that training minimises, and the head of a classifier."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import DatasetDict
from prepared_workspace import (
    causal_lm_data,
    classification_data,
    image_data,
    losses,
    prepared_run,
    prose,
    save_encoder,
    save_llama,
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
from luthier_trainer.prepare import training
from luthier_trainer.tasks.causal_lm import TokenLoss
from luthier_trainer.tasks.classification import LabelFigures
from luthier_trainer.tasks.text_classification import TextClassification
from luthier_trainer.training import main as train


@pytest.fixture(scope="module")
def llama(paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"), paragraphs)


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


HEADS: list[tuple[str, str, list[str], list[str], bool, str]] = [
    # name               architecture  made for                  wanted           rows kept  notice
    ("the same labels", "bert", ["a", "b"], ["a", "b"], True, "its head is for the same labels (a, b) and is kept"),
    (
        "another order",
        "bert",
        ["c", "a", "b"],
        ["a", "b", "c"],
        True,
        "its head knows the labels in another order (c, a, b) and is put into ours (a, b, c)",
    ),
    (
        "a layer before",
        "roberta",
        ["b", "a"],
        ["a", "b"],
        True,
        "its head knows the labels in another order (b, a) and is put into ours (a, b)",
    ),
    (
        "other labels",
        "bert",
        ["x", "y"],
        ["a", "b"],
        False,
        "its head is for other labels (x, y); a new one for a, b begins with random weights",
    ),
    (
        "one label more",
        "bert",
        ["a", "b"],
        ["a", "b", "c"],
        False,
        "its head is for other labels (a, b); a new one for a, b, c begins with random weights",
    ),
    (
        "no names, and numbers",
        "bert",
        ["LABEL_0", "LABEL_1"],
        ["0", "1"],
        True,
        "its head names no labels and is kept: LABEL_0 is 0, and so on",
    ),
    (
        "eleven of them",
        "bert",
        [f"LABEL_{i}" for i in range(11)],
        [str(i) for i in range(11)],
        True,
        "its head names no labels and is kept: LABEL_0 is 0, and so on",
    ),
    (
        "no names, and a number more",
        "bert",
        ["LABEL_0", "LABEL_1"],
        ["0", "1", "2"],
        False,
        "its head is for other labels (LABEL_0, LABEL_1); a new one for 0, 1, 2 begins with random weights",
    ),
    (
        "no names, and numbers from 1",
        "bert",
        ["LABEL_0", "LABEL_1"],
        ["1", "2"],
        False,
        (
            "its head is for other labels (LABEL_0, LABEL_1); a new one for 1, 2 begins with random weights. If LABEL_0"
            " is 1, and so on, name them so under id2label in its config.json, and it is kept"
        ),
    ),
    (
        "no names",
        "roberta",
        ["LABEL_0", "LABEL_1"],
        ["a", "b"],
        False,
        (
            "its head is for other labels (LABEL_0, LABEL_1); a new one for a, b begins with random weights. If LABEL_0"
            " is a, and so on, name them so under id2label in its config.json, and it is kept"
        ),
    ),
    (
        "names, and numbers",
        "bert",
        ["neg", "pos"],
        ["0", "1"],
        False,
        (
            "its head is for other labels (neg, pos); a new one for 0, 1 begins with random weights. If 0 is neg, and"
            " so on, write these names into the rows, and it is kept"
        ),
    ),
]


@pytest.mark.parametrize(("name", "kind", "held", "wanted", "kept", "said"), HEADS, ids=[h[0] for h in HEADS])
def test_a_head_is_kept_for_the_labels_it_knows(
    name: str, kind: str, held: list[str], wanted: list[str], kept: bool, said: str, tmp_path: Path
) -> None:
    before = rows(classifier(kind, tmp_path, held))
    assert said_in_prepare(tmp_path, wanted) == said
    model, whole = TextClassification().load_model(str(tmp_path), wanted)
    after = rows(model)
    assert list(after) == wanted
    assert whole == ["classifier"]
    if kept:
        assert after == {label.removeprefix("LABEL_"): row for label, row in before.items()}
    else:
        assert not {tuple(row) for row in after.values()} & {tuple(row) for row in before.values()}


def test_a_model_without_a_head_gets_one(tmp_path: Path) -> None:
    classifier("bert", tmp_path, ["x", "y"], head=False)
    assert (
        said_in_prepare(tmp_path, ["a", "b"])
        == "it has no head for labels; a new one for a, b begins with random weights"
    )
    model, _ = TextClassification().load_model(str(tmp_path), ["a", "b"])
    assert list(rows(model)) == ["a", "b"]


def said_in_prepare(folder: Path, wanted: list[str]) -> str:
    model = training.Model(ResolvedSource(source=str(folder)), folder, AutoConfig.from_pretrained(folder), None)
    return training.what_becomes_of_the_head(model, "text-classification", wanted)


PERPLEXITIES = [
    ("a small loss", 1.0, {"loss": 1.0, "perplexity": math.e}),
    ("a huge loss", 800.0, {"loss": 800.0}),
    ("no number", math.nan, {"loss": math.nan}),
]


@pytest.mark.parametrize(("name", "loss", "figures"), PERPLEXITIES, ids=[p[0] for p in PERPLEXITIES])
def test_a_perplexity_is_a_number_or_missing(name: str, loss: float, figures: dict[str, float]) -> None:
    gathered = EvalPrediction(predictions=torch.tensor([[loss * 2, 2.0]]), label_ids=torch.zeros(1, 2))
    assert TokenLoss()(gathered, compute_result=True) == pytest.approx(figures, nan_ok=True)


F1 = [
    # name                                  truth         answers       of classes  f1Macro
    ("all classes are held out", [0, 1, 2], [0, 1, 2], 3, 1.0),
    ("one is neither held out nor given", [0, 1], [0, 1], 3, 2 / 3),
    ("one is given and not held out", [0, 1, 1], [0, 1, 2], 3, (1 + 2 / 3 + 0) / 3),
]


@pytest.mark.parametrize(("name", "truth", "answers", "classes", "f1"), F1, ids=[f[0] for f in F1])
def test_f1_counts_every_class_of_the_training(
    name: str, truth: list[int], answers: list[int], classes: int, f1: float
) -> None:
    """sklearn alone would leave out a class that occurs nowhere."""
    figures, labels = LabelFigures(), torch.tensor(truth)
    rows = figures.reduce(torch.nn.functional.one_hot(torch.tensor(answers), classes).float(), labels)
    assert figures(EvalPrediction(rows, labels), compute_result=True)["f1Macro"] == pytest.approx(f1)
