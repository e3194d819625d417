"""What a user should know although nothing failed: said once, bounded, and again by a `prepare` that finds its work
done.
"""

from __future__ import annotations

import pytest
from trainer.conftest import MakeRun

from luthier_trainer.prepare import main as prepare
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.notices import given, notice

CASES = [
    # name                 given                              expect
    ("none", [], []),
    ("repeated", ["a", "b", "a"], ["a", "b"]),
    ("long", ["x" * 400], ["x" * 299 + "…"]),
    ("many", [str(i) for i in range(30)], [*map(str, range(19)), "11 more notices are in the log of the phase"]),
]


@pytest.mark.parametrize(("name", "texts", "expect"), CASES, ids=[c[0] for c in CASES])
def test_what_is_kept(name: str, texts: list[str], expect: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for text in texts:
        notice(text)
    assert given() == expect
    assert capsys.readouterr().out.split("\n")[:-1] == list(dict.fromkeys(texts)), "the log has all of them, whole"


def test_prepare_says_again_what_it_said(make_run: MakeRun) -> None:
    run = make_run(training={"maxLength": 8, "batchSize": 4})
    notice("spec.training.maxLength: rows are cut")
    first = prepare.main(run)
    assert "spec.training.maxLength: rows are cut" in first.notices
    notices.forget()
    assert prepare.main(run).notices == first.notices
