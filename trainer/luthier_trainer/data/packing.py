"""Concatenates texts, separated by the end-of-text token, and cuts them into blocks of `maxLength` tokens.

The time is linear in the length of the texts, and the memory does not depend on it: a long text (a file, a book) is
tokenised in pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING

from luthier_trainer.data.reading import rows_at_once
from luthier_trainer.data.tokens import SHORTEST, language_features, mapped

if TYPE_CHECKING:
    import numpy
    import pyarrow
    from datasets import Dataset
    from tokenizers import Encoding

    from luthier_trainer.data.reading import Reader

PIECE = 1 << 16  # characters of a long text that are tokenised at once
OVERLAP = 1 << 10  # characters that a piece shares with each of its neighbours
AGREEING = 8  # tokens on each side of a seam that must be the same in both pieces
CHARACTERS_AT_ONCE = 1 << 20  # in one call of the tokenizer


def blocks(texts: Dataset, column: str, reader: Reader, max_length: int, documents: bool) -> Dataset:
    """Return the blocks as rows with the columns input_ids and length.

    All blocks have `max_length` tokens, except that the last may be shorter. With `documents`, rows are parts of
    documents: a text ends only where the column `ends` is true.
    """
    packer = Packer(reader, max_length)

    def pack(batch: pyarrow.Table, indices: list[int]) -> pyarrow.Table:
        cells = batch[column].to_pylist()
        for text, ends in (
            joined(cells, batch["ends"].to_pylist()) if documents else zip(cells, repeat(True), strict=False)
        ):
            packer.add(text, ends)
        if indices[-1] < len(texts) - 1:
            return _table(packer.take(), [], max_length)
        packer.finish()
        return _table(packer.take(), packer.rest if len(packer.rest) >= SHORTEST else [], max_length)

    # One process, in order, because the tokens that are left of one batch begin the next.
    arrow = texts.with_format("arrow")
    packed: Dataset = mapped(
        arrow, pack, language_features(), with_indices=True, batch_size=rows_at_once(texts, 10_000)
    )
    return packed.with_format(None)


def joined(parts: list[str], ends: list[bool]) -> Iterator[tuple[str, bool]]:
    """Join the parts of each text. Yields (text, whether it ends there)."""
    begin = 0
    for i, end in enumerate(ends, 1):
        if end:
            yield "".join(parts[begin:i]), True
            begin = i
    if begin < len(parts):
        yield "".join(parts[begin:]), False


def _table(whole: numpy.ndarray, rest: list[int], max_length: int) -> pyarrow.Table:
    """Return blocks as a table, one block a row.

    `whole` is int32 of shape (blocks × max_length,). `rest` holds the tokens of a last, shorter block, if there is one.
    """
    import numpy
    import pyarrow

    lengths = numpy.array([max_length] * (len(whole) // max_length) + [len(rest)] * bool(rest), dtype=numpy.int32)
    offsets = numpy.concatenate([[0], numpy.cumsum(lengths)]).astype(numpy.int32)
    tokens = numpy.concatenate([whole, numpy.array(rest, dtype=numpy.int32)])
    ids = pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(tokens))
    return pyarrow.table({"input_ids": ids, "length": pyarrow.array(lengths)})


@dataclass(frozen=True)
class Piece:
    """A part of a text, with some of the characters before and after it."""

    text: str
    before: int
    """Characters at the beginning of `text` that belong to the piece before; 0 if the text begins with this piece."""
    after: int
    """Characters at the end of `text` that belong to the next piece."""
    ends: bool
    """Whether the text ends with this piece."""


class Cutter:
    """Cuts texts, which may arrive in parts, into pieces."""

    def __init__(self, overlap: int) -> None:
        self.overlap = overlap
        """Characters that a piece shares with each neighbour. With 0, pieces begin at line breaks if there are any."""
        self._parts: list[str] = []
        self._size = self._before = 0

    @property
    def is_open(self) -> bool:
        """Return whether a text has begun and not ended."""
        return self._size > 0

    def add(self, text: str, ends: bool) -> Iterator[Piece]:
        """Yield the pieces that are complete once `text` has been appended to the open text.

        `ends`: the open text ends with `text`.
        """
        self._parts.append(text)
        self._size += len(text)
        if not ends and self._size <= self._before + PIECE + 2 * self.overlap:
            return
        whole, at, before = "".join(self._parts), 0, self._before
        while len(whole) - at > before + PIECE + 2 * self.overlap:
            end = at + before + PIECE
            if not self.overlap:
                end = whole.rfind("\n", at, end) + 1 or end
            yield Piece(whole[at : end + self.overlap], before, self.overlap, ends=False)
            at, before = end - self.overlap, self.overlap
        rest = whole[at:]
        if ends:
            yield Piece(rest, before, 0, ends=True)
            rest, before = "", 0
        self._parts, self._size, self._before = [rest], len(rest), before


@dataclass
class Tokenised:
    """A piece and its tokens. Those from `start` on have not been added to the stream."""

    piece: Piece
    ids: list[int]
    encoding: Encoding | None
    start: int = 0


class Packer:
    """A stream of tokens: texts are added to it, and blocks are taken from it.

    A long text is cut into pieces that overlap, so that its tokens are those of the whole text. Without an overlap, a
    word at a cut becomes two, two line breaks are no longer one token, and SentencePiece puts a blank before each
    piece, because a tokenizer considers what is around a token. Here each piece includes some characters of its
    neighbours, and the stream changes from one piece to the next only at a position around which both have the same
    tokens. Pre-tokenizers decide by a few characters around a position, and merges stay within words, so text that is
    further away cannot change the tokens there. If there is no such position within the overlap (for example in a
    thousand blanks or letters in a row), the text is cut at a boundary between tokens instead: no character is lost or
    doubled.
    """

    def __init__(self, reader: Reader, max_length: int) -> None:
        self.reader, self.max_length = reader, max_length
        self._cutter = Cutter(OVERLAP if reader.tokenizer.is_fast else 0)
        self._pieces: list[Piece] = []
        self._characters = 0
        self._open: Tokenised | None = None
        """The newest piece of a text that has not ended."""
        self._stream: list[int] = []
        self._last: int | None = None
        """The newest token of the open text."""
        self._cut_off = False

    def add(self, text: str, ends: bool) -> None:
        """Append a text or a part of a text. `ends`: the text ends with it."""
        for piece in self._cutter.add(text, ends):
            self._pieces.append(piece)
            self._characters += len(piece.text)
            if self._characters >= CHARACTERS_AT_ONCE:
                self._tokenise()

    def take(self) -> numpy.ndarray:
        """Remove all full blocks from the stream and return their tokens, int32 of shape (blocks × max_length,)."""
        import numpy

        self._tokenise()
        whole = len(self._stream) - len(self._stream) % self.max_length
        taken = numpy.array(self._stream[:whole], dtype=numpy.int32)
        del self._stream[:whole]
        return taken

    def finish(self) -> None:
        """Add the rest of a text that did not end, because its last rows were left out.

        It gets no end-of-text token.
        """
        if self._cutter.is_open:
            self._tokenise()
            self._cut_off = True
            self.add("", ends=True)
            self._tokenise()

    @property
    def rest(self) -> list[int]:
        """Return the tokens that do not fill a block yet."""
        return self._stream

    def _tokenise(self) -> None:
        """Tokenise the pieces that are waiting, and append them to the stream."""
        if not self._pieces:
            return
        encoded = self.reader(
            [piece.text for piece in self._pieces],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        encodings = encoded.encodings or [None] * len(self._pieces)
        for piece, ids, encoding in zip(self._pieces, encoded["input_ids"], encodings, strict=True):
            self._append(Tokenised(piece, ids, encoding))
        self._pieces, self._characters = [], 0

    def _append(self, new: Tokenised) -> None:
        """Append the tokens of the open piece up to the seam with the new one.

        The new piece is then the open one, or is appended as well if its text ends with it.
        """
        if self._open is None:
            begin = self.reader.begin
            if new.ids[:1] != begin:  # unless the text itself begins with this token
                self._stream += begin
            self._last = None
        else:
            end, new.start, between = seam(self._open, new)
            self._put(self._open.ids[self._open.start : end])
            if between:
                self._put(self.reader([between], add_special_tokens=False)["input_ids"][0])
        self._open = new
        if new.piece.ends:
            self._put(new.ids[new.start :])
            eos = self.reader.tokenizer.eos_token_id
            if self._last != eos and not self._cut_off:
                self._stream.append(eos)
            self._open = None

    def _put(self, ids: list[int]) -> None:
        self._stream += ids
        self._last = ids[-1] if ids else self._last


def seam(left: Tokenised, right: Tokenised) -> tuple[int, int, str]:
    """Return (end, start, between): where the stream changes from piece `left` to piece `right`.

    `left.ids[:end]`, the tokens of `between` and `right.ids[start:]` together are the tokens of both pieces.
    """
    a, b = left.encoding, right.encoding
    if not right.piece.before or a is None or b is None:
        return len(left.ids), 0, ""  # they do not overlap
    shift = len(left.piece.text) - right.piece.before - left.piece.after  # of characters, from `left` to `right`
    middle = shift + right.piece.before  # where the part of `left` ends
    # Prefer a seam with many equal tokens around it; 0 only requires that a token begins there in both pieces.
    for agreeing in (AGREEING, 1, 0):
        for character in range(middle, middle + left.piece.after // 2):
            i, j = beginning(a, character), beginning(b, character - shift)
            if i is None or j is None:
                continue
            if left.ids[i - agreeing : i + agreeing] == right.ids[j - agreeing : j + agreeing]:
                return i, j, ""
    # There is no character at which a token begins in both pieces. The text between a token of the left piece and the
    # next whole token of the right piece is tokenised by itself.
    end = sum(start < middle for start, _ in a.offsets)
    after = max((stop for _, stop in a.offsets[:end]), default=0) - shift
    start = sum(begin < after for begin, _ in b.offsets)
    return (
        end,
        start,
        right.piece.text[after : b.offsets[start][0] if start < len(b.offsets) else len(right.piece.text)],
    )


def beginning(encoding: Encoding, character: int) -> int | None:
    """Return the index of the token that begins at `character`, or None if no token begins there."""
    token = encoding.char_to_token(character)
    if token is None:
        return None
    span = encoding.token_to_chars(token)
    return token if span and span[0] == character else None
