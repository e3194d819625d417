"""`perf rows` on a few rows: each stage of its ledger works with the lines of today."""

from __future__ import annotations

import pytest
from perf import rows

pytestmark = pytest.mark.slow


def test_every_stage_has_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_ROWS", "300")
    assert rows.main()["rows"].keys() == {"300"}
