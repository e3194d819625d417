"""The project's pages as a reader sees them: blocks, and the commands and documents in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

TOP = Path(__file__).resolve().parents[2]
PAGES = [
    TOP / "README.md",
    TOP / "CHANGELOG.md",
    TOP / "CODE_OF_CONDUCT.md",
    TOP / "CONTRIBUTING.md",
    TOP / "SECURITY.md",
    *sorted((TOP / "docs").rglob("*.md")),
    *sorted((TOP / "examples").rglob("*.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    page: Path
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(TOP)}:{self.text.strip().splitlines()[0][:50]}"

    def commands(self) -> list[str]:
        """Lines to type, in their order."""
        return (
            [line for line in self.text.splitlines() if line and not line.startswith("#")]
            if self.language == "bash"
            else []
        )

    def documents(self) -> list[dict[str, Any]]:
        return list(yaml.safe_load_all(self.text)) if self.language == "yaml" else []


def blocks() -> Iterator[Block]:
    for page in PAGES:
        for match in FENCE.finditer(page.read_text()):
            yield Block(page, match[1], match[2])
