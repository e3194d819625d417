"""Converts texts into tokens, once and before any GPU is used: one row a text, truncated at `maxLength`.

The columns are those that `train` expects. For causal-lm they are input_ids, length and, where not every token is in
the loss, loss_mask (1: the token is a label); for text-classification input_ids, attention_mask, labels
and length.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_api.rows import RowFilter
from luthier_trainer.data import full_lengths
from luthier_trainer.data.parallel import one_thread_each
from luthier_trainer.data.parallel import processes as parallel_processes
from luthier_trainer.data.reading import Reader, rows_at_once
from luthier_trainer.runtime.failure import Failure, NothingLeft
from luthier_trainer.runtime.notices import notice

if TYPE_CHECKING:
    import numpy
    from datasets import Dataset

SHORTEST = 2  # tokens; a row of one token has nothing to predict
MAX_LENGTH = "spec.training.maxLength"
FILTER = "spec.dataset.filter"
NUM_PROC = "spec.prepare.numProc"
_in_memory: ContextVar[bool] = ContextVar("in_memory", default=False)
FULL_LENGTH = "full_length"  # a column while rows are encoded: their tokens before they are cut


def language_rows(
    texts: Dataset,
    column: str,
    reader: Reader,
    max_length: int | None,
    use: str = "training",
    wanted: RowFilter | None = None,
) -> Dataset:
    """Return one row a text, with the end-of-text token at its end, truncated at `max_length` tokens if that is given.

    Rows of a single token are left out, and those that `wanted` does not keep. `use` is training or
    held-out, for notices.
    """

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        rows = [
            reader.row(ids)
            for ids in reader(batch[column], return_attention_mask=False, return_token_type_ids=False)["input_ids"]
        ]
        return language(row[:max_length] for row in rows) | {FULL_LENGTH: [len(row) for row in rows]}

    rows = mapped(texts, tokenize, with_notes(language_features()), parallel=True)
    return keep_learnable(without_lengths(rows, max_length, use, wanted))


def classification_rows(
    texts: Dataset,
    column: str,
    labels: numpy.ndarray,
    reader: Reader,
    max_length: int,
    use: str = "training",
    wanted: RowFilter | None = None,
) -> Dataset:
    """Return one row a text that `wanted` keeps, with what the model should answer.

    `labels`: int64 [rows], the ids of their classes; or fp32 [rows] or [rows, classes]. The tokenizer truncates at
    `max_length` and keeps its closing token.
    """

    def tokenize(batch: dict[str, list[str]], indices: list[int]) -> dict[str, list[Any]]:
        rows, lengths = reader.truncated(batch[column], max_length)
        return {
            "input_ids": rows,
            "attention_mask": [[1] * len(row) for row in rows],
            "length": [len(row) for row in rows],
            "labels": labels[indices].tolist(),
            FULL_LENGTH: lengths,
        }

    rows = mapped(texts, tokenize, with_notes(_classification_features(labels)), with_indices=True, parallel=True)
    return without_lengths(rows, max_length, use, wanted)


def count_tokens(data: Dataset) -> int:
    """Return the number of tokens of all rows."""
    if "length" in data.column_names:
        return sum(data["length"][:])
    return sum(len(row) for start in range(0, len(data), 10_000) for row in data[start : start + 10_000]["input_ids"])


def mapped(texts: Dataset, function: Any, features: Any, *, parallel: bool = False, **options: Any) -> Dataset:
    """Return what `function` makes of batches of the texts, in their order.

    `features` are the types of the result: without them, a column of the texts with the same name would keep its type,
    for example labels that were booleans. With `parallel`, several processes share the rows, in as many pieces. Then
    `function` must treat each row for itself, and what it has to report must be a column of its result.

    Raises Failure if a process disappears.
    """
    processes = parallel_processes(len(texts)) if parallel else 1
    if _in_memory.get():
        options["keep_in_memory"] = True
    # No result is looked for in a cache. A name for it saves the time to derive one from all that the function uses.
    options["new_fingerprint"] = secrets.token_hex(8)
    options = {"batch_size": rows_at_once(texts, 1000)} | options | ({"num_proc": processes} if processes > 1 else {})
    with one_thread_each() if processes > 1 else nullcontext():
        try:
            return texts.map(
                function,
                batched=True,
                remove_columns=texts.column_names,
                features=features,
                load_from_cache_file=False,
                **options,
            )
        except RuntimeError as error:
            if processes == 1 or "abruptly died" not in str(error):  # of `datasets`
                raise
            raise Failure(
                ExitCode.HOST_OUT_OF_MEMORY,
                f"{NUM_PROC}: one of {processes} processes that convert rows was killed, most likely for lack of"
                " memory. Set numProc to fewer, or spec.prepare.memory to more",
            ) from error


@contextmanager
def in_memory() -> Iterator[None]:
    """Let `mapped` keep its results in memory instead of in files. For a few rows, that are not needed for long."""
    token = _in_memory.set(True)
    try:
        yield
    finally:
        _in_memory.reset(token)


def with_notes(features: Any) -> Any:
    """Return the types of a result with the column that has the tokens of each row before it is cut."""
    from datasets import Features, Value

    return Features({**features, FULL_LENGTH: Value("int32")})


def within(rows: Dataset, wanted: RowFilter | None, use: str) -> numpy.ndarray:
    """Return the positions of the rows that have as many tokens as asked for, int64. The others are counted, and said.

    Rows without a length were left out already. Raises Failure if no row is left.
    """
    import numpy

    lengths = numpy.array([numpy.nan if n is None else n for n in rows[FULL_LENGTH][:]], dtype=numpy.float64)
    kept = numpy.ones(len(rows), dtype=bool)
    for name, limit, lost, what in (
        ("minTokens", wanted and wanted.min_tokens, lengths < ((wanted and wanted.min_tokens) or 0), "fewer"),
        ("maxTokens", wanted and wanted.max_tokens, lengths > ((wanted and wanted.max_tokens) or 0), "more"),
    ):
        if limit is None or not lost.any():
            continue
        kept &= ~lost
        count = int(lost.sum())
        said = f"{FILTER}.{name}: {count} of {len(rows)} {use} rows have {what} tokens than {limit}, and are left out"
        full_lengths.leave_out(use, f"filter.{name}", count)
        if not kept.any():
            raise NothingLeft(ExitCode.INVALID_DATASET, f"{said}, so that no row is left")
        notice(said)
    return numpy.flatnonzero(kept)


def without_lengths(rows: Dataset, max_length: int | None, use: str, wanted: RowFilter | None) -> Dataset:
    """Keep the lengths of the rows before they were cut for the data report, and return the rows without them.

    It gives notice of the rows that are cut at `max_length`. Rows that `wanted` does not keep are left out.
    """
    import numpy

    kept = within(rows, wanted, use)
    rows = rows if len(kept) == len(rows) else rows.select(kept)
    lengths = numpy.asarray(rows[FULL_LENGTH][:], dtype=numpy.int32)
    full_lengths.keep(use, lengths)
    cut = 0 if max_length is None else int((lengths > max_length).sum())
    if cut:
        notice(f"{MAX_LENGTH}: {cut} of {len(rows)} {use} rows are longer than {max_length} tokens and are cut")
    return rows.remove_columns(FULL_LENGTH)


def language(rows: Any) -> dict[str, list[Any]]:
    """Return the columns for causal-lm from lists of token ids."""
    ids = list(rows)
    return {"input_ids": ids, "length": [len(row) for row in ids]}


def language_features(masked: bool = False) -> Any:
    """Return the types of the columns for causal-lm. `masked`: whether not every token is in the loss."""
    from datasets import Features, List, Value

    mask = {"loss_mask": List(Value("uint8"))} if masked else {}
    return Features({"input_ids": List(Value("int32"))} | mask | {"length": Value("int32")})


def _classification_features(labels: numpy.ndarray) -> Any:
    """Return the types of the columns for text-classification."""
    from datasets import Features, List, Value

    label = Value(str(labels.dtype))

    return Features(
        {
            "input_ids": List(Value("int32")),
            "attention_mask": List(Value("int8")),
            "labels": label if labels.ndim == 1 else List(label),
            "length": Value("int32"),
        }
    )


def keep_learnable(rows: Dataset) -> Dataset:
    """Return the rows that have at least `SHORTEST` tokens."""
    import numpy

    kept = numpy.flatnonzero(numpy.asarray(rows["length"][:]) >= SHORTEST)
    return rows if len(kept) == len(rows) else rows.select(kept)
