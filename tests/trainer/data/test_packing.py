"""Packing: blocks hold the tokens of the whole texts, whatever the pieces that they were tokenised in, and the work is
linear.
"""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from datasets import Dataset
from trainer.tokenizers_of_kinds import KINDS
from transformers import PreTrainedTokenizerBase

from luthier_trainer.data import decoding, filerows, packing, reading
from luthier_trainer.data.packing import Cutter, blocks
from luthier_trainer.data.reading import Reader


@pytest.fixture(scope="module")
def tokenizers(paragraphs: list[str]) -> dict[str, PreTrainedTokenizerBase]:
    return {kind: make(paragraphs[:400]) for kind, make in KINDS.items()}


@pytest.fixture(scope="module")
def book() -> str:
    """300,000 characters: prose, code, tables, blank lines."""
    return "\n\n".join(text for _, text in sorted(topics.items()))[:300_000]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A seam every 4,000 characters."""
    monkeypatch.setattr(packing, "PIECE", 4000)
    monkeypatch.setattr(packing, "OVERLAP", 400)
    monkeypatch.setattr(packing, "CHARACTERS_AT_ONCE", 20_000)
    monkeypatch.setattr(reading, "BYTES_AT_ONCE", 50_000)


def lines(text: str) -> Dataset:
    """A text file as `prepare` reads it."""
    found = text.splitlines(keepends=True)
    return Dataset.from_dict({"text": found, "ends": [False] * (len(found) - 1) + [True]})


def stream(packed: Dataset) -> list[int]:
    return [token for row in packed["input_ids"] for token in row]


@pytest.mark.parametrize("shape", ["lines of a file", "one row"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_has_the_tokens_that_it_has_as_a_whole(
    kind: str, shape: str, tokenizers: dict[str, PreTrainedTokenizerBase], book: str, small_pieces: None
) -> None:
    """75 seams in real text, each of which would show: see the next test."""
    tokenizer = tokenizers[kind]
    whole = tokenizer(book, add_special_tokens=False, verbose=False)["input_ids"]
    texts = Dataset.from_dict({"text": [book]}) if shape == "one row" else lines(book)
    reader = Reader(tokenizer)
    packed = blocks(texts, "text", reader, 128, documents=shape != "one row")
    assert stream(packed) == [*reader.begin, *whole, tokenizer.eos_token_id]
    assert packed["length"][:] == [128] * (len(packed) - 1) + [len(packed[-1]["input_ids"])]


@pytest.mark.parametrize("kind", ["SentencePiece BPE", "Unigram"])
def test_pieces_that_do_not_overlap_would_have_other_tokens(
    kind: str,
    tokenizers: dict[str, PreTrainedTokenizerBase],
    book: str,
    small_pieces: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packing, "OVERLAP", 0)
    tokenizer = tokenizers[kind]
    whole = tokenizer(book, add_special_tokens=False, verbose=False)["input_ids"]
    assert stream(blocks(lines(book), "text", Reader(tokenizer), 128, documents=True)) != [
        *Reader(tokenizer).begin,
        *whole,
        tokenizer.eos_token_id,
    ]


UNBROKEN = [
    # name                text
    ("letters", "a" * 30_000),
    ("blanks", "x" + " " * 30_000 + "y"),
    ("line breaks", "\n" * 30_000),
    ("digits", "".join(str(i * i) for i in range(6000))),
    ("no blanks", "".join(f"{i * 7919:x}" for i in range(6000))),
    ("other scripts", "漢字かな交じり文🎉é" * 3000),
]


@pytest.mark.parametrize("kind", ["byte-level", "SentencePiece BPE"])
@pytest.mark.parametrize(("name", "text"), UNBROKEN, ids=[u[0] for u in UNBROKEN])
def test_no_character_is_lost_or_doubled_where_nothing_breaks_a_text(
    name: str, text: str, kind: str, tokenizers: dict[str, PreTrainedTokenizerBase], small_pieces: None
) -> None:
    tokenizer = tokenizers[kind]
    ids = stream(blocks(Dataset.from_dict({"text": [text]}), "text", Reader(tokenizer), 128, documents=False))
    whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert tokenizer.decode(ids[len(Reader(tokenizer).begin) : -1]) == tokenizer.decode(whole)


def test_texts_follow_each_other(
    tokenizers: dict[str, PreTrainedTokenizerBase], paragraphs: list[str], small_pieces: None
) -> None:
    """Rows of all lengths, in several batches: each has its beginning and its end, and no token is lost between batches
    and blocks.
    """
    for kind in ("byte-level", "SentencePiece BPE"):
        tokenizer = tokenizers[kind]
        reader = Reader(tokenizer)
        rows = ["", *paragraphs[:300], "\n\n".join(paragraphs[300:350]), "end"]
        expected = [
            token for text in rows for token in [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]
        ]
        packed = blocks(Dataset.from_dict({"text": rows}), "text", reader, 100, documents=False)
        assert stream(packed) == expected[: len(expected) - len(expected) % 100 + len(packed[-1]["input_ids"]) % 100]
        assert len(stream(packed)) >= len(expected) - 1  # a last token alone predicts nothing


def test_a_file_that_is_cut_off_has_no_end(
    tokenizers: dict[str, PreTrainedTokenizerBase], book: str, small_pieces: None
) -> None:
    """train[:50%] of a file: what is left out would have gone on."""
    tokenizer = tokenizers["byte-level"]
    half = lines(book).select(range(3000))
    whole = tokenizer("".join(half["text"][:]), add_special_tokens=False, verbose=False)["input_ids"]
    assert stream(blocks(half, "text", Reader(tokenizer), 128, documents=True)) == whole


@pytest.mark.parametrize("shape", ["lines of a file", "one row", "rows"])
def test_the_work_is_linear_and_bounded(
    shape: str, tokenizers: dict[str, PreTrainedTokenizerBase], book: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer sees each character once, but for the overlaps, and never more than a bounded number at once."""
    calls: list[int] = []
    tokenizer = tokenizers["byte-level"]
    monkeypatch.setattr(packing, "CHARACTERS_AT_ONCE", 100_000)
    encode = type(tokenizer)._encode_plus

    def counting(self: Any, text: list[str], **options: Any) -> Any:
        calls.append(sum(map(len, text)))
        return encode(self, text, **options)

    monkeypatch.setattr(type(tokenizer), "_encode_plus", counting)
    rows = {
        "lines of a file": lines(book),
        "one row": Dataset.from_dict({"text": [book]}),
        "rows": Dataset.from_dict({"text": [book[i : i + 3000] for i in range(0, len(book), 3000)]}),
    }
    blocks(rows[shape], "text", Reader(tokenizer), 512, documents=shape == "lines of a file")
    assert sum(calls) <= len(book) * 1.05
    assert max(calls) <= 100_000 + packing.PIECE + 2 * packing.OVERLAP


def test_a_text_file_is_read_in_bounded_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a line that is longer than a part, which may be the whole file."""
    monkeypatch.setattr(decoding, "CHUNK", 1000)
    monkeypatch.setattr(filerows, "CHARACTERS_AT_ONCE", 5000)
    text = "one long line " * 2000 + "\n" + "a short one\n" * 3000 + "漢字" * 4000
    (tmp_path / "x.txt").write_text(text)
    file = filerows.TextFile(tmp_path / "x.txt", decoding.Decoder(None, "spec.dataset", "spec.dataset.files"))
    parts = list(file.documents())
    assert "".join(row for part in parts for row in part["text"]) == text
    assert max(sum(map(len, part["text"])) for part in parts) < 6000
    assert [end for part in parts for end in part["ends"]].index(True) == sum(len(part["text"]) for part in parts) - 1


def test_pieces_are_cut_in_linear_time() -> None:
    """What a text has left is copied once a piece, whatever the parts that it comes in."""
    cutter, copied = Cutter(packing.OVERLAP), 0
    for _ in range(100_000):
        for piece in cutter.add("0123456789" * 4, ends=False):
            copied += len(piece.text)
        assert cutter._size <= packing.PIECE + 4 * packing.OVERLAP
    assert 4_000_000 * 0.95 < copied < 4_000_000 * 1.05
