"""Shows one encoded row as text, with the part that the model learns to write in brackets.

Most mistakes in a dataset or a chat template are seen at once in such a row, and in no metric.
"""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier_trainer.workspace.manifest import replace_file

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

FILE = "first-row.json"
OPEN, CLOSE = "⟦", "⟧"
CHARACTERS = 2000  # of a row in the log


def described(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """Return the first row, or the first document of a packed one: text, tokens, mask. None if it has no tokens."""
    if "input_ids" not in rows.column_names or not len(rows):
        return None
    row = rows[0]
    first = row["seq_lengths"][0] if row.get("seq_lengths") else len(row["input_ids"])
    ids = row["input_ids"][:first]
    mask = row["loss_mask"][:first] if "loss_mask" in row else [1] * len(ids)
    if "labels" in row:  # a class for the whole row
        mask = [0] * len(ids)
    return {
        "text": marked(ids, mask, tokenizer),
        "tokens": tokenizer.convert_ids_to_tokens(ids),
        "input_ids": ids,
        "loss_mask": mask,
    }


def marked(ids: list[int], mask: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of tokens, with brackets around those that are labels.

    Each part is what it adds to the text before it: a tokenizer may write tokens differently that stand alone.
    """
    parts, begin, before = [], 0, ""
    for one, run in groupby(mask):
        end = begin + len(list(run))
        whole = str(tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False))
        added = whole[len(before) :]
        parts.append(f"{OPEN}{added}{CLOSE}" if one else added)
        begin, before = end, whole
    return "".join(parts)


def keep(rows: Dataset, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Print the first row, and keep it in `folder`."""
    row = described(rows, tokenizer)
    if row is None:
        return
    replace_file(folder / FILE, json.dumps(row, ensure_ascii=False, indent=1).encode())
    print(told(row), flush=True)


def told(row: dict[str, Any]) -> str:
    """Return a described row as lines for a log."""
    text, learnt = row["text"], sum(row["loss_mask"])
    if len(text) > CHARACTERS:
        half = CHARACTERS // 2
        text = f"{text[:half]}\n… {len(text) - 2 * half} characters …\n{text[-half:]}"
    labels = f"{learnt} of them labels, between {OPEN} and {CLOSE}" if learnt else "and one label, its class"
    return f"The first training row, {len(row['tokens'])} tokens, {labels}:\n{text}"
