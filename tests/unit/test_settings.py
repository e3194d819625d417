"""Settings come from the environment, as the chart writes it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from luthier_operator.settings import Settings

GIVEN = [
    ("names with commas", {"LUTHIER_NAMESPACES": "team-a, team-b"}, "namespaces", ("team-a", "team-b")),
    ("an empty list is no name", {"LUTHIER_NAMESPACES": ""}, "namespaces", ()),
    ("pull secrets", {"LUTHIER_IMAGE_PULL_SECRETS": "one,two"}, "image_pull_secrets", ("one", "two")),
    ("a number", {"LUTHIER_WORKERS": "4"}, "workers", 4),
    ("an empty endpoint is none", {"LUTHIER_HUB_ENDPOINT": ""}, "hub_endpoint", None),
    ("a mirror", {"LUTHIER_HUB_ENDPOINT": "https://hub.example"}, "hub_endpoint", "https://hub.example"),
    ("nothing", {}, "gpu_resource", "nvidia.com/gpu"),
]


@pytest.mark.parametrize(("environment", "field", "expect"), [c[1:] for c in GIVEN], ids=[c[0] for c in GIVEN])
def test_settings(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], field: str, expect: object) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert getattr(Settings(), field) == expect


def test_a_grace_too_short_to_save_is_refused() -> None:
    with pytest.raises(ValueError, match="grace_seconds"):
        Settings(grace_seconds=5)


CHART = Path(__file__).parents[2] / "charts/luthier"


def test_the_chart_has_every_setting_with_its_default() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    template = (CHART / "templates/deployment.yaml").read_text()
    of_jobs = {re.sub("[A-Z]", lambda m: f"_{m[0].lower()}", name): value for name, value in values["jobs"].items()}
    by_name = set(re.findall(r"name: LUTHIER_([A-Z_]+)", template))
    assert of_jobs.keys() | {name.lower() for name in by_name} - {""} == set(Settings.model_fields)
    for name, value in of_jobs.items():
        assert getattr(Settings(), name) == (value or None), name
