"""The first steps of a newcomer: each common form of a file is read, or its refusal says what to do."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from luthier_trainer.data.chats import CHAT
from luthier_trainer.prepare.training import read_examples
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.tasks.causal_lm import CausalLM
from luthier_trainer.tasks.table import TASKS

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SHARED = [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
CALL = {"name": "add", "arguments": {"a": 1}}
TOOL = {"name": "add", "parameters": {}}


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@dataclass(frozen=True)
class Reads:
    name: str
    content: str
    form: str
    chat: dict[str, Any] | None = None
    """The first row, if rows are conversations."""
    file: str = "x.jsonl"
    dataset: dict[str, Any] = field(default_factory=dict)
    notices: tuple[str, ...] = ()


READ = [
    Reads(name="texts", content=lines({"text": "a"}), form="text"),
    Reads(name="another name", content=lines({"body": "a"}), dataset={"columns": {"text": "body"}}, form="text"),
    Reads(name="messages", content=lines({"messages": TURNS}), form="messages", chat={"messages": TURNS}),
    Reads(
        name="messages in a list, under another name",
        content=json.dumps([{"dialog": TURNS}]),
        file="x.json",
        dataset={"columns": {"messages": "dialog"}},
        form="messages",
        chat={"messages": TURNS},
    ),
    Reads(
        name="messages in a table",
        content='messages\n"' + json.dumps(TURNS).replace('"', '""') + '"\n',
        file="x.csv",
        form="messages",
        chat={"messages": TURNS},
    ),
    Reads(
        name="ShareGPT",
        content=lines({"conversations": SHARED}),
        form="sharegpt",
        chat={"messages": [{"role": "system", "content": "Be kind."}, *TURNS]},
        notices=(
            "spec.dataset: the rows of x.jsonl are read as conversations of ShareGPT: from becomes role, and value",
        ),
    ),
    Reads(
        name="a call of a tool in ShareGPT, and its answer",
        content=lines(
            {
                "conversations": [
                    {"from": "human", "value": "1+1"},
                    {"from": "function_call", "value": json.dumps(CALL)},
                    {"from": "observation", "value": "2"},
                    {"from": "gpt", "value": "Two"},
                ],
                "tools": json.dumps([TOOL]),
            }
        ),
        form="sharegpt",
        chat={
            "messages": [
                {"role": "user", "content": "1+1"},
                {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
                {"role": "tool", "content": "2"},
                {"role": "assistant", "content": "Two"},
            ],
            "tools": [{"type": "function", "function": TOOL}],
        },
    ),
    Reads(
        name="arguments as text, and parts of a content, as in OpenAI's files",
        content=lines(
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "+1"}]},
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [
                            {"id": "c1", "type": "function", "function": CALL | {"arguments": '{"a": 1}'}},
                        ],
                    },
                    {"role": "tool", "tool_call_id": "c1", "content": "2"},
                ]
            }
        ),
        form="messages",
        chat={
            "messages": [
                {"role": "user", "content": "1+1"},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"type": "function", "function": CALL, "id": "c1"}],
                },
                {"role": "tool", "tool_call_id": "c1", "content": "2"},
            ]
        },
    ),
    Reads(
        name="Alpaca, with an answer that looks like JSON",
        content=json.dumps([{"instruction": "Count", "input": "to 2", "output": "[1, 2]"}]),
        file="x.json",
        form="alpaca",
        chat={
            "messages": [
                {"role": "user", "content": "Count\n\nto 2"},
                {"role": "assistant", "content": "[1, 2]"},
            ],
            "prompt": 1,
        },
        notices=("spec.dataset: the rows of x.json are read as instructions of Alpaca: instruction and input become",),
    ),
    Reads(name="prompts and completions", content=lines({"prompt": "a", "completion": "b"}), form="prompt-completion"),
    Reads(
        name="answers that are good or bad",
        content=lines({"prompt": "a", "completion": "b", "label": False}),
        form="prompt-completion",
        notices=(
            'spec.dataset.columns: column "label" of x.jsonl is not read: all completions are learnt. If it tells good',
        ),
    ),
    Reads(
        name="prompts and completions of messages",
        content=lines({"prompt": TURNS[:1], "completion": TURNS[1:]}),
        form="prompt-completion",
        chat={"messages": TURNS, "prompt": 1},
    ),
    Reads(
        name="columns of two forms",
        content=lines({"messages": TURNS, "text": "a"}),
        form="messages",
        chat={"messages": TURNS},
        notices=("spec.dataset: the rows of x.jsonl are read as conversations. Their columns also fit text; set",),
    ),
    Reads(
        name="columns of two forms, of which the job names one",
        content=lines({"messages": TURNS, "text": "a"}),
        dataset={"form": "text"},
        form="text",
    ),
    Reads(
        name="a row without messages",
        content=lines({"messages": TURNS}, {"messages": []}),
        form="messages",
        chat={"messages": TURNS},
        notices=(
            'spec.dataset.columns.messages: column "messages" of x.jsonl is empty in 1 of 2 rows, which are left',
        ),
    ),
]


@dataclass(frozen=True)
class Refused:
    name: str
    content: str
    message: str
    file: str = "x.jsonl"
    dataset: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


NONE = "spec.dataset.columns: {file} has no columns by which its rows could be read (columns: {columns}). "
REFUSED = [
    Refused(
        name="semicolons",
        file="x.csv",
        content="question;answer\na;b\n",
        message=(
            'spec.dataset.columns.text: no column "text" in x.csv (columns: question;answer). The only column is called'
            " 'question;answer'. If its cells are separated by semicolon, set spec.dataset.csv.separator to semicolon"
        ),
    ),
    Refused(
        name="messages under another column",
        content=lines({"id": 1, "dialog": TURNS}, {"id": 2, "dialog": TURNS}),
        message=NONE.format(file="x.jsonl", columns="id, dialog")
        + "If dialog holds conversations, set spec.dataset.columns.messages: dialog",
    ),
    Refused(
        name="questions and answers",
        file="x.csv",
        content="question,answer\na,b\n",
        message=NONE.format(file="x.csv", columns="question, answer")
        + "If they are prompts and completions, set spec.dataset.columns.prompt: question and"
        " spec.dataset.columns.completion: answer",
    ),
    Refused(
        name="one text under another name",
        content=lines({"id": 1, "body": "a"}),
        message=NONE.format(file="x.jsonl", columns="id, body")
        + "To learn its texts, set spec.dataset.columns.text: body",
    ),
    Refused(
        name="pairs of preferences",
        content=lines({"prompt": "a", "chosen": "b", "rejected": "c"}),
        message=NONE.format(file="x.jsonl", columns="prompt, chosen, rejected")
        + "Rows with a chosen and a rejected answer belong to task: preference, or reward",
    ),
    Refused(
        name="a list of messages",
        file="x.json",
        content=json.dumps(TURNS),
        message=NONE.format(file="x.json", columns="role, content")
        + "Each row is a single message (role, content), and a row is to be a whole conversation: write one"
        ' {"messages": [...]} a line',
    ),
    Refused(
        name="an object with a list for each column",
        file="x.json",
        content=json.dumps({"text": ["a", "b"], "label": ["c", "d"]}),
        message='spec.dataset.columns.text: column "text" of x.json holds lists, not text (no column holds text). The'
        " file holds one object, with a list for each column. Write one object for each row; pandas does so with",
    ),
    Refused(
        name="rows by their names in an object",
        file="x.json",
        content=json.dumps({"a": {"text": "x"}, "b": {"text": "y"}}),
        message=NONE.format(file="x.json", columns="a, b")
        + "The file holds one object, with 2 objects in it. Write one object of texts for each row",
    ),
    Refused(
        name="tokens",
        content=lines({"input_ids": [1, 2]}, {"input_ids": [3]}),
        message=NONE.format(file="x.jsonl", columns="input_ids") + "Rows of tokens are not read, because prepare",
    ),
    Refused(
        name="prompts and responses",
        content=lines({"prompt": "a", "response": "b"}),
        message=NONE.format(file="x.jsonl", columns="prompt, response")
        + "If they are prompts and completions, set spec.dataset.columns.prompt: prompt and"
        " spec.dataset.columns.completion: response",
    ),
    Refused(
        name="a table without a header",
        file="x.csv",
        content="I like it,pos\nbad,neg\n",
        message=NONE.format(file="x.csv", columns="I like it, pos")
        + "To learn the texts of one of them, set spec.dataset.columns.text to it: I like it, pos. To learn one as the"
        " answer to another, set spec.dataset.columns.prompt and spec.dataset.columns.completion. The first line of a"
        " table is read as the names of its columns",
    ),
    Refused(
        name="rows inside an object",
        file="x.json",
        content=json.dumps({"data": [{"messages": TURNS}]}),
        message=NONE.format(file="x.json", columns="data")
        + "The file holds one object. If its rows are in data, write that list alone into the file",
    ),
    Refused(
        name="lines of strings",
        content='"a"\n"b"\n',
        message=(
            "spec.dataset.files: {path} cannot be read as json: row 0, counted from 0 (line 1), is no object but of"
            ' kind: text. Each row is an object, such as {"text": "..."}'
        ),
    ),
    Refused(
        name="lines of lists",
        content=lines(TURNS, TURNS),
        message=(
            "spec.dataset.files: {path} cannot be read as json: line 1: something follows the end of the list. Write"
            ' one object a line, or one list of objects; if each line is a conversation, write {"messages": [...]}'
        ),
    ),
    Refused(name="an empty file", content="", message="spec.dataset.files: {path} is empty"),
    Refused(name="an empty list", content="[]", message="spec.dataset: x.jsonl has no rows"),
    Refused(
        name="an unknown role",
        content=lines({"messages": [{"role": "narrator", "content": "a"}]}),
        message=(
            'spec.dataset.columns.messages: column "messages" of x.jsonl cannot be read as conversations in 1 of 1'
            " rows. The first is row 0, counted from 0 (line 1 of x.jsonl): message 0 has the role narrator. The roles"
            " are: system, developer, user, assistant, tool"
        ),
    ),
    Refused(
        name="a message that is learnt by half",
        content=lines({"messages": [TURNS[0], TURNS[1] | {"weight": 0.5}]}),
        message='spec.dataset.columns.messages: column "messages" of x.jsonl cannot be read as conversations in 1 of 1'
        " rows. The first is row 0, counted from 0 (line 1 of x.jsonl): message 1 has the weight 0.5. The"
        " weights are: 1, the message is learnt, and 0, it is only read",
    ),
    Refused(
        name="an image",
        content=lines({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        message='spec.dataset.columns.messages: column "messages" of x.jsonl cannot be read as conversations in 1 of 1'
        " rows. The first is row 0, counted from 0 (line 1 of x.jsonl): message 0 has content of the type image_url."
        " Models of text read only text",
    ),
    Refused(
        name="a loss that rows do not have",
        content=lines({"messages": TURNS}),
        training={"lossOn": "completions"},
        message="spec.training.lossOn: completions does not apply to conversations, as which the rows of x.jsonl are"
        " read. Choose assistant or all, or remove it",
    ),
    Refused(
        name="a template for texts",
        content=lines({"text": "a"}),
        dataset={"chatTemplate": {"name": "zephyr"}},
        message="spec.dataset.chatTemplate: the rows of x.jsonl are texts, which have no messages; remove it",
    ),
    Refused(
        name="conversations that are joined",
        content=lines({"messages": TURNS}),
        training={"packing": "concatenate"},
        message="spec.training.packing: concatenate joins texts, and the rows of x.jsonl are conversations. Choose"
        " isolated, which keeps each row whole, or none",
    ),
    Refused(
        name="columns of no form",
        content=lines({"messages": TURNS}),
        dataset={"columns": {"text": "a", "messages": "b"}},
        message="spec.dataset.columns: no form of rows has all of messages, text. The forms are: messages (messages);",
    ),
]


@pytest.mark.parametrize("case", READ, ids=lambda case: case.name)
def test_a_file_is_read(case: Reads, make_run: Any, tmp_path: Path) -> None:
    (tmp_path / case.file).write_text(case.content)
    run = make_run(dataset={"files": [str(tmp_path / case.file)]} | case.dataset)
    rows = read_examples(CausalLM(), run, tmp_path / "cache").train
    assert rows.form is not None
    assert rows.form.name == case.form
    assert (json.loads(rows.data[0][CHAT]) if CHAT in rows.data.column_names else None) == case.chat
    given = notices.given()
    assert len(given) == len(case.notices) or not case.notices
    assert all(text.startswith(expect) for text, expect in zip(given, case.notices, strict=False))


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_a_refusal_says_what_to_do(case: Refused, make_run: Any, tmp_path: Path) -> None:
    path = tmp_path / case.file
    path.write_text(case.content)
    training = {"maxLength": 64, "batchSize": 4} | case.training
    run = make_run(dataset={"files": [str(path)]} | case.dataset, training=training)
    with pytest.raises(Failure) as failure:
        read_examples(CausalLM(), run, tmp_path / "cache")
    assert failure.value.message.startswith(case.message.replace("{path}", str(path)))


@dataclass(frozen=True)
class OtherTask:
    """A file that was meant for another task, or that is no table."""

    name: str
    task: str
    file: str
    content: bytes
    message: str


ZIP = b"PK\x03\x04\x14\x00\x06\x00"
OTHERS = [
    OtherTask(
        name="texts, of which pairs are to be learnt",
        task="preference",
        file="x.txt",
        content=b"a\nb\n",
        message='spec.dataset.columns.chosen: no column "chosen" in x.txt (columns: text). Rows with nothing but texts'
        " belong to task: causal-lm",
    ),
    OtherTask(
        name="conversations, of which pairs are to be learnt",
        task="reward",
        file="x.jsonl",
        content=lines({"messages": TURNS}).encode(),
        message='spec.dataset.columns.chosen: no column "chosen" in x.jsonl (columns: messages). Rows with'
        " conversations belong to task: causal-lm",
    ),
    OtherTask(
        name="prompts and completions, of which pairs are to be learnt",
        task="preference",
        file="x.jsonl",
        content=lines({"prompt": "a", "completion": "b"}).encode(),
        message='spec.dataset.columns.chosen: no column "chosen" in x.jsonl (columns: prompt, completion). Rows with'
        " prompts and completions belong to task: causal-lm",
    ),
    OtherTask(
        name="answers with a label, for a model of rewards",
        task="reward",
        file="x.jsonl",
        content=lines({"prompt": "a", "completion": "b", "label": True}).encode(),
        message='spec.dataset.columns.chosen: no column "chosen" in x.jsonl (columns: prompt, completion, label). Rows'
        " with answers that are good or bad belong to task: preference, with spec.preference.lossType: kto",
    ),
    OtherTask(
        name="conversations for classes",
        task="text-classification",
        file="x.jsonl",
        content=lines({"messages": TURNS}).encode(),
        message='spec.dataset.columns.text: no column "text" in x.jsonl (columns: messages). Rows with conversations'
        " belong to task: causal-lm",
    ),
    OtherTask(
        name="pairs for classes",
        task="text-classification",
        file="x.jsonl",
        content=lines({"prompt": "a", "chosen": "b", "rejected": "c"}).encode(),
        message='spec.dataset.columns.text: no column "text" in x.jsonl (columns: prompt, chosen, rejected). Rows with'
        " a chosen and a rejected answer belong to task: preference, or reward",
    ),
    OtherTask(
        name="classes of unusual names",
        task="text-classification",
        file="x.csv",
        content=b"review,sentiment\na,1\nb,0\n",
        message='spec.dataset.columns.text: no column "text" in x.csv (columns: review, sentiment). Name the one that'
        " plays this role. The first line of a table is read as the names of its columns",
    ),
    OtherTask(
        name="texts under another name beside a label",
        task="text-classification",
        file="x.csv",
        content=b"body,label\na,1\nb,0\n",
        message='spec.dataset.columns.text: no column "text" in x.csv (columns: body, label). Did you mean "body"?',
    ),
    OtherTask(
        name="names of images",
        task="image-classification",
        file="x.csv",
        content=b"file_name,label\na.png,b\n",
        message='spec.dataset.columns.image: no column "image" in x.csv (columns: file_name, label). Name the one that'
        " holds images; a folder of them is read with dataset.format: imagefolder",
    ),
    OtherTask(
        name="texts for images",
        task="image-classification",
        file="x.csv",
        content=b"text,label\na,b\n",
        message='spec.dataset.columns.image: no column "image" in x.csv (columns: text, label). Rows with texts and'
        " labels belong to task: text-classification",
    ),
    OtherTask(
        name="a workbook",
        task="causal-lm",
        file="x.xlsx",
        content=ZIP,
        message="spec.dataset.files: x.xlsx is a workbook, which is not read; save it as CSV",
    ),
    OtherTask(
        name="a workbook that was renamed",
        task="causal-lm",
        file="x.csv",
        content=ZIP + bytes(8),
        message="spec.dataset.files: {path} is a zip archive, as workbooks of Excel are; save the workbook as CSV, or",
    ),
    OtherTask(
        name="a document",
        task="causal-lm",
        file="x.pdf",
        content=b"%PDF-1.4",
        message="spec.dataset.files: x.pdf is a document, which is not read; write its text into a file of text, or of",
    ),
    OtherTask(
        name="an image by itself",
        task="image-classification",
        file="x.png",
        content=b"\x89PNG",
        message="spec.dataset.files: x.png is an image; name its folder, and set spec.dataset.format: imagefolder",
    ),
    OtherTask(
        name="a Parquet file that is said to be CSV",
        task="causal-lm",
        file="x.csv",
        content=b"PAR1\x15\x04",
        message="spec.dataset.files: {path} is a Parquet file; set spec.dataset.format to parquet",
    ),
]


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.name)
def test_a_file_for_something_else(case: OtherTask, make_run: Any, tmp_path: Path) -> None:
    path = tmp_path / case.file
    path.write_bytes(case.content)
    run = make_run(task=case.task, dataset={"files": [str(path)]})
    with pytest.raises(Failure) as failure:
        read_examples(TASKS[case.task], run, tmp_path / "cache")
    assert failure.value.message.startswith(case.message.replace("{path}", str(path)))


FOLDERS = [
    # files in it             what the message says of them
    (("a/x.jsonl.gz",), "name its files, for example {folder}/a/*.jsonl.gz"),
    (("cat/1.png", "x.csv"), "to read the images in it, set spec.dataset.format: imagefolder"),
    (("x.unknown",), "it has no file of a known format"),
    ((), "it is empty"),
]


@pytest.mark.parametrize(("files", "expect"), FOLDERS, ids=lambda value: str(value)[:20])
def test_a_folder(files: tuple[str, ...], expect: str, make_run: Any, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    with pytest.raises(Failure) as failure:
        read_examples(CausalLM(), make_run(dataset={"files": [str(folder)]}), tmp_path / "cache")
    expected = f"spec.dataset.files[0]: there is no file {folder}. It is a folder: {expect}"
    assert failure.value.message == expected.replace("{folder}", str(folder))
