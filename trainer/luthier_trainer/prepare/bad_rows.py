"""`BadRow`: why a row of a GenerateJob cannot be worked on."""

from __future__ import annotations


class BadRow(ValueError):
    """The text is the error of the row."""
