"""Requests of OpenAI's Batch API: what their bodies ask for, and the answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from trainer.generating import generate_run, generate_shards, result_lines
from transformers import AutoTokenizer

from luthier_api.run import GenerateRun
from luthier_trainer.prepare.generation_rows import read_inputs
from luthier_trainer.prepare.main import main as prepare
from luthier_trainer.runtime import notices

Request = dict[str, Any]
ASKED = [{"role": "user", "content": "What is a lute?"}]
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}}}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def request(custom_id: str = "one", url: str = "/v1/chat/completions", **body: Any) -> Request:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "gpt-9", "messages": ASKED} | body}


def job(folder: Path, requests: list[Request], model: Path = Path("/model"), **spec: Any) -> GenerateRun:
    """A job over a file of requests."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "requests.jsonl").write_text("\n".join(map(json.dumps, requests)))
    inputs = {"dataset": {"files": [str(folder / "requests.jsonl")]}, "form": "openai-batch"}
    given = {"task": "text-generation", "model": {"path": str(model)}, "inputs": inputs}
    return generate_run(folder / "job", [], **given | {"text": {"chat": True}} | spec)


@dataclass(frozen=True)
class Case:
    name: str
    body: Request
    settings: Request = field(default_factory=dict)
    others: Request = field(default_factory=dict)
    error: str | None = None


CASES = [
    Case(name="nothing but messages", body={}),
    Case(name="nulls ask for nothing", body={"temperature": None, "tools": None, "logit_bias": None}),
    Case(
        name="all that there is",
        body={
            "max_tokens": 7,
            "temperature": 0.5,
            "top_p": 0.9,
            "stop": ["a", "b"],
            "n": 2,
            "presence_penalty": 1,
            "frequency_penalty": -1.5,
            "seed": 5,
            "response_format": {"type": "text"},
        },
        settings={
            "maxNewTokens": 7,
            "temperature": 0.5,
            "topP": 0.9,
            "stop": ["a", "b"],
            "presencePenalty": 1,
            "frequencyPenalty": -1.5,
        },
        others={"seed": 5, "outputs": 2},
    ),
    Case(
        name="what vLLM adds",
        body={"top_k": -1, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 2, "temperature": 1},
        settings={"topK": 0, "minP": 0.1, "repetitionPenalty": 1.2, "minNewTokens": 2, "temperature": 1},
    ),
    Case(name="one stop string", body={"stop": "end"}, settings={"stop": ["end"]}),
    Case(name="the newer name", body={"max_completion_tokens": 9}, settings={"maxNewTokens": 9}),
    Case(name="both names", body={"max_tokens": 8, "max_completion_tokens": 9}, error="body.max_completion_tokens: 9"),
    Case(name="who asks", body={"user": "me", "metadata": {"a": 1}}),
    Case(name="switched off", body={"stream": False, "logprobs": False, "tools": [], "tool_choice": "none"}),
    Case(name="the job's schema", body={"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}),
    Case(
        name="another schema",
        body={"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "array"}}}},
        error="body.response_format: ",
    ),
    Case(name="any JSON", body={"response_format": {"type": "json_object"}}, error="body.response_format: "),
    Case(name="tools", body={"tools": [{"type": "function"}]}, error="body.tools: "),
    Case(name="probabilities", body={"logprobs": True}, error="body.logprobs: true is not possible here"),
    Case(name="a bias", body={"logit_bias": {"5": 1}}, error="body.logit_bias: "),
    Case(name="a field of nobody", body={"colour": "red"}, error="body.colour: is not known here"),
    Case(name="too hot", body={"temperature": 11}, error="body.temperature: text.temperature: "),
    Case(name="settings that exclude each other", body={"top_p": 0.5}, error="text.topP: without a temperature"),
    Case(name="a seed that is too large", body={"seed": 2**32}, error="body.seed: 4294967296 is no whole number"),
    Case(name="no messages", body={"messages": []}, error="body.messages: there are none"),
    Case(
        name="a picture", body={"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, error="image_url"
    ),
    Case(name="a prompt", body={"prompt": "A lute"}, error="body.prompt: /v1/chat/completions has messages"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_a_body_asks_for(tmp_path: Path, case: Case) -> None:
    """Beside a good request, so that the job goes on."""
    text = {"chat": True, "jsonSchema": json.dumps(SCHEMA)}
    run = job(tmp_path, [request(**case.body), request("two")], text=text)
    row, other = read_inputs(run, tmp_path / "cache")[0]
    assert "error" not in other
    if case.error is not None:
        assert case.error in row["error"]
        return
    assert "error" not in row, row["error"]
    assert row.get("settings", {}) == case.settings
    assert {name: row[name] for name in ("id", "prompt")} == {"id": "one", "prompt": ASKED}
    assert {name: row.get(name) for name in ("seed", "outputs")} == {"seed": None, "outputs": None} | case.others
    assert any("the requests name the models gpt-9" in notice for notice in notices.given())


HEADS = [
    ({"custom_id": ""}, "custom_id: empty"),
    ({"method": "GET"}, 'method: "GET"; write POST'),
    ({"url": "/v1/embeddings"}, 'url: "/v1/embeddings"; a job with text.chat: true has /v1/chat/completions'),
    ({"url": "/v1/completions"}, "has /v1/chat/completions"),
    ({"body": "A lute"}, 'body: "A lute" is no object'),
    ({"priority": 1}, "priority: is no part of a request"),
]


@pytest.mark.parametrize(("change", "error"), HEADS, ids=[error for _, error in HEADS])
def test_what_is_around_a_body(tmp_path: Path, change: Request, error: str) -> None:
    row, other = read_inputs(job(tmp_path, [request() | change, request("two")]), tmp_path / "cache")[0]
    assert error in row["error"]
    assert "error" not in other


@pytest.fixture
def chat_model(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model, with a chat template."""
    folder = tmp_path / "chatty"
    folder.mkdir()
    for file in tiny_model.iterdir():
        (folder / file.name).symlink_to(file)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = TEMPLATE
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (folder / name).unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    return folder


Answered = Callable[[GenerateRun], list[Request]]


def test_answers_have_the_form_of_openai(chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the same bytes for one shard and for three, although a request has outputs of two of them."""
    requests = [
        request("greedy", max_tokens=4),
        request("several", n=3, temperature=1.0, max_tokens=3),
        request("refused", tools=[{"type": "function"}]),
        request("long", messages=[{"role": "user", "content": "A lute " * 300}]),
    ]

    def answered(name: str, shards: int) -> tuple[GenerateRun, bytes]:
        spec = {"outputs": {"format": "openai-batch"}, "text": {"chat": True, "maxNewTokens": 8}}
        run = job(tmp_path / name, requests, chat_model, shards=shards, **spec)
        generate_shards(run, monkeypatch, prepare)
        return run, (Path(run.workspace) / "result/data/batch_output.jsonl").read_bytes()

    run, content = answered("one", 1)
    assert answered("three", 3)[1] == content
    greedy, several, refused, long = map(json.loads, content.splitlines())
    lines = result_lines(run)
    body = greedy["response"]["body"]
    assert greedy.keys() == {"id", "custom_id", "response", "error"}
    assert (greedy["custom_id"], greedy["error"], greedy["response"]["status_code"]) == ("greedy", None, 200)
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": lines[0]["text"]},
            "logprobs": None,
            "finish_reason": lines[0]["finishReason"],
        }
    ]
    prompt = AutoTokenizer.from_pretrained(chat_model)("<user>What is a lute?<a>", add_special_tokens=False)[
        "input_ids"
    ]
    used = {"prompt_tokens": len(prompt), "completion_tokens": 4, "total_tokens": len(prompt) + 4}
    assert body["usage"] == used
    assert [choice["index"] for choice in several["response"]["body"]["choices"]] == [0, 1, 2]
    assert [choice["message"]["content"] for choice in several["response"]["body"]["choices"]] == [
        line["text"] for line in lines[1:4]
    ]
    assert several["response"]["body"]["usage"]["completion_tokens"] == sum(line["newTokens"] for line in lines[1:4])
    for answer, words in ((refused, "body.tools: "), (long, "more than the model's 256")):
        assert answer["response"] is None
        assert words in answer["error"]["message"]
