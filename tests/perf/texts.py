"""Text generation beside loops over transformers: speed, and how many tokens are computed for each one of a prompt.

`PYTHONPATH=tests python -m perf texts` prints one JSON document. All programs write the same greedy texts with the same
model (24 million random weights, fp32) on one thread: prompts of very different lengths, and texts of 1 to 96 tokens,
because the model ends a text with a likelihood of about 1 in 48 at each token. Rounding parts some texts, so what is
compared are new tokens a CPU second. Programs take turns; what counts is the median of each one's rounds.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy
import torch
from tokenizers import ByteLevelBPETokenizer
from trainer.generating import generate_run, sample
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    pipeline,
)

from luthier_api.task_settings import TextSettings
from luthier_trainer.generation.engines.text import TextEngine
from luthier_trainer.generation.hardware import Hardware
from luthier_trainer.generation.samples import Sample

PROMPTS, BATCH_SIZE, NEW_TOKENS, ROUNDS = 64, 8, 96, 2
LONGEST_WAIT = 300  # seconds for a peer that may never answer
LONGEST = 600  # characters of a prompt
VOCABULARY, ENDS = 4096, 85  # a text ends with one of so many tokens
THREADS = 1  # so that CPU seconds are those of work, and not of threads that wait for each other
Texts = list[str]


def write_model(folder: Path) -> None:
    """Write a small Llama with random weights, whose texts look like random tokens, and its tokenizer."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        sorted(text for _, text in topics.items()), VOCABULARY, special_tokens=["<pad>", "</s>"]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, pad_token="<pad>", eos_token="</s>", padding_side="left"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)  # so that texts depend on all of their tokens
    model.generation_config.eos_token_id = [1, *range(VOCABULARY - ENDS + 1, VOCABULARY)]
    model.save_pretrained(folder)


def prompts() -> Texts:
    """Return paragraphs of Python's language reference in an order drawn once: 5 to about 150 tokens."""
    paragraphs = [part.strip() for _, text in sorted(topics.items()) for part in text.split("\n\n")]
    chosen = [text for text in paragraphs if 20 < len(text) < LONGEST]
    numbers = numpy.random.default_rng(0).choice(len(chosen), PROMPTS, replace=False)
    return [chosen[number] for number in numbers]


class Programs:
    """The programs that are compared. Each returns the number of its new tokens."""

    def __init__(self, folder: Path) -> None:
        self.texts = prompts()
        run = generate_run(
            folder / "job",
            [{"prompt": "-"}],
            task="text-generation",
            model={"path": str(folder)},
            text={"maxNewTokens": NEW_TOKENS},
        )
        self.engine = TextEngine(run.spec, folder, folder, [], Hardware("cpu", "fp32"), BATCH_SIZE)
        self.model = AutoModelForCausalLM.from_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.ends = set(self.model.generation_config.eos_token_id)
        self.settings = GenerationConfig(
            max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=sorted(self.ends), pad_token_id=0
        )
        self.model.generation_config = self.settings
        self.pipeline = pipeline("text-generation", model=self.model, tokenizer=self.tokenizer, batch_size=BATCH_SIZE)
        self.computed = 0
        self.real = sum(len(ids) for ids in self.tokenizer(self.texts)["input_ids"])

    def luthier(self) -> int:
        run = generate_samples(self.texts, self.engine.settings)
        self.engine.slots.computed = 0
        made = [output for outputs in self.engine.work(run) for output in outputs]
        # The last token of a prompt is read by the first step.
        self.computed = self.engine.slots.computed + len(made)
        return sum(output.facts["newTokens"] + (output.facts["finishReason"] == "stop") for output in made)

    def loop(self, texts: Sequence[str]) -> int:
        """Batches one after the other, as examples do it."""
        new = self.computed = 0
        for first in range(0, len(texts), BATCH_SIZE):
            batch = self.tokenizer(list(texts[first : first + BATCH_SIZE]), return_tensors="pt", padding=True)
            self.computed += batch.input_ids.numel()
            with torch.inference_mode():
                made = self.model.generate(**batch)[:, batch.input_ids.shape[1] :].tolist()
            self.tokenizer.batch_decode(made, skip_special_tokens=True)
            new += sum(self.length(row) for row in made)
        return new

    def length(self, row: list[int]) -> int:
        """Tokens of a text, with the one that ends it."""
        return next((i + 1 for i, token in enumerate(row) if token in self.ends), len(row))

    def given_order(self) -> int:
        return self.loop(self.texts)

    def by_length(self) -> int:
        return self.loop(sorted(self.texts, key=lambda text: len(self.tokenizer(text)["input_ids"])))

    def transformers_pipeline(self) -> int:
        self.computed = 0
        made = self.pipeline(self.texts, generation_config=self.settings, return_tensors=True)
        new = 0
        for text, row in zip(self.texts, made, strict=True):
            ids = row[0]["generated_token_ids"]
            padding = next(i for i, token in enumerate(ids) if token != self.tokenizer.pad_token_id)
            new += self.length(list(ids[padding + len(self.tokenizer(text)["input_ids"]) :]))
        return new

    def continuous_batching(self) -> int:
        self.computed = 0
        ids = [self.tokenizer(text)["input_ids"] for text in self.texts]
        found: list[dict[str, Any]] = []

        def write() -> None:
            found.append(self.model.generate_batch(inputs=ids, generation_config=self.settings, progress_bar=False))

        # It waits for a thread of its own, for ever if that one has stopped.
        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        thread.join(LONGEST_WAIT)
        if not found:
            raise TimeoutError(f"no texts within {LONGEST_WAIT} s")
        assert len(found[0]) == len(ids), "some texts were not written"
        return sum(self.length(list(output.generated_tokens)) for output in found[0].values())


def generate_samples(texts: Sequence[str], settings: TextSettings) -> list[Sample]:
    return [sample(text, row=row, seed=row, settings=settings) for row, text in enumerate(texts)]


def main() -> dict[str, Any]:
    """The ratios of new tokens a CPU second."""
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LUTHIER_RUN_DIR"] = folder
        write_model(Path(folder))
        programs = Programs(Path(folder))
        contenders: dict[str, Callable[[], int]] = {
            "luthier": programs.luthier,
            "batches in the given order": programs.given_order,
            "batches by length": programs.by_length,
            "pipeline(batch_size)": programs.transformers_pipeline,
            "generate_batch": programs.continuous_batching,
        }
        paces: dict[str, list[float]] = {name: [] for name in contenders}
        slots: dict[str, float] = {}
        missing: dict[str, str] = {}
        for _ in range(ROUNDS):
            for name, program in contenders.items():
                if name in missing:
                    continue
                began = time.process_time()
                try:
                    new = program()
                except Exception as error:  # a peer that cannot run here is reported, and not the end of the benchmark
                    missing[name] = f"{type(error).__name__}: {error}"
                    continue
                paces[name].append(new / (time.process_time() - began))
                print(f"{name}: {paces[name][-1]:.1f} tokens a CPU second", file=sys.stderr, flush=True)
                slots[name] = round(programs.computed / programs.real, 3)
    pace = {name: statistics.median(found) for name, found in paces.items() if found}
    return {
        "prompts": PROMPTS,
        "prompt tokens": programs.real,
        "batch size": BATCH_SIZE,
        "new tokens a CPU second": {name: round(value, 1) for name, value in pace.items()},
        "luthier to": {name: round(pace["luthier"] / value, 3) for name, value in pace.items() if name != "luthier"},
        "computed tokens a real one of prompts": {name: value for name, value in slots.items() if value},
        "not measured": missing,
    }
