"""A workspace as `prepare` leaves it, made directly: tests of the training then fail for the training's reasons
only.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, Features, List, Value
from PIL import Image
from sklearn.datasets import load_digits
from transformers import BertConfig, BertModel, PreTrainedTokenizerBase

from luthier_api.finetune import FineTuneJobSpec
from luthier_api.run import FineTuneRun, PreparedRecord
from luthier_api.spec import NewModel
from luthier_api.variables import Variables
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.data.bins import packed
from luthier_trainer.distributed import launch
from luthier_trainer.models.new_model import new_config, save_new_model
from luthier_trainer.models.new_tokenizer import train_tokenizer
from luthier_trainer.tasks.base import LoadedModel, TrainingContext
from luthier_trainer.tasks.table import TASKS
from luthier_trainer.workspace.prepared import FINGERPRINT, fingerprint, write_prepared

LENGTH = 48


def prepared_run(
    root: Path, base: Path, data: DatasetDict, labels: list[str] | None = None, port: int = 29500, **spec: Any
) -> FineTuneRun:
    """The run config of a CPU job whose workspace `root` holds everything that training reads. Keywords replace fields
    of the spec; `training` and `resources` are merged.
    """
    training = {
        "maxLength": LENGTH,
        "batchSize": 8,
        "maxSteps": 10,
        "learningRate": 2e-3,
        "logSteps": 1,
        "saveSteps": 100,
    }
    spec = {
        "task": "causal-lm",
        "model": {"path": str(base)},
        "dataset": {"files": ["unused.txt"]},
        "method": {"type": "full"},
    } | spec
    own = spec.get("training", {})
    if own.get("saveEvery") == "epoch":
        del training["saveSteps"]
    spec["training"] = training | own
    spec["resources"] = {"gpusPerNode": 0} | spec.get("resources", {})
    run = FineTuneRun.model_validate(
        {"name": "job", "workspace": str(root), "metricsPort": 0, "rendezvousPort": port, "spec": spec}
    )
    world, training = run.spec.resources.world_size, run.spec.training
    micro = training.micro_batch_size or training.batch_size // world
    strategy = run.spec.strategy
    if strategy == "auto":
        strategy = "none" if world == 1 else "ddp"
    workspace = WorkspaceFolder(root)
    workspace.prepared.mkdir(parents=True)
    data.save_to_disk(workspace.prepared / "dataset")
    TASKS[run.spec.task].read_processor(base, "spec.model").save_pretrained(workspace.prepared / "processor")
    record = PreparedRecord.model_validate(
        {
            "model": {"source": str(base)},
            "dataset": {"source": "unused.txt", "rows": len(data["train"]), "labels": labels},
            "plan": {
                "strategy": strategy,
                "worldSize": world,
                "microBatchSize": micro,
                "accumulationSteps": training.batch_size // (micro * world),
                "steps": training.max_steps,
                "precision": "fp32" if training.precision == "auto" else training.precision,
                "gradientCheckpointing": bool(training.gradient_checkpointing),
                "attention": None if training.attention == "auto" else training.attention,
            },
            "modelPath": str(base),
            "datasetPath": str(workspace.prepared / "dataset"),
        }
    )
    sign(run)
    write_prepared(run, record)
    return run


def loaded(
    task: str, folder: Path, labels: list[str] | None = None, processor: Any = None, **weights: Any
) -> LoadedModel:
    """The model in `folder` as the training of `task` loads it."""
    spec = {"task": task, "model": {"path": str(folder)}, "dataset": {"files": ["unused.jsonl"]}}
    context = TrainingContext(FineTuneJobSpec.model_validate(spec), folder, processor, labels, weights=weights)
    return TASKS[task].load_model(context)


def sign(run: FineTuneRun) -> None:
    """Make what is prepared belong to `run`."""
    (WorkspaceFolder(Path(run.workspace)).prepared / FINGERPRINT).write_text(fingerprint(run))


def save_llama(folder: Path, paragraphs: list[str]) -> Path:
    """A Llama with new weights, wide enough for bitsandbytes, whose 4-bit blocks on CPU need rows of a multiple of
    64.
    """
    tokenizer = train_tokenizer(paragraphs[:250], 512)
    tokenizer.save_pretrained(folder)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
    }
    save_new_model(
        new_config(NewModel(model_type="llama", vocab_size=512, parameters=sizes), tokenizer), folder, seed=1
    )
    return folder


def prose(paragraphs: list[str]) -> list[str]:
    return [text for text in paragraphs if text[0].isupper()]


def code(paragraphs: list[str]) -> list[str]:
    """What is left: code, grammar, tables."""
    return [text for text in paragraphs if not text[0].isupper()]


def causal_lm_data(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> DatasetDict:
    """About 200 rows of differing lengths to train on, and every sixth held out; chosen evenly from `texts`."""
    rows = [tokenizer(text, truncation=True, max_length=LENGTH)["input_ids"] for text in texts[:: len(texts) // 240]]
    columns = {"input_ids": rows, "length": [len(row) for row in rows]}
    return split(columns)


def packed_data(tokenizer: PreTrainedTokenizerBase, texts: list[str], rows: int) -> DatasetDict:
    """`rows` bins of the beginnings of texts, and as many held out. Of each of them only the second half is learnt."""
    types = Features({"input_ids": List(Value("int32")), "loss_mask": List(Value("uint8")), "length": Value("int32")})
    data = causal_lm_data(tokenizer, texts)
    for name, whole in data.items():
        ids = [tokens[: 4 + 7 * i % 20] for i, tokens in enumerate(whole["input_ids"][: 5 * rows])]
        masks = [[int(2 * i >= len(tokens)) for i in range(len(tokens))] for tokens in ids]
        columns = {"input_ids": ids, "loss_mask": masks, "length": [len(tokens) for tokens in ids]}
        data[name] = packed(Dataset.from_dict(columns, features=types), LENGTH, name).take(rows)
    return data


def classification_data(tokenizer: PreTrainedTokenizerBase, paragraphs: list[str]) -> DatasetDict:
    """Is the paragraph prose (1), or code and tables (0)?"""
    rows = [tokenizer(text, truncation=True, max_length=LENGTH) for text in paragraphs[::8]]
    columns = {
        "input_ids": [row["input_ids"] for row in rows],
        "attention_mask": [row["attention_mask"] for row in rows],
        "labels": [int(text[0].isupper()) for text in paragraphs[::8]],
        "length": [len(row["input_ids"]) for row in rows],
    }
    return split(columns)


def image_data() -> DatasetDict:
    """Handwritten digits: is it a one (1), or a zero (0)?"""
    found = load_digits(n_class=2)
    pictures = [Image.fromarray((pixels * 15.9).astype("uint8")) for pixels in found.images[:240]]
    return split({"pixel_values": pictures, "labels": found.target[:240].tolist()}).cast_column(
        "pixel_values", datasets.Image()
    )


def split(columns: dict[str, list[Any]]) -> DatasetDict:
    held_out = range(0, len(next(iter(columns.values()))), 6)
    rows = Dataset.from_dict(columns)
    return DatasetDict(
        train=rows.select([i for i in range(len(rows)) if i not in held_out]), eval=rows.select(held_out)
    )


def save_encoder(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A small BERT without a head: classification has to add one."""
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def losses(run: FineTuneRun) -> list[float]:
    """The reported training losses, from the newest checkpoint's history."""
    return [entry["loss"] for entry in logged(run)]


OF_THE_MACHINE = {"seconds", "peakMemoryGB", "reservedMemoryGB", "plannedMemoryGB"}


def without_the_machine(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics that depend on model and data alone."""
    return {name: value for name, value in metrics.items() if name not in OF_THE_MACHINE}


def logged(run: FineTuneRun) -> list[dict[str, float]]:
    """The reports of the training, from the newest checkpoint's history."""
    newest = max((Path(run.workspace) / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


@contextmanager
def pod(run: FineTuneRun, folder: Path, node_rank: int = 0, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """The processes of one pod, started as the supervisor starts them. `folder` is the pod's run folder; its output is
    `folder`/log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(run.dump()))
    prepared = PreparedRecord.model_validate_json(WorkspaceFolder(Path(run.workspace)).prepared_record.read_bytes())
    before = os.environ.get(Variables.RUN_DIR)
    os.environ[Variables.RUN_DIR] = str(folder)
    try:
        command = launch.command(run, prepared, node_rank)
        environment = (
            os.environ
            | launch.environment(run, prepared, node_rank)
            | {Variables.RUN: str(folder / "run.json")}
            | variables
        )
    finally:
        os.environ[Variables.RUN_DIR] = before or ""
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()  # torch's agent ends its workers, which have sessions of their own
                with suppress(subprocess.TimeoutExpired):
                    process.wait(40)
                process.kill()
