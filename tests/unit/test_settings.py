"""Settings come from the environment, as the chart writes it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from luthier_api.spec import OBJECT_NAME, Bytes, Cores
from luthier_operator.settings import Settings

GIVEN = [
    ("names with commas", {"LUTHIER_NAMESPACES": "team-a, team-b"}, "namespaces", ("team-a", "team-b")),
    ("an empty list is no name", {"LUTHIER_NAMESPACES": ""}, "namespaces", ()),
    ("pull secrets", {"LUTHIER_IMAGE_PULL_SECRETS": "one,two"}, "image_pull_secrets", ("one", "two")),
    ("a number", {"LUTHIER_WORKERS": "4"}, "workers", 4),
    ("an empty endpoint is none", {"LUTHIER_HUB_ENDPOINT": ""}, "hub_endpoint", None),
    ("a mirror", {"LUTHIER_HUB_ENDPOINT": "https://hub.example"}, "hub_endpoint", "https://hub.example"),
    ("a size", {"LUTHIER_WORKSPACE_SIZE": "1.5Ti"}, "workspace_size", "1.5Ti"),
    ("no service account", {"LUTHIER_SERVICE_ACCOUNT": ""}, "service_account", None),
    ("a level in small letters", {"LUTHIER_LOG_LEVEL": "debug"}, "log_level", "DEBUG"),
    ("variables for the jobs", {"LUTHIER_ENV": '{"NCCL_DEBUG": "WARN"}'}, "env", {"NCCL_DEBUG": "WARN"}),
    ("nothing", {}, "gpu_resource", "nvidia.com/gpu"),
]


@pytest.mark.parametrize(("environment", "field", "expect"), [c[1:] for c in GIVEN], ids=[c[0] for c in GIVEN])
def test_settings(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], field: str, expect: object) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert getattr(Settings(), field) == expect


WRONG = [
    # variable                        value            what is said
    ("LUTHIER_GRACE_SECONDS", "5", "greater than or equal to 15"),
    ("LUTHIER_WORKSPACE_SIZE", "0", "must be an amount above zero, in bytes"),
    ("LUTHIER_WORKSPACE_SIZE", "1e+09", "must be an amount above zero, in bytes"),
    ("LUTHIER_MEMORY_REQUEST", "100m", "must be an amount above zero, in bytes"),
    ("LUTHIER_CPU_REQUEST", "two", "must be a number of cores above zero"),
    ("LUTHIER_SERVICE_ACCOUNT", "My Account", "must be the name of a Kubernetes object"),
    ("LUTHIER_IMAGE_PULL_SECRETS", "one,Two", "must be the name of a Kubernetes object"),
    ("LUTHIER_IMAGE_PULL_POLICY", "Sometimes", "'Always', 'IfNotPresent' or 'Never'"),
    ("LUTHIER_ENV", '{"A B": "1"}', "should match pattern"),
    ("LUTHIER_ENV", '{"HF_TOKEN": "hf_x"}', "HF_TOKEN: set by Luthier itself"),
    ("LUTHIER_LOG_LEVEL", "LOUD", "'DEBUG', 'INFO', 'WARNING' or 'ERROR'"),
]


@pytest.mark.parametrize(("variable", "value", "said"), WRONG, ids=[f"{w[0]}={w[1]}" for w in WRONG])
def test_a_wrong_setting_is_named(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=variable) as refused:
        Settings()
    assert said in str(refused.value)


def test_every_setting_is_described() -> None:
    assert [name for name, field in Settings.model_fields.items() if len(field.description or "") < 10] == []


CHART = Path(__file__).parents[2] / "charts/luthier"


def test_the_chart_has_every_setting_with_its_default() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    template = (CHART / "templates/deployment.yaml").read_text()
    of_jobs = {re.sub("[A-Z]", lambda m: f"_{m[0].lower()}", name): value for name, value in values["jobs"].items()}
    by_name = set(re.findall(r"name: LUTHIER_([A-Z_]+)", template))
    assert of_jobs.keys() | {name.lower() for name in by_name} - {""} == set(Settings.model_fields)
    for name, value in of_jobs.items():
        assert (getattr(Settings(), name) or None) == (value or None), name


def test_the_chart_takes_what_the_settings_take() -> None:
    """Helm knows no types of ours: its patterns are copies."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    copies = {name: definition.get("pattern") for name, definition in schema["definitions"].items()}
    ours = {"bytes": Bytes.__metadata__[-1], "cores": Cores.__metadata__[-1], "objectName": OBJECT_NAME}
    assert {name: copies[name] for name in ours} == {name: found.pattern for name, found in ours.items()}
    assert (
        schema["properties"]["jobs"]["properties"]["serviceAccount"]["pattern"] == f"^({OBJECT_NAME.pattern[1:-1]})?$"
    )
