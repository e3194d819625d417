"""What a tokenizer makes of the texts: control tokens that they spell are text, and what a text brings itself is not
doubled.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trainer.preparing import prepared
from trainer.tokenizers_of_kinds import BEGIN, END, KINDS
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from luthier_api.exitcodes import ExitCode
from luthier_trainer.data import packing, tokens
from luthier_trainer.data.reading import Reader
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.failure import Failure


@pytest.fixture(scope="module")
def tokenizers(paragraphs: list[str]) -> dict[str, PreTrainedTokenizerBase]:
    return {kind: make(paragraphs[:200]) for kind, make in KINDS.items()}


def texts(*rows: str) -> Dataset:
    return Dataset.from_dict({"text": list(rows)})


HONOURED = [
    # kind                  read as text
    ("byte-level", True),
    ("SentencePiece BPE", True),
    ("WordPiece", True),
    ("Unigram", False),
]


@pytest.mark.parametrize(("kind", "honoured"), HONOURED)
@pytest.mark.parametrize("packed", [True, False], ids=["blocks", "rows"])
def test_control_tokens_that_a_text_spells_are_text(
    kind: str,
    honoured: bool,
    packed: bool,
    tokenizers: dict[str, PreTrainedTokenizerBase],
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer = tokenizers[kind]
    end = tokenizer.eos_token
    rows = texts("a line", f"old HTML has {end} and more {end}", f"{end}")
    reader = Reader(tokenizer)
    notices.forget()
    if not honoured:
        with pytest.raises(Failure) as refused:
            reader.check_spellings(rows, "text", "spec.dataset.columns.text", "rows of train.jsonl")
        assert refused.value.code == ExitCode.INVALID_DATASET
        assert str(refused.value).startswith(
            "spec.dataset.columns.text: </s> in 2 rows of train.jsonl spell control tokens, and a tokenizer of the kind"
            " Unigram cannot read them as text"
        )
        assert "spec.dataset.parseSpecialTokens: true" in str(refused.value)
        return
    reader.check_spellings(rows, "text", "spec.dataset.columns.text", "rows of train.jsonl")
    assert (
        capsys.readouterr().out
        == f"spec.dataset.columns.text: 2 of 3 rows of train.jsonl spell control tokens of the tokenizer ({end} in 2),"
        " which are read as ordinary text. Set spec.dataset.parseSpecialTokens: true if they are meant as the"
        " tokens themselves, as in text made by a chat template\n"
    )
    made = (
        packing.blocks(rows, "text", reader, 512, documents=False)
        if packed
        else tokens.language_rows(rows, "text", reader, 512)
    )
    ids = [token for row in made["input_ids"] for token in row]
    assert ids.count(tokenizer.eos_token_id) == 3  # those that end the three texts


def test_rows_without_spellings_are_no_notice(
    tokenizers: dict[str, PreTrainedTokenizerBase], capsys: pytest.CaptureFixture[str]
) -> None:
    for tokenizer in tokenizers.values():
        Reader(tokenizer).check_spellings(texts("a < b", "x</a>", "<|end|>"), "text", "field", "rows")
        Reader(tokenizer, parse_special=True).check_spellings(
            texts(f"a {tokenizer.eos_token}"), "text", "field", "rows"
        )
    assert capsys.readouterr().out == ""


def test_padding_that_is_an_ordinary_character_refuses_nothing(
    tokenizers: dict[str, PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    """Some published tokenizers pad with "!": text that holds one is text."""
    tokenizers["byte-level"].save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, pad_token="!")
    Reader(tokenizer).check_spellings(texts("Stop!", "go"), "text", "field", "rows")


@dataclass(frozen=True)
class Case:
    name: str
    tokenizer: str
    text: str
    expect: list[int]


BROUGHT = [
    Case(
        name="nothing",
        tokenizer="SentencePiece BPE",
        text="a text",
        expect=[1, 2],
    ),
    Case(
        name="a beginning",
        tokenizer="SentencePiece BPE",
        text=f"{BEGIN}a text",
        expect=[1, 2],
    ),
    Case(
        name="an end",
        tokenizer="SentencePiece BPE",
        text=f"a text{END}",
        expect=[1, 2],
    ),
    Case(
        name="both",
        tokenizer="SentencePiece BPE",
        text=f"{BEGIN}a text{END}",
        expect=[1, 2],
    ),
    Case(
        name="an end between",
        tokenizer="SentencePiece BPE",
        text=f"a{END}text",
        expect=[1, 2, 2],
    ),
    Case(
        name="the tokenizer adds both",
        tokenizer="WordPiece",
        text="a text",
        expect=[1, 2],
    ),
    Case(
        name="both, and the text too",
        tokenizer="WordPiece",
        text=f"{BEGIN} a text {END}",
        expect=[1, 2],
    ),
]


@pytest.mark.parametrize("case", BROUGHT, ids=lambda case: case.name)
@pytest.mark.parametrize("packed", [True, False], ids=["blocks", "rows"])
def test_what_a_text_brings_is_not_doubled(
    case: Case, packed: bool, tokenizers: dict[str, PreTrainedTokenizerBase]
) -> None:
    tokenizer = tokenizers[case.tokenizer]
    reader = Reader(tokenizer, parse_special=True)
    made = (
        packing.blocks(texts(case.text), "text", reader, 64, False)
        if packed
        else tokens.language_rows(texts(case.text), "text", reader, 64)
    )
    (ids,) = made["input_ids"]
    assert [token for token in ids if token in (1, 2)] == case.expect
    assert (ids[0], ids[-1]) == (1, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_to_classify_are_tokenised_once(
    kind: str, tokenizers: dict[str, PreTrainedTokenizerBase], paragraphs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And as the tokenizer itself cuts them; rows that just fit are not counted as cut."""
    tokenizer = tokenizers[kind]
    rows = paragraphs[:200]
    whole = tokenizer(rows, verbose=False)["input_ids"]
    longest = sorted(map(len, whole))[100]
    expected = tokenizer(rows, truncation=True, max_length=longest)
    encode, seen = type(tokenizer)._encode_plus, []

    def counting(self: Any, text: list[str], **options: Any) -> Any:
        seen.extend(text)
        return encode(self, text, **options)

    monkeypatch.setattr(type(tokenizer), "_encode_plus", counting)
    made, lengths = Reader(tokenizer).truncated(rows, longest)
    assert made == expected["input_ids"]
    assert lengths == [len(ids) for ids in whole]
    assert max(lengths) > longest
    assert seen == rows


def test_the_spec_says_which(
    make_run: Any, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through `prepare`: the same file, as text and as what a chat template has made."""
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": f"question {i}<|endoftext|>answer"}) + "\n" for i in range(3)))
    end, counts = AutoTokenizer.from_pretrained(tiny_model).eos_token_id, {}
    for parse in (False, True):
        notices.forget()
        _, data = prepared(
            make_run(f"parse-{parse}".lower(), dataset={"files": [str(path)], "parseSpecialTokens": parse})
        )
        counts[parse] = [ids.count(end) for ids in data["train"]["input_ids"]]
    assert counts == {False: [1, 1, 1], True: [2, 2, 2]}
    assert [
        line
        for line in capsys.readouterr().out.splitlines()
        if "3 of 3 training rows of x.jsonl spell control tokens" in line
    ]
