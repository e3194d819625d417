"""Which rows of a dataset a training learns from: filters, repeats."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from luthier_api.base import ApiModel, Rule
from luthier_api.spec import ShortText

Deduplicate = Literal["exact"]
Characters = Annotated[int, Field(ge=1, le=2**31 - 1)]


class ColumnFilter(ApiModel):
    """What a cell must be, so that its row is used: all that is set must hold. A cell without a value never is."""

    column: ShortText
    """Column of the dataset; it need not have a role in `columns`."""
    values: Annotated[list[Annotated[str, Field(max_length=1024)]] | None, Field(min_length=1, max_length=256)] = None
    """The cell is one of these: as text, so that 3 is "3", and truth "true" or "false"."""
    matches: Annotated[str | None, Field(min_length=1, max_length=1024)] = None
    """A part of the cell matches this regular expression (RE2): ^https: at its beginning, ^(a|b)$ as a whole."""
    min: float | None = None
    """The cell is a number, and not below this."""
    max: float | None = None
    """The cell is a number, and not above this."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "has(self.values) || has(self.matches) || has(self.min) || has(self.max)",
            "columns: a filter needs at least one of values, matches, min and max",
        ),
    )


class RowFilter(ApiModel):
    """Rows that are used, for training and for evaluation. All others are left out, and counted."""

    columns: Annotated[list[ColumnFilter] | None, Field(min_length=1, max_length=8)] = None
    """What cells must be. These filters come first: what they leave out need not be a row that the task can read."""
    min_characters: Characters | None = None
    """The fewest characters of a row's texts together; of a conversation, of its messages."""
    max_characters: Characters | None = None
    """The most."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "has(self.columns) || has(self.minCharacters) || has(self.maxCharacters)",
            "filter: set at least one of columns, minCharacters and maxCharacters, or remove it",
        ),
        Rule(
            "!has(self.minCharacters) || !has(self.maxCharacters) || self.minCharacters <= self.maxCharacters",
            "filter.minCharacters: is more than maxCharacters",
        ),
    )
