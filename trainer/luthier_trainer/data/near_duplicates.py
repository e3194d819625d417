"""Finds texts that are nearly the same: MinHash with bands (LSH) over shingles, then the exact similarity of each pair.

A shingle is `SHINGLE` tokens in a row: words, or characters of scripts without blanks. Two texts are nearly the same if
`ALIKE` of all their shingles are in both (Jaccard). A pair of similarity s is found with a probability of
1 - (1 - s^DEPTH)^BANDS, 0.998 at the limit. All is vectorised with numpy, and a row keeps 4 bytes for each band:
datasketch keeps Python objects of kilobytes a row, and rensa is one more compiled package, of one maintainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy

SHINGLE = 3  # tokens
ALIKE = 0.8
BANDS, DEPTH = 16, 5
CHARACTERS = 20_000  # of a text that are compared
CHUNK = 200_000  # characters at a time, so that the arrays stay in the cache of a core
NEIGHBOURS = 3  # rows before it in a band that a row is compared with, beside the first of the band
TRIES = 3  # candidates of a row that are compared
PAIRS = 200_000  # candidates that are compared in all
PAIRS_AT_ONCE = 1_000
BLANK, WIDE = 0x20, 0xE0  # bytes: from WIDE on begin the characters of three bytes or more in UTF-8


@dataclass(frozen=True)
class Found:
    """Rows that are nearly the same as an earlier row. Rows are numbered through all splits."""

    within: numpy.ndarray
    """int64 of shape (pairs, 2): an earlier row of the same split, and the row; each row at most once."""
    across: numpy.ndarray
    """The same with an earlier row of the other split."""
    complete: bool
    """Whether all candidates were compared."""


def chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield the texts in lists of about `CHUNK` characters."""
    held: list[str] = []
    size = 0
    for text in texts:
        held.append(text)
        size += len(text[:CHARACTERS])
        if size >= CHUNK:
            yield held
            held, size = [], 0
    if held:
        yield held


def band_keys(texts: Sequence[str]) -> numpy.ndarray:
    """Return a key of each row for each band, uint32 of shape (BANDS, rows). Rows with equal keys may be alike.

    The key of a text without any token is 0.
    """
    import numpy

    hashes, rows = shingles(texts)
    keys = numpy.zeros((BANDS, len(texts)), dtype=numpy.uint32)
    if not len(hashes):
        return keys
    begins = numpy.flatnonzero(numpy.diff(rows, prepend=-1))
    filled = rows[begins]
    short = (hashes >> numpy.uint64(32)).astype(numpy.uint32)
    masks, factors = _permutations()
    mixed = numpy.empty_like(short)
    for band in range(BANDS):
        key = numpy.zeros(len(filled), dtype=numpy.uint64)
        for i in range(band * DEPTH, (band + 1) * DEPTH):
            numpy.bitwise_xor(short, masks[i], out=mixed)
            numpy.multiply(mixed, factors[i], out=mixed)
            key = _mix(key ^ numpy.minimum.reduceat(mixed, begins).astype(numpy.uint64))
        keys[band, filled] = numpy.maximum(key >> numpy.uint64(32), numpy.uint64(1)).astype(numpy.uint32)
    return keys


def shingles(texts: Sequence[str]) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return the hash of each shingle, uint64, and the number of its text, int64, in the order of the texts.

    A text with fewer than `SHINGLE` tokens is one shingle. The hash of bytes b is the sum of value(b) · R^i, so that
    all shingles come from one cumulative sum, in arithmetic modulo 2^64.
    """
    import numpy

    encoded = [text[:CHARACTERS].encode("utf-8", "replace") + b" " for text in texts]
    ends_of_text = numpy.cumsum([len(text) for text in encoded])
    raw = numpy.frombuffer(b"".join(encoded), dtype=numpy.uint8)
    after_blank = numpy.concatenate([[True], raw[:-1] == BLANK])
    begins = numpy.flatnonzero((raw != BLANK) & (after_blank | (raw >= WIDE)))
    if not len(begins):
        return numpy.empty(0, dtype=numpy.uint64), numpy.empty(0, dtype=numpy.int64)
    rows = numpy.searchsorted(ends_of_text, begins, side="right")

    # Token i + SHINGLE of the same text is where the shingle of token i ends; the last ones end with their text.
    later = numpy.arange(len(begins)) + SHINGLE
    inside = later < len(begins)
    inside[inside] = rows[later[inside]] == rows[inside]
    whole = ends_of_text[rows]
    ends = numpy.where(inside, begins[numpy.minimum(later, len(begins) - 1)], whole)
    # A shingle that ends with its text must be complete, or begin the text.
    last = numpy.arange(len(begins)) + SHINGLE - 1
    complete = last < len(begins)
    complete[complete] = rows[last[complete]] == rows[complete]
    kept = complete | (numpy.diff(rows, prepend=-1) != 0)
    begins, ends, rows = begins[kept], ends[kept], rows[kept]

    values, powers, inverses = _values(), *_powers(1 << len(raw).bit_length())
    sums = numpy.concatenate([numpy.zeros(1, numpy.uint64), numpy.cumsum(values[raw] * powers[: len(raw)])])
    return _mix((sums[ends] - sums[begins]) * inverses[begins]), rows


def similarity(one: numpy.ndarray, other: numpy.ndarray) -> float:
    """Return the Jaccard similarity of two sets of hashes, each sorted and without repetitions."""
    import numpy

    both = len(numpy.intersect1d(one, other, assume_unique=True))
    return both / max(len(one) + len(other) - both, 1)


def find(
    keys: numpy.ndarray, numbers: numpy.ndarray, first_of_eval: int, texts_at: Callable[[numpy.ndarray], list[str]]
) -> Found:
    """Return the rows that are nearly the same as earlier ones.

    `keys`: of the rows to compare, shape (BANDS, rows). `numbers`: the number of each, int64, ascending. Those from
    `first_of_eval` on are held out. `texts_at` returns the texts of ascending numbers.
    """
    import numpy

    pairs, complete = candidates(keys, numbers >= first_of_eval)
    found: list[numpy.ndarray] = []
    done = numpy.zeros((len(numbers), 2), dtype=bool)
    for rank in range(TRIES):
        tried = pairs[pairs[:, 3] == rank]
        tried = tried[~done[tried[:, 1], tried[:, 2]]]
        for begin in range(0, len(tried), PAIRS_AT_ONCE):
            some = tried[begin : begin + PAIRS_AT_ONCE]
            alike = some[_alike(numbers[some[:, 0]], numbers[some[:, 1]], texts_at)]
            done[alike[:, 1], alike[:, 2]] = True
            found.append(alike)
    all_found = numpy.concatenate([numpy.empty((0, 4), dtype=numpy.int64), *found])
    across = all_found[:, 2] == 1
    return Found(numbers[all_found[~across, :2]], numbers[all_found[across, :2]], complete)


def candidates(keys: numpy.ndarray, held_out: numpy.ndarray) -> tuple[numpy.ndarray, bool]:
    """Return int64 of shape (pairs, 4): an earlier row, a row, whether only one of them is held out, and a rank.

    The rank counts the candidates of a row from 0; the one that shares most bands comes first. The second value is
    False if there were more than `PAIRS`.
    """
    import numpy

    rows = keys.shape[1]
    places = numpy.arange(rows)
    codes = numpy.empty(0, dtype=numpy.int64)
    counts = numpy.empty(0, dtype=numpy.int64)
    complete = True
    for key in keys:
        order = numpy.argsort(key, kind="stable")
        ordered = key[order]
        heads = numpy.maximum.accumulate(numpy.where(numpy.diff(ordered, prepend=0) != 0, places, 0))
        lefts = [heads, *(places - distance for distance in range(1, NEIGHBOURS + 1))]
        made = []
        for left in lefts:
            usable = (left >= heads) & (left < places) & (ordered != 0)
            made.append(order[left[usable]] * rows + order[usable])
        new = numpy.unique(numpy.concatenate(made))
        codes, back = numpy.unique(numpy.concatenate([codes, new]), return_inverse=True)
        counts = numpy.bincount(back, weights=numpy.concatenate([counts, numpy.ones(len(new))])).astype(numpy.int64)
        if len(codes) > TRIES * PAIRS:
            # Those that share most bands are kept. The others would be compared last.
            complete = False
            best = numpy.sort(numpy.argsort(-counts, kind="stable")[: TRIES * PAIRS])
            codes, counts = codes[best], counts[best]
    left, right = codes // max(rows, 1), codes % max(rows, 1)
    across = (held_out[left] != held_out[right]).astype(numpy.int64)
    order = numpy.lexsort((-counts, across, right))
    left, right, across = left[order], right[order], across[order]
    group = right * 2 + across
    begins = numpy.maximum.accumulate(numpy.where(numpy.diff(group, prepend=-1) != 0, numpy.arange(len(group)), 0))
    ranked = numpy.stack([left, right, across, numpy.arange(len(group)) - begins], axis=1)
    ranked = ranked[ranked[:, 3] < TRIES]
    if len(ranked) > PAIRS:
        complete = False
        ranked = ranked[numpy.argsort(ranked[:, 3], kind="stable")[:PAIRS]]
    return ranked, complete


def _alike(left: numpy.ndarray, right: numpy.ndarray, texts_at: Callable[[numpy.ndarray], list[str]]) -> numpy.ndarray:
    """Return whether each of the pairs is at least `ALIKE`, bool of shape (pairs,)."""
    import numpy

    numbers = numpy.unique(numpy.concatenate([left, right]))
    sets: list[numpy.ndarray] = []
    for chunk in chunks(texts_at(numbers)):
        hashes, rows = shingles(chunk)
        parts = numpy.split(hashes, numpy.searchsorted(rows, numpy.arange(1, len(chunk))))
        sets += [numpy.unique(part) for part in parts]
    at = {int(number): i for i, number in enumerate(numbers)}
    pairs = zip(left.tolist(), right.tolist(), strict=True)
    return numpy.array([similarity(sets[at[a]], sets[at[b]]) >= ALIKE for a, b in pairs], dtype=bool)


def _mix(hashes: numpy.ndarray) -> numpy.ndarray:
    """Return uint64 hashes whose upper bits depend on all bits."""
    import numpy

    hashes = (hashes ^ (hashes >> numpy.uint64(32))) * numpy.uint64(0x9E3779B97F4A7C15)
    hashes ^= hashes >> numpy.uint64(29)
    return hashes * numpy.uint64(0xBF58476D1CE4E5B9)


@cache
def _permutations() -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return what each of the hash functions of MinHash combines with a hash: a mask and an odd factor, uint32."""
    import numpy

    drawn = numpy.random.default_rng(1).integers(0, 1 << 32, (2, BANDS * DEPTH), dtype=numpy.uint32)
    return drawn[0], drawn[1] | numpy.uint32(1)


@cache
def _values() -> numpy.ndarray:
    """Return a random value for each byte, uint64 of shape (256,)."""
    import numpy

    return numpy.random.default_rng(2).integers(0, 1 << 64, 256, dtype=numpy.uint64)


@cache
def _powers(count: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return R^i and R^-i modulo 2^64 for i < count, uint64."""
    import numpy

    base = 0x5851F42D4C957F2D  # odd, so that it has an inverse
    made = []
    for factor in (base, pow(base, -1, 1 << 64)):
        steps = numpy.full(count, factor, dtype=numpy.uint64)
        steps[0] = 1
        made.append(numpy.cumprod(steps))
    return made[0], made[1]
