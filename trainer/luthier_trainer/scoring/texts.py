"""Texts that a model has written against reference texts: exact match, ROUGE and BLEU.

A pair of texts becomes a row of numbers, and the figures of a corpus follow from the sum of these rows. So processes
and shards only exchange numbers, and each text is read once.

ROUGE is computed as rouge-score 0.1.2 does without its stemmer. That package has had no release since 2022 and would
bring nltk; tests compare both. BLEU is sacrebleu's.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

ORDER = 4  # of the n-grams of BLEU
SIZE = 4 + 2 * ORDER + 2
"""Numbers of a pair: exact match, ROUGE-1, ROUGE-2, ROUGE-L; n-grams found and written, by n; lengths of both."""
NOT_IN_WORDS = re.compile(r"[^a-z0-9]+")


def numbers(written: str, reference: str) -> list[float]:
    """Return the numbers of a pair, as many as `SIZE`, which may be added to those of other pairs."""
    found = _bleu().sentence_score(written, [reference])
    given, wanted = (NOT_IN_WORDS.sub(" ", text.lower()).split() for text in (written, reference))
    return [
        float(written.strip() == reference.strip()),
        _overlap(given, wanted, 1),
        _overlap(given, wanted, 2),
        _f1(_common_length(given, wanted), len(given), len(wanted)),
        *map(float, found.counts),
        *map(float, found.totals),
        float(found.sys_len),
        float(found.ref_len),
    ]


def figures(total: Sequence[float], pairs: int) -> dict[str, float]:
    """Return the figures of a corpus. `total`: the sum of the numbers of `pairs` pairs.

    exactMatch, rouge1, rouge2 and rougeL are means from 0 to 1. bleu is that of the whole corpus, from 0 to 100, with
    sacrebleu's tokens (13a) and smoothing (exp).
    """
    counts, totals = ([int(n) for n in total[4 + i * ORDER : 4 + (i + 1) * ORDER]] for i in range(2))
    lengths = [int(n) for n in total[4 + 2 * ORDER :]]
    bleu = type(_bleu()).compute_bleu(counts, totals, *lengths, smooth_method="exp").score
    names = ("exactMatch", "rouge1", "rouge2", "rougeL")
    return {name: total[i] / pairs for i, name in enumerate(names)} | {"bleu": float(bleu)}


@cache
def _bleu() -> Any:
    from sacrebleu.metrics.bleu import BLEU

    # What this changes is the score of a sentence, which is not used, and without it a warning says so.
    return BLEU(effective_order=True)


def _overlap(written: list[str], reference: list[str], n: int) -> float:
    """Return the F measure of the n-grams that both have."""
    found, wanted = (Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in (written, reference))
    return _f1((found & wanted).total(), found.total(), wanted.total())


def _f1(common: int, written: int, reference: int) -> float:
    return 2 * common / (written + reference) if common else 0.0


def _common_length(one: list[str], other: list[str]) -> int:
    """Return the length of the longest common subsequence."""
    lengths = [0] * (len(other) + 1)
    for word in one:
        before = 0
        for i, against in enumerate(other, 1):
            before, lengths[i] = lengths[i], before + 1 if word == against else max(lengths[i], lengths[i - 1])
    return lengths[-1]
