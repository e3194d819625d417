"""The health checks of docs/install.md, run as Argo CD and Flux run them, against statuses of every state."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cel
import pytest
import yaml
from lupa import LuaRuntime

PAGE = Path(__file__).parents[2] / "docs/install.md"


def block(language: str, text: str) -> str:
    """The block of `language` on the page that contains `text`."""
    found = [b for b in re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL) if text in b]
    assert len(found) == 1
    return str(found[0])


ARGO = yaml.safe_load(block("yaml", "resource.customizations"))["data"]
FLUX = yaml.safe_load(block("text", "healthCheckExprs"))["healthCheckExprs"]


@dataclass(frozen=True)
class Case:
    name: str
    status: dict[str, Any] | None
    argo: str
    flux: str
    generation: int = 1


def status(state: str, observed: int = 1, **conditions: str) -> dict[str, Any]:
    found = [{"type": t, "status": s, "reason": t, "message": f"{t} it is"} for t, s in conditions.items()]
    return {"state": state, "observedGeneration": observed, "conditions": found}


PLANNED = {
    "state": "Planned",
    "observedGeneration": 1,
    "conditions": [{"type": "Prepared", "status": "True", "reason": "PlanOnly", "message": "40 steps"}],
}
CASES = [
    Case(
        name="nobody has looked at it",
        status=None,
        argo="Progressing",
        flux="inProgress",
    ),
    Case(
        name="waiting for another job",
        status=status("Waiting", Accepted="False"),
        argo="Progressing",
        flux="inProgress",
    ),
    Case(
        name="preparing",
        status=status("Preparing", Accepted="True", Prepared="False"),
        argo="Progressing",
        flux="inProgress",
    ),
    Case(
        name="queued",
        status=status("Queued", Accepted="True", Prepared="True", Running="False"),
        argo="Progressing",
        flux="inProgress",
    ),
    Case(
        name="running",
        status=status("Running", Accepted="True", Prepared="True", Running="True"),
        argo="Progressing",
        flux="inProgress",
    ),
    Case(
        name="publishing",
        status=status("Publishing", Accepted="True", Trained="True", Published="False"),
        argo="Progressing",
        flux="inProgress",
    ),
    Case(
        name="planned, and that was all",
        status=PLANNED,
        argo="Suspended",
        flux="current",
    ),
    Case(
        name="suspended",
        status=status("Suspended", Accepted="True", Suspended="True"),
        argo="Suspended",
        flux="current",
    ),
    Case(
        name="resumed",
        status=status("Running", Accepted="True", Suspended="False", Running="True"),
        argo="Progressing",
        flux="inProgress",
    ),
    Case(
        name="complete",
        status=status("Complete", Accepted="True", Complete="True"),
        argo="Healthy",
        flux="current",
    ),
    Case(
        name="failed",
        status=status("Failed", Accepted="True", Failed="True"),
        argo="Degraded",
        flux="failed",
    ),
    Case(
        name="failed, and resumed",
        status=status("Running", Accepted="True", Failed="False", Running="True"),
        argo="Progressing",
        flux="inProgress",
    ),
    Case(
        name="changed since it failed",
        status=status("Failed", Accepted="True", Failed="True"),
        generation=2,
        argo="Progressing",
        flux="inProgress",
    ),
    Case(
        name="it has lost how it ended",
        status=status("Unknown", Complete="Unknown"),
        argo="Degraded",
        flux="failed",
    ),
]


@pytest.mark.parametrize("kind", ["FineTuneJob", "GenerateJob"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_argo_cd(case: Case, kind: str) -> None:
    lua = LuaRuntime()
    found = {"metadata": {"generation": case.generation}} | ({"status": case.status} if case.status else {})
    lua.globals().obj = lua.table_from(found, recursive=True)
    health = lua.execute(ARGO[f"resource.customizations.health.luthier.dev_{kind}"])
    assert health["status"] == case.argo
    assert health["message"]


@pytest.mark.parametrize("kind", ["FineTuneJob", "GenerateJob"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_flux(case: Case, kind: str) -> None:
    """Flux asks in this order, and takes the first that is true."""
    (check,) = (c for c in FLUX if c["kind"] == kind)
    found = {"metadata": {"generation": case.generation}, "status": case.status or {}}
    answer = next(n for n in ("inProgress", "failed", "current") if cel.evaluate(check[n], found) is True)
    assert answer == case.flux
