"""Text to tokens, once, before any GPU is held: rows cut at `maxLength`, or all text joined and cut into blocks of it (packing).

Columns are those that `train` expects: causal-lm input_ids, labels, length; text-classification input_ids, attention_mask, labels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from luthier_trainer.data.columns import invalid

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

SHORTEST = 2  # a row of one token predicts nothing
MAX_LENGTH = "spec.training.maxLength"


def language_rows(texts: Dataset, column: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """One row a text, ended by the end-of-text token, cut at `max_length`."""
    eos, cut = tokenizer.eos_token_id, 0

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        nonlocal cut
        rows = [ids if ids[-1:] == [eos] else [*ids, eos] for ids in tokenizer(batch[column], verbose=False)["input_ids"]]
        cut += sum(len(row) > max_length for row in rows)
        return _language(row[:max_length] for row in rows)

    rows = _mapped(texts, tokenize, _language_features())
    _tell_cut(cut, len(texts), max_length)
    return _keep_learnable(rows)


def language_blocks(texts: Dataset, column: str, tokenizer: PreTrainedTokenizerBase, max_length: int, documents: bool) -> Dataset:
    """All texts one after the other, separated by the end-of-text token, in blocks of `max_length`; the last may be shorter.

    With `documents`, rows are lines of files: only the end of a file is the end of a text.
    """
    eos, start = tokenizer.eos_token_id, _prefix(tokenizer)
    rest: list[int] = []
    begins = True

    def pack(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        nonlocal rest, begins
        joined = _join(batch[column], batch["ends"] if documents else [True] * len(indices))
        ids_of = tokenizer([text for text, _ in joined], add_special_tokens=False, verbose=False)["input_ids"]  # longer than the model, as yet
        stream = rest
        for ids, (_, ends) in zip(ids_of, joined, strict=True):
            stream = stream + (start if begins else []) + ids + ([eos] if ends else [])
            begins = ends
        whole = len(stream) - len(stream) % max_length
        blocks = [stream[i : i + max_length] for i in range(0, whole, max_length)]
        rest = stream[whole:]
        if indices[-1] == len(texts) - 1 and len(rest) >= SHORTEST:
            blocks.append(rest)
        return _language(blocks)

    # One process, in order: what is left of a batch begins the next.
    return _mapped(texts, pack, _language_features(), with_indices=True)


def classification_rows(
    texts: Dataset, column: str, labels: list[int], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Dataset:
    """One row a text, cut at `max_length`, with the id of its class."""
    cut = 0

    def tokenize(batch: dict[str, list[str]], indices: list[int]) -> dict[str, list[Any]]:
        nonlocal cut
        encoded = tokenizer(batch[column], truncation=True, max_length=max_length)
        # Only the tokenizer knows how to cut and keep its closing token; a row that fills the length may have been cut, or just fit.
        full = [text for text, ids in zip(batch[column], encoded["input_ids"], strict=True) if len(ids) == max_length]
        cut += sum(len(ids) > max_length for ids in tokenizer(full, verbose=False)["input_ids"]) if full else 0
        return {name: encoded[name] for name in ("input_ids", "attention_mask")} | {"labels": [labels[i] for i in indices]}

    rows = _mapped(texts, tokenize, _classification_features(), with_indices=True)
    _tell_cut(cut, len(texts), max_length)
    return rows


def hold_out(data: Dataset, fraction: float, seed: int, field: str) -> tuple[Dataset, Dataset]:
    """(train, eval): `fraction` of the rows, chosen by `seed`, are held out; both keep the order of the rows."""
    import numpy

    count = round(len(data) * fraction)
    if not 0 < count < len(data):
        raise invalid(f"{field}: {fraction:g} of {len(data)} rows is {count}; both sides need one row at least. Choose another fraction")
    chosen = numpy.zeros(len(data), dtype=bool)
    chosen[numpy.random.default_rng(seed).permutation(len(data))[:count]] = True
    return data.select(numpy.flatnonzero(~chosen)), data.select(numpy.flatnonzero(chosen))


def count_tokens(data: Dataset) -> int:
    """Tokens of all rows."""
    if "length" in data.column_names:
        return sum(data["length"][:])
    return sum(len(row) for start in range(0, len(data), 10_000) for row in data[start : start + 10_000]["input_ids"])


def _join(texts: list[str], ends: list[bool]) -> list[tuple[str, bool]]:
    """Consecutive lines of one text as one string, so that tokens may cross line breaks: (string, whether the text ends there)."""
    joined: list[tuple[str, bool]] = []
    open_lines: list[str] = []
    for text, end in zip(texts, ends, strict=True):
        open_lines.append(text)
        if end:
            joined.append(("".join(open_lines), True))
            open_lines = []
    if open_lines:
        joined.append(("".join(open_lines), False))
    return joined


def _prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text (a begin-of-text token, mostly nothing)."""
    alone = tokenizer("")["input_ids"]
    return alone[:1] if alone[:1] == [tokenizer.bos_token_id] else []


def _mapped(texts: Dataset, function: Any, features: Any, **options: Any) -> Dataset:
    """What `function` makes of the batches, one after the other and never from a cache: it counts, or keeps what a batch left over.

    Without `features`, a column of the texts that has the name of one of ours would keep its type: labels, say, that were booleans.
    """
    return texts.map(function, batched=True, remove_columns=texts.column_names, features=features, load_from_cache_file=False, **options)


def _tell_cut(cut: int, rows: int, max_length: int) -> None:
    if cut:
        print(f"{MAX_LENGTH}: {cut} of {rows} rows are longer than {max_length} tokens and are cut", flush=True)


def _language(rows: Any) -> dict[str, list[Any]]:
    ids = list(rows)
    return {"input_ids": ids, "labels": ids, "length": [len(row) for row in ids]}


def _language_features() -> Any:
    from datasets import Features, List, Value

    return Features({"input_ids": List(Value("int32")), "labels": List(Value("int32")), "length": Value("int32")})


def _classification_features() -> Any:
    from datasets import Features, List, Value

    return Features({"input_ids": List(Value("int32")), "attention_mask": List(Value("int8")), "labels": Value("int64")})


def _keep_learnable(rows: Dataset) -> Dataset:
    return rows.filter(lambda lengths: [n >= SHORTEST for n in lengths], batched=True, input_columns=["length"])
