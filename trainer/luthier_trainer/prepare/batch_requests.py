"""Reads requests of OpenAI's Batch API (`inputs.form: openai-batch`).

A request is an object with `custom_id`, `method`, `url` and `body`. What its body asks for becomes the settings of its
row. A request that asks for something that is not done here is the record of an error, which names the field: nothing
of a body is ignored, unless it asks for nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from luthier_api.run import GenerateRun
from luthier_trainer.data import chats
from luthier_trainer.data.columns import some
from luthier_trainer.data.load import Rows
from luthier_trainer.generation.overrides import read_overrides
from luthier_trainer.generation.rows import Line
from luthier_trainer.prepare.bad_rows import BadRow
from luthier_trainer.runtime.notices import notice

COLUMNS = ("custom_id", "method", "url", "body")
SETTINGS: Mapping[str, str] = {
    "max_tokens": "maxNewTokens",
    "max_completion_tokens": "maxNewTokens",
    "min_tokens": "minNewTokens",
    "temperature": "temperature",
    "top_p": "topP",
    "top_k": "topK",
    "min_p": "minP",
    "stop": "stop",
    "n": "perPrompt",
    "presence_penalty": "presencePenalty",
    "frequency_penalty": "frequencyPenalty",
    "repetition_penalty": "repetitionPenalty",
}
"""Field of a body → field of `spec.text`. Some are additions of vLLM."""
NOTHING: Mapping[str, tuple[Any, ...]] = {
    "stream": (False,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
}
"""Field of a body → values with which it asks for nothing. All others are refused."""
ABOUT_THE_REQUEST = frozenset({"model", "messages", "prompt", "seed", "response_format"})
"""Fields of a body that are read by themselves."""
OF_THE_CALLER = frozenset({"user", "metadata", "store", "safety_identifier", "prompt_cache_key"})
"""Fields of a body that say who asks, or what the server keeps. They change no answer, there or here."""
SEED_LIMIT = 2**32


def lines(rows: Rows, run: GenerateRun) -> Iterator[Line]:
    """Yield the line of each request. A notice names the models that were asked for, because the job has its own."""
    models: dict[str, None] = {}
    further = [name for name in rows.data.column_names if name not in COLUMNS]
    for row in rows.data:
        line: Line = {}
        problems = [f"{name}: is no part of a request; remove it" for name in further if row[name] is not None]
        try:
            line |= {"id": custom_id(row)}
            body = body_of(row, run)
            if isinstance(model := body.get("model"), str):
                models[model] = None
            read_body(body, run, line, problems)
        except BadRow as problem:
            problems.append(str(problem))
        if problems:
            line.setdefault("prompt", "")
            line.pop("settings", None)
            line["error"] = "; ".join(problems)
        yield line
    if models:
        notice(
            f"spec.inputs: the requests name the models {some(models)}; all are answered by the model of the job, and"
            " with the settings of spec.text where a body has none"
        )


def custom_id(row: Mapping[str, Any]) -> str:
    """Return the identifier of a request. Raises BadRow if it has none."""
    value = row.get("custom_id")
    if value is None or str(value) == "":
        raise BadRow("custom_id: empty; give each request one, so that its answer can be told")
    return str(value)


def body_of(row: Mapping[str, Any], run: GenerateRun) -> dict[str, Any]:
    """Return the body of a request, without fields that are null. Raises BadRow if it is for something else."""
    method, url = row.get("method"), row.get("url")
    if method != "POST":
        raise BadRow(f"method: {chats.shown(method)}; write POST")
    if url != url_of(run):
        raise BadRow(
            f"url: {chats.shown(url)}; a job with text.chat: {str(run.spec.text.chat).lower()} has {url_of(run)}"
        )
    body = row.get("body")
    if isinstance(body, str):  # of JSON files objects are JSON text
        with suppress(ValueError):
            body = json.loads(body)
    if not isinstance(body, dict):
        raise BadRow(f"body: {chats.shown(body)} is no object")
    return {name: value for name, value in body.items() if value is not None}


def url_of(run: GenerateRun) -> str:
    """Return the address that requests of the job have."""
    return "/v1/chat/completions" if run.spec.text.chat else "/v1/completions"


def read_body(body: Mapping[str, Any], run: GenerateRun, line: Line, problems: list[str]) -> None:
    """Add what a body asks for to its line, and to `problems` what it cannot have."""
    settings: dict[str, Any] = {}
    for name, value in body.items():
        try:
            take_field(name, value, settings)
        except BadRow as problem:
            problems.append(f"body.{name}: {problem}")
    for name, read in (("prompt", prompt), ("seed", seed), ("response_format", response_format)):
        try:
            found = read(body, run)
        except BadRow as problem:
            problems.append(str(problem))
            continue
        if found is not None:
            line[name] = found
    if settings:
        line["settings"] = settings


def take_field(name: str, value: Any, settings: dict[str, Any]) -> None:
    """Add what a field of a body overrides to `settings`. Raises BadRow if it asks for something that is not done."""
    if name in SETTINGS:
        take_setting(name, value, settings)
    elif name in NOTHING:
        if not any(value == one and type(value) is type(one) for one in NOTHING[name]):
            raise BadRow(f"{chats.shown(value)} is not possible here; remove it")
    elif name not in ABOUT_THE_REQUEST | OF_THE_CALLER:
        raise BadRow("is not known here; remove it")


def take_setting(name: str, value: Any, settings: dict[str, Any]) -> None:
    """Add a field of a body to what the row overrides. Raises BadRow if its value does not fit."""
    field = SETTINGS[name]
    if name == "stop" and isinstance(value, str):
        value = [value]
    if name == "top_k" and value == -1:  # vLLM's word for all tokens
        value = 0
    try:
        found = read_overrides("text", {field: value})[field]
    except ValueError as problem:
        raise BadRow(str(problem)) from None
    except KeyError:  # an empty text overrides nothing
        raise BadRow(f"{chats.shown(value)} says nothing; remove it") from None
    if settings.setdefault(field, found) != found:
        raise BadRow(f"{chats.shown(value)}, and another field of the body says {settings[field]}; remove one of them")


def prompt(body: Mapping[str, Any], run: GenerateRun) -> Any:
    """Return the messages of a request, or its prompt where the job has no chat. Raises BadRow if there are none."""
    name, other = ("messages", "prompt") if run.spec.text.chat else ("prompt", "messages")
    if other in body:
        raise BadRow(f"body.{other}: {url_of(run)} has {name}")
    value = body.get(name)
    if not run.spec.text.chat:
        if not isinstance(value, str) or not value.strip():
            raise BadRow(f"body.prompt: {chats.shown(value)}; write one text")
        return value
    try:
        found = chats.messages_of(value)
    except chats.Malformed as problem:
        raise BadRow(f"body.messages: {problem}") from None
    if not found:
        raise BadRow("body.messages: there are none")
    return found


def seed(body: Mapping[str, Any], run: GenerateRun) -> int | None:
    """Return the seed of a request; None if it has none. Raises BadRow if it is no seed."""
    value = body.get("seed")
    if value is None or (type(value) is int and 0 <= value < SEED_LIMIT):
        return value
    raise BadRow(f"body.seed: {chats.shown(value)} is no whole number from 0 to 2^32 - 1")


def response_format(body: Mapping[str, Any], run: GenerateRun) -> None:
    """Raise BadRow if a request asks for a form of its answer that the job does not give all its texts."""
    value = body.get("response_format")
    if value is None or value == {"type": "text"}:
        return
    own = run.spec.text.json_schema
    asked = value.get("json_schema") if isinstance(value, dict) and value.get("type") == "json_schema" else None
    if isinstance(asked, dict) and own is not None and asked.get("schema") == json.loads(own):
        return
    raise BadRow(
        f"body.response_format: {chats.shown(value)}; here all texts of a job have one form: set text.jsonSchema to the"
        " schema, or remove it"
    )
