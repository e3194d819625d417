"""Answers of OpenAI's Batch API: a line for each request, with the texts of its row as choices.

What differs there from call to call follows from the request here, so that the same outputs give the same bytes: `id`
and `request_id` from its number and `custom_id`, and `created` is 0.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from luthier_trainer.generation.exports.base import Outputs
from luthier_trainer.generation.kinds import Kind

FILE = "batch_output.jsonl"
FINISH: Mapping[str, str] = {"stop": "stop", "stop-string": "stop", "length": "length"}
"""`finishReason` of a line → `finish_reason` of a choice."""
REFUSED = "invalid_request"
ANSWER: Kind = {
    "id": "string",
    "custom_id": "string",
    "response": {
        "status_code": "int64",
        "request_id": "string",
        "body": {
            "id": "string",
            "object": "string",
            "created": "int64",
            "model": "string",
            "choices": [
                {
                    "index": "int64",
                    "message": {"role": "string", "content": "string"},
                    "text": "string",
                    "logprobs": None,
                    "finish_reason": "string",
                }
            ],
            "usage": {"prompt_tokens": "int64", "completion_tokens": "int64", "total_tokens": "int64"},
            "system_fingerprint": "string",
        },
    },
    "error": {"code": "string", "message": "string"},
}
"""The types of an answer. Answers to messages have a message, the others a text."""


def write(outputs: Outputs, folder: Path) -> None:
    """Write the answers in the order of the requests."""
    with (folder / FILE).open("w", encoding="utf-8", errors="surrogatepass") as file:
        for _, lines in groupby((line for line, _ in outputs), key=lambda line: line["row"]):
            file.write(json.dumps(answer(list(lines), outputs), ensure_ascii=False) + "\n")


def answer(lines: list[dict[str, Any]], outputs: Outputs) -> dict[str, Any]:
    """Return the answer to a request, whose texts are `lines`. If one of them cannot be made, it is an error."""
    first = lines[0]
    number = hashlib.sha256(f"{first['row']} {first['id']}".encode("utf-8", "surrogatepass")).hexdigest()[:24]
    head = {"id": f"batch_req_{number}", "custom_id": first["id"]}
    if error := next((line["error"] for line in lines if line["error"] is not None), None):
        return {**head, "response": None, "error": {"code": REFUSED, "message": error}}
    body = completion(lines, outputs, number)
    return {**head, "response": {"status_code": 200, "request_id": number, "body": body}, "error": None}


def completion(lines: list[dict[str, Any]], outputs: Outputs, number: str) -> dict[str, Any]:
    """Return the body of an answer."""
    chat = outputs.run.spec.text.chat
    written = sum(line["newTokens"] for line in lines)
    asked = lines[0]["promptTokens"]
    choices = []
    for line in lines:
        text = {"message": {"role": "assistant", "content": line["text"]}} if chat else {"text": line["text"]}
        choices.append(
            {"index": line["sample"], **text, "logprobs": None, "finish_reason": FINISH[line["finishReason"]]}
        )
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{number}",
        "object": "chat.completion" if chat else "text_completion",
        "created": 0,
        "model": outputs.model,
        "choices": choices,
        "usage": {"prompt_tokens": asked, "completion_tokens": written, "total_tokens": asked + written},
        "system_fingerprint": lines[0]["run"],
    }
