"""Writes the quickstart's text: the documentation that every Python carries, in two registers.

prose.jsonl     what the language says of itself: the reference that `help("for")` shows (pydoc's topics), without its
examples sessions.jsonl  the examples alone, those of the standard library's docstrings too: what a person types at
`>>>`, and what Python answers

One JSON object a line, with the column `text`. Nothing is downloaded, and nothing but the standard library is needed.

    python data.py FOLDER
"""

from __future__ import annotations

import ast
import doctest
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

SHORTEST = 80  # characters: below that a text says little more than a name
SECTION = 1200  # characters of a row of the language reference, cut between paragraphs
SKIPPED = {"test", "tests", "idlelib", "site-packages", "lib2to3", "turtledemo", "ensurepip"}


def docstrings() -> Iterator[str]:
    """Every docstring of the standard library."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if SKIPPED & set(path.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # a file that is about broken source
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
                text := ast.get_docstring(node)
            ):
                yield text


def registers(text: str) -> tuple[str, str]:
    """`text` apart: its prose, and its interactive session."""
    try:
        parts = doctest.DocTestParser().parse(text)
    except ValueError:
        return text, ""
    examples = [part for part in parts if isinstance(part, doctest.Example)]
    if not examples:
        return text, ""
    prose = "\n".join(part.strip("\n") for part in parts if isinstance(part, str) and part.strip())
    return prose, "".join(typed(example) for example in examples)


def typed(example: doctest.Example) -> str:
    """An example as it stands on the screen."""
    first, *rest = example.source.splitlines()
    return "".join([f">>> {first}\n", *(f"... {line}\n" for line in rest), example.want])


def sections(text: str) -> Iterator[str]:
    """Paragraphs of a long text, as many together as fit in a row."""
    row = ""
    for paragraph in text.split("\n\n"):
        if row and len(row) + len(paragraph) > SECTION:
            yield row
            row = ""
        row += ("\n\n" if row else "") + paragraph
    yield row


def write(path: Path, rows: list[str]) -> None:
    rows = list(dict.fromkeys(rows))  # a text that stands twice could be learnt and held out at once
    path.write_text("".join(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows):,} rows, {sum(map(len, rows)):,} characters")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    reference = [registers(text) for text in topics.values()]
    library = [registers(text) for text in docstrings()]
    prose = [section for text, _ in reference for section in sections(text)]
    sessions = [session for _, session in [*reference, *library]]
    write(folder / "prose.jsonl", [row for row in prose if len(row) >= SHORTEST])
    write(folder / "sessions.jsonl", [row for row in sessions if len(row) >= SHORTEST])


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("data"))
