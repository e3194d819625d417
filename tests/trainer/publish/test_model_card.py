"""The commands of a model's card: run as they stand, they give the model that was measured, its class names, and
batches that can be made.
"""

from __future__ import annotations

import html
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import DatasetDict
from markdown_it import MarkdownIt
from prepared_workspace import causal_lm_data, classification_data, image_data, prepared_run, prose
from trainer.conftest import MakeRun
from trainer.digits import save_model as save_vit
from transformers import AutoTokenizer, LlamaConfig

from luthier_api.run import PreparedRecord
from luthier_api.status import Plan, ResolvedDataset, ResolvedSource
from luthier_trainer.publish import model_card
from luthier_trainer.training import main as train
from luthier_trainer.workspace import tracked_runs
from luthier_trainer.workspace.prepared import read_prepared

CLASSES = {"text-classification": ["code", "prose"], "image-classification": ["zero", "one"]}
TEXTS = ["class", "The lambda expression", *(f"{'The with statement is used. ' * n}" for n in range(1, 7))]


def commands(run: Any, result: Path) -> str:
    """The card's Python code, with the result's folder for the name of the repository."""
    card = model_card.card(run, read_prepared(run), result)
    return card.split("```python\n")[1].split("```")[0].replace(f'"{run.name}"', repr(str(result)))


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("task", ["causal-lm", "text-classification", "image-classification"])
@pytest.mark.filterwarnings("ignore")
def test_the_commands_of_a_card(
    task: str, method: str, tiny_model: Path, paragraphs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    base = (
        save_vit(tmp_path / "model")
        if task == "image-classification"
        else without_padding(tiny_model, tmp_path / "model")
    )
    data = {
        "causal-lm": lambda: causal_lm_data(tokenizer, prose(paragraphs)),
        "text-classification": lambda: classification_data(tokenizer, paragraphs),
        "image-classification": image_data,
    }[task]()
    rows = DatasetDict(train=data["train"].select(range(32)), eval=data["eval"].select(range(16)))
    run = prepared_run(
        tmp_path / "job",
        base,
        rows,
        CLASSES.get(task),
        task=task,
        method={"type": method},
        training={"maxSteps": 4, "learningRate": 1e-2},
    )
    metrics = train.main(run).metrics
    assert metrics is not None
    monkeypatch.setattr("socket.socket.connect", refuse)
    made: dict[str, Any] = {}
    exec(commands(run, Path(run.workspace) / "result"), made)
    model = made["model"].eval()

    inputs = (
        pixels(made, rows["eval"].select(range(8)))
        if "processor" in made
        else made["tokenizer"](TEXTS, padding=True, return_tensors="pt")
    )
    with torch.no_grad():
        assert len(model(**inputs).logits) == 8
    if task in CLASSES:
        assert model.config.id2label == dict(enumerate(CLASSES[task]))
        assert model.config.label2id == {name: i for i, name in enumerate(CLASSES[task])}
        assert accuracy(model, made, rows["eval"]) == pytest.approx(metrics["accuracy"])


@dataclass(frozen=True)
class Case:
    targets: list[str]
    tied: bool
    warnings: list[str]


TARGETS = [
    Case(
        targets=["embed_tokens", "q_proj"],
        tied=True,
        warnings=[
            "model.embed_tokens has the same weights as lm_head, and the adapter changes those of model.embed_tokens"
            " alone"
        ],
    ),
    Case(
        targets=["embed_tokens", "q_proj"],
        tied=False,
        warnings=[],
    ),
    Case(
        targets=["q_proj"],
        tied=True,
        warnings=[],
    ),
    Case(
        targets=["all-linear"],
        tied=True,
        warnings=[],
    ),
]


@pytest.mark.parametrize(
    "case", TARGETS, ids=lambda case: f"{' '.join(case.targets)}, {'tied' if case.tied else 'untied'}"
)
def test_a_card_warns_of_what_peft_would_merge_wrongly(case: Case, make_run: MakeRun, tmp_path: Path) -> None:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    LlamaConfig(**sizes, tie_word_embeddings=case.tied).save_pretrained(tmp_path)
    record = PreparedRecord(
        model=ResolvedSource(source="m"),
        dataset=ResolvedDataset(source="d", rows=1),
        plan=Plan(strategy="none"),
        model_path=str(tmp_path),
        dataset_path="d",
    )
    found = model_card.shared_weights(make_run(method={"type": "lora", "targetModules": case.targets}), record)
    assert [text.partition(". ")[0] for text in found] == case.warnings


NOTICES = [
    "spec.model.resizeEmbeddings: 2 tokens had no row in the embedding (<a> (512), c_* (513)). Each is drawn",
    "spec.dataset.files: 3 rows of `a[1].csv` | b … were left out",
]


def test_a_card_says_what_was_noticed(make_run: MakeRun, tmp_path: Path) -> None:
    record = PreparedRecord(
        model=ResolvedSource(source="m"),
        dataset=ResolvedDataset(source="d", rows=1),
        plan=Plan(strategy="none"),
        model_path=str(tmp_path),
        dataset_path="d",
        notices=NOTICES,
    )
    page = MarkdownIt().render(model_card.card(make_run(), record, tmp_path).split("---\n")[2])
    section = page.split("<h2>What was noticed</h2>")[1].split("</ul>")[0]
    assert [html.unescape(item) for item in re.findall(r"<li>(.*)</li>", section)] == NOTICES


def without_padding(model: Path, folder: Path) -> Path:
    """A copy whose config.json names no padding token, as that of most decoders."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    return folder


def pixels(made: dict[str, Any], rows: Any) -> Any:
    return made["processor"]([image.convert("RGB") for image in rows["pixel_values"][:]], return_tensors="pt")


def refuse(*args: Any) -> None:
    raise OSError("no network in this test")


@torch.no_grad()
def accuracy(model: Any, made: dict[str, Any], rows: Any) -> float:
    """Of all rows in one batch."""
    inputs = (
        pixels(made, rows)
        if "processor" in made
        else made["tokenizer"].pad({"input_ids": rows["input_ids"][:]}, return_tensors="pt")
    )
    answers = model(**inputs).logits.argmax(dim=1)
    return (answers == torch.tensor(rows["labels"][:])).double().mean().item()


def test_a_card_links_the_pages_of_trackers(tmp_path: Path) -> None:
    tracked_runs.keep(tmp_path / "tensorboard", "tensorboard", run="b")
    tracked_runs.keep(tmp_path / "mlflow", "mlflow", run="a", url="http://mlflow/#/a")
    assert model_card.tracked(tmp_path) == {"MLflow": "http://mlflow/#/a"}
    tracked_runs.keep(tmp_path / "mlflow", "mlflow", run="a", url="http://mlflow/" + "a" * 2000)
    assert model_card.tracked(tmp_path) == {}, "an address that is too long for a status"
