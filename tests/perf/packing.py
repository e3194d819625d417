"""Our packing against TRL's: the time to pack rows, how full the bins are, and what a step of training costs.

`PYTHONPATH=tests python -m perf packing` prints one JSON document. Both pack the same 200,000 rows, whose lengths are
those of chats and paragraphs, and of which some are longer than a bin. The steps are those of one small model with the
attention `sdpa`, on the same bins, with the batches of our collator and of TRL's, in turn; a third kind of batch joins
the rows without keeping them apart, which is the least that packed tokens can cost.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy
import torch
from datasets import Dataset, disable_caching, disable_progress_bars
from transformers import LlamaConfig, LlamaForCausalLM
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from luthier_trainer.data import bins
from luthier_trainer.tasks.batches import TokenCollator

ROWS, MAX_LENGTH, VOCABULARY = 200_000, 2048, 2048
STEP_LENGTH, MICRO_BATCH, ROUNDS = 512, 8, 5
SIZES = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
Batch = dict[str, Any]


def rows_of(lengths: numpy.ndarray, folder: str) -> Dataset:
    """Rows of random tokens, as `prepare` keeps them: in a file, which is mapped into memory."""
    tokens = numpy.random.default_rng(1).integers(2, VOCABULARY, lengths.sum(), dtype=numpy.int32)
    parts = numpy.split(tokens, numpy.cumsum(lengths)[:-1])
    Dataset.from_dict({"input_ids": parts, "length": lengths.astype(numpy.int32)}).save_to_disk(folder)
    return Dataset.load_from_disk(folder)


def timed(pack: Callable[[], Dataset], tokens: int) -> dict[str, float]:
    """CPU seconds, and what became of `tokens` tokens."""
    begin = time.process_time()
    packed = pack()
    seconds = time.process_time() - begin
    kept = int(numpy.sum([numpy.sum(lengths) for lengths in packed["seq_lengths"][:]]))
    return {
        "seconds": round(seconds, 2),
        "bins": len(packed),
        "fill": round(kept / (len(packed) * MAX_LENGTH), 5),
        "tokens lost": round(1 - kept / tokens, 5),
    }


def bins_of(folder: str) -> dict[str, Any]:
    """Both packings of the same rows."""
    lengths = numpy.random.default_rng(0).lognormal(5.0, 1.2, ROWS).clip(2, 4 * MAX_LENGTH).astype(numpy.int64)
    rows, tokens = rows_of(lengths, folder), int(lengths.sum())
    ids = rows.select_columns(["input_ids"])
    found = {
        "ours": timed(lambda: bins.packed(rows, MAX_LENGTH, "training"), tokens),
        "TRL bfd_split": timed(lambda: pack_dataset(ids, MAX_LENGTH, "bfd_split"), tokens),
        "TRL bfd": timed(lambda: pack_dataset(ids, MAX_LENGTH, "bfd"), tokens),
    }
    ours, theirs = found["ours"], found["TRL bfd_split"]
    return {
        "rows": ROWS,
        "tokens": tokens,
        "longer than a bin": int((lengths > MAX_LENGTH).sum()),
        **found,
        "seconds, ours / TRL bfd_split": round(ours["seconds"] / theirs["seconds"], 3),
        "bins, ours / TRL bfd_split": round(ours["bins"] / theirs["bins"], 4),
    }


def joined(rows: list[Batch]) -> Batch:
    """A batch that does not keep documents apart."""
    packed = TokenCollator(padding=0)(rows)
    return {"input_ids": packed["input_ids"], "labels": packed["labels"], "use_cache": False}


def moved(model: LlamaForCausalLM, collate: Callable[[list[Batch]], Batch], rows: list[Batch]) -> float:
    """How far the logits of the second document of a bin move when the first token of its first one changes."""
    first, second = rows[0]["seq_lengths"][:2]
    other = [rows[0] | {"input_ids": [5 if rows[0]["input_ids"][0] != 5 else 6, *rows[0]["input_ids"][1:]]}, *rows[1:]]
    with torch.no_grad():
        logits = [model(**given(collate(some))).logits[0, first : first + second] for some in (rows, other)]
    return float((logits[0] - logits[1]).abs().max() / logits[0].std())


def given(batch: Batch) -> Batch:
    """A batch as TRL's trainer, and ours, hand it to the model: without a cache."""
    return batch | {"use_cache": False}


def steps(folder: str) -> dict[str, Any]:
    """Learnt tokens a CPU second of forward, backward and update, of each kind of batch."""
    lengths = numpy.random.default_rng(2).lognormal(4.5, 1.0, 2_000).clip(2, STEP_LENGTH).astype(numpy.int64)
    packed = bins.packed(rows_of(lengths, folder), STEP_LENGTH, "training")
    several = [row for row in packed.select(range(200)) if len(row["seq_lengths"]) > 1]
    rows = several[:MICRO_BATCH]
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=STEP_LENGTH, **SIZES)
    model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
    update = torch.optim.AdamW(model.parameters(), lr=1e-4)
    collators: dict[str, Callable[[list[Batch]], Batch]] = {
        "ours": TokenCollator(padding=0),
        "TRL": DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True),
        "joined": joined,
    }
    leaks = {name: moved(model, collate, rows) for name, collate in collators.items()}
    seconds: dict[str, list[float]] = {name: [] for name in collators}
    for _ in range(ROUNDS + 1):  # the first one warms up
        for name, collate in collators.items():
            begin = time.process_time()
            model(**given(collate(rows))).loss.backward()
            update.step()
            update.zero_grad()
            seconds[name].append(time.process_time() - begin)
    tokens = sum(sum(row["seq_lengths"]) for row in rows)
    rate = {name: tokens / statistics.median(times[1:]) for name, times in seconds.items()}
    return {
        "tokens of a batch": tokens,
        "tokens a CPU second": {name: round(value) for name, value in rate.items()},
        "ours / TRL": round(rate["ours"] / rate["TRL"], 3),
        "ours / joined": round(rate["ours"] / rate["joined"], 3),
        "logits of the next document move by": {name: float(f"{value:.2g}") for name, value in leaks.items()},
    }


def main() -> dict[str, Any]:
    """The figures of the bins and of the steps."""
    disable_progress_bars()
    disable_caching()
    with tempfile.TemporaryDirectory() as folder:
        return {"bins": bins_of(f"{folder}/rows"), "steps": steps(f"{folder}/step")}
