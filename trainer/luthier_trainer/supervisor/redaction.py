"""Tokens hidden in what others can read: messages in a status, lines in a log.

Imports little: PID 1 hides with it what it says before it has imported anything else.
"""

from __future__ import annotations

import os
import re

from luthier_api.variables import Variables

TOKEN = re.compile(r"hf_(?:(?:oauth|jwt)_[\w.\-]{20,}|[A-Za-z0-9]{20,})")
SHORTEST_SECRET = 8  # characters; to hide less would hide words
HIDDEN = "hf_…"


def redact(text: str) -> str:
    """`text` without Hub tokens, ours first of all: it goes into a status that others can read."""
    for secret in _secrets():
        text = text.replace(secret, HIDDEN)
    return TOKEN.sub(HIDDEN, text)


def _secrets() -> list[str]:
    """The token of this pod, as it is and as an exception would quote it."""
    token = os.environ.get(Variables.TOKEN, "").strip()
    return list({token, repr(token)[1:-1]}) if len(token) >= SHORTEST_SECRET else []


class Veil:
    """Output with our token hidden, also where it comes in two pieces: what could be its beginning waits for the
    rest.
    """

    def __init__(self) -> None:
        self._secrets = [s.encode() for s in _secrets()]
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        data = self._held + data
        for secret in self._secrets:
            data = data.replace(secret, HIDDEN.encode())
        begun = max((n for secret in self._secrets for n in range(len(secret)) if data.endswith(secret[:n])), default=0)
        data, self._held = data[: len(data) - begun], data[len(data) - begun :]
        return data

    def rest(self) -> bytes:
        held, self._held = self._held, b""
        return held
