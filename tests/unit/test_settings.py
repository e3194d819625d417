"""Settings come from the environment, as the chart writes it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from pydantic.alias_generators import to_camel

from luthier_api.quantity import Bytes, Cores
from luthier_api.spec import OBJECT_NAME
from luthier_operator.settings import Settings


@dataclass(frozen=True)
class GivenCase:
    name: str
    environment: dict[str, str]
    field: str
    expect: object


GIVEN = [
    GivenCase(
        name="names with commas",
        environment={"LUTHIER_NAMESPACES": "team-a, team-b"},
        field="namespaces",
        expect=("team-a", "team-b"),
    ),
    GivenCase(
        name="an empty list is no name",
        environment={"LUTHIER_NAMESPACES": ""},
        field="namespaces",
        expect=(),
    ),
    GivenCase(
        name="pull secrets",
        environment={"LUTHIER_IMAGE_PULL_SECRETS": "one,two"},
        field="image_pull_secrets",
        expect=("one", "two"),
    ),
    GivenCase(
        name="a number",
        environment={"LUTHIER_WORKERS": "4"},
        field="workers",
        expect=4,
    ),
    GivenCase(
        name="an empty endpoint is none",
        environment={"LUTHIER_HUB_ENDPOINT": ""},
        field="hub_endpoint",
        expect=None,
    ),
    GivenCase(
        name="a mirror",
        environment={"LUTHIER_HUB_ENDPOINT": "https://hub.example"},
        field="hub_endpoint",
        expect="https://hub.example",
    ),
    GivenCase(
        name="a size",
        environment={"LUTHIER_WORKSPACE_SIZE": "1.5Ti"},
        field="workspace_size",
        expect="1.5Ti",
    ),
    GivenCase(
        name="a size as Helm prints a large number",
        environment={"LUTHIER_WORKSPACE_SIZE": "1e+09"},
        field="workspace_size",
        expect="1e+09",
    ),
    GivenCase(
        name="no service account",
        environment={"LUTHIER_SERVICE_ACCOUNT": ""},
        field="service_account",
        expect=None,
    ),
    GivenCase(
        name="a level in small letters",
        environment={"LUTHIER_LOG_LEVEL": "debug"},
        field="log_level",
        expect="DEBUG",
    ),
    GivenCase(
        name="variables for the jobs",
        environment={"LUTHIER_ENV": '{"NCCL_DEBUG": "WARN"}'},
        field="env",
        expect={"NCCL_DEBUG": "WARN"},
    ),
    GivenCase(
        name="nothing",
        environment={},
        field="gpu_resource",
        expect="nvidia.com/gpu",
    ),
]


@pytest.mark.parametrize("case", GIVEN, ids=lambda case: case.name)
def test_settings(monkeypatch: pytest.MonkeyPatch, case: GivenCase) -> None:
    for name, value in case.environment.items():
        monkeypatch.setenv(name, value)
    assert getattr(Settings(), case.field) == case.expect


@dataclass(frozen=True)
class WrongCase:
    variable: str
    value: str
    message: str


WRONG = [
    WrongCase(
        variable="LUTHIER_GRACE_SECONDS",
        value="5",
        message="greater than or equal to 15",
    ),
    WrongCase(
        variable="LUTHIER_WORKSPACE_SIZE",
        value="0",
        message="must be an amount above zero, in bytes",
    ),
    WrongCase(
        variable="LUTHIER_MEMORY_REQUEST",
        value="100m",
        message="must be an amount above zero, in bytes",
    ),
    WrongCase(
        variable="LUTHIER_CPU_REQUEST",
        value="two",
        message="must be a number of cores above zero",
    ),
    WrongCase(
        variable="LUTHIER_SERVICE_ACCOUNT",
        value="My Account",
        message="must be the name of a Kubernetes object",
    ),
    WrongCase(
        variable="LUTHIER_IMAGE_PULL_SECRETS",
        value="one,Two",
        message="must be the name of a Kubernetes object",
    ),
    WrongCase(
        variable="LUTHIER_IMAGE_PULL_POLICY",
        value="Sometimes",
        message="'Always', 'IfNotPresent' or 'Never'",
    ),
    WrongCase(
        variable="LUTHIER_ENV",
        value='{"A B": "1"}',
        message="should match pattern",
    ),
    WrongCase(
        variable="LUTHIER_ENV",
        value='{"HF_TOKEN": "hf_x"}',
        message="HF_TOKEN: set by Luthier itself",
    ),
    WrongCase(
        variable="LUTHIER_LOG_LEVEL",
        value="LOUD",
        message="'DEBUG', 'INFO', 'WARNING' or 'ERROR'",
    ),
]


@pytest.mark.parametrize("case", WRONG, ids=lambda case: f"{case.variable}={case.value}")
def test_a_wrong_setting_is_named(monkeypatch: pytest.MonkeyPatch, case: WrongCase) -> None:
    monkeypatch.setenv(case.variable, case.value)
    with pytest.raises(ValueError, match=case.variable) as refused:
        Settings()
    assert case.message in str(refused.value)


def test_every_setting_is_described() -> None:
    assert [name for name, field in Settings.model_fields.items() if len(field.description or "") < 10] == []


CHART = Path(__file__).parents[2] / "charts/luthier"


def test_the_chart_has_every_setting_with_its_default() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    template = (CHART / "templates/deployment.yaml").read_text()
    of_jobs = dict(re.findall(r'"(LUTHIER_[A-Z_]+)" \.Values\.jobs\.(\w+)', template))
    named_in_full = {f"LUTHIER_{name.upper()}" for name in Settings.model_fields}
    assert set(re.findall(r"LUTHIER_[A-Z_]+", template.replace("see LUTHIER_LEASE", ""))) == named_in_full
    assert sorted(of_jobs.values()) == sorted(values["jobs"])
    for variable, value_name in of_jobs.items():
        setting = variable.removeprefix("LUTHIER_").lower()
        assert value_name == to_camel(setting)
        assert (getattr(Settings(), setting) or None) == (values["jobs"][value_name] or None), setting


def test_the_chart_takes_what_the_settings_take() -> None:
    """Helm knows no types of ours: its patterns are copies."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    copies = {name: definition.get("pattern") for name, definition in schema["definitions"].items()}
    ours = {"bytes": Bytes.__metadata__[-1], "cores": Cores.__metadata__[-1], "objectName": OBJECT_NAME}
    assert {name: copies[name] for name in ours} == {name: found.pattern for name, found in ours.items()}
    assert (
        schema["properties"]["jobs"]["properties"]["serviceAccount"]["pattern"] == f"^({OBJECT_NAME.pattern[1:-1]})?$"
    )
