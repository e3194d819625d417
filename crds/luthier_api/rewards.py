"""The kinds of rewards of the task grpo, one row each: which fields of a reward belong to them.

CEL rules and pages are drawn from these rows; the trainer has an implementation for each (`tasks/rewards.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

RewardType = Literal["exactMatch", "regex", "length", "json", "model", "python"]
"""The rows of `REWARDS`."""


@dataclass(frozen=True)
class RewardInfo:
    """A kind of rewards."""

    needs: tuple[str, ...] = ()
    """Fields without which such a reward cannot be computed."""
    takes: tuple[str, ...] = ()
    """Further fields that belong to it."""


REWARDS: Mapping[RewardType, RewardInfo] = {
    "exactMatch": RewardInfo(needs=("column",), takes=("pattern",)),
    "regex": RewardInfo(needs=("pattern",)),
    "length": RewardInfo(needs=("tokens",), takes=("shorter",)),
    "json": RewardInfo(takes=("keys",)),
    "model": RewardInfo(needs=("model",)),
    "python": RewardInfo(needs=("file",), takes=("function", "columns", "timeoutSeconds")),
}

FIELDS = tuple(dict.fromkeys(name for info in REWARDS.values() for name in info.needs + info.takes))
