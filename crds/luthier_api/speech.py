"""How models write down what is said: the block `speech`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from luthier_api.base import ApiModel, Format

SpeechTask = Literal["transcribe", "translate"]
Normalization = Literal["none", "basic"]
Language = Annotated[
    str,
    Field(max_length=3),
    Format("^[a-z]{2,3}$", "must be the code of a language in two or three letters, such as en"),
]


class Speech(ApiModel):
    """How a model learns to write down what is said."""

    language: Language | None = None
    """Code of the language that is spoken, such as en. Models of several languages need it, and others have none."""
    task: SpeechTask = "transcribe"
    """What models of several languages are told to write: the language that is spoken, or English."""
    beams: Annotated[int, Field(ge=0, le=16)] = 1
    """How an evaluation writes the texts that it compares with the held-out ones. 1: greedily. More: by a search with
    that many beams. 0: it writes none, and measures the loss alone, which takes far less time.
    """
    normalize: Normalization = "basic"
    """What is done to both texts before they are compared. basic: as Whisper's normaliser for all languages does: lower
    case, no punctuation, nothing in brackets; it also takes vowel signs away, so choose none for scripts that have
    them, such as Hindi's. none: only blanks in a row are one. What is learnt stays as it is.
    """
