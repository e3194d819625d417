"""What a user should know although nothing failed: said once, bounded, and again by a `prepare` that finds its work
done.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from trainer.conftest import MakeRun

from luthier_trainer.prepare import main as prepare
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.notices import given, notice


@dataclass(frozen=True)
class Case:
    name: str
    texts: list[str]
    expect: list[str]


CASES = [
    Case(
        name="none",
        texts=[],
        expect=[],
    ),
    Case(
        name="repeated",
        texts=["a", "b", "a"],
        expect=["a", "b"],
    ),
    Case(
        name="long",
        texts=["x" * 400],
        expect=["x" * 299 + "…"],
    ),
    Case(
        name="many",
        texts=[str(i) for i in range(30)],
        expect=[*map(str, range(19)), "11 more notices are in the log of the phase"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_kept(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    for text in case.texts:
        notice(text)
    assert given() == case.expect
    assert capsys.readouterr().out.split("\n")[:-1] == list(dict.fromkeys(case.texts)), "the log has all of them, whole"


def test_prepare_says_again_what_it_said(make_run: MakeRun) -> None:
    run = make_run(training={"maxLength": 8, "batchSize": 4})
    notice("spec.training.maxLength: rows are cut")
    first = prepare.main(run)
    assert "spec.training.maxLength: rows are cut" in first.notices
    notices.forget()
    assert prepare.main(run).notices == first.notices
