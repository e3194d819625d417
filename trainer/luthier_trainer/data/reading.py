"""Reads texts with a tokenizer: spelled-out control tokens are ordinary text by default, and none is doubled.

A tokenizer reads the spelling of a control token, such as `</s>` or `<|im_end|>`, as the token itself. In training data
this is hardly ever meant: a page about HTML would teach the model to end in the middle of it. Unless the spec asks for
it, such spellings are read like other text.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import BatchEncoding, PreTrainedTokenizerBase

PARSE = "spec.dataset.parseSpecialTokens"
BYTES_AT_ONCE = 1 << 23  # total size of the rows that are in memory at once, on average
SHOWN = 3  # spellings in a message
# Spellings that look like control tokens. Others, such as "!" for padding, are ordinary text.
MARKED = re.compile(r"\W.*\W|__\w+__", re.DOTALL)


@dataclass(frozen=True)
class Reader:
    """A tokenizer, and how it reads texts."""

    tokenizer: PreTrainedTokenizerBase
    parse_special: bool = False
    """Whether spellings of control tokens are read as the tokens themselves."""
    targets: bool = False
    """Whether texts are what a decoder writes. Tokenizers of several languages mark them with another language."""

    def __call__(self, texts: Any, **options: Any) -> BatchEncoding:
        """Return what the tokenizer makes of `texts`: a list of them, or one. `options` are those of the tokenizer."""
        name = "text_target" if self.targets else "text"
        given = {name: texts, "split_special_tokens": not self.parse_special, "verbose": False}
        return self.tokenizer(**given, **options)

    def for_targets(self) -> Reader:
        """Return the reader of what the decoder of the same model writes."""
        return replace(self, targets=True)

    def truncated(self, texts: list[str], max_length: int) -> tuple[list[list[int]], list[int]]:
        """Return (token ids of each text, number of tokens of each text before it was truncated).

        The tokenizer truncates the texts itself, and keeps its closing token.
        """
        options = {
            "truncation": True,
            "max_length": max_length,
            "return_attention_mask": False,
            "return_token_type_ids": False,
        }
        if self.tokenizer.is_fast:
            encoded = self(texts, **options)
            # Each part that was cut off has control tokens of its own around it.
            added = self.tokenizer.num_special_tokens_to_add()
            return encoded["input_ids"], [
                len(e.ids) + sum(len(part.ids) - added for part in e.overflowing) for e in encoded.encodings or []
            ]
        rows = [self(text, return_overflowing_tokens=True, **options) for text in texts]
        return [row["input_ids"] for row in rows], [
            len(row["input_ids"]) + max(row.get("num_truncated_tokens", 0), 0) for row in rows
        ]

    @cached_property
    def begin(self) -> list[int]:
        """Return the tokens that the tokenizer puts before a text: a begin-of-text token, or nothing."""
        alone = self.tokenizer("")["input_ids"]
        return alone[:1] if alone[:1] == [self.tokenizer.bos_token_id] else []

    def row(self, ids: list[int]) -> list[int]:
        """Return the ids of a text with the end-of-text token after them.

        A begin-of-text or end-of-text token that is in the text already is not doubled.
        """
        begin, end = self.begin, [self.tokenizer.eos_token_id]
        if begin and ids[:2] == begin * 2:
            ids = ids[1:]
        if ids[-2:] == end * 2:
            ids = ids[:-1]
        return ids if ids[-1:] == end else ids + end

    @cached_property
    def spellings(self) -> dict[str, int]:
        """Return spelling → id of the control tokens."""
        tokenizer = self.tokenizer
        added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))

    def check_spellings(self, texts: Dataset, column: str, field: str, rows: str) -> None:
        """Give notice of the rows that spell out control tokens. `rows` names them in messages: rows of train.jsonl.

        Raises Failure if this kind of tokenizer reads a spelling as the control token in any case.
        """
        if self.parse_special:
            return
        found, count = self._spelled(texts, column)
        if not found:
            return
        unavoidable = [spelling for spelling in found if MARKED.fullmatch(spelling) and self._unavoidable(spelling)]
        if unavoidable:
            model = (
                type(self.tokenizer.backend_tokenizer.model).__name__
                if self.tokenizer.is_fast
                else type(self.tokenizer).__name__
            )
            raise Failure(
                ExitCode.INVALID_DATASET,
                f"{field}: {_shown(Counter({s: found[s] for s in unavoidable}))} {rows} spell control tokens, and a"
                f" tokenizer of the kind {model} cannot read them as text: the model would learn them as the tokens"
                f" themselves. Remove the spellings, or set {PARSE}: true if that is meant",
            )
        notice(
            f"{field}: {count} of {len(texts)} {rows} spell control tokens of the tokenizer ({_shown(found)}), which"
            f" are read as ordinary text. Set {PARSE}: true if they are meant as the tokens themselves, as in text made"
            " by a chat template"
        )

    def _spelled(self, texts: Dataset, column: str) -> tuple[Counter[str], int]:
        """Return (spelling → number of rows that hold it, number of rows that hold any)."""
        import pyarrow.compute

        found: Counter[str] = Counter()
        count = 0
        pattern = re.compile("|".join(re.escape(s) for s in sorted(self.spellings, key=len, reverse=True) if s) or "$^")
        arrow = texts.with_format("arrow", columns=[column])
        step = rows_at_once(texts, 10_000)
        for start in range(0, len(texts), step):
            cells = arrow[start : start + step][column]
            held = cells.filter(pyarrow.compute.match_substring_regex(cells, pattern.pattern))
            for text in held:
                found.update(set(pattern.findall(text.as_py())))
            count += len(held)
        return found, count

    def _unavoidable(self, spelling: str) -> bool:
        """Return whether the tokenizer reads `spelling` as the control token although it is asked not to.

        Tokenizers that look up whole pieces in their vocabulary (Unigram, WordLevel) do, because their control tokens
        are pieces like all others.
        """
        around = [spelling, f" {spelling} ", f"a{spelling}b", f"a {spelling} b"]
        return any(self.spellings[spelling] in ids for ids in self(around, add_special_tokens=False)["input_ids"])


def _shown(found: Counter[str]) -> str:
    """Return the most frequent spellings, with the number of rows that hold them, for a message."""
    listed = [f"{spelling} in {rows}" for spelling, rows in found.most_common(SHOWN)]
    return ", ".join(listed) + (", ..." if len(found) > SHOWN else "")


def rows_at_once(texts: Dataset, most: int) -> int:
    """Return the number of rows, from 1 to `most`, whose texts are together about `BYTES_AT_ONCE` long."""
    bytes_a_row = texts.data.nbytes / max(len(texts.data), 1)
    return min(max(int(BYTES_AT_ONCE / max(bytes_a_row, 1)), 1), most)
