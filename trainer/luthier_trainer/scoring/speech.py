"""Texts that a model has written of what it heard, against reference texts: word and character error rates.

A pair of texts becomes a row of numbers, and the rates of a corpus follow from the sum of these rows. Distances are
those of jiwer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from luthier_api.speech import Normalization

SIZE = 4
"""Numbers of a pair: wrong words and words of the reference, and the same of characters."""


def numbers(written: str, reference: str, normalize: Normalization) -> list[float]:
    """Return the numbers of a pair, as many as `SIZE`, which may be added to those of other pairs.

    Wrong are words that were replaced, left out or added. A reference without words counts those that were added.
    """
    import jiwer

    given, wanted = (normalized(text, normalize) for text in (written, reference))
    words, characters = jiwer.process_words(wanted, given), jiwer.process_characters(wanted, given)
    return [float(number) for found in (words, characters) for number in counts(found)]


def counts(found: Any) -> tuple[int, int]:
    """Return (what is wrong, what the reference has) of a comparison of jiwer."""
    lost = found.substitutions + found.deletions
    return lost + found.insertions, lost + found.hits


def figures(total: Sequence[float]) -> dict[str, float]:
    """Return the error rates of a corpus: 0 without an error, and more than 1 where much was added.

    `total`: the sum of the numbers of its pairs. Without a word in any reference there is no rate.
    """
    names = ("wer", "cer")
    return {name: total[2 * i] / total[2 * i + 1] for i, name in enumerate(names) if total[2 * i + 1]}


def normalized(text: str, how: Normalization) -> str:
    """Return a text as it is compared."""
    made = _basic()(text) if how == "basic" else text
    return " ".join(made.split())


@cache
def _basic() -> Any:
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    return BasicTextNormalizer()
