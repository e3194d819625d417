"""Rows that `prepare` converts into tokens in a second, by one process and by as many as there are cores.

`PYTHONPATH=tests python -m perf tokenizing` prints one JSON document. The rows are made of pieces of Python's language
reference: texts, conversations and pairs of answers of 600 characters on average. Both results must be the same.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pydoc_data.topics import topics
from typing import Any

import numpy
from datasets import Dataset, Features, Value, disable_progress_bars

from luthier_api.finetune import FineTuneJobSpec
from luthier_trainer.data import chats, full_lengths, labelled, pair_tokens, pairs, parallel, tokens
from luthier_trainer.data.load import Rows
from luthier_trainer.data.masks import ChatReader
from luthier_trainer.data.reading import Reader
from luthier_trainer.data.templates import CHATML
from luthier_trainer.models.new_tokenizer import train_tokenizer
from luthier_trainer.runtime import cores

ROWS = 200_000
WORDS = 80  # of a row
MAX_LENGTH = 256
PREFERENCE = {
    "task": "preference",
    "model": {"path": "/model"},
    "dataset": {"files": ["/rows.jsonl"]},
    "training": {"maxLength": MAX_LENGTH},
}


def rows(count: int) -> Iterator[dict[str, str]]:
    """Yield a text, a conversation, and a pair of answers, of the same words."""
    random = numpy.random.default_rng(0)
    words = [word for _, body in sorted(topics.items()) for word in body.split()]
    for begin in random.integers(0, len(words) - 2 * WORDS, count).tolist():
        parts = [" ".join(words[begin + i : begin + i + WORDS // 4]) for i in range(0, WORDS, WORDS // 4)]
        messages = [{"role": "assistant" if i % 2 else "user", "content": part} for i, part in enumerate(parts)]
        prompt, *answers = parts[:3]
        pair = json.dumps({"prompt": prompt, "chosen": f" {answers[0]}", "rejected": f" {answers[1]}"})
        yield {"text": " ".join(parts), chats.CHAT: json.dumps({"messages": messages}), pairs.PAIR: pair}


def digest(data: Dataset) -> str:
    """Return a hash of all cells."""
    found = hashlib.sha256()
    for batch in data.with_format("arrow").iter(10_000):
        found.update(repr([batch[name].to_pylist() for name in batch.column_names]).encode())
    return found.hexdigest()


def measured(encode: Callable[[], Dataset]) -> dict[str, Any]:
    """The figures of one kind of rows."""
    found: dict[int, tuple[float, str]] = {}
    every = cores.available()
    for processes in (1, every):
        parallel.use(processes)
        begin = time.perf_counter()
        data = encode()
        found[processes] = ROWS / (time.perf_counter() - begin), digest(data)
        full_lengths.take("training")
    assert len({one for _, one in found.values()}) == 1, "several processes make other rows"
    return {
        "rows/s, 1 process": round(found[1][0]),
        f"rows/s, {every} processes": round(found[every][0]),
        "1 process / all cores": round(found[1][0] / found[every][0], 3),
    }


def main() -> dict[str, Any]:
    """The figures."""
    disable_progress_bars()
    tokenizer = train_tokenizer([body for _, body in sorted(topics.items())], 8192)
    tokenizer.chat_template = CHATML
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    with tempfile.TemporaryDirectory() as folder:
        features = Features({name: Value("string") for name in ("text", chats.CHAT, pairs.PAIR)})
        data = Dataset.from_generator(rows, gen_kwargs={"count": ROWS}, features=features, cache_dir=folder)
        given = Rows(data.select_columns([chats.CHAT]), "rows")
        compared = Rows(data.select_columns([pairs.PAIR]), "rows")
        asked = FineTuneJobSpec.model_validate(PREFERENCE)
        reader = ChatReader(tokenizer, "assistant")
        return {
            "rows": ROWS,
            "cores": cores.available(),
            "texts": measured(
                lambda: tokens.language_rows(data.select_columns(["text"]), "text", Reader(tokenizer), MAX_LENGTH)
            ),
            "conversations": measured(lambda: labelled.chat_rows(given, reader, MAX_LENGTH, "training")),
            "pairs of answers": measured(lambda: pair_tokens.pair_rows(compared, tokenizer, asked, "training")),
        }
