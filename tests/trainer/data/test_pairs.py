"""Pairs of answers are read in every common form, and become the tokens that TRL makes of them."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trl
from datasets import Dataset
from prepared_workspace import prose
from trainer.tokenizers_of_kinds import KINDS
from transformers import PreTrainedTokenizerBase
from trl import DPOTrainer

from luthier_api.finetune import FineTuneJobSpec
from luthier_trainer.data.load import Rows
from luthier_trainer.prepare import first_row
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.tasks.preference import PreferenceTask

CHATML = """\
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
QWEN3 = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
NO_END = "{% for message in messages %}{{ message.role + ': ' + message.content + '\\n' }}{% endfor %}"
COUNTED = "{{ messages | length }}" + CHATML
CONTROL = ["<|im_start|>", "<|im_end|>"]
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")

Row = dict[str, Any]


def chat(*contents: str, first: int = 0) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents, first)]


def answer(text: str) -> list[dict[str, str]]:
    return chat(text, first=1)


EXPLICIT_TEXTS = [
    {"prompt": "What is a class?", "chosen": " A class is a template.", "rejected": " No idea."},
    {"prompt": "def f():\n", "chosen": "    return 1\n", "rejected": "pass"},
    {"prompt": "A word that is cut in the mid", "chosen": "dle of it", "rejected": "st"},
]
DIALOGUES = [  # as in Anthropic/hh-rlhf
    {
        "chosen": "\n\nHuman: What is a class?\n\nAssistant: It is a template.",
        "rejected": "\n\nHuman: What is a class?\n\nAssistant: It is nothing.",
    },
    {
        "chosen": "\n\nHuman: Hi\n\nAssistant: Hello",
        "rejected": "\n\nHuman: Hi\n\nAssistant: Hello there",
    },
]
EXPLICIT_CHATS = [
    {"prompt": chat("What is a class?"), "chosen": answer("A template."), "rejected": answer("No idea.")},
    {"prompt": chat("Hi", "Hello", "And?"), "chosen": answer("Bonjour ! 🦜"), "rejected": answer("Two\n\nlines")},
]
WHOLE_CHATS = [{role: row["prompt"] + row[role] for role in ("chosen", "rejected")} for row in EXPLICIT_CHATS]


@pytest.fixture(scope="module")
def tokenizers(paragraphs: list[str]) -> dict[str, PreTrainedTokenizerBase]:
    """A tokenizer of each kind, with the control tokens of CHATML."""
    found = {kind: KINDS[kind](prose(paragraphs)[:200]) for kind in ("byte-level", "SentencePiece BPE")}
    for tokenizer in found.values():
        tokenizer.add_tokens(CONTROL, special_tokens=True)
    return found


def spec_of(**changes: Any) -> FineTuneJobSpec:
    training = {"maxLength": 4096} | changes.pop("training", {})
    dataset = {"files": ["rows.jsonl"]} | changes.pop("dataset", {})
    made = {"task": "preference", "model": {"path": "/model"}, "dataset": dataset, "training": training} | changes
    return FineTuneJobSpec.model_validate(made)


def ours(rows: list[Row], tokenizer: PreTrainedTokenizerBase, **changes: Any) -> Dataset:
    """What `prepare` makes of rows."""
    task, spec = PreferenceTask(), spec_of(**changes)
    read = task.fitting(Rows(Dataset.from_list(rows), "rows.jsonl"), spec)
    return task.encode(read, tokenizer, spec, None, "training")


def of_trl(rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """What TRL's DPOTrainer makes of them."""
    args = SimpleNamespace(dataset_num_proc=None, max_length=4096, truncation_mode="keep_start")
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    return DPOTrainer._prepare_dataset(trainer, Dataset.from_list(rows), tokenizer, args, "train")


@dataclass(frozen=True)
class Form:
    name: str
    rows: list[Row]
    notice: str = ""
    template: str = CHATML
    same: list[Row] = field(default_factory=list)
    """The same pairs in a form that TRL reads; empty: TRL reads `rows`."""


FORMS = [
    Form(name="texts", rows=EXPLICIT_TEXTS),
    Form(
        name="texts without a prompt",
        rows=DIALOGUES,
        notice='have no column "prompt"; what "chosen" and "rejected" begin with alike is the prompt',
    ),
    Form(
        name="texts that repeat their prompt",
        rows=[
            {"prompt": r["prompt"]} | {k: r["prompt"] + r[k] for k in ("chosen", "rejected")} for r in EXPLICIT_TEXTS
        ],
        same=EXPLICIT_TEXTS,
        notice="3 of 3 rows of rows.jsonl begin with their prompt in both answers; it is read once",
    ),
    Form(name="messages", rows=EXPLICIT_CHATS),
    Form(name="messages by the template of Qwen 3", rows=EXPLICIT_CHATS, template=QWEN3),
    Form(name="conversations without a prompt", rows=WHOLE_CHATS, notice='have no column "prompt"'),
    Form(
        name="conversations, and their prompt as text",  # as in HuggingFaceH4/ultrafeedback_binarized
        rows=[{"prompt": whole["chosen"][0]["content"]} | whole for whole in WHOLE_CHATS[:1]],
        same=EXPLICIT_CHATS[:1],
        notice="begin with their prompt in both answers; it is read once",
    ),
    Form(
        name="conversations with a system message, and the question as text",
        rows=[
            {"prompt": "Hi"}
            | {k: [{"role": "system", "content": "Be kind."}, *chat("Hi", k)] for k in ("chosen", "rejected")}
        ],
        same=[
            {"prompt": [{"role": "system", "content": "Be kind."}, *chat("Hi")]}
            | {k: answer(k) for k in ("chosen", "rejected")}
        ],
        notice="have whole conversations as answers; what both begin with alike is the prompt",
    ),
    Form(
        name="a text as prompt of messages",
        rows=[{"prompt": "Hi", "chosen": answer("Hello"), "rejected": answer("What?")}],
        same=[{"prompt": chat("Hi"), "chosen": answer("Hello"), "rejected": answer("What?")}],
    ),
    Form(
        name="texts as answers to messages",
        rows=[{"prompt": chat("Hi"), "chosen": "Hello", "rejected": "What?"}],
        same=[{"prompt": chat("Hi"), "chosen": answer("Hello"), "rejected": answer("What?")}],
    ),
    Form(
        name="ShareGPT's names",
        rows=[
            {"prompt": [{"from": "human", "value": "Hi"}]}
            | {k: [{"from": "gpt", "value": k}] for k in ("chosen", "rejected")}
        ],
        same=[{"prompt": chat("Hi")} | {k: answer(k) for k in ("chosen", "rejected")}],
    ),
]


@pytest.mark.parametrize("kind", ["byte-level", "SentencePiece BPE"])
@pytest.mark.parametrize("case", FORMS, ids=lambda case: case.name)
def test_pairs_have_the_tokens_of_trl(case: Form, kind: str, tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    tokenizer = deepcopy(tokenizers[kind])
    tokenizer.chat_template = case.template
    found = ours(case.rows, tokenizer)
    expect = of_trl(case.same or case.rows, tokenizer)
    for name in IDS:
        assert [tokenizer.convert_ids_to_tokens(ids) for ids in found[name]] == [
            tokenizer.convert_ids_to_tokens(ids) for ids in expect[name]
        ], name
    given = [text for text in notices.given() if "last tokens change" not in text]
    assert case.notice in "\n".join(given)
    assert bool(given) == bool(case.notice)


def test_turns_end_once(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    """TRL's trainer never teaches the end of a turn that the template does not write."""
    tokenizer = deepcopy(tokenizers["byte-level"])
    tokenizer.chat_template = NO_END
    found, expect = ours(EXPLICIT_CHATS, tokenizer), of_trl(EXPLICIT_CHATS, tokenizer)
    for name in IDS[1:]:
        assert list(found[name]) == [[*ids, tokenizer.eos_token_id] for ids in expect[name]]
    assert any("do not end with a control token of the template" in text for text in notices.given())


@dataclass(frozen=True)
class Dropped:
    name: str
    row: Row
    notice: str
    template: str = CHATML


LONG = "long " * 100
DROPPED = [
    Dropped(
        name="the same answer twice",
        row={"prompt": chat("Hi"), "chosen": answer("Hello"), "rejected": answer("Hello")},
        notice='"chosen" and "rejected" are the same in 1 of 3 rows of rows.jsonl, which are left out. The first is',
    ),
    Dropped(
        name="a blank answer",
        row={"prompt": chat("Hi"), "chosen": answer(" "), "rejected": answer("Hello")},
        notice='column "prompt" or column "chosen" or column "rejected" of rows.jsonl is empty in 1 of 3 rows, which',
    ),
    Dropped(
        name="a prompt that leaves no room",
        row={"prompt": chat(LONG), "chosen": answer("yes"), "rejected": answer("no")},
        notice="maxLength: 1 of 3 training rows of rows.jsonl have a prompt of 64 tokens or more, which leaves no room",
    ),
    Dropped(
        name="answers that differ too late",
        row={"prompt": chat("Hi"), "chosen": answer(f"{LONG}yes"), "rejected": answer(f"{LONG}no")},
        notice="maxLength: 1 of 3 training rows of rows.jsonl have answers that do not differ within 64 tokens",
    ),
]


@pytest.mark.parametrize("case", DROPPED, ids=lambda case: case.name)
def test_what_is_left_out_is_said(case: Dropped, tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    tokenizer = deepcopy(tokenizers["byte-level"])
    tokenizer.chat_template = case.template
    assert len(ours([case.row, *EXPLICIT_CHATS], tokenizer, training={"maxLength": 64})) == 2
    assert any(case.notice in text for text in notices.given()), notices.given()


def test_long_answers_are_cut_and_that_is_said(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    row = {"prompt": "Why?", "chosen": f" yes {LONG}", "rejected": " no"}
    (found,) = ours([row], tokenizers["byte-level"], training={"maxLength": 16}).to_list()
    (expect,) = of_trl([row], tokenizers["byte-level"]).to_list()
    begin = len(expect["prompt_ids"])
    assert (found["chosen_ids"], found["length"]) == (expect["chosen_ids"][: 16 - begin], 16)
    assert found["rejected_ids"] == expect["rejected_ids"]
    assert any("1 of 1 training rows of rows.jsonl are longer than 16 tokens and are cut" in t for t in notices.given())


@dataclass(frozen=True)
class Refused:
    name: str
    rows: list[Row]
    message: str
    dataset: Row = field(default_factory=dict)
    template: str | None = CHATML


REFUSED = [
    Refused(
        name="no rejected answer",
        rows=[{"prompt": "a", "chosen": "b", "refused": "c"}],
        message='columns.rejected: no column "rejected" in rows.jsonl (columns: prompt, chosen, refused). Did you mean '
        '"refused"?',
    ),
    Refused(
        name="a prompt that is named and missing",
        rows=[{"chosen": "b", "rejected": "c", "query": "a"}],
        dataset={"columns": {"prompt": "question"}},
        message='columns.prompt: no column "question" in rows.jsonl',
    ),
    Refused(
        name="numbers",
        rows=[{"prompt": "a", "chosen": 1, "rejected": 2}],
        message="cannot be read as pairs of answers in 1 of 1 rows. The first is row 0, counted from 0: 1 is neither a"
        " text nor a list of messages",
    ),
    Refused(
        name="texts and messages",
        rows=[
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            {"prompt": "a"} | {k: str(answer(k)).replace("'", '"') for k in ("chosen", "rejected")},
        ],
        message="it holds messages, and the rows before it texts",
    ),
    Refused(
        name="a part of an answer that is not to be learnt",
        rows=[{"prompt": "a", "chosen": [answer("b")[0] | {"weight": 0}], "rejected": answer("c")}],
        message="a message of an answer has the weight 0, but answers are compared as a whole. Remove the key",
    ),
    Refused(
        name="the same answers everywhere",
        rows=[{"prompt": "a", "chosen": "b", "rejected": "b"}],
        message='"chosen" and "rejected" are the same in 1 of 1 rows of rows.jsonl. Name two other columns',
    ),
    Refused(
        name="a chat template for texts",
        rows=EXPLICIT_TEXTS,
        dataset={"chatTemplate": {"name": "zephyr"}},
        message="spec.dataset.chatTemplate: the rows of rows.jsonl are texts, which have no messages; remove it",
    ),
    Refused(
        name="no chat template",
        rows=EXPLICIT_CHATS,
        template=None,
        message="spec.dataset.chatTemplate: the model's tokenizer has no chat template",
    ),
    Refused(
        name="a template that writes prompts differently",
        rows=EXPLICIT_CHATS,
        template=COUNTED,
        message="chatTemplate: 2 of 2 training rows of rows.jsonl are left out, because the template writes the prompt"
        " differently where an answer follows it",
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_what_is_refused(case: Refused, tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    tokenizer = deepcopy(tokenizers["byte-level"])
    tokenizer.chat_template = case.template
    with pytest.raises(Failure) as raised:
        ours(case.rows, tokenizer, dataset=case.dataset)
    assert case.message in raised.value.message


def test_the_first_pair_is_shown(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    tokenizer = deepcopy(tokenizers["byte-level"])
    tokenizer.chat_template = CHATML
    row = first_row.described(ours(EXPLICIT_CHATS, tokenizer), tokenizer)
    assert row is not None
    asked = "<|im_start|>user\nWhat is a class?<|im_end|>\n<|im_start|>assistant\n"
    assert f"{asked}⟦A template.<|im_end|>\n⟧" in first_row.told(row)
    assert f"{asked}⟦No idea.<|im_end|>\n⟧" in first_row.told(row)
