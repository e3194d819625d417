"""How long encoded rows are, for the plan of time."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from datasets import Dataset

SAMPLED = 20_000  # rows from which the mean is taken


def attended(rows: Dataset) -> float | None:
    """Return the tokens of the row that a token is in, on average over all tokens; None if rows have no tokens.

    A long row counts for each of its tokens. Documents that share a packed row count as rows of their own.
    """
    lengths = list(_lengths(rows.select(range(min(len(rows), SAMPLED)))))
    total = sum(lengths)
    return sum(length**2 for length in lengths) / total if total else None


def _lengths(rows: Dataset) -> Iterable[int]:
    names = rows.column_names
    if "seq_lengths" in names:
        return (length for row in rows["seq_lengths"] for length in row)
    if "length" in names:
        return rows["length"][:]
    if "input_ids" in names:
        return (len(ids) for ids in rows["input_ids"])
    answers = [name for name in names if name.endswith("_ids") and name != "prompt_ids"]
    prompts = [len(ids) for ids in rows["prompt_ids"]] if "prompt_ids" in names else [0] * len(rows)
    return (p + len(ids) for name in answers for p, ids in zip(prompts, rows[name], strict=True))
