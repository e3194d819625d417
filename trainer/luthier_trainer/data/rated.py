"""Reads answers that are good or bad each, for KTO: they become one column of JSON text.

A row is then an object with `prompt` and `completion`, texts or lists of messages as in `pairs`, with `label`, true or
false, and with `tools` if there are some. Pairs of answers are taken apart: the chosen one is good, the rejected one is
bad.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from luthier_api.finetune import FineTuneJobSpec
from luthier_api.preference import Preference
from luthier_trainer.data import chats, columns, pairs
from luthier_trainer.data.chats import Malformed, listed, messages_of, shown, tools_of
from luthier_trainer.data.forms import COLUMNS, DATASET
from luthier_trainer.data.load import Rows
from luthier_trainer.data.pair_tokens import Parts, encoded, kept, splitter, token_lists
from luthier_trainer.data.tokens import mapped
from luthier_trainer.runtime.notices import notice

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

RATED = "rated"  # the column of JSON text
NEEDED = ("completion", "label")
TITLE = "answers with a label"
ENCODED = ("prompt_ids", "completion_ids")  # the names in TRL, which drops columns with other names
ROWS_AT_ONCE = 1000
MOST_EVEN = 4 / 3  # weighted good answers for each bad one; up to here, the authors of KTO found no harm (Eq. 8)


def wanted(spec: FineTuneJobSpec) -> tuple[str, ...]:
    """Return the columns to read."""
    return tuple(dict.fromkeys([*roles(spec).values(), *pairs.wanted(spec)]))


def roles(spec: FineTuneJobSpec) -> dict[str, str]:
    """Return role → column, of the roles that rows can have."""
    given = spec.dataset.columns
    return {role: getattr(given, role) or role for role in ("prompt", *NEEDED, "tools")}


def read(rows: Rows, spec: FineTuneJobSpec) -> Rows:
    """Return rows with the one column `RATED`.

    Rows with a blank prompt or answer are dropped, with a notice. Raises Failure if a row is no answer with a label, if
    no row is left, or if all labels are the same.
    """
    named, there = roles(spec), rows.names or tuple(rows.data.column_names)
    answers = {spec.dataset.columns.chosen, spec.dataset.columns.rejected}
    if answers <= set(there) and not any(named[role] in there for role in NEEDED):
        return _taken_apart(pairs.read(rows, spec))
    found = pairs.present(rows, spec, named, ("prompt", *NEEDED))
    subject = f'{COLUMNS}: column "{found["prompt"]}" or column "{found["completion"]}" of {rows.origin}'
    rated = chats.as_json(rows, found, RATED, _rated, subject, TITLE, parallel=True)
    pairs.refuse_kinds(rated, RATED, subject, TITLE)
    pairs.refuse_template(rated, RATED, "completion", spec)
    labels = {json.loads(row)["label"] for row in rated.data[RATED]}
    if len(labels) == 1:
        raise columns.invalid(
            f'{COLUMNS}.label: column "{found["label"]}" of {rows.origin} is {str(labels.pop()).lower()} in all rows;'
            " KTO learns from good and from bad answers"
        )
    return rated


def prompts(rows: Rows) -> Iterator[list[str]]:
    """Yield the prompts of rows as `read` returns them, in batches, as text.

    Answers without a prompt are known by their pair, which both answers of a row of the source have in common.
    """
    numbers = range(len(rows.data)) if rows.numbers is None else rows.numbers.tolist()
    begin = 0
    for batch in rows.data.select_columns([RATED]).iter(ROWS_AT_ONCE):
        found = []
        for number, row in zip(numbers[begin : begin + len(batch[RATED])], batch[RATED], strict=True):
            prompt = json.loads(row)["prompt"]
            found.append(json.dumps(prompt, ensure_ascii=False) if prompt else f"row {number}")
        begin += len(found)
        yield found


def rated_rows(rows: Rows, tokenizer: PreTrainedTokenizerBase, spec: FineTuneJobSpec, use: str) -> Dataset:
    """Return the token ids of each prompt and of its answer, as in `ENCODED`, and the columns `label` and `length`.

    Answers are cut, and rows are left out, as in `pair_tokens.pair_rows`. Raises Failure if no row is left.
    """
    from datasets import Value

    longest = spec.training.max_length

    def read_row(row: dict[str, Any], whole: Parts) -> tuple[dict[str, Any], tuple[str, ...]]:
        parts, remarks = kept(whole, longest)
        answer = parts.answers[0] if parts.answers else []
        cells = {"prompt_ids": parts.prompt, "completion_ids": answer, "label": row["label"], "length": parts.length}
        return cells, remarks

    split = splitter(rows, RATED, tokenizer, spec, use)
    features = token_lists(ENCODED) | {"label": Value("bool")}
    learnt = encoded(rows, RATED, split, ("completion",), read_row, features, longest, use)
    if use == "training" and len(learnt):
        _tell_weights(learnt["label"][:], spec.preference)
    return learnt


def weights(labels: Iterable[bool], asked: Preference) -> tuple[float, float]:
    """Return how much a good answer counts, and how much a bad one. `labels`: of the training rows.

    Where the job says nothing, the rarer kind is weighted so that both kinds count alike, unless they nearly do.
    """
    if asked.desirable_weight is not None or asked.undesirable_weight is not None:
        return asked.desirable_weight or 1.0, asked.undesirable_weight or 1.0
    good = bad = 0
    for label in labels:
        good, bad = good + label, bad + (not label)
    if not good or not bad or 1 <= good / bad <= MOST_EVEN:
        return 1.0, 1.0
    return (1.0, good / bad) if good > bad else (bad / good, 1.0)


def _tell_weights(labels: list[bool], asked: Preference) -> None:
    """Give notice if the two kinds of answers are not equally frequent: how much each counts, and what can be set."""
    good = sum(labels)
    bad = len(labels) - good
    if not good or not bad or 1 <= good / bad <= MOST_EVEN:
        return
    found = f"{good} of the training answers are good and {bad} are bad"
    good_weight, bad_weight = weights(labels, asked)
    if asked.desirable_weight is None and asked.undesirable_weight is None:
        notice(
            f"spec.preference: {found}. So that both kinds count alike, a good one has the weight {good_weight:.4g} and"
            f" a bad one {bad_weight:.4g}. Set desirableWeight and undesirableWeight to choose others"
        )
        return
    ratio = good * good_weight / (bad * bad_weight)
    if not 0.99 <= ratio <= MOST_EVEN * 1.01:
        notice(
            f"spec.preference: {found}. By desirableWeight and undesirableWeight, the good ones count {ratio:.3g} times"
            f" as much as the bad ones; the authors of KTO advise 1 to {MOST_EVEN:.2f}. Remove both to have 1"
        )


def _rated(cells: dict[str, Any]) -> dict[str, Any] | None:
    """Return a row; None if its prompt or its answer is blank. Raises Malformed."""
    prompt, completion = listed(cells["prompt"]), listed(cells["completion"])
    if pairs.blank(prompt) or pairs.blank(completion):
        return None
    if isinstance(prompt, list) or isinstance(completion, list):
        prompt, completion = messages_of(prompt, "user"), messages_of(completion, "assistant")
        if completion[: len(prompt)] == prompt and len(completion) > len(prompt):
            completion = completion[len(prompt) :]  # the whole conversation
    for part in (prompt, completion):
        if not isinstance(part, str | list):
            raise Malformed(f"{shown(part)} is neither a text nor a list of messages")
    pairs.refuse_weights([completion])
    found = {"prompt": pairs.without_weights(prompt), "completion": completion, "label": _label(cells["label"])}
    tools = tools_of(cells.get("tools"))
    return found | ({"tools": tools} if tools else {})


def _label(value: Any) -> bool:
    """Return whether an answer is good. Raises Malformed if the cell does not say it."""
    good = columns.BOOLEANS.get(str(value).strip().lower())
    if good is None:
        raise Malformed(f"its label is {shown(value)}; labels are true or false, or 1 or 0")
    return good


def _taken_apart(rows: Rows) -> Rows:
    """Return two rows for each pair: the chosen answer, which is good, and the rejected one, which is bad."""
    import numpy
    from datasets import Features, Value

    def both(batch: dict[str, list[str]]) -> dict[str, list[str]]:
        made = []
        for text in batch[pairs.PAIR]:
            pair = json.loads(text)
            shared = {key: pair[key] for key in ("prompt", "tools") if key in pair}
            for role, label in (("chosen", True), ("rejected", False)):
                made.append(json.dumps(shared | {"completion": pair[role], "label": label}, ensure_ascii=False))
        return {RATED: made}

    notice(
        f"{DATASET}: the rows of {rows.origin} are pairs of answers, which are taken apart for KTO: {len(rows.data)}"
        f" good ones and {len(rows.data)} bad ones"
    )
    numbers = numpy.arange(len(rows.data)) if rows.numbers is None else rows.numbers
    return replace(
        rows,
        data=mapped(rows.data, both, Features({RATED: Value("string")}), parallel=True),
        numbers=numpy.repeat(numbers, 2),
    )
