"""Named spans of words against reference spans: precision, recall and F1 of the entities that BIO tags describe.

The rules are those of conlleval and of seqeval's default mode: an entity is right if its type and both its ends are,
and an I- tag that continues nothing begins an entity. seqeval 1.2.2 has had no release since 2020 and needs sklearn's
arrays of all tags at once; here rows are counted where they are evaluated, and tests compare both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Span = tuple[str, int, int]
"""(type, first word, last word), or any other two positions"""
OUTSIDE = "O"


def spans(tags: Sequence[str]) -> Iterator[Span]:
    """Yield the entities of a row. A tag is O, or B- or I- and a type."""
    kind, begin = "", 0
    for i, tag in enumerate([*tags, OUTSIDE]):
        prefix, _, name = tag.partition("-")
        continues = prefix == "I" and name == kind and bool(kind)
        if continues:
            continue
        if kind:
            yield kind, begin, i - 1
        kind, begin = ("" if tag == OUTSIDE else name), i


def broken(tags: Sequence[str]) -> int | None:
    """Return the first word whose I- tag continues nothing; None if there is none."""
    before = OUTSIDE
    for i, tag in enumerate(tags):
        if tag.startswith("I-") and before[2:] != tag[2:]:
            return i
        before = tag
    return None


def types_of(tags: Sequence[str]) -> list[str]:
    """Return the types that tags name, sorted."""
    return sorted({tag.partition("-")[2] for tag in tags if tag != OUTSIDE})


def counted(given: set[Span], wanted: set[Span], types: Sequence[str]) -> list[float]:
    """Return the number of entities that are right, given and wanted, for each type."""
    return [
        float(sum(kind == name for kind, _, _ in chosen))
        for name in types
        for chosen in (given & wanted, given, wanted)
    ]


@dataclass(frozen=True)
class SpanScore:
    """Counts the entities of rows of these types."""

    types: Sequence[str]

    def numbers(self, answered: Sequence[str], reference: Sequence[str]) -> list[float]:
        """Return the numbers of a row, which may be added to those of others: found, answered and wanted by type."""
        return counted(set(spans(answered)), set(spans(reference)), self.types)

    def figures(self, total: Sequence[float]) -> dict[str, float]:
        """Return precision, recall and f1 over all entities, and f1Macro, the mean over the types.

        `total`: the sum of the numbers of rows. A type that is neither answered nor wanted counts as 0 in f1Macro, so
        that the figure does not rise because a rare type is missing from the held-out rows.
        """
        by_type = [total[i : i + 3] for i in range(0, len(total), 3)]
        found, given, wanted = (sum(counts) for counts in zip(*by_type, strict=True)) if by_type else (0.0, 0.0, 0.0)
        return {
            "precision": found / given if given else 0.0,
            "recall": found / wanted if wanted else 0.0,
            "f1": _f1(found, given, wanted),
            "f1Macro": sum(_f1(*counts) for counts in by_type) / max(len(by_type), 1),
        }


def _f1(found: float, given: float, wanted: float) -> float:
    return 2 * found / (given + wanted) if found else 0.0
