"""Shows one encoded row as text, with the part that the model learns to write in brackets.

Most mistakes in a dataset or a chat template are seen at once in such a row, and in no metric.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier_trainer.tasks.base import Shown, Task
from luthier_trainer.workspace.manifest import replace_file

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

FILE = "first-row.json"
ANSWERS = {"chosen": "chosen answer", "rejected": "rejected answer", "completion": "answer"}
"""Roles of answers to a prompt → what they are called."""
PARTS = ANSWERS | {"prompt": "prompt"}
OPEN, CLOSE = "⟦", "⟧"
CHARACTERS = 2000  # of a row in the log


def described(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    parts: Callable[[Mapping[str, Any]], Mapping[str, Shown]] = lambda row: {},
) -> dict[str, Any] | None:
    """Return the first row, or the first document of a packed one: text, tokens, mask; of a pair, both answers so.

    `parts` may divide it otherwise (`Task.shown`). None if it has no tokens.
    """
    if not len(rows):
        return None
    row = rows[0]
    if found := parts(row):
        return {name: _sequence([*ids], [*mask], tokenizer) for name, (ids, mask) in found.items()}
    answers = [role for role in ANSWERS if f"{role}_ids" in row]
    if answers:
        return {role: _sequence(*_after(row.get("prompt_ids"), row[f"{role}_ids"]), tokenizer) for role in answers}
    if "prompt_ids" in row:  # what follows it is written in the training
        return {"prompt": _sequence(*_after(row["prompt_ids"], []), tokenizer)}
    if "input_ids" not in row:
        return None
    first = row["seq_lengths"][0] if row.get("seq_lengths") else len(row["input_ids"])
    ids = row["input_ids"][:first]
    mask = row["loss_mask"][:first] if "loss_mask" in row else [1] * len(ids)
    if "labels" in row:  # a class for the whole row
        mask = [0] * len(ids)
    return _sequence(ids, mask, tokenizer)


def _after(prompt: list[int] | None, answer: list[int]) -> tuple[list[int], list[int]]:
    """Return (token ids, mask) of a prompt and an answer, whose tokens are the labels.

    Without a prompt, the answer is a whole text that is rated at its last token.
    """
    if prompt is None:
        return answer, [0] * (len(answer) - 1) + [1]
    return prompt + answer, [0] * len(prompt) + [1] * len(answer)


def _sequence(ids: list[int], mask: list[int], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
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


def keep(rows: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Print the first row, and keep it in `folder`."""
    row = described(rows, tokenizer, task.shown)
    if row is None:
        return
    replace_file(folder / FILE, json.dumps(row, ensure_ascii=False, indent=1).encode())
    print(told(row), flush=True)


def told(row: dict[str, Any]) -> str:
    """Return a described row as lines for a log."""
    if "tokens" in row:
        return _shown("The first training row", row)
    return "\n".join(
        _shown(f"The {PARTS.get(role, role)} of the first training row", found) for role, found in row.items()
    )


def _shown(what: str, row: dict[str, Any]) -> str:
    text, learnt = row["text"], sum(row["loss_mask"])
    if len(text) > CHARACTERS:
        half = CHARACTERS // 2
        text = f"{text[:half]}\n… {len(text) - 2 * half} characters …\n{text[-half:]}"
    labels = f"{learnt} of them labels, between {OPEN} and {CLOSE}" if learnt else "none of them a label of its own"
    return f"{what}, {len(row['tokens'])} tokens, {labels}:\n{text}"
