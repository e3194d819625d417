"""The settings of the tasks whose models read texts and do something else than to go on writing them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from luthier_api.base import ApiModel

Pooling = Literal["mean", "cls", "last"]


class Seq2Seq(ApiModel):
    """How a model learns to write a text from another one."""

    prefix: Annotated[str, Field(max_length=512)] = ""
    """Text before each source, such as "summarize: ", with its blank. T5 was trained with one for each task. Whoever
    uses the result writes it, too.
    """
    max_target_length: Annotated[int, Field(ge=2, le=131072)] = 128
    """Tokens of a target, at most; longer ones are cut. `training.maxLength` is that of sources."""
    beams: Annotated[int, Field(ge=0, le=64)] = 1
    """How an evaluation writes the texts that it compares with the held-out targets. 1: greedily, token by token. More:
    by a search with that many beams. 0: it writes none, and measures the loss alone, which takes far less time.
    """


class Tagging(ApiModel):
    """How a model learns to tag words."""

    label_pieces: Literal["first", "all"] = "first"
    """Of a word of several tokens, those that learn its tag. all: the further ones learn that of a continuation (I- for
    B-). Metrics are those of words either way: the first token answers.
    """


class Answering(ApiModel):
    """How a model learns to find answers in texts."""

    stride: Annotated[int, Field(ge=0, le=65536)] = 128
    """Tokens that two windows of a context share, which is longer than `training.maxLength`."""
    max_answer_length: Annotated[int, Field(ge=1, le=65536)] = 30
    """Tokens of an answer that an evaluation chooses, at most."""
    no_answer_threshold: Annotated[float, Field(ge=-1000, le=1000)] = 0.0
    """By how much the logits of no answer must be higher than those of the best one, so that an evaluation says that
    there is none.
    """


class Masking(ApiModel):
    """Which tokens a model learns to fill in."""

    probability: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the tokens, or words, that are chosen. Of these, 80 % are replaced by the mask token, 10 % by another
    one, and 10 % stay, as in BERT. `training.seed`, the step and the row decide which; each row has one at least.
    """
    unit: Literal["token", "word"] = "token"
    """What is chosen: each token for itself, or all tokens of a word (whole-word masking)."""


class Embedding(ApiModel):
    """How a model learns vectors of texts."""

    scale: Annotated[float, Field(gt=0, le=1000)] = 20.0
    """What cosine similarities are multiplied with: the inverse of a temperature."""
    pooling: Pooling | None = None
    """How the vector of a text is made of those of its tokens: their mean, that of the first (cls) or of the last one.
    When left out, as 1_Pooling/config.json of the model says, or mean.
    """
