"""Which rows a training learns from: filters, repeats, and mixes of several sources."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from luthier_api.base import ApiModel, Rule
from luthier_api.marks import For, by_table
from luthier_api.spec import DatasetSource, Path, ShortText, source_rules, train_alone

Deduplicate = Literal["exact"]
Characters = Annotated[int, Field(ge=1, le=2**31 - 1)]


class ColumnFilter(ApiModel):
    """What a cell must be, so that its row is used: all that is set must hold. A cell without a value never is."""

    column: ShortText
    """Column of the dataset; it need not have a role in `columns`."""
    values: Annotated[list[Annotated[str, Field(max_length=512)]] | None, Field(min_length=1, max_length=256)] = None
    """The cell is one of these: as text, so that 3 is "3", and truth "true" or "false"."""
    matches: Annotated[str | None, Field(min_length=1, max_length=512)] = None
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
    """The most characters of a row's texts together."""

    min_tokens: Annotated[Annotated[int, Field(ge=1)] | None, For("task")] = by_table()
    """The fewest tokens of a row before it is cut, with those of the chat template. What it leaves out, `evalFraction`
    has counted.
    """
    max_tokens: Annotated[Annotated[int, Field(ge=1)] | None, For("task")] = by_table()
    """The most such tokens. At `training.maxLength`, no row is cut."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "has(self.columns) || has(self.minCharacters) || has(self.maxCharacters) || has(self.minTokens) ||"
            " has(self.maxTokens)",
            "filter: set at least one of columns, minCharacters, maxCharacters, minTokens and maxTokens, or remove it",
        ),
        Rule(
            "!has(self.minTokens) || !has(self.maxTokens) || self.minTokens <= self.maxTokens",
            "filter.minTokens: is more than maxTokens",
        ),
        Rule(
            "!has(self.minCharacters) || !has(self.maxCharacters) || self.minCharacters <= self.maxCharacters",
            "filter.minCharacters: is more than maxCharacters",
        ),
    )


Stopping = Literal["first_exhausted", "all_exhausted"]


class MixedSource(DatasetSource):
    """One of several sources of rows."""

    files: Annotated[list[Path] | None, Field(min_length=1, max_length=32)] = None
    """Files or glob patterns inside the pods; for imagefolder, folders."""
    split: ShortText = "train"
    """Split to train on; slices such as train[:90%] work."""
    eval_split: ShortText | None = None
    """Split to evaluate on; slices work."""
    rename: Annotated[dict[str, ShortText] | None, Field(min_length=1, max_length=16)] = None
    """Name of a column in this source → the name that it has in the others, by which `dataset.columns` and `filter`
    know it.
    """
    weight: Annotated[float | None, Field(gt=0, le=1_000_000)] = None
    """Probability, relative to the other weights, with which the next row of an epoch is drawn from this source. When
    left out for all, each row of all sources is there once.
    """

    rules: ClassVar[tuple[Rule, ...]] = (
        *source_rules("sources"),
        train_alone("split", "sources"),
        train_alone("evalSplit", "sources"),
        Rule(
            "!has(self.evalSplit) || self.evalSplit != self.split",
            "sources.evalSplit: is also the training split; choose another split, or parts that do not overlap, such as"
            " train[:90%] and train[90%:]",
        ),
    )


class Mix(ApiModel):
    """Several sources of rows, whose forms must fit each other: texts, pairs of texts, or conversations of any form."""

    sources: Annotated[list[MixedSource], Field(min_length=2, max_length=8)]
    """Where rows come from."""
    stopping_strategy: Stopping = "first_exhausted"
    """When an epoch with weights ends, as in `interleave_datasets`. first_exhausted: when a source has no row left;
    no row is there twice, and the rest of the others is left out. all_exhausted: when each row of each source was
    drawn; smaller sources begin anew until then.
    """

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.sources.all(s, has(s.weight)) || !self.sources.exists(s, has(s.weight))",
            "mix.sources: some have a weight and some have none; set weight for all of them, or for none",
        ),
    )
