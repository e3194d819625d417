"""Answers to questions against reference answers, by the rules of SQuAD's evaluation (version 2.0)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(answer: str) -> str:
    """Return an answer in lower case, without punctuation, articles and superfluous blanks."""
    return " ".join(ARTICLES.sub(" ", answer.lower().translate(PUNCTUATION)).split())


def exact_and_f1(answer: str, references: Sequence[str]) -> tuple[float, float]:
    """Return exact match and F1 of the words, each that of the reference for which it is highest.

    An empty answer is none. It is right if there are no references, or only such as have no word left.
    """
    wanted = [reference for reference in references if normalised(reference)] or [""]
    return (
        max(float(normalised(answer) == normalised(reference)) for reference in wanted),
        max(_f1(answer, reference) for reference in wanted),
    )


def _f1(answer: str, reference: str) -> float:
    given, wanted = normalised(answer).split(), normalised(reference).split()
    if not given or not wanted:
        return float(given == wanted)
    common = (Counter(given) & Counter(wanted)).total()
    return 2 * common / (len(given) + len(wanted))
