"""For the tests that need a GPU: `make gpu` runs them. Without one they are skipped, and the summary says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer.conftest import (  # noqa: F401 (fixtures)
    classify,
    corpus_file,
    corpus_rows,
    digits,
    llama,
    make_generate_run,
    make_run,
    pairs,
    paragraphs,
    prose_data,
    quiet,
    sdxl,
    tiny_model,
    vit,
)

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if not item.path.is_relative_to(HERE):
            continue  # pytest hands a conftest the tests of all folders
        item.add_marker(pytest.mark.skip(reason="needs a GPU: torch.cuda.is_available() is false"))


@pytest.fixture(autouse=True)
def fresh_memory() -> None:
    """Peak memory counts from here."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Print a line of JSON with figures of this test, for `pytest -s`."""

    def show(**figures: Any) -> None:
        print("\n" + json.dumps({"test": request.node.name, **figures}), flush=True)

    return show
