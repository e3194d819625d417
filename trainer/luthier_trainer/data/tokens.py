"""Converts texts into tokens, once and before any GPU is used: one row a text, truncated at `maxLength`.

The columns are those that `train` expects. For causal-lm they are input_ids, length and, where not every token is in
the loss, loss_mask (1: the token is a label); for text-classification input_ids, attention_mask, labels
and length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from luthier_trainer.data import full_lengths
from luthier_trainer.data.reading import Reader, rows_at_once
from luthier_trainer.runtime.notices import notice

if TYPE_CHECKING:
    import numpy
    from datasets import Dataset

SHORTEST = 2  # tokens; a row of one token has nothing to predict
MAX_LENGTH = "spec.training.maxLength"


def language_rows(
    texts: Dataset, column: str, reader: Reader, max_length: int | None, use: str = "training"
) -> Dataset:
    """Return one row a text, with the end-of-text token at its end, truncated at `max_length` tokens if that is given.

    Rows of a single token are left out. `use` is training or held-out, for notices.
    """
    cut = 0

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        nonlocal cut
        rows = [
            reader.row(ids)
            for ids in reader(batch[column], return_attention_mask=False, return_token_type_ids=False)["input_ids"]
        ]
        full_lengths.keep(use, map(len, rows))
        if max_length is not None:
            cut += sum(len(row) > max_length for row in rows)
            rows = [row[:max_length] for row in rows]
        return language(rows)

    rows = mapped(texts, tokenize, language_features())
    if max_length is not None:
        _tell_cut(cut, len(texts), max_length, use)
    return keep_learnable(rows)


def classification_rows(
    texts: Dataset, column: str, labels: numpy.ndarray, reader: Reader, max_length: int, use: str = "training"
) -> Dataset:
    """Return one row a text, with the id of its class.

    `labels` is int64 of shape (rows,). The tokenizer truncates at `max_length` and keeps its closing token.
    """
    cut = 0

    def tokenize(batch: dict[str, list[str]], indices: list[int]) -> dict[str, list[Any]]:
        nonlocal cut
        rows, lengths = reader.truncated(batch[column], max_length)
        full_lengths.keep(use, lengths)
        cut += sum(length > max_length for length in lengths)
        return {
            "input_ids": rows,
            "attention_mask": [[1] * len(row) for row in rows],
            "length": [len(row) for row in rows],
            "labels": labels[indices].tolist(),
        }

    rows = mapped(texts, tokenize, _classification_features(), with_indices=True)
    _tell_cut(cut, len(texts), max_length, use)
    return rows


def count_tokens(data: Dataset) -> int:
    """Return the number of tokens of all rows."""
    if "length" in data.column_names:
        return sum(data["length"][:])
    return sum(len(row) for start in range(0, len(data), 10_000) for row in data[start : start + 10_000]["input_ids"])


def mapped(texts: Dataset, function: Any, features: Any, **options: Any) -> Dataset:
    """Return what `function` makes of batches of the texts, in their order.

    The result is never read from a cache, because `function` counts, or keeps the rest of a batch for the next.
    `features` are the types of the result: without them, a column of the texts with the same name would keep its type,
    for example labels that were booleans.
    """
    options = {"batch_size": rows_at_once(texts, 1000)} | options
    return texts.map(
        function,
        batched=True,
        remove_columns=texts.column_names,
        features=features,
        load_from_cache_file=False,
        **options,
    )


def _tell_cut(cut: int, rows: int, max_length: int, use: str) -> None:
    """Give notice of the rows that were truncated."""
    if cut:
        notice(f"{MAX_LENGTH}: {cut} of {rows} {use} rows are longer than {max_length} tokens and are cut")


def language(rows: Any) -> dict[str, list[Any]]:
    """Return the columns for causal-lm from lists of token ids."""
    ids = list(rows)
    return {"input_ids": ids, "length": [len(row) for row in ids]}


def language_features(masked: bool = False) -> Any:
    """Return the types of the columns for causal-lm. `masked`: whether not every token is in the loss."""
    from datasets import Features, List, Value

    mask = {"loss_mask": List(Value("uint8"))} if masked else {}
    return Features({"input_ids": List(Value("int32"))} | mask | {"length": Value("int32")})


def _classification_features() -> Any:
    """Return the types of the columns for text-classification."""
    from datasets import Features, List, Value

    return Features(
        {
            "input_ids": List(Value("int32")),
            "attention_mask": List(Value("int8")),
            "labels": Value("int64"),
            "length": Value("int32"),
        }
    )


def keep_learnable(rows: Dataset) -> Dataset:
    """Return the rows that have at least `SHORTEST` tokens."""
    return rows.filter(lambda lengths: [n >= SHORTEST for n in lengths], batched=True, input_columns=["length"])
