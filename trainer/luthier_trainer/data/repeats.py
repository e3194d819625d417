"""Finds what repeats in the rows of a job: equal rows, nearly equal rows, and held-out rows that are learnt, too.

Texts are equal if they are so after Unicode's form NFKC, in lower case, and with one blank for all blanks in a row.
Images are equal if their files are. A row takes about 100 bytes of memory, whatever its length.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import xxhash

from luthier_trainer.data import near_duplicates, scripts

if TYPE_CHECKING:
    import numpy

Content = str | bytes


@dataclass(frozen=True)
class Split:
    """The contents of the rows of a split, which are all texts or all files: in batches, and of single rows."""

    batches: Callable[[], Iterator[Sequence[Content]]]
    at: Callable[[numpy.ndarray], list[Content]]
    """Returns the contents at ascending positions, an int64 array."""


@dataclass
class Read:
    """What is kept of the rows of a split while they are read."""

    hashes: numpy.ndarray
    """uint64 of shape (rows,)"""
    keys: numpy.ndarray
    """`near_duplicates.band_keys` of all rows; no columns for images."""
    scripts: Counter[str] = field(default_factory=Counter)
    mixed: int = 0


@dataclass(frozen=True)
class Repeats:
    """Positions of rows, int64; `pairs` are of shape (pairs, 2)."""

    scripts: dict[str, Counter[str]]
    mixed: dict[str, int]
    exact: dict[str, numpy.ndarray]
    """Split → rows that are equal to an earlier row of the split."""
    near: dict[str, numpy.ndarray]
    """Split → pairs of an earlier row of the split and a row that is nearly the same."""
    shared: numpy.ndarray
    """Pairs of a training row and a held-out row that are equal."""
    nearly_shared: numpy.ndarray
    """Pairs of a training row and a held-out row that are nearly the same."""
    groups: dict[str, numpy.ndarray]
    """Split → a number of each row, the same for equal rows."""
    complete: bool
    """Whether all candidates for nearly equal rows were compared."""


def normalised(text: str) -> str:
    """Return the form of a text in which it is compared."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.lower().split())


def groups_of(*splits: Iterator[Sequence[Content]]) -> numpy.ndarray:
    """Return a number of each row of the splits, one after the other, which equal rows share; int64 from 0 on.

    `splits`: the contents of the rows, in batches.
    """
    import numpy

    hashes = [numpy.empty(0, dtype=numpy.uint64)]
    for split in splits:
        for batch in split:
            texts = [normalised(text) for text in batch if isinstance(text, str)]
            hashes.append(_hashes(texts, [file for file in batch if isinstance(file, bytes)]))
    return numpy.unique(numpy.concatenate(hashes), return_inverse=True)[1]


def find(train: Split, held_out: Split | None) -> Repeats:
    """Return what repeats in the rows of both splits."""
    import numpy

    splits = {"train": train} | ({"eval": held_out} if held_out else {})
    read = {name: _read(split) for name, split in splits.items()}
    rows = len(read["train"].hashes)
    hashes = numpy.concatenate([part.hashes for part in read.values()])
    first, groups = numpy.unique(hashes, return_index=True, return_inverse=True)[1:]

    exact, shared = {}, numpy.empty((0, 2), dtype=numpy.int64)
    for name, part in read.items():
        begin = 0 if name == "train" else rows
        own = groups[begin : begin + len(part.hashes)]
        earliest = numpy.unique(own, return_index=True)[1]
        repeats = numpy.ones(len(own), dtype=bool)
        repeats[earliest] = False
        exact[name] = numpy.flatnonzero(repeats)
        if name == "eval":
            known = numpy.flatnonzero(first[own] < rows)
            shared = numpy.stack([first[own[known]], known], axis=1)

    distinct = numpy.sort(first)
    keys = numpy.concatenate([part.keys for part in read.values()], axis=1)
    nothing = numpy.empty((0, 2), dtype=numpy.int64)
    found = near_duplicates.Found(nothing, nothing, complete=True)
    if keys.shape[1]:

        def texts_at(numbers: numpy.ndarray) -> list[str]:
            contents = train.at(numbers[numbers < rows])
            if held_out is not None:
                contents = contents + held_out.at(numbers[numbers >= rows] - rows)
            return [normalised(str(text)) for text in contents]

        found = near_duplicates.find(keys[:, distinct], distinct, rows, texts_at)
    of_train = found.within[:, 1] < rows
    near = {"train": found.within[of_train]} | ({"eval": found.within[~of_train] - rows} if held_out else {})
    return Repeats(
        scripts={name: part.scripts for name, part in read.items()},
        mixed={name: part.mixed for name, part in read.items()},
        exact=exact,
        near=near,
        shared=shared,
        nearly_shared=found.across - [0, rows],
        groups={"train": groups[:rows]} | ({"eval": groups[rows:]} if held_out else {}),
        complete=found.complete,
    )


def _read(split: Split) -> Read:
    """Read all rows of a split, one batch in memory at a time."""
    import numpy

    hashes: list[numpy.ndarray] = []
    keys: list[numpy.ndarray] = [numpy.zeros((near_duplicates.BANDS, 0), dtype=numpy.uint32)]
    counts: Counter[str] = Counter()
    mixed = 0
    for batch in split.batches():
        texts = [normalised(text) for text in batch if isinstance(text, str)]
        files = [file for file in batch if isinstance(file, bytes)]
        hashes.append(_hashes(texts, files))
        keys += [near_duplicates.band_keys(chunk) for chunk in near_duplicates.chunks(texts)]
        for script, is_mixed in scripts.of(texts):
            counts[script] += 1
            mixed += is_mixed
    empty = numpy.empty(0, dtype=numpy.uint64)
    return Read(numpy.concatenate([empty, *hashes]), numpy.concatenate(keys, axis=1), counts, mixed)


def _hashes(texts: Sequence[str], files: Sequence[bytes]) -> numpy.ndarray:
    """Return a hash of each normalised text and of each file, uint64. A batch has one of the two kinds."""
    import numpy

    compared = [text.encode("utf-8", "surrogatepass") for text in texts] + [*files]
    return numpy.array([xxhash.xxh3_64_intdigest(content) for content in compared], dtype=numpy.uint64)
