"""Which scripts texts are written in. Languages are not told apart: that would need a model."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

CHARACTERS = 2_000  # of a text that are looked at
MIXED = 0.1  # share of the letters that are not in the main script, from which on a text is mixed
EAST_ASIAN = "Han and Kana"  # Japanese mixes them
SAME = {"Cjk": EAST_ASIAN, "Hiragana": EAST_ASIAN, "Katakana": EAST_ASIAN, "Kangxi": EAST_ASIAN}
NONE = "none"  # digits and signs alone


def of(texts: Sequence[str]) -> list[tuple[str, bool]]:
    """Return the script of most letters of each text, and whether a share of `MIXED` is in other scripts."""
    return [_of(text[:CHARACTERS]) for text in texts]


def _of(text: str) -> tuple[str, bool]:
    import numpy

    if text.isascii():
        return ("Latin" if text.upper() != text.lower() else NONE), False
    characters, counts = numpy.unique(
        numpy.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=numpy.uint32), return_counts=True
    )
    found: dict[str, int] = {}
    for character, count in zip(characters.tolist(), counts.tolist(), strict=True):
        if script := script_of(character):
            found[script] = found.get(script, 0) + count
    if not found:
        return NONE, False
    main = max(found, key=lambda script: found[script])
    return main, found[main] <= (1 - MIXED) * sum(found.values())


@cache
def script_of(character: int) -> str | None:
    """Return the script of a letter; None for other characters.

    The names of letters in Unicode begin with their script: CYRILLIC SMALL LETTER A.
    """
    letter = chr(character)
    if unicodedata.category(letter) not in ("Lu", "Ll", "Lo", "Lt"):
        return None
    first = unicodedata.name(letter, "").partition(" ")[0].capitalize()
    return SAME.get(first, first) or None
