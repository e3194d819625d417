"""What a task makes of a model: the loss that training minimises, and the head of a classifier."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import DatasetDict
from prepared_workspace import causal_lm_data, classification_data, image_data, losses, prepared_run, prose, save_encoder, save_llama
from trainer.digits import save_model as save_vit
from transformers import (
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

from luthier_trainer import train
from luthier_trainer.tasks.causal_lm import TokenLoss
from luthier_trainer.tasks.text_classification import TextClassification


@pytest.fixture(scope="module")
def llama(paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"), paragraphs)


def save_model(name: str, folder: Path, llama: Path) -> Path:
    """A small model without dropout, with the tokenizer of `llama`."""
    tokenizer = AutoTokenizer.from_pretrained(llama)
    vocabulary = len(tokenizer)
    bert = {"vocab_size": vocabulary, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
            "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
    if name == "gpt2":
        GPT2LMHeadModel(
            GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=1, n_head=2, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0)
        ).save_pretrained(folder)
    elif name == "bart":
        BartForCausalLM(
            BartConfig(vocab_size=vocabulary, d_model=32, decoder_layers=1, encoder_layers=1, decoder_attention_heads=2, encoder_attention_heads=2,
                       decoder_ffn_dim=64, encoder_ffn_dim=64, max_position_embeddings=64, dropout=0.0)
        ).save_pretrained(folder)  # fmt: skip
    elif name == "bert decoder":
        BertLMHeadModel(BertConfig(**bert, is_decoder=True)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


MINIMISED: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"type": "full"}),
    ("gpt2", {"type": "full"}),
    ("bart", {"type": "lora", "targetModules": ["fc1"]}),  # alone, its decoder has an attention to an encoder that nothing uses
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
    """The loss of the first step, in four micro-batches, is that of the same rows when they are held out: the mean over all items."""
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
    run = prepared_run(tmp_path / "job", base, DatasetDict(train=rows, eval=rows), method=method, training=training, **spec)
    metrics = train.main(run).metrics
    assert metrics is not None
    assert losses(run) == pytest.approx([metrics["evalLossBefore"]], abs=1e-4)


def classifier(kind: str, folder: Path, labels: list[str], head: bool = True) -> torch.nn.Module:
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
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


HEADS = [
    # name                  architecture  made for            wanted              rows kept  said
    ("the same labels",     "bert",       ["a", "b"],         ["a", "b"],         "all",     ""),
    ("another order",       "bert",       ["c", "a", "b"],    ["a", "b", "c"],    "all",     "(c, a, b) knows the labels in another order"),
    ("a layer before",      "roberta",    ["b", "a"],         ["a", "b"],         "all",     "(b, a) knows the labels in another order"),
    ("other labels",        "bert",       ["x", "y"],         ["a", "b"],         "none",    "(x, y) is for other labels, and starts anew"),
    ("no names",            "roberta",    ["LABEL_0", "LABEL_1"], ["a", "b"],     "none",    "(LABEL_0, LABEL_1) is for other labels"),
    ("one label more",      "bert",       ["a", "b"],         ["a", "b", "c"],    "none",    "(a, b) is for other labels, and starts anew"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind", "held", "wanted", "kept", "said"), HEADS, ids=[h[0] for h in HEADS])
def test_a_head_is_kept_for_the_labels_it_knows(
    name: str, kind: str, held: list[str], wanted: list[str], kept: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = rows(classifier(kind, tmp_path, held))
    model, whole = TextClassification().load_model(str(tmp_path), wanted)
    after = rows(model)
    assert list(after) == wanted
    assert whole == ["classifier"]
    if kept == "all":
        assert after == before
    else:
        assert not {tuple(row) for row in after.values()} & {tuple(row) for row in before.values()}
    output = capsys.readouterr().out
    assert output.startswith(f"spec.model: its head {said}") if said else output == ""


def test_a_model_without_a_head_gets_one_without_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classifier("bert", tmp_path, ["x", "y"], head=False)
    TextClassification().load_model(str(tmp_path), ["a", "b"])
    assert capsys.readouterr().out == ""


PERPLEXITIES = [
    ("a small loss", 1.0, {"loss": 1.0, "perplexity": math.e}),
    ("a huge loss", 800.0, {"loss": 800.0}),
    ("no number", math.nan, {"loss": math.nan}),
]


@pytest.mark.parametrize(("name", "loss", "figures"), PERPLEXITIES, ids=[p[0] for p in PERPLEXITIES])
def test_a_perplexity_is_a_number_or_missing(name: str, loss: float, figures: dict[str, float]) -> None:
    gathered = EvalPrediction(predictions=torch.tensor([[loss * 2, 2.0]]), label_ids=torch.zeros(1, 2))
    assert TokenLoss()(gathered, compute_result=True) == pytest.approx(figures, nan_ok=True)
