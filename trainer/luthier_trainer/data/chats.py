"""Reads conversations: every form of rows that holds messages becomes one column of JSON text.

A row is then an object with `messages`, with `tools` if there are some, and, where it is a prompt and its completion,
with `prompt`, the number of messages that are the prompt. Messages have the keys that chat templates know: role,
content, tool_calls, name, tool_call_id, reasoning_content. Content is one text. A message that is not to be learnt has
the weight 0, as in OpenAI's files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from luthier_trainer.data import columns, tokens
from luthier_trainer.data.forms import COLUMNS, Form
from luthier_trainer.data.load import Rows
from luthier_trainer.data.reading import rows_at_once
from luthier_trainer.runtime.notices import notice

if TYPE_CHECKING:
    from datasets import Dataset

CHAT = "chat"  # the column of JSON text
ROLES = ("system", "developer", "user", "assistant", "tool")
SAME_ROLE = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
"""Names of roles in ShareGPT and similar datasets → the role of chat templates."""
CALLS = ("function_call", "tool_call")
"""Roles of ShareGPT whose value is a call of a tool, as JSON."""
PARTS_SHOWN = 60  # characters of a cell in a message

Message = dict[str, Any]
Chat = dict[str, Any]


class Malformed(ValueError):
    """A cell is no conversation. The text says why."""


def has_messages(rows: Rows, form: Form) -> bool:
    """Return whether rows of this form are conversations, and not pairs of texts."""
    if form.name != "prompt-completion":
        return form.can_converse
    return any(is_nested(rows, form.columns[role]) for role in ("prompt", "completion"))


def is_nested(rows: Rows, column: str) -> bool:
    """Return whether the cells of a column are not texts: lists or objects, or values of several kinds."""
    feature = rows.data.features[column]
    return column in rows.mixed or not columns.is_text(feature)


def conversations(rows: Rows, form: Form) -> Rows:
    """Return rows with the one column `CHAT`.

    Rows without messages are dropped, with a notice. Raises Failure if a row is no conversation, or if no row is left.
    """
    role, column = next(iter(form.columns.items()))
    field, subject = f"{COLUMNS}.{role}", f'column "{column}" of {rows.origin}'
    read = partial(_chat, form)
    return as_json(rows, form.columns, CHAT, read, f"{field}: {subject}", form.info.title, parallel=True)


def as_json(
    rows: Rows,
    roles: Mapping[str, str],
    into: str,
    read: Callable[[dict[str, Any]], Mapping[str, Any] | None],
    subject: str,
    title: str,
    *,
    parallel: bool = False,
) -> Rows:
    """Return rows with the one column `into`: what `read` makes of the cells of each row, as JSON text.

    `roles`: role → column; `read` gets the cells by role. It returns None for an empty row, which is dropped, with a
    notice, and raises Malformed for a row that is not what `title` says. `subject` begins the messages.
    `parallel`: `read` keeps nothing from row to row, so that several processes can call it. Raises Failure if a row is
    malformed, or if no row is left.
    """
    import numpy
    from datasets import Features, Value

    nested = {column: is_nested(rows, column) for column in roles.values()}

    def convert(batch: dict[str, list[Any]]) -> dict[str, list[str | None]]:
        made: dict[str, list[str | None]] = {into: [], "problem": []}
        for cells in _rows_of(batch):
            try:
                row = read({role: _cell(cells[column], nested[column]) for role, column in roles.items()})
                made[into].append(json.dumps(row, ensure_ascii=False) if row else None)
                made["problem"].append(None)
            except Malformed as error:
                made[into].append(None)
                made["problem"].append(str(error))
        return made

    found = tokens.mapped(
        rows.data.select_columns(list(dict.fromkeys(roles.values()))),
        convert,
        Features({into: Value("string"), "problem": Value("string")}),
        parallel=parallel,
    )
    problems = [i for i, problem in enumerate(found["problem"]) if problem is not None]
    if problems:
        raise columns.invalid(
            f"{subject} cannot be read as {title} in {len(problems)} of {len(found)} rows. The first is"
            f" {rows.place(problems[0])}: {found[problems[0]]['problem']}"
        )
    there = numpy.array([row is not None for row in found[into]], dtype=bool)
    empty = numpy.flatnonzero(~there)
    if len(empty) == len(found):
        raise columns.nothing_left(f"{subject} is empty in all {len(found)} rows")
    kept = replace(rows, data=found.select_columns([into]))
    if len(empty):
        notice(
            f"{subject} is empty in {len(empty)} of {len(found)} rows, which are left out. The first is"
            f" {rows.place(int(empty[0]))}"
        )
        kept = kept.select(numpy.flatnonzero(there))
    return kept


def prompt_of(value: Any, nested: bool) -> list[Message]:
    """Return the messages in a cell; a text is the message of a user. Raises Malformed if it holds neither.

    `nested`: whether the column holds messages (`is_nested`).
    """
    messages = messages_of(listed(_cell(value, nested)), "user")
    if not messages:
        raise Malformed("it has no messages")
    return messages


def tools_in(value: Any, nested: bool) -> list[dict[str, Any]]:
    """Return the tools in a cell, which may be empty. Raises Malformed if it holds something else, or one has no name.

    `nested`: whether the column holds lists (`is_nested`).
    """
    tools = tools_of(_cell(value, nested))
    for tool in tools:
        function = tool["function"]
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Malformed(f"tools: {shown(tool)} has no name")
    return tools


def prompts(rows: Rows, column: str, field: str) -> Iterator[list[Message]]:
    """Yield the messages of each row; a text is the message of a user. Raises Failure at a row that holds neither."""
    nested = is_nested(rows, column)
    for i, row in enumerate(rows.data.select_columns([column])):
        try:
            yield prompt_of(row[column], nested)
        except Malformed as error:
            raise columns.invalid(f"{field}: {rows.place(i)}: {error}") from None


def contents(data: Dataset) -> Iterator[str]:
    """Yield the contents of all messages of conversations."""
    for row in data:
        yield from (message["content"] for message in json.loads(row[CHAT])["messages"])


def unlearnt(chat: Chat) -> list[int]:
    """Return the numbers of the messages with the weight 0, which are not learnt."""
    return [number for number, message in enumerate(chat["messages"]) if message.get("weight") == 0]


def joined(data: Dataset) -> Iterator[list[str]]:
    """Yield the contents of conversations, in batches: all messages of one as one text."""
    for batch in data.iter(rows_at_once(data, 1_000)):
        chats = map(json.loads, batch[CHAT])
        yield ["\n".join(message["content"] for message in chat["messages"]) for chat in chats]


def _rows_of(batch: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    names = list(batch)
    for cells in zip(*batch.values(), strict=True):
        yield dict(zip(names, cells, strict=True))


def _cell(value: Any, nested: bool) -> Any:
    """Return what a cell holds. Nested values of JSON files are JSON text, and those of other files have empty keys.

    Parquet has the same keys in all objects of a column, and null where an object has no such key.
    """
    return _parsed(value) if nested and isinstance(value, str) else _without_nulls(value)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _chat(form: Form, cells: dict[str, Any]) -> Chat | None:
    """Return a row as a conversation; None if it is empty. Raises Malformed."""
    if form.name in ("messages", "sharegpt"):
        messages = messages_of(listed(cells["messages"]))
        prompt = None
    else:
        asked = messages_of(_with_input(cells), "user")
        answer = messages_of(listed(cells["completion"]), "assistant")
        if not any(says_something(message) for message in answer):
            return None
        messages, prompt = asked + answer, len(asked)
    if not messages:
        return None
    if cells.get("system"):
        messages = [{"role": "system", "content": str(cells["system"])}, *messages]
        prompt = None if prompt is None else prompt + 1
    found: Chat = {"messages": messages}
    if tools := tools_of(cells.get("tools")):
        found["tools"] = tools
    if prompt is not None:
        found["prompt"] = prompt
    return found


def says_something(message: Message) -> bool:
    """Return whether a message has a content, or calls a tool."""
    return bool(message["content"].strip() or message.get("tool_calls"))


def _with_input(cells: dict[str, Any]) -> Any:
    """Return the prompt; in rows of Alpaca, the instruction and, after a blank line, its input."""
    prompt, given = listed(cells["prompt"]), cells.get("input")
    if isinstance(prompt, str) and isinstance(given, str) and given.strip():
        return f"{prompt}\n\n{given}"
    return prompt


def listed(value: Any) -> Any:
    """Return the value of a cell, or the messages of which it is the JSON text, as in tables of CSV."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        parsed = _parsed(value)
        messages = parsed.get("messages") if isinstance(parsed, dict) else parsed
        if (
            isinstance(messages, list)
            and messages
            and all(isinstance(m, dict) and {"role", "from"} & set(m) for m in messages)
        ):
            return messages
    return value


def messages_of(value: Any, role: str | None = None) -> list[Message]:
    """Return messages with the keys of chat templates. A text becomes one message of `role`, if that is given.

    Raises Malformed.
    """
    if value is None or value == "":
        return []
    if isinstance(value, str) and role is not None:
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise Malformed(f"{shown(value)} is no list of messages")
    return [_message(item, i) for i, item in enumerate(value)]


def _message(item: Any, number: int) -> Message:
    """Return a message with the keys of chat templates. `number` is its place. Raises Malformed."""
    if not isinstance(item, dict):
        raise Malformed(f"message {number} is {shown(item)}, and no object with role and content")
    given = {key: value for key, value in item.items() if value is not None and key not in ("from", "value")}
    name = given.get("role", item.get("from"))
    if not isinstance(name, str):
        raise Malformed(f"message {number} has no role. Its keys are: {', '.join(item)}")
    weight = given.pop("weight", 1)
    if weight not in (0, 1):
        raise Malformed(
            f"message {number} has the weight {shown(weight)}. The weights are: 1, the message is learnt, and 0, it is"
            " only read"
        )
    if weight == 0:
        given["weight"] = 0
    content = given.get("content", item.get("value"))
    role = SAME_ROLE.get(name.lower(), name.lower())
    if role in CALLS:
        return {"role": "assistant", "content": "", "tool_calls": _calls(_parsed(content), number)}
    if role not in ROLES:
        raise Malformed(f"message {number} has the role {name}. The roles are: {', '.join(ROLES)}")
    found = {**given, "role": role, "content": _content(content, number)}
    if calls := given.get("tool_calls"):
        found["tool_calls"] = _calls(calls, number)
    elif content is None and not given.get("reasoning_content"):
        raise Malformed(f"message {number} has no content. Its keys are: {', '.join(item)}")
    return found


def _content(value: Any, number: int) -> str:
    """Return a content as one text: its parts follow each other directly, as chat templates write them.

    Raises Malformed if a part is no text.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)  # the answer of a tool
    texts = []
    for part in value:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            kind = part.get("type", "?") if isinstance(part, dict) else type(part).__name__
            raise Malformed(f"message {number} has content of the type {kind}. Models of text read only text")
        texts.append(text)
    return "".join(texts)


def _parsed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _calls(value: Any, number: int) -> list[dict[str, Any]]:
    """Return calls of tools, each with the arguments as an object, which is what chat templates expect.

    Raises Malformed if a tool has no name.
    """
    calls = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Malformed(f"message {number} calls a tool without a name: {shown(call)}")
        made = {"name": function["name"], "arguments": _parsed(function.get("arguments", {}))}
        others = {key: call[key] for key in ("id",) if call.get(key) is not None}
        calls.append({"type": "function", "function": made} | others)
    return calls


def tools_of(value: Any) -> list[dict[str, Any]]:
    """Return the tools of a conversation as chat templates expect them. Raises Malformed."""
    tools = _parsed(value)
    if not tools:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Malformed(f"tools: {shown(tools)} is no list of JSON schemas")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def shown(value: Any) -> str:
    """Return the beginning of a value, as JSON, for a message."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= PARTS_SHOWN else f"{text[:PARTS_SHOWN]}…"
