"""Texts of mixed lengths that are classified in a second: by `generate`, and by the pipeline of transformers.

`PYTHONPATH=tests python -m perf reading` prints one JSON document. 10,000 pieces of Python's language reference, of 1
to 300 words and most of them short, go through a BERT of 2 layers. `generate` is the whole run phase of a job: it loads
the model, and writes and syncs each output. The pipeline only returns its answers; `sorted` gets the texts sorted by
length. All must give the same scores.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, pipeline

from luthier_api.run import GenerateRun
from luthier_api.variables import Variables
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.generation import main as generate
from luthier_trainer.models.new_tokenizer import train_tokenizer
from luthier_trainer.prepare import main as prepare

ROWS = 10_000
BATCH = 32
WORDS = 300  # of the longest text
ALIKE = 1e-4  # largest difference between two scores of the same text


def texts() -> list[str]:
    """Return the texts; their lengths are log-normal, with a median of 25 words."""
    random = numpy.random.default_rng(0)
    words = [word for _, body in sorted(topics.items()) for word in body.split()]
    lengths = numpy.clip(random.lognormal(3.2, 1.0, ROWS), 1, WORDS).astype(int)
    starts = random.integers(0, len(words) - WORDS, ROWS)
    return [" ".join(words[start : start + length]) for start, length in zip(starts, lengths, strict=True)]


def save_model(folder: Path) -> None:
    """Write a small BERT with random weights and a tokenizer."""
    tokenizer = train_tokenizer([body for _, body in sorted(topics.items())], 4000)
    tokenizer.model_max_length = 1024
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=512,
        max_position_embeddings=1024,
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=3,
    )
    BertForSequenceClassification(config).save_pretrained(folder)


def by_generate(folder: Path, rows: list[str]) -> tuple[float, list[dict[str, float]]]:
    """Return the seconds of the run phase, and the scores of each text."""
    data = folder / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    spec = {
        "task": "text-classification",
        "model": {"path": str(folder / "model")},
        "inputs": {"dataset": {"files": [str(data)]}},
        "batchSize": BATCH,
        "resources": {"gpus": 0},
    }
    run = GenerateRun.model_validate(
        {"name": "reading", "workspace": str(folder / "job"), "metricsPort": 0, "spec": spec}
    )
    prepare.main(run)
    begin = time.perf_counter()
    generate.main(run)
    seconds = time.perf_counter() - begin
    lines = [
        json.loads(line)
        for path in sorted(WorkspaceFolder(folder / "job").result.glob("shard-*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    return seconds, [{one["label"]: one["score"] for one in line["scores"]} for line in lines]


def by_pipeline(folder: Path, rows: list[str]) -> tuple[float, list[dict[str, float]]]:
    """Return the seconds of the pipeline with its model, and the scores of each text."""
    begin = time.perf_counter()
    model = BertForSequenceClassification.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    made = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu", top_k=None)
    found = list(made(rows, batch_size=BATCH))
    return time.perf_counter() - begin, [{one["label"]: one["score"] for one in scores} for scores in found]


def by_sorted_pipeline(folder: Path, rows: list[str]) -> tuple[float, list[dict[str, float]]]:
    """The same, with the texts sorted by length."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    seconds, found = by_pipeline(folder, [rows[i] for i in order])
    scores: list[dict[str, float]] = [{}] * len(rows)
    for i, one in zip(order, found, strict=True):
        scores[i] = one
    return seconds, scores


WAYS: dict[str, Callable[[Path, list[str]], tuple[float, list[dict[str, float]]]]] = {
    "generate": by_generate,
    "pipeline": by_pipeline,
    "pipeline, sorted": by_sorted_pipeline,
}


def main() -> dict[str, Any]:
    """The figures."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    rows = texts()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ[Variables.RUN_DIR] = name
        save_model(folder / "model")
        measured = {way: work(folder, rows) for way, work in WAYS.items()}
    scores = {way: found for way, (_, found) in measured.items()}
    worst = max(
        abs(one[label] - other[label])
        for way in scores
        for one, other in zip(scores["generate"], scores[way], strict=True)
        for label in one
    )
    assert worst < ALIKE, f"the scores differ by {worst}"
    pace = {way: ROWS / seconds for way, (seconds, _) in measured.items()}
    return {
        "rows": ROWS,
        "batch size": BATCH,
        "rows/s": {way: round(value) for way, value in pace.items()},
        "generate / pipeline": round(pace["generate"] / pace["pipeline"], 2),
        "generate / pipeline, sorted": round(pace["generate"] / pace["pipeline, sorted"], 2),
        "largest difference of a score": worst,
    }
