"""Hides tokens in what others can read: messages in a status, lines in a log.

Imports no types of the API: PID 1 also reports an environment in which these cannot be imported.
"""

from __future__ import annotations

import os
import re

from luthier_api.variables import Variables

TOKEN = re.compile(r"hf_(?:(?:oauth|jwt)_[\w.\-]{20,}|[A-Za-z0-9]{20,})")
SHORTEST_SECRET = 8  # characters; a shorter one could be an ordinary word
HIDDEN = "hf_…"


def redact(text: str) -> str:
    """`text` without the token of this pod, and without anything that looks like a token of the Hub."""
    for secret in _secrets():
        text = text.replace(secret, HIDDEN)
    return TOKEN.sub(HIDDEN, text)


def _secrets() -> list[str]:
    """The token of this pod, as it is and as an exception would quote it."""
    token = os.environ.get(Variables.TOKEN, "").strip()
    return list({token, repr(token)[1:-1]}) if len(token) >= SHORTEST_SECRET else []


class OutputRedaction:
    """Hides the token of this pod in a stream of output, also if it is split over two chunks: bytes that could be its
    beginning are held back until the next chunk.
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
