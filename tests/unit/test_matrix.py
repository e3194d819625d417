"""What works together: what the tables refuse is refused at apply, for the reason of the page, and nothing else is."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest

from luthier_api.finetune import FineTuneJobSpec
from luthier_api.matrix import AXES, REFUSALS, Cell, Refusal, allows, pairwise, spec_of
from luthier_api.methods import METHODS
from luthier_api.tasks import TRAINING_TASKS
from luthier_api.validation import broken_rules

BASE: dict[str, Any] = {
    "model": {"path": "/m"},
    "dataset": {"files": ["/d.jsonl"]},
    "training": {},
    "resources": {"gpusPerNode": 2},
}
OF_TASKS: dict[str, dict[str, Any]] = {"grpo": {"grpo": {"rewards": [{"type": "json"}]}}}


def problems(cell: Cell) -> list[str]:
    """What the CRD's rules say of a job with these choices."""
    cell = {"task": "causal-lm", "method": "lora"} | cell
    given = spec_of(cell)
    spec: dict[str, Any] = BASE | OF_TASKS.get(cell["task"], {}) | given
    for block in ("model", "training"):
        spec[block] = BASE[block] | given.get(block, {})
    return [*broken_rules(FineTuneJobSpec.model_validate(spec), "spec")]


def name_of(refusal: Refusal) -> str:
    return f"{'='.join(refusal.first)}, {'='.join(refusal.second)}"


@pytest.mark.parametrize("refusal", REFUSALS, ids=name_of)
def test_a_refused_pair_is_refused_for_the_reason_of_the_page(refusal: Refusal) -> None:
    assert refusal.reason
    told = problems(dict([refusal.first, refusal.second]))
    path = next(axis.path for axis in AXES if axis.name == refusal.second[0])
    block = path.rpartition(".")[0]
    named = [text for text in told if text.startswith((f"spec.{path}:", f"spec.{block}:"))]
    assert named
    # Where a field does not belong to the other choice at all, the message says to which it does.
    assert any(refusal.reason in text or "applies to" in text for text in named)


def test_what_is_allowed_is_not_refused() -> None:
    found = pairwise(AXES)
    assert {text for cell in found for text in problems(cell)} == set()
    assert all(allows(cell) for cell in found)


def test_every_allowed_pair_is_in_a_cell() -> None:
    covered = {pair for cell in pairwise(AXES) for pair in combinations(cell.items(), 2)}
    refused = {(refusal.first, refusal.second) for refusal in REFUSALS}
    every = {((a.name, x), (b.name, y)) for a, b in combinations(AXES, 2) for x in a.values for y in b.values}
    assert every - covered == refused | IMPLIED


# qlora is lora on a base in nf4; the pairs below have no third value with which both work.
IMPLIED: set[Any] = set()


def test_each_restriction_has_a_reason() -> None:
    assert [
        name for name, method in METHODS.items() if not method.recomputes and not method.why.get("recomputes")
    ] == []
    assert [
        name
        for name, method in METHODS.items()
        if method.adapter and not (method.mergeable or method.why.get("mergeable"))
    ] == []
    assert set(TRAINING_TASKS) == set(next(axis.values for axis in AXES if axis.name == "task"))
