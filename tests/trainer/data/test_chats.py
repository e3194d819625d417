"""Conversations become the tokens and the labels that TRL makes of them, for templates that it knows and others."""

from __future__ import annotations

import re
from collections.abc import Callable
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
from trl import SFTTrainer
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from luthier_api.finetune import FineTuneJobSpec
from luthier_trainer.data.load import Rows
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.tasks.causal_lm import CausalLM

TRL_TEMPLATES = Path(trl.__file__).parent / "chat_templates"
CONTROL = re.compile(r"<[|｜][^|｜<>]+[|｜]>|</?\w+>")  # spellings in templates that are tokens of their models
UNMARKED = """\
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
MARKED = """\
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
FAMILIES = ["qwen2_5", "qwen3", "llama3", "gemma", "phi3", "glm4moe", "cohere", "gptoss", "deepseekv3"]

Row = dict[str, Any]


def chat(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


CHATS = [
    chat("What is a class?", "A class is a template for objects."),
    chat("Say hello.", "Hello!", "And in French?", "Bonjour ! Ça va ? 🦜", "Thanks.", "You are welcome."),
    chat("Two lines:\nplease", "one\n\ntwo"),
]
PAIRS = [{"prompt": row[:-1], "completion": row[-1:]} for row in CHATS]
TEXTS = [
    {"prompt": "What is a class?", "completion": " A class is a template."},
    {"prompt": "def f():\n", "completion": "    return 1\n"},
    {"prompt": "A word that is cut in the mid", "completion": "dle of it"},
]


@pytest.fixture(scope="module")
def make_tokenizer(paragraphs: list[str]) -> Callable[..., PreTrainedTokenizerBase]:
    """A tokenizer of a kind, with the control tokens that a template spells."""
    trained = {kind: KINDS[kind](prose(paragraphs)[:200]) for kind in KINDS}

    def make(template: str | None, kind: str = "byte-level") -> PreTrainedTokenizerBase:
        from copy import deepcopy

        tokenizer = deepcopy(trained[kind])
        tokenizer.add_tokens(sorted(set(CONTROL.findall(template or ""))), special_tokens=True)
        tokenizer.chat_template = template
        return tokenizer

    return make


def ours(rows: list[Row], tokenizer: PreTrainedTokenizerBase, **spec: Any) -> list[Row]:
    """What `prepare` makes of rows."""
    training = {"maxLength": 4096} | spec.pop("training", {})
    dataset = {"files": ["rows.jsonl"]} | spec.pop("dataset", {})
    made = FineTuneJobSpec.model_validate(
        {"task": "causal-lm", "model": {"path": "/model"}, "dataset": dataset, "training": training} | spec
    )
    task = CausalLM()
    read = task.fitting(Rows(Dataset.from_list(rows), "rows.jsonl"), made)
    return task.encode(read, tokenizer, made, None, "training").to_list()


def of_trl(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, assistant: bool = False, completion: bool = True
) -> list[Row]:
    """What TRL's SFTTrainer makes of them."""
    template = None
    if assistant and not has_generation_markers(tokenizer.chat_template):
        template = get_training_chat_template(tokenizer)
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=template, completion_only_loss=completion)
    args = SimpleNamespace(
        dataset_num_proc=None,
        dataset_text_field="text",
        assistant_only_loss=assistant,
        max_length=4096,
        truncation_mode="keep_start",
        shuffle_dataset=False,
    )
    made = SFTTrainer._prepare_dataset(trainer, Dataset.from_list(rows), tokenizer, args, False, None, "train")
    return [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in made]


def labels(row: Row) -> list[int]:
    mask = row.get("loss_mask", [1] * len(row["input_ids"]))
    return [token if one else -100 for token, one in zip(row["input_ids"], mask, strict=True)]


def assert_same(rows: list[Row], expect: list[Row], tokenizer: PreTrainedTokenizerBase) -> None:
    assert [tokenizer.convert_ids_to_tokens(row["input_ids"]) for row in rows] == [
        tokenizer.convert_ids_to_tokens(row["input_ids"]) for row in expect
    ]
    assert [labels(row) for row in rows] == [row["labels"] for row in expect]


@pytest.mark.parametrize("kind", ["byte-level", "SentencePiece BPE"])
@pytest.mark.parametrize("family", FAMILIES)
def test_conversations_have_the_labels_of_trl(family: str, kind: str, make_tokenizer: Any) -> None:
    template = (TRL_TEMPLATES / f"{family}.jinja").read_text()
    rows = [{"messages": messages} for messages in CHATS]
    expect = of_trl(rows, make_tokenizer(template, kind), assistant=True)
    tokenizer = make_tokenizer(template, kind)
    found = ours(rows, tokenizer)
    if kind == "SentencePiece BPE":
        # transformers finds the end of a turn by the first token of its last character. This tokenizer makes two tokens
        # of a line break after a control token, and the model writes both.
        for row, other in zip(found, expect, strict=True):
            for i in range(1, len(other["labels"])):
                if row["loss_mask"][i] > (other["labels"][i] != -100):
                    assert tokenizer.convert_ids_to_tokens(row["input_ids"][i - 1 : i + 1]) == ["▁", "\n"]
                    row["loss_mask"][i] = 0
    assert_same(found, expect, tokenizer)
    assert any("TRL's training version" in text for text in notices.given())


@pytest.mark.parametrize("form", ["prompt-completion of texts", "prompt-completion of messages"])
@pytest.mark.parametrize("kind", ["byte-level", "SentencePiece BPE", "Unigram", "WordPiece"])
def test_completions_have_the_labels_of_trl(form: str, kind: str, make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(UNMARKED, kind)
    rows = TEXTS if form.endswith("texts") else PAIRS
    expect = of_trl(rows, tokenizer)
    for row in expect:
        if row["input_ids"][-2:] == [tokenizer.eos_token_id] * 2:  # TRL doubles what the tokenizer adds by itself
            row["input_ids"].pop()
            row["labels"].pop()
    assert_same(ours(rows, tokenizer), expect, tokenizer)


@pytest.mark.parametrize("loss_on", ["all", "assistant"])
def test_what_is_learnt_of_a_completion_of_messages(loss_on: str, make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(MARKED)
    expect = of_trl(PAIRS, tokenizer, assistant=loss_on == "assistant", completion=loss_on == "assistant")
    assert_same(ours(PAIRS, tokenizer, training={"lossOn": loss_on}), expect, tokenizer)


@pytest.mark.parametrize("kind", ["byte-level", "SentencePiece BPE"])
def test_turns_are_found_without_marks(kind: str, make_tokenizer: Any) -> None:
    """By comparing, they are what the marks of the same template say, and the line break after the turn."""
    rows = [{"messages": messages} for messages in CHATS]
    tokenizer = make_tokenizer(UNMARKED, kind)
    found = ours(rows, tokenizer)
    marked = make_tokenizer(UNMARKED, kind)
    marked.chat_template = MARKED
    assert [row["input_ids"] for row in found] == [row["input_ids"] for row in ours(rows, marked)]
    for row, expect in zip(found, of_trl(rows, marked, assistant=True), strict=True):
        more = [token for token, old in zip(labels(row), expect["labels"], strict=True) if token != old]
        assert set(tokenizer.convert_ids_to_tokens(more)) <= {"\n", "▁", "Ċ"}


@dataclass(frozen=True)
class Remark:
    name: str
    template: str
    messages: list[dict[str, Any]]
    learnt: str
    """The text of the labels."""
    notice: str


OPEN_END = MARKED.replace(
    "message.content + '<|im_end|>' }}{% endgeneration %}", "message.content }}{% endgeneration %}<|im_end|>"
)
NO_END = """\
{% for message in messages %}{{ message.role + ': ' + message.content + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}assistant: {% endif %}"""
USER_ONLY = MARKED.replace("in messages %}", "in messages if message.role != 'system' %}")
REMARKS = [
    Remark(
        name="marks without the end of a turn",
        template=OPEN_END,
        messages=CHATS[0],
        learnt="A class is a template for objects.<|im_end|>",
        notice="2 of 2 training rows of rows.jsonl have turns whose last token the template leaves out",
    ),
    Remark(
        name="no token ends a turn",
        template=NO_END,
        messages=CHATS[0],
        learnt=" A class is a template for objects.\n<|endoftext|>",  # the blank before it is one token with the word
        notice="2 of 2 training rows of rows.jsonl do not end with a control token of the template",
    ),
    Remark(
        name="a message that the template leaves out",
        template=USER_ONLY,
        messages=[{"role": "system", "content": "Be kind."}, *CHATS[0]],
        learnt="A class is a template for objects.<|im_end|>",
        notice="1 of 2 training rows of rows.jsonl have messages, tools or calls of tools that the chat template",
    ),
    Remark(
        name="no answer",
        template=MARKED,
        messages=CHATS[0][:1],
        learnt="You are kind.<|im_end|>",
        notice="1 of 2 training rows of rows.jsonl have no message of the assistant that could be learnt, and are left",
    ),
    Remark(
        name="a spelt control token",
        template=MARKED,
        messages=chat("Write <|im_end|> please", "It is <|im_end|>, here."),
        learnt="It is <|im_end|>, here.<|im_end|>",
        notice="1 of 2 training rows of rows.jsonl spell control tokens of the tokenizer in messages, which are",
    ),
]


@pytest.mark.parametrize("case", REMARKS, ids=lambda case: case.name)
def test_what_happens_to_rows_is_said(case: Remark, make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(MARKED)
    tokenizer.chat_template = case.template
    other = [*chat("Who are you?", "You are kind.")]
    rows = ours([{"messages": case.messages}, {"messages": other}], tokenizer)
    row = rows[0]
    assert tokenizer.decode([token for token in labels(row) if token != -100]) == case.learnt
    assert any(case.notice in text for text in notices.given())
    if "spelt" in case.name:
        expect = tokenizer.apply_chat_template(case.messages, sanitize_control_tokens=True, return_dict=False)
        assert row["input_ids"] == expect
        assert row["input_ids"].count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
    else:
        ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
        assert not any(a == b and a in ends for a, b in zip(row["input_ids"], row["input_ids"][1:], strict=False))


@dataclass(frozen=True)
class Weighted:
    name: str
    template: str
    learnt: str
    """The text of the labels of CHATS[1], of which the second answer is not to be learnt."""
    changes: dict[str, Any] = field(default_factory=dict)


THINKING = MARKED.replace(
    "{% generation %}{{ message.content",
    "{% generation %}{{ '' if loop.last else '<think></think>' }}{{ message.content",
)
WEIGHTED = [
    Weighted(
        name="marks",
        template=MARKED,
        learnt="Hello!<|im_end|>You are welcome.<|im_end|>",
    ),
    Weighted(
        name="marks, of a turn that is written differently later",
        template=THINKING,
        learnt="<think></think>Hello!<|im_end|>You are welcome.<|im_end|>",
    ),
    Weighted(
        name="no marks",
        template=UNMARKED,
        learnt="Hello!<|im_end|>\nYou are welcome.<|im_end|>\n",
    ),
    Weighted(
        name="completions",
        template=MARKED,
        learnt="Hello!<|im_end|>\n<|im_start|>user\nAnd in French?<|im_end|>\n<|im_start|>assistant\n"
        "<|im_start|>user\nThanks.<|im_end|>\n<|im_start|>assistant\nYou are welcome.<|im_end|>\n",
        changes={"training": {"lossOn": "completions"}},
    ),
]


@pytest.mark.parametrize("case", WEIGHTED, ids=lambda case: case.name)
def test_messages_of_weight_0_are_not_learnt(case: Weighted, make_tokenizer: Any) -> None:
    """They are read as all others: the tokens are the same as without weights."""
    weighted = [message | {"weight": int(number != 3)} for number, message in enumerate(CHATS[1])]
    halves = [{"prompt": weighted[:1], "completion": weighted[1:]}]
    rows = [{"messages": weighted}] if case.name != "completions" else halves
    tokenizer = make_tokenizer(MARKED)
    tokenizer.chat_template = case.template
    (row,) = ours(rows, tokenizer, **case.changes)
    assert tokenizer.decode([token for token in labels(row) if token != -100]) == case.learnt
    (plain,) = ours([{"messages": CHATS[1]}], tokenizer)
    assert row["input_ids"] == plain["input_ids"]


def test_what_is_not_to_be_learnt_is_refused_where_all_is_learnt(make_tokenizer: Any) -> None:
    rows = [{"messages": CHATS[0]}, {"messages": [CHATS[0][0], CHATS[0][1] | {"weight": 0}]}]
    with pytest.raises(Failure, match=r"spec\.training\.lossOn: all learns each token, and message 1 of row 1.* 0\."):
        ours(rows, make_tokenizer(MARKED), training={"lossOn": "all"})
    with pytest.raises(Failure, match=r"1 of 1 training rows of rows\.jsonl have no message of the assistant that"):
        ours(rows[1:], make_tokenizer(MARKED))


def test_a_template_that_cannot_be_compared_is_refused(make_tokenizer: Any) -> None:
    """It writes the number of messages first, so that no beginning of a conversation is the beginning of the whole."""
    tokenizer = make_tokenizer("{{ messages | length }}" + UNMARKED)
    with pytest.raises(
        Failure, match=r"chatTemplate: 2 of 2 .* Put \{% generation %\} .* or set spec\.training\.lossOn"
    ):
        ours([{"messages": CHATS[1]}, {"messages": CHATS[1]}], tokenizer)
    assert len(ours([{"messages": CHATS[1]}], tokenizer, training={"lossOn": "all"})) == 1


def test_rows_without_a_label_in_reach_are_left_out(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(MARKED)
    rows = [{"messages": chat("long " * 50, "answer")}, {"messages": chat("short", "answer")}]
    assert len(ours(rows, tokenizer, training={"maxLength": 32})) == 1
    assert any("1 of 2 training rows of rows.jsonl have no label within 32 tokens" in text for text in notices.given())


def test_the_begin_of_text_is_not_doubled(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer("{{ bos_token }}{{ bos_token }}" + UNMARKED, "SentencePiece BPE")
    (row,) = ours([{"messages": CHATS[0]}], tokenizer)
    assert row["input_ids"].count(tokenizer.bos_token_id) == 1
