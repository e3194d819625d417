"""What a user should know although nothing failed: data that was dropped or changed, weights that were drawn anew,
defaults that were chosen.

A notice is printed to the log and travels in the termination message, so that it also stands in `status.notices` and on
the screen of `luthier run`. Each process collects its own; only those of the first rank are sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

LIMIT = 20  # a termination message has 4,096 bytes; the log has all notices
CHARACTERS = 300

_given: list[str] = []
_collected: ContextVar[list[str] | None] = ContextVar("collected", default=None)


def notice(text: str) -> None:
    """Print `text`, which begins with the path of the field that it is about, and keep it for the status. Repeated
    texts count once.
    """
    collected = _collected.get()
    if collected is not None:
        collected.append(text)
        return
    if text in _given:
        return
    _given.append(text)
    print(text, flush=True)


@contextmanager
def collecting() -> Iterator[list[str]]:
    """Collect the notices of this thread instead of giving them."""
    texts: list[str] = []
    token = _collected.set(texts)
    try:
        yield texts
    finally:
        _collected.reset(token)


def given() -> list[str]:
    """The notices of this process so far, the first `LIMIT` of them, each cut to `CHARACTERS`."""
    shown = [text if len(text) <= CHARACTERS else f"{text[: CHARACTERS - 1]}…" for text in _given[:LIMIT]]
    if len(_given) > LIMIT:
        shown[-1] = f"{len(_given) - LIMIT + 1} more notices are in the log of the phase"
    return shown


def forget() -> None:
    """Forget all notices. For processes that run several phases, as tests do."""
    _given.clear()
