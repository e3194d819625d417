"""Hides credentials in what others can read: messages in a status, lines in a log.

Imports no types of the API: PID 1 also reports an environment in which these cannot be imported.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from urllib.parse import quote

from luthier_api.secrets import VARIABLES
from luthier_api.variables import Variables

TOKEN = re.compile(r"hf_(?:(?:oauth|jwt)_[\w.\-]{20,}|[A-Za-z0-9]{20,})")
SECRET_FIELD = re.compile("key|secret|token|password", re.IGNORECASE)
SHORTEST_SECRET = 8  # characters; a shorter one could be an ordinary word
HIDDEN = "hf_…"
HIDDEN_CREDENTIAL = "[hidden]"


def redact(text: str) -> str:
    """`text` without the credentials of this pod, and without anything that looks like a token of the Hub."""
    for secret, hidden in _secrets().items():
        text = text.replace(secret, hidden)
    return TOKEN.sub(HIDDEN, text)


def _secrets() -> dict[str, str]:
    """Credential of this pod → what is shown instead. The longest come first, because one may be a part of another."""
    found = {
        form: HIDDEN if name == Variables.TOKEN else HIDDEN_CREDENTIAL
        for name in sorted(VARIABLES)
        for form in _forms(os.environ.get(name, "").strip())
        if len(form) >= SHORTEST_SECRET
    }
    return dict(sorted(found.items(), key=lambda item: len(item[0]), reverse=True))


def _forms(value: str) -> Iterator[str]:
    """How an output may show a credential: as it is, as an exception or a URL has it, or a secret field of a JSON
    document.
    """
    yield value
    yield repr(value)[1:-1]
    yield quote(value, safe="", errors="surrogateescape")
    if value.startswith("{"):
        with suppress(ValueError):
            fields = json.loads(value).items()
            for name, text in fields:
                if SECRET_FIELD.search(name) and isinstance(text, str):
                    yield text
                    yield repr(text)[1:-1]


class OutputRedaction:
    """Hides the credentials of this pod in a stream of output, also if one is split over two chunks: bytes that could
    be its beginning are held back until the next chunk.
    """

    def __init__(self) -> None:
        self._secrets = {secret.encode(errors="surrogateescape"): text.encode() for secret, text in _secrets().items()}
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        data = self._held + data
        for secret, hidden in self._secrets.items():
            data = data.replace(secret, hidden)
        begun = max((n for secret in self._secrets for n in range(len(secret)) if data.endswith(secret[:n])), default=0)
        data, self._held = data[: len(data) - begun], data[len(data) - begun :]
        return data

    def rest(self) -> bytes:
        held, self._held = self._held, b""
        return held
