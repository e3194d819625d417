"""Adds pieces to the tokenizer of a trained model, learnt from the texts of the dataset.

The pieces are learnt as byte-pair encoding goes on where it ended: the texts are read with the tokenizer as it is, and
the most frequent pair of neighbours within a word becomes a new piece, again and again. So a new piece consists of old
ones, and the row of its embedding can begin as their mean. The pieces become part of the tokenizer's model: tokens that
transformers' `add_tokens` adds would be found within other words too, and those of bytes would be written wrongly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.workspace.manifest import sha256

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

FIELD = "spec.model.tokenizer"
SIZE = f"{FIELD}.train.vocabSize"
FILE = "tokenizer.json"
KINDS = ("BPE", "WordPiece", "Unigram")
"""The library's names of the kinds of tokenizers that pieces can be added to."""
BYTE = re.compile("<0x[0-9A-F]{2}>")  # stands for one byte of a character that has no piece
BLANK = "▁"  # as SentencePiece writes it; the tokenizers of some models read a whole text as one word
BETWEEN = "\0"  # two words, where pieces are written as characters
SURROGATES = range(0xD800, 0xE000)  # code points that are no characters
FEWEST = 2  # occurrences of a pair that becomes a piece
TEXTS_AT_ONCE = 1_000
SHOWN = 60  # characters of a text in a message


@dataclass(frozen=True)
class Extended:
    """A tokenizer with new pieces."""

    tokenizer: PreTrainedTokenizerBase
    pieces: Mapping[str, int]
    """Piece → id, in the order of ids, which follow those of the other tokens."""
    parts: Mapping[int, list[int]]
    """Id of a piece → ids of the old tokens that it consists of."""
    digest: str
    """SHA-256 of its file."""
    before: int
    """Tokens of all texts with the old tokenizer, without control tokens around them."""
    after: int
    """The same with the new one."""


@dataclass(frozen=True)
class Learnt:
    """What was learnt from the texts."""

    parts: Mapping[str, list[int]]
    """New piece → ids of the old tokens that it consists of."""
    merges: list[tuple[str, str]]
    """Pairs of pieces that are joined, in this order."""


def extended(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], entries: int, config: PreTrainedConfig
) -> Extended:
    """Return `tokenizer`, as AutoTokenizer reads it beside a model of this `config`, with at most `entries` tokens.

    `texts` can be read several times. Raises Failure if the tokenizer has as many tokens already, or if pieces cannot
    be added to it.
    """
    from transformers import AutoTokenizer

    if not tokenizer.is_fast:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{FIELD}: pieces can be added to the tokenizers of the library of this name, and the model's is a"
            f" {type(tokenizer).__name__}; use model.addSpecialTokens, or a model with a tokenizer.json",
        )
    if entries <= len(tokenizer):
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{SIZE}: the tokenizer has {len(tokenizer):,} entries with the control tokens that were added, and"
            f" {entries:,} are asked for; raise it by the pieces that are to be learnt, or remove it",
        )
    before = tokenizer.get_vocab()
    with TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        whole = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if whole["model"].get("type") not in KINDS:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{FIELD}: the model's tokenizer is a {whole['model'].get('type')}, and pieces can be added to"
                f" {', '.join(KINDS)}; use model.addSpecialTokens",
            )
        plain = plain_copy(tokenizer)
        added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
        learnt = learn(plain, whole["model"], added, texts, entries - len(tokenizer))
        pieces = {piece: number for number, piece in enumerate(learnt.parts, start=max(before.values()) + 1)}
        add_to_model(whole["model"], added, pieces, learnt)
        (folder / FILE).write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")
        result = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
        result.save_pretrained(folder)
        digest = sha256(folder / FILE)
    if result.get_vocab() != {**before, **pieces}:
        raise cannot_be_had(result, "has other tokens than before")
    counts = count_tokens(plain, plain_copy(result), texts, inner_mark(whole["model"]), result)
    parts = {pieces[piece]: ids for piece, ids in learnt.parts.items()}
    return Extended(result, pieces, parts, digest, *counts)


def plain_copy(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return the library's tokenizer behind `tokenizer`, which neither cuts texts nor fills them up."""
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def cannot_be_had(tokenizer: PreTrainedTokenizerBase, why: str) -> Failure:
    """Return the Failure for a tokenizer that is not what it was, but for the pieces that were added."""
    return Failure(
        ExitCode.INVALID_SPEC,
        f"{FIELD}: with the pieces that were added, transformers reads a {type(tokenizer).__name__} that {why}; remove"
        " train.vocabSize. train.specialTokens and model.addSpecialTokens add control tokens alone",
    )


# ---- learning


def learn(
    plain: Tokenizer, model: Mapping[str, Any], added: Mapping[str, int], texts: Iterable[str], count: int
) -> Learnt:
    """Learn at most `count` pieces from `texts`.

    `model`: of the tokenizer `plain`, as its file has it. `added`: token → id of the tokens beside it, which become
    part of no piece.

    The trainer of the library begins with characters. So each old token is written as a character of its own.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokens = vocabulary(model)
    unknown = {str(model.get("unk_token"))}
    usable = {
        number: token
        for token, number in tokens.items()
        if token not in added and token not in unknown and not BYTE.fullmatch(token)
    }
    if model["type"] == "Unigram" and model.get("unk_id") is not None:
        usable.pop(model["unk_id"], None)
    characters = {number: character(at) for at, number in enumerate(sorted(usable))}
    begins = {number for number, token in usable.items() if token.startswith(BLANK)}
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Split(BETWEEN, "removed")
    trainer = trainers.BpeTrainer(
        # Twice as many, because pairs that make a piece which is there already are left out.
        vocab_size=len(characters) + 2 * count,
        initial_alphabet=list(characters.values()),
        min_frequency=FEWEST,
        show_progress=False,
    )
    learner.train_from_iterator(as_characters(plain, characters, begins, texts), trainer)
    content = {character: usable[number] for number, character in characters.items()}
    parts = {character: [number] for number, character in characters.items()}
    found: dict[str, list[int]] = {}
    merges: list[tuple[str, str]] = []
    inner = inner_mark(model)
    for left, right in json.loads(learner.to_str())["model"]["merges"]:
        if left not in content or right not in content:
            continue  # a pair before it was left out
        piece = content[left] + content[right].removeprefix(inner)
        if piece in tokens or piece in added:
            continue
        if piece not in found:
            if len(found) == count:
                break
            found[piece] = parts[left] + parts[right]
        merges.append((content[left], content[right]))
        content[left + right], parts[left + right] = piece, parts[left] + parts[right]
    return Learnt(found, merges)


def character(at: int) -> str:
    """Return the character that stands for the token `at` of the old ones."""
    code = at + 1  # 0 is between words
    return chr(code if code < SURROGATES.start else code + len(SURROGATES))


def as_characters(
    plain: Tokenizer, characters: Mapping[int, str], begins: Collection[int], texts: Iterable[str]
) -> Iterator[str]:
    """Yield each text with a character for each token, and `BETWEEN` where no piece reaches across.

    `begins`: ids of tokens that begin a word in any case.
    """
    for some in in_batches(texts):
        for encoding in plain.encode_batch(some, add_special_tokens=False):
            written, last = [], None
            for number, word in zip(encoding.ids, encoding.word_ids, strict=True):
                known = characters.get(number)
                if known is None or word != last or number in begins:
                    written.append(BETWEEN)
                if known is not None:
                    written.append(known)
                last = word if known is not None else None
            yield "".join(written)


def in_batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield the texts, some at a time."""
    left = iter(texts)
    while some := list(islice(left, TEXTS_AT_ONCE)):
        yield some


# ---- the tokenizer's file


def vocabulary(model: Mapping[str, Any]) -> dict[str, int]:
    """Return token → id of a tokenizer's model, as its file has it."""
    if model["type"] == "Unigram":
        return {token: number for number, (token, _) in enumerate(model["vocab"])}
    return dict(model["vocab"])


def inner_mark(model: Mapping[str, Any]) -> str:
    """Return what stands before pieces that do not begin a word: ## of WordPiece, nothing for most others."""
    return model.get("continuing_subword_prefix") or ""


def add_to_model(model: dict[str, Any], added: Mapping[str, int], pieces: Mapping[str, int], learnt: Learnt) -> None:
    """Add pieces to a tokenizer's model, as its file has it.

    `added`: token → id of the tokens beside the model. They become part of it, because the library (0.23) numbers them
    after the model's tokens when it reads the file, so that they would lose their ids.
    Raises Failure if ids would be left out, which a Unigram cannot have.
    """
    if model["type"] != "Unigram":
        model["vocab"] |= {token: number for token, number in added.items() if token not in model["vocab"]}
        model["vocab"] |= pieces
        if model["type"] == "BPE":
            model["merges"] += [list(pair) for pair in learnt.merges]
        return
    entries: list[list[Any]] = model["vocab"]
    scores = [float(score) for _, score in entries]
    for token, number in sorted(added.items(), key=lambda item: item[1]):
        if number == len(entries):
            entries.append([token, 0.0])  # as T5 has its own
        elif number > len(entries):
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{FIELD}: the ids before {token} ({number}) belong to no token, and a Unigram cannot have such ids"
                " within it; use model.addSpecialTokens",
            )
    for piece in pieces:
        # Scores are logarithms of probabilities: a piece counts as often as its rarest part. This is more than the sum
        # of its parts, so that it is read wherever the parts were.
        entries.append([piece, min(scores[part] for part in learnt.parts[piece])])


def count_tokens(
    old: Tokenizer, new: Tokenizer, texts: Iterable[str], inner: str, read: PreTrainedTokenizerBase
) -> tuple[int, int]:
    """Return the number of tokens of all texts with the tokenizers `old` and `new`.

    `inner`: what stands before pieces that do not begin a word. Raises Failure if a text is read otherwise: the tokens
    must spell the same.
    """
    before = after = 0
    for some in in_batches(texts):
        first, second = (
            [encoding.tokens for encoding in made.encode_batch(some, add_special_tokens=False)] for made in (old, new)
        )
        before, after = before + sum(map(len, first)), after + sum(map(len, second))
        for text, one, other in zip(some, first, second, strict=True):
            if written(one, inner) != written(other, inner):
                raise cannot_be_had(read, f"reads a text otherwise ({text[:SHOWN]!r})")
    return before, after


def written(tokens: Iterable[str], inner: str) -> str:
    """Return what tokens spell together."""
    return "".join(token.removeprefix(inner) for token in tokens)


def describe(made: Extended, wanted: int) -> str:
    """Return a text, for a notice, on pieces that were added. `wanted`: entries that the job asks for."""
    entries = len(made.tokenizer)
    few = f", because no other pair occurs {FEWEST} times ({wanted:,} were asked for)" if entries < wanted else ""
    return (
        f"{FIELD}: {len(made.pieces):,} pieces were learnt from the training rows and added to the tokenizer, which has"
        f" {entries:,} entries now{few} (SHA-256 {made.digest}). The rows had {made.before:,} tokens and have"
        f" {made.after:,}"
    )
