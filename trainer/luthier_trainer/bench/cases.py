"""What is measured: a model with random weights, rows of random words, and a FineTuneJob over them.

Everything is made here from a seed, so that a measurement needs no network and no files.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy

from luthier_api.run import FineTuneRun, Gpu
from luthier_trainer.bench.rounds import Unmeasured

SEED = 42
WORDS = 2000  # different ones in the rows
VOCABULARY = 2048  # of the tokenizer; the model's may be larger
RANK = 16
LLAMA_3 = {
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    "num_key_value_heads": 8,
    "num_attention_heads": 32,
}
MODELS: Mapping[str, Mapping[str, Any]] = {
    # 2.6 million weights: a step takes a fifth of a second of one CPU core.
    "tiny": {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "tie_word_embeddings": False,
    },
    # Llama-3.2-1B
    "llama-1b": LLAMA_3
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    # Llama-3.1-8B
    "llama-8b": LLAMA_3
    | {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
}


@dataclass(frozen=True)
class Case:
    """A training to measure. Fields are options of the command line."""

    model: str = "tiny"
    """A row of MODELS, which gets random weights."""
    method: str = "lora"
    """method.type of the job."""
    packing: str = "none"
    """training.packing of the job."""
    compiled: bool = False
    """training.torchCompile of the job."""
    gpus: int = 0
    """GPUs: 0 or 1."""
    batch_size: int = 8
    """Rows of an optimiser step."""
    micro_batch: int | None = None
    """Rows of a forward pass; the plan chooses them when left out."""
    max_length: int = 128
    """Tokens of a row at most, or with packing of a bin."""

    @property
    def name(self) -> str:
        parts = [self.model, self.method, "packed" if self.packing != "none" else "padded"]
        return " ".join([*parts, "compiled"] if self.compiled else parts)

    def document(self) -> dict[str, Any]:
        return asdict(self)


def run_of(case: Case, root: Path, model: Path, steps: int, gpu: Gpu | None = None) -> FineTuneRun:
    """Return the run config of `case` in the workspace `root`, and write its rows beside it.

    `gpu`: what an administrator would say of the GPU, by which `prepare` plans.
    """
    root.mkdir(parents=True, exist_ok=True)
    rows = root / "rows.jsonl"
    write_rows(rows, case, steps)
    training: dict[str, Any] = {
        "maxSteps": steps,
        "batchSize": case.batch_size,
        "maxLength": case.max_length,
        "learningRate": 1e-4,
        "seed": SEED,
        "packing": case.packing,
    }
    if case.micro_batch:
        training["microBatchSize"] = case.micro_batch
    if case.compiled:
        training["torchCompile"] = True
    spec = {
        "task": "causal-lm",
        "model": {"path": str(model)},
        "dataset": {"files": [str(rows)]},
        "method": {"type": case.method} | ({} if case.method == "full" else {"rank": RANK, "alpha": 2 * RANK}),
        "training": training,
        "resources": {"gpusPerNode": case.gpus},
    }
    run = {"name": "bench", "workspace": str(root / "job"), "metricsPort": 0, "spec": spec}
    return FineTuneRun.model_validate(run | ({"gpu": gpu.dump()} if gpu else {}))


def word(number: int) -> str:
    """Return the word of a number: two to five letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return "".join(letters[(number // 26**place + 7 * place) % 26] for place in range(2 + number % 4))


def words(random: numpy.random.Generator, count: int) -> str:
    """Return `count` words, the first of which are the most frequent, as in a language."""
    numbers = (WORDS ** random.random(count)).astype(numpy.int64)
    return " ".join(word(number) for number in numbers.tolist())


def write_rows(path: Path, case: Case, steps: int) -> None:
    """Write as many texts as `steps` steps read, with the lengths of chats and paragraphs (log-normal)."""
    random = numpy.random.default_rng(SEED)
    longest = case.max_length * 3 // 4  # words; a word is a token or a little more
    wanted = steps * case.batch_size
    mean = longest / 2
    if case.packing != "none":
        wanted = math.ceil(1.2 * wanted * case.max_length / mean)
    lengths = random.lognormal(math.log(mean) - 0.25, 0.7, wanted).clip(4, longest).astype(int)
    with path.open("w") as file:
        for length in lengths.tolist():
            file.write(json.dumps({"text": words(random, length)}) + "\n")


def make_model(name: str, folder: Path, cpu: bool) -> None:
    """Make a model of MODELS with random weights in a process of its own, so that this one never holds a GPU.

    Raises Unmeasured.
    """
    code = f"from luthier_trainer.bench.cases import write_model; write_model({name!r}, {str(folder)!r}, {cpu!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unmeasured(f"the model {name} could not be made: {done.stderr[-1000:]}")


def write_model(name: str, folder: str, cpu: bool) -> None:
    """Write a model with random weights and a tokenizer into `folder`. On a GPU it takes seconds."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, set_seed

    from luthier_trainer.models.new_tokenizer import train_tokenizer

    random = numpy.random.default_rng(SEED)
    tokenizer = train_tokenizer((words(random, 100) for _ in range(200)), VOCABULARY)
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    set_seed(SEED)
    with torch.device("cpu" if cpu else "cuda"):
        # Large models are published in bf16.
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(**MODELS[name], **special), dtype=torch.float32 if cpu else torch.bfloat16
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
