"""The forms of rows that causal-lm learns from, one row each: which columns they have, and what can be learnt.

Imports no torch. The trainer recognises the form of a file by these columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

RowForm = Literal["messages", "sharegpt", "prompt-completion", "alpaca", "text"]
"""The rows of `FORMS`, in the order in which they are recognised: a file with the columns of several has the first."""
LossOn = Literal["all", "completions", "assistant"]
TemplateName = Literal["zephyr", "chatml", "alpaca"]
"""The chat templates that Luthier brings for models without one."""


@dataclass(frozen=True)
class FormInfo:
    """A form of rows."""

    title: str
    """As messages call such rows."""
    columns: dict[str, str]
    """Roles in `dataset.columns` that each row must have → the column's name unless the job gives another."""
    loss_on: tuple[LossOn, ...]
    """What can be learnt from such rows; the first is the default."""
    optional_columns: dict[str, str] = field(default_factory=dict)
    """The same as `columns` for roles that rows need not have."""


FORMS: Mapping[RowForm, FormInfo] = {
    "messages": FormInfo(
        title="conversations",
        columns={"messages": "messages"},
        optional_columns={"tools": "tools"},
        loss_on=("assistant", "all"),
    ),
    "sharegpt": FormInfo(
        title="conversations of ShareGPT",
        columns={"messages": "conversations"},
        optional_columns={"tools": "tools", "system": "system"},
        loss_on=("assistant", "all"),
    ),
    "prompt-completion": FormInfo(
        title="prompts and completions",
        columns={"prompt": "prompt", "completion": "completion"},
        optional_columns={"tools": "tools"},
        loss_on=("completions", "all", "assistant"),
    ),
    "alpaca": FormInfo(
        title="instructions of Alpaca",
        columns={"prompt": "instruction", "completion": "output"},
        optional_columns={"input": "input", "system": "system"},
        loss_on=("completions", "all", "assistant"),
    ),
    "text": FormInfo(
        title="texts",
        columns={"text": "text"},
        loss_on=("all",),
    ),
}

ROLES = tuple(dict.fromkeys(role for info in FORMS.values() for role in info.columns | info.optional_columns))
"""All roles that columns of rows of some form have."""
LOSSES_OF_FORMS = {name: info.loss_on for name, info in FORMS.items()}
