"""Answers that are good or bad are read in every common form, and become the tokens that TRL's KTOTrainer makes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import KTOTrainer

from luthier_api.finetune import FineTuneJobSpec
from luthier_api.preference import Preference
from luthier_api.run import FineTuneRun
from luthier_trainer.data import rated
from luthier_trainer.data.load import Rows
from luthier_trainer.prepare.examples import read_examples
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.tasks.preference import PreferenceTask

Row = dict[str, Any]
CHATML = """\
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
ASKED = [{"role": "user", "content": "What is a class?"}]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


TEXTS = [
    {"prompt": "What is a class?", "completion": " A class is a template.", "label": True},
    {"prompt": "What is a class?", "completion": " No idea.", "label": False},
]
CHATS = [
    {"prompt": ASKED, "completion": answer("A template."), "label": True},
    {"prompt": ASKED, "completion": answer("No idea."), "label": False},
]
PAIR = {"prompt": ASKED, "chosen": answer("A template."), "rejected": answer("No idea.")}


@pytest.fixture
def tokenizer(tiny_model: Any) -> PreTrainedTokenizerBase:
    found = AutoTokenizer.from_pretrained(tiny_model)
    found.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    found.chat_template = CHATML
    return found


def spec_of(**changes: Any) -> FineTuneJobSpec:
    made = {
        "task": "preference",
        "model": {"path": "/model"},
        "dataset": {"files": ["rows.jsonl"]},
        "training": {"maxLength": 256},
        "preference": {"lossType": "kto"},
    }
    return FineTuneJobSpec.model_validate(made | changes)


def ours(rows: list[Row], tokenizer: PreTrainedTokenizerBase, **changes: Any) -> list[Row]:
    """What `prepare` makes of rows."""
    task, spec = PreferenceTask(), spec_of(**changes)
    read = task.fitting(Rows(Dataset.from_list(rows), "rows.jsonl"), spec)
    return task.encode(read, tokenizer, spec, None, "training").to_list()


def of_trl(rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """What TRL's KTOTrainer makes of them."""
    args = SimpleNamespace(dataset_num_proc=None, max_length=256)
    trainer = SimpleNamespace(_tokenizer=tokenizer, calculate_KL=False)
    return KTOTrainer._prepare_dataset(trainer, Dataset.from_list(rows), tokenizer, args, "eval").to_list()


@dataclass(frozen=True)
class Form:
    name: str
    rows: list[Row]
    same: list[Row]
    """The same answers in the form that TRL reads."""


FORMS = [
    Form(name="texts", rows=TEXTS, same=TEXTS),
    Form(name="messages", rows=CHATS, same=CHATS),
    Form(name="numbers as labels", rows=[row | {"label": int(row["label"])} for row in TEXTS], same=TEXTS),
    Form(name="words as labels", rows=[row | {"label": str(row["label"])} for row in TEXTS], same=TEXTS),
    Form(name="a text as prompt of messages", rows=[row | {"prompt": "What is a class?"} for row in CHATS], same=CHATS),
    Form(
        name="whole conversations",
        rows=[row | {"completion": row["prompt"] + row["completion"]} for row in CHATS],
        same=CHATS,
    ),
    Form(name="pairs", rows=[PAIR], same=CHATS),
    Form(
        name="pairs without a prompt",
        rows=[{role: PAIR["prompt"] + PAIR[role] for role in ("chosen", "rejected")}],
        same=CHATS,
    ),
]


@pytest.mark.parametrize("case", FORMS, ids=lambda case: case.name)
def test_answers_have_the_tokens_of_trl(case: Form, tokenizer: PreTrainedTokenizerBase) -> None:
    keys = (*rated.ENCODED, "label")
    expect = [{key: row[key] for key in keys} for row in of_trl(case.same, tokenizer)]
    assert [{key: row[key] for key in keys} for row in ours(case.rows, tokenizer)] == expect
    assert any("are pairs of answers, which are taken apart" in n for n in notices.given()) == (len(case.rows) == 1)


@dataclass(frozen=True)
class Refused:
    name: str
    rows: list[Row]
    message: str
    changes: Row = field(default_factory=dict)


REFUSED = [
    Refused(
        name="all answers good",
        rows=TEXTS[:1],
        message='columns.label: column "label" of rows.jsonl is true in all rows; KTO learns from good and from bad',
    ),
    Refused(
        name="stars as labels",
        rows=[row | {"label": 4} for row in TEXTS],
        message="its label is 4; labels are true or false, or 1 or 0",
    ),
    Refused(
        name="no label",
        rows=[{"prompt": "a", "completion": "b", "good": True}],
        message='columns.label: no column "label" in rows.jsonl (columns: prompt, completion, good)',
    ),
    Refused(
        name="a loss of pairs",
        rows=TEXTS,
        changes={"preference": {"lossType": "sigmoid"}},
        message="spec.preference.lossType: sigmoid learns from pairs, and the rows of rows.jsonl are answers with a"
        " label. Choose kto for them",
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_what_is_refused(case: Refused, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(Failure) as raised:
        ours(case.rows, tokenizer, **case.changes)
    assert case.message in raised.value.message


def test_a_micro_batch_of_one_is_refused() -> None:
    """Its answer has no other prompt, so that the KL divergence could not be estimated."""
    from luthier_trainer.tasks.preference import way

    training = {"batchSize": 4, "microBatchSize": 1}
    with pytest.raises(Failure, match=r"microBatchSize: is 1, and KTO compares the answers of a micro-batch"):
        way(spec_of(training=training)).check(spec_of(training=training))


@dataclass(frozen=True)
class Division:
    name: str
    rows: list[Row]


DIVISIONS = [
    Division(
        name="several answers to a prompt",
        rows=[TEXTS[i % 2] | {"prompt": f"{i // 3}?", "completion": f" {i}"} for i in range(36)],
    ),
    Division(
        name="pairs",
        rows=[{"prompt": f"{i // 2}?", "chosen": f" {i}", "rejected": f" no {i}"} for i in range(24)],
    ),
    Division(
        name="pairs without a prompt",
        rows=[{"chosen": f"{i} yes", "rejected": f"no {i}"} for i in range(24)],
    ),
]


@pytest.mark.parametrize("case", DIVISIONS, ids=lambda case: case.name)
def test_answers_to_a_prompt_are_all_learnt_or_all_held_out(case: Division, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in case.rows))
    spec = spec_of(dataset={"files": [str(file)], "evalFraction": 0.25})
    run = FineTuneRun.model_validate({"name": "job", "workspace": str(tmp_path), "spec": spec.dump()})
    found = read_examples(PreferenceTask(), run, tmp_path / "cache")
    assert found.eval
    learnt, measured = (
        {owner(json.loads(row)) for row in part.data[rated.RATED]} for part in (found.train, found.eval)
    )
    assert len(found.eval.data) > 0
    assert not learnt & measured


def owner(row: Row) -> str:
    """What a row of the cases belongs to: its prompt or, without one, the number of its pair."""
    return row["prompt"] or re.sub(r"\D", "", row["completion"])


@dataclass(frozen=True)
class Weights:
    name: str
    good: int
    bad: int
    weights: tuple[float, float]
    asked: Row = field(default_factory=dict)
    notice: str = ""


WEIGHTS = [
    Weights(name="as many", good=8, bad=8, weights=(1, 1)),
    Weights(name="a few more good ones", good=12, bad=9, weights=(1, 1)),
    Weights(
        name="many good ones", good=30, bad=10, weights=(1, 3), notice="a good one has the weight 1 and a bad one 3."
    ),
    Weights(
        name="many bad ones", good=5, bad=10, weights=(2, 1), notice="a good one has the weight 2 and a bad one 1."
    ),
    Weights(
        name="weights that do not balance",
        good=30,
        bad=10,
        asked={"undesirableWeight": 1},
        weights=(1, 1),
        notice="the good ones count 3 times as much as the bad ones; the authors of KTO advise 1 to 1.33",
    ),
    Weights(name="weights that balance", good=30, bad=10, asked={"undesirableWeight": 2.5}, weights=(1, 2.5)),
]


@pytest.mark.parametrize("case", WEIGHTS, ids=lambda case: case.name)
def test_weights_are_chosen_and_said(case: Weights, tokenizer: PreTrainedTokenizerBase) -> None:
    preference = {"lossType": "kto"} | case.asked
    rows = [TEXTS[0] | {"completion": f" {i}"} for i in range(case.good)] + [TEXTS[1]] * case.bad
    found = ours(rows, tokenizer, preference=preference)
    assert rated.weights([row["label"] for row in found], Preference.model_validate(preference)) == case.weights
    given = [text for text in notices.given() if text.startswith("spec.preference:")]
    assert bool(given) == bool(case.notice)
    assert case.notice in "".join(given)
