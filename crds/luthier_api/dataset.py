"""The rows of a FineTuneJob: where they come from, what their columns are, and how they are read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar

from pydantic import Field

from luthier_api.base import ApiModel, Rule
from luthier_api.formats import FORMATS
from luthier_api.forms import RowForm, TemplateName
from luthier_api.marks import For, by_table
from luthier_api.rows import Deduplicate, Mix, RowFilter
from luthier_api.spec import DatasetSource, Path, ShortText, at_most_one, exactly_one, source_rules, train_alone


class Columns(ApiModel):
    """Which columns of the dataset play which role."""

    text: Annotated[ShortText, For("task")] = by_table()
    """The text to learn (causal-lm, masked-lm) or to classify (text-classification), the caption of the image
    (text-to-image), or what is said (speech-recognition).
    """
    prompt: Annotated[ShortText, For("task")] = by_table()
    """The text that the completion or both answers continue, which follow it directly, without a blank between them; or
    messages. For causal-lm also the instruction of Alpaca. For preference and reward, rows need not have it: then it is
    what both answers begin with alike.
    """
    completion: Annotated[ShortText | None, For("task")] = by_table()
    """What the model shall write after the prompt: text, or messages. For preference with lossType kto, the answer that
    the label rates.
    """
    messages: Annotated[ShortText | None, For("task")] = by_table()
    """A conversation: a list of messages with role (system, user, assistant, tool) and content; in ShareGPT, from and
    value. One with the weight 0 is read, but not learnt.
    """
    tools: Annotated[ShortText | None, For("task")] = by_table()
    """The tools that a conversation can call, as JSON schemas. Used where there is such a column."""
    system: Annotated[ShortText | None, For("task")] = by_table()
    """The system message of a row of ShareGPT or Alpaca. Used where there is such a column."""
    input: Annotated[ShortText | None, For("task")] = by_table()
    """What an instruction of Alpaca is about. Used where there is such a column."""
    chosen: Annotated[ShortText, For("task")] = by_table()
    """The answer to prefer: text, or messages, with or without those of the prompt."""
    rejected: Annotated[ShortText, For("task")] = by_table()
    """The answer to avoid: as `chosen`."""
    source: Annotated[ShortText, For("task")] = by_table()
    """The text that the model reads."""
    target: Annotated[ShortText, For("task")] = by_table()
    """The text that the model shall write."""
    words: Annotated[ShortText, For("task")] = by_table()
    """The words of a text: a list of texts, in CSV as JSON."""
    tags: Annotated[ShortText, For("task")] = by_table()
    """The tag of each word: a list of names, or of numbers of classes that the dataset names, in CSV as JSON. For
    entities O, B- and I-.
    """
    question: Annotated[ShortText, For("task")] = by_table()
    """The question."""
    context: Annotated[ShortText, For("task")] = by_table()
    """The text in which the answer stands."""
    answers: Annotated[ShortText, For("task")] = by_table()
    """The answers, as in SQuAD: {"text": [...], "answer_start": [...]}, or a list of such objects; in CSV as JSON.
    Empty where the context has no answer. The first one is learnt, and evaluations accept all.
    """
    anchor: Annotated[ShortText, For("task")] = by_table()
    """A text, such as a question."""
    positive: Annotated[ShortText, For("task")] = by_table()
    """A text that belongs to the anchor, such as its answer."""
    negative: Annotated[ShortText | None, For("task")] = by_table()
    """A text that does not belong to the anchor. Rows have none when left out."""
    image: Annotated[ShortText, For("task")] = by_table()
    """The image to classify or to learn, with 8 bits a channel."""
    prior: Annotated[ShortText | None, For("task")] = by_table()
    """Prior preservation (DreamBooth, arXiv:2208.12242): whether an image shows what the model shall go on to make of a
    class, such as any dog beside yours: true or false, or 1 or 0. An image to learn and one of the class make a pair,
    whose losses are added (image.priorLossWeight). All images are learnt alike when left out.
    """
    audio: Annotated[ShortText, For("task")] = by_table()
    """The audio: the path of a WAV, FLAC, MP3 or Ogg file, from / on or relative to the file of the rows; or the file
    itself, as bytes or as the feature Audio of datasets. Several channels are mixed down to one.
    """
    label: Annotated[ShortText, For("task")] = by_table()
    """The class of a row: a name or a number. Images in folders have it by the folder's name: FOLDER/CLASS/image.png.
    With classification.problem multi-label a list of names, in CSV as JSON; with regression a number. For preference
    with lossType kto, whether the answer is good: true or false, or 1 or 0.
    """


class ChatTemplate(ApiModel):
    """How messages are written as text: exactly one of name, file and text."""

    name: TemplateName | None = None
    """A template that Luthier brings. zephyr and alpaca end each turn with the end-of-text token of the model, and suit
    any model; chatml needs the tokens <|im_start|> and <|im_end|>.
    """
    file: Path | None = None
    """A file inside the pods with a Jinja template: chat_template.jinja, or a tokenizer_config.json that has one."""
    text: Annotated[str | None, Field(min_length=1, max_length=65536)] = None
    """A Jinja template. Text between {% generation %} and {% endgeneration %} is what the assistant writes."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(exactly_one("name", "file", "text"), "spec.dataset.chatTemplate: set exactly one of name, file and text"),
    )


STREAMS = "has(self{0}.streaming) && self{0}.streaming"
"""CEL: whether rows are read while the model learns."""


def of_streaming() -> Iterator[Rule]:
    """Yield the rules of what in `dataset` cannot be had of rows that are not known before the training."""
    not_streamed = f"!({STREAMS.format('')})"
    for field, remedy in (
        ("mix", "with streaming there is one source; name it in dataset, or remove streaming"),
        ("deduplicate", "would have to know all rows; remove it, or remove streaming"),
        (
            "evalFraction",
            "is a share of an unknown number of rows; use evalSplit: train[:1000], with split:"
            " train[1000:], or evalFiles",
        ),
    ):
        yield Rule(f"{not_streamed} || !has(self.{field})", f"dataset.{field}: {remedy}")
    streamed = [name for name, info in FORMATS.items() if info.streamed]
    yield Rule(
        f"{not_streamed} || !has(self.format) || self.format in {streamed}",
        f"dataset.format: files of {', '.join(streamed)} are streamed; choose one of these, or remove streaming",
    )
    for field, part, example in (
        ("split", "[0-9]+:", "train or train[1000:]"),
        ("evalSplit", ":[0-9]+", "test, test[:1000] or train[:1000]"),
    ):
        pattern = f"^[-._a-zA-Z0-9]+([^-._a-zA-Z0-9]{part}.)?$"  # brackets, which CEL would want escaped
        yield Rule(
            f"{not_streamed} || !has(self.{field}) || self.{field}.matches('{pattern}')",
            f"dataset.{field}: a stream has no known end, of which a share could be taken; write {example}",
        )
    yield Rule(
        f"!has(self.shuffleBuffer) || {STREAMS.format('')}",
        "dataset.shuffleBuffer: belongs to streaming, without which all rows are shuffled; set streaming: true, or"
        " remove it",
    )


class TrainingData(DatasetSource):
    """The rows to learn from, and those held out to measure with."""

    mix: Mix | None = None
    """Several sources of rows, instead of `id` and `files`."""
    split: ShortText = "train"
    """Split to train on; slices such as train[:90%] work."""
    eval_split: ShortText | None = None
    """Split to evaluate on; slices work."""
    eval_files: Annotated[list[Path] | None, Field(min_length=1, max_length=256)] = None
    """Files to evaluate on."""
    eval_fraction: Annotated[float | None, Field(gt=0, lt=1)] = None
    """Share of the training rows, chosen by `training.seed`, that is held out to evaluate on. Rows with equal content
    are all learnt or all held out.
    """
    filter: RowFilter | None = None
    """Which rows are used."""
    streaming: Annotated[bool, For("task")] = by_table()
    """Read the rows while the model learns, instead of preparing them all in the workspace: for data that does not fit
    there. `training.maxSteps` says when the training ends; `prepare` looks at the first rows only. docs/data.md says
    what else is different.
    """
    shuffle_buffer: Annotated[int | None, Field(ge=0, le=1_000_000), For("task")] = by_table()
    """With `streaming`: encoded rows in a row of the stream that are shuffled with each other; 10,000 when left out.
    Files are then read in random order, too. 0: the order of the files. A process keeps twice as many in memory.
    """
    deduplicate: Deduplicate | None = None
    """exact: of rows with equal content the first one is learnt, and none that is equal to a held-out row; each of
    `evalSplit` and `evalFiles` is held out once. Content is equal if it is so after Unicode's NFKC, in lower case and
    with one blank for all blanks in a row; an image is its file.
    """
    columns: Columns = Field(default_factory=Columns)
    form: Annotated[RowForm | None, For("task")] = by_table()
    """What rows are: text; prompt-completion; messages, a conversation; sharegpt or alpaca, which are converted to
    messages. When left out, the columns tell: those that are named in `columns`, or else those of the file.
    """
    chat_template: Annotated[ChatTemplate | None, For("task")] = by_table()
    """How messages are written as text. When left out, by the template of the model's tokenizer. The result has the
    template with which it was trained.
    """
    parse_special_tokens: Annotated[bool, For("task")] = by_table()
    """Whether control tokens that a text spells, such as </s> or <|im_end|>, become these tokens. Set it for texts that
    were made with a chat template. Otherwise such spellings are ordinary text.
    """
    merge_labels: Annotated[bool, For("task")] = by_table()
    """Whether labels that differ only in blanks, in capitals or in how a number is written (7, 007, 7.0) are one class,
    which is named as most of its rows have it. They are shown in any case.
    """

    rules: ClassVar[tuple[Rule, ...]] = (
        *source_rules("dataset", "mix"),
        Rule(
            "!has(self.mix) || (self.split == 'train' && !has(self.evalSplit) && !has(self.evalFiles))",
            "dataset.mix: split and evalSplit belong to each of its sources, and there are no evalFiles; name them"
            " there, or use evalFraction",
        ),
        train_alone("split"),
        train_alone("evalSplit"),
        Rule(
            "!has(self.evalSplit) || self.evalSplit != self.split",
            "dataset.evalSplit: is also the training split; choose another split, or parts that do not overlap, such as"
            " train[:90%] and train[90%:]",
        ),
        Rule(
            at_most_one("evalSplit", "evalFiles", "evalFraction"),
            "dataset: set at most one of evalSplit, evalFiles and evalFraction",
        ),
        Rule(
            "!has(self.evalFiles) || has(self.files)",
            "dataset.evalFiles: belongs to dataset.files; use evalSplit for a Hub dataset",
        ),
        *of_streaming(),
    )
