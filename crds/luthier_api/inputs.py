"""The rows that a GenerateJob works on: where they come from, what they override, and how they are repeated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, ModelWrapValidatorHandler, model_validator
from pydantic.alias_generators import to_camel

from luthier_api.base import SET, ApiModel, Format, Rule, model_in
from luthier_api.marks import For, by_table
from luthier_api.outputs import BATCH, InputForm
from luthier_api.overriding import overriding, sweeping
from luthier_api.spec import LABEL, DatasetSource, Seed, ShortText, exactly_one, train_alone
from luthier_api.task_settings import ImageSettings, TextSettings

OtherJob = Annotated[
    str,
    Field(min_length=1, max_length=40),
    Format(f"^{LABEL}$", "must be the name of a GenerateJob: lower-case letters, digits and '-'"),
]


BLOCKS: Mapping[str, type[ApiModel]] = {"text": TextSettings, "image": ImageSettings}
"""The blocks of settings of which rows can override fields."""
RowOverrides = overriding(BLOCKS, "RowOverrides", "What a row overrides of the settings of the job.")


ROWS_SIZE = 65536
"""Characters of the texts of all rows in a manifest. The operator and etcd hold every job whole. Not bytes: the API
server counts what it costs to convert each text at its longest, and refuses the CRD.
"""
TEXTS = (
    "prompt",
    "negativePrompt",
    "tools",
    "text",
    "question",
    "context",
    "image",
    "initImage",
    "mask",
    "audio",
    "reference",
)
"""Fields of a row that hold a text, or a path."""


def _size(name: str) -> str:
    """CEL: characters of a text of `row`."""
    return f"(has(row.{name}) ? size(row.{name}) : 0)"


class Row(ApiModel):
    """One input."""

    prompt: Annotated[str | None, Field(min_length=1, max_length=8192), For("task")] = None
    """The text to continue (text-generation), or what the image shows (text-to-image). With `inputs.template`, a text
    for {prompt}.
    """
    fields: Annotated[dict[str, Annotated[str, Field(max_length=8192)]] | None, Field(max_length=64), For("task")] = (
        None
    )
    """Texts for `inputs.template`, by their names there. Each output repeats them under `input`."""
    tools: Annotated[str | None, Field(min_length=2, max_length=8192), For("task")] = None
    """The tools that the model can call: a list of JSON schemas, as JSON text. Needs text.chat, whose template writes
    them.
    """
    negative_prompt: Annotated[str | None, Field(max_length=8192), For("task")] = None
    """What the image should not show. An empty text is none, as an empty cell of a dataset is."""
    text: Annotated[str | None, Field(min_length=1, max_length=ROWS_SIZE), For("task")] = None
    """The text that the model reads."""
    question: Annotated[str | None, Field(min_length=1, max_length=8192), For("task")] = None
    """The question that the context answers."""
    context: Annotated[str | None, Field(min_length=1, max_length=ROWS_SIZE), For("task")] = None
    """The text in which the answer stands."""
    image: Annotated[str | None, Field(min_length=1, max_length=1024), For("task")] = None
    """The image that the model looks at: the path of a file inside the pods."""
    init_image: Annotated[str | None, Field(min_length=1, max_length=1024), For("task")] = None
    """The image that is changed: the path of a file inside the pods. It is scaled to image.width and image.height."""
    mask: Annotated[str | None, Field(min_length=1, max_length=1024), For("task")] = None
    """Where the image is changed: white in another one, likewise. Left out: everywhere."""
    audio: Annotated[str | None, Field(min_length=1, max_length=1024), For("task")] = None
    """The audio that the model hears: the path of a file inside the pods."""
    reference: Annotated[str | None, Field(min_length=1, max_length=8192), For("task")] = None
    """What the output should be: the text, the label, the answer, or the tags of the words (B-PER O O). From the
    outputs that have one the metrics of the job are computed.
    """
    id: Annotated[str | None, Field(min_length=1, max_length=512)] = None
    """Identifier of this row, which each of its outputs repeats."""
    seed: Annotated[Seed | None, For("task")] = None
    """Seed of this row. Left out: derived from the job's seed and from the row, by its id or else by its contents."""
    overrides: RowOverrides | None = None  # type: ignore[valid-type]  # drawn from the blocks
    """What this row overrides of the settings of the job, such as {image: {steps: 50}}."""


class InputColumns(ApiModel):
    """Which columns of the dataset play which role."""

    prompt: Annotated[ShortText, For("task")] = by_table()
    """The prompt. Text files hold one a line and need no name here."""
    tools: Annotated[ShortText | None, For("task")] = None
    """The tools that the model can call: a list of JSON schemas, or its JSON text; an empty cell has none. Needs
    text.chat, whose template writes them.
    """
    text: Annotated[ShortText, For("task")] = by_table()
    """The text that the model reads. Text files hold one a line and need no name here."""
    question: Annotated[ShortText, For("task")] = by_table()
    """The question that the context answers."""
    context: Annotated[ShortText, For("task")] = by_table()
    """The text in which the answer stands."""
    image: Annotated[ShortText, For("task")] = by_table()
    """The image that the model looks at: images, or paths of files inside the pods, which may be relative to the folder
    of the file that names them. Text files hold a path a line and need no name here.
    """
    init_image: Annotated[ShortText, For("task")] = by_table()
    """The image that is changed, likewise. It is scaled to image.width and image.height, whatever its own shape is."""
    mask: Annotated[ShortText, For("task")] = by_table()
    """Where the image is changed: white in another one. Used where there is such a column; a name other than the
    default must exist.
    """
    audio: Annotated[ShortText, For("task")] = by_table()
    """The audio that the model hears: WAV, FLAC or MP3 files, or paths of them inside the pods, which may be relative
    to the folder of the file that names them. Text files hold a path a line and need no name here.
    """
    negative_prompt: Annotated[ShortText, For("task")] = by_table()
    """What the image should not show. Used where there is such a column; a name other than the default must exist."""
    reference: Annotated[ShortText | None, For("task")] = None
    """What the output should be: a text; a label, a list of labels or a number; the answer or a list of them, as in
    SQuAD; or entities (label, start, end), or the tags of the words (B-PER, I-PER, O). From the outputs that have one
    the metrics of the job are computed, with an empty cell there is none.
    """
    id: ShortText | None = None
    """Identifier of the row, which each of its outputs repeats. The seed of a row that has none is derived from it."""
    seed: Annotated[ShortText, For("task")] = by_table()
    """Seed of the row, a whole number below 2^32. Used where there is such a column; a name other than the default must
    exist.
    """
    settings: Annotated[dict[str, ShortText] | None, Field(max_length=64)] = None
    """Columns that override fields of the task's settings, by the names of the fields: {steps: n_steps}. An empty cell
    overrides nothing.
    """
    carry: Annotated[Annotated[list[ShortText], SET] | None, Field(max_length=100)] = None
    """Other columns that each output repeats under `input`, such as ids; all of them when left out, none with []. Text
    files have the line there.
    """


class InputData(DatasetSource):
    """Rows from files or from the Hub."""

    split: ShortText = "train"
    """Split of a Hub dataset; slices such as train[:100] work."""

    rules: ClassVar[tuple[Rule, ...]] = (
        *DatasetSource.rules,
        train_alone("split"),
        Rule(
            "!has(self.format) || self.format != 'webdataset'",
            "dataset.format: archives of WebDataset are read by FineTuneJobs only; write the prompts into a file of"
            " JSON lines",
        ),
    )


class SweepLists(ApiModel):
    """Lists of values, by what they are values of."""

    fields: Annotated[
        dict[str, Annotated[list[Annotated[str, Field(max_length=8192)]], Field(min_length=1, max_length=64)]] | None,
        Field(max_length=16),
    ] = None
    """Texts for `inputs.template`, by their names there."""
    seed: Annotated[list[Seed] | None, Field(min_length=1, max_length=1000), For("task")] = None
    """Seeds, instead of those of the rows."""


SweepValues = sweeping(BLOCKS, "SweepValues", SweepLists)


class Sweep(ApiModel):
    """Works on each row several times, with other values: exactly one of zip and product."""

    zip: SweepValues | None = None  # type: ignore[valid-type]  # drawn from the blocks
    """The first values of all lists together, then the second ones, and so on: all lists are of one length."""
    product: SweepValues | None = None  # type: ignore[valid-type]
    """Each value of a list with each one of the others. The last list changes fastest."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(exactly_one("zip", "product"), "sweep: set exactly one of zip and product"),
    )


class Inputs(ApiModel):
    """The rows to work on: exactly one of rows, dataset and job."""

    rows: Annotated[list[Row] | None, Field(min_length=1, max_length=1000)] = None
    """Rows written here: a handful, with at most 65536 characters in all. More belong into a file or a dataset."""
    dataset: InputData | None = None
    """Rows from files or from the Hub."""
    job: OtherJob | None = None
    """A GenerateJob of the same namespace: each of its outputs is a row, in their order. `columns` says which of their
    columns are read, such as {prompt: text}. An output that could not be made is an error here, too.
    """
    columns: InputColumns | None = None
    """Names of the columns of the dataset, or of the outputs of the other job."""
    form: Annotated[InputForm, For("task")] = by_table()
    """What rows of a dataset are. columns: each column is what `columns` says. openai-batch: each row is a request of
    OpenAI's Batch API (custom_id, method, url, body), whose body overrides fields of `text`. A request that asks for
    something else is an error, which names the field.
    """
    template: Annotated[str | None, Field(min_length=1, max_length=8192), For("task")] = None
    """The prompt of each row, with texts of the row in it: "a {thing} in the style of {style}". A name stands for a
    column of the dataset, for one of `rows[].fields`, or for a list of `sweep`; {{ and }} stand for braces.
    """
    sweep: Sweep | None = None
    """Works on each row several times, with other values. Each time is a row of its own in the outputs."""
    truncate: Annotated[bool, For("task")] = by_table()
    """Whether a text that is longer than the model reads is cut at its end, and counted. Otherwise its row is an
    error, which says how long the text is.
    """

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(exactly_one("rows", "dataset", "job"), "inputs: set exactly one of rows, dataset and job"),
        Rule(
            "!has(self.job) || has(self.columns)",
            "inputs.columns: says which column of the outputs of inputs.job is read; set it, such as {prompt: text}",
        ),
        Rule(
            f"!has(self.form) || self.form != '{BATCH}' || has(self.dataset) && !has(self.columns) &&"
            " !has(self.template) && !has(self.sweep)",
            f"inputs.form: requests ({BATCH}) are rows of inputs.dataset and say themselves what is asked; remove"
            " columns, template and sweep, and set dataset",
        ),
        Rule(
            "!has(self.rows) || !has(self.columns)",
            "inputs.columns: rows that stand in the job have no columns to name; remove it, or set inputs.dataset",
        ),
        Rule(
            f"!has(self.rows) || self.rows.map(row, {' + '.join(map(_size, TEXTS))}).sum() <= {ROWS_SIZE}",
            f"inputs.rows: more than {ROWS_SIZE} characters in all; put the rows into a file and name it in"
            " inputs.dataset.files: of a ConfigMap or a claim (spec.volumes), or of a dataset (inputs.dataset.id)",
        ),
    )

    @model_validator(mode="wrap")
    @classmethod
    def _dataset_has_columns(cls, data: Any, handler: ModelWrapValidatorHandler[Inputs]) -> Inputs:
        inputs = handler(data)
        if inputs.dataset and not inputs.columns and inputs.form != BATCH:
            return inputs.model_copy(update={"columns": InputColumns()})
        return inputs


def overridable(block: str) -> list[str]:
    """The fields of a block of settings that a row can override, by their names in a manifest."""
    if block not in BLOCKS:
        return []
    model = model_in(RowOverrides.model_fields[block].annotation)
    assert model is not None
    return [field.alias or to_camel(name) for name, field in model.model_fields.items()]
