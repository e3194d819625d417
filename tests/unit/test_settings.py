"""Settings come from the environment, as the chart writes it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic.alias_generators import to_camel

from luthier_api.base import ApiModel, model_in
from luthier_api.quantity import Bytes, Cores
from luthier_api.scheduling import Toleration
from luthier_api.spec import OBJECT_NAME
from luthier_operator.profiles import GpuClass, NamespacePolicy, Network, PodResources, ResourceAmounts
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
        name="amounts as Helm writes numbers",
        environment={"LUTHIER_PREPARE_RESOURCES": '{"requests": {"cpu": 0.5, "memory": 1000000000}}'},
        field="prepare_resources",
        expect=PodResources(requests=ResourceAmounts(cpu="0.5", memory="1000000000")),
    ),
    GivenCase(
        name="a class of GPUs as Helm writes numbers",
        environment={"LUTHIER_GPU_CLASSES": '{"h100": {"peakFlops": 9.89e14, "network": {"perPod": {"rdma/hca": 1}}}}'},
        field="gpu_classes",
        expect={"h100": GpuClass(peak_flops=989e12, network=Network(per_pod={"rdma/hca": "1"}))},
    ),
    GivenCase(
        name="keys with commas",
        environment={"LUTHIER_ALLOWED_LABELS": "team, example.com/*"},
        field="allowed_labels",
        expect=("team", "example.com/*"),
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
        variable="LUTHIER_PREPARE_RESOURCES",
        value='{"requests": {"memory": "100m"}}',
        message="must be an amount above zero, in bytes",
    ),
    WrongCase(
        variable="LUTHIER_PUBLISH_RESOURCES",
        value='{"limits": {"cpu": "two"}}',
        message="must be a number of cores above zero",
    ),
    WrongCase(
        variable="LUTHIER_GPU_CLASSES",
        value='{"h100": {"nodes": {"gpu": "h100"}}}',
        message="h100.nodes",
    ),
    WrongCase(
        variable="LUTHIER_GPU_CLASSES",
        value='{"h100": {"network": {"perPod": {"rdma": 1}}}}',
        message="should match pattern",
    ),
    WrongCase(
        variable="LUTHIER_GPU_CLASSES",
        value='{"h100": {"network": {"env": {"LUTHIER_RUN_DIR": "/x"}}}}',
        message="LUTHIER_RUN_DIR: set by Luthier itself; remove it",
    ),
    WrongCase(
        variable="LUTHIER_NAMESPACE_POLICIES",
        value='{"team-a": {"defaults": {"gpuClass": "h100"}}}',
        message="team-a: there is no class h100 in gpuClasses",
    ),
    WrongCase(
        variable="LUTHIER_NAMESPACE_POLICIES",
        value='{"team-a": {"defaults": {"tracking": [{"type": "mlflow"}]}}}',
        message="tracking[0].url: mlflow cannot do without; set it",
    ),
    WrongCase(
        variable="LUTHIER_ALLOWED_ANNOTATIONS",
        value="*.example.com/a",
        message="should match pattern",
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
        assert getattr(Settings(**{setting: values["jobs"][value_name]}), setting) == getattr(Settings(), setting)


def test_the_chart_takes_what_the_settings_take() -> None:
    """Helm knows no types of ours: its patterns are copies."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    copies = {name: definition.get("pattern") for name, definition in schema["definitions"].items()}
    ours = {"bytes": Bytes.__metadata__[-1], "cores": Cores.__metadata__[-1], "objectName": OBJECT_NAME}
    assert {name: copies[name] for name in ours} == {name: found.pattern for name, found in ours.items()}
    assert (
        schema["properties"]["jobs"]["properties"]["serviceAccount"]["pattern"] == f"^({OBJECT_NAME.pattern[1:-1]})?$"
    )


def names(model: type[ApiModel]) -> dict[str, object]:
    """Names of the fields, as values of the chart have them, at any depth."""
    found: dict[str, object] = {}
    for name, field in model.model_fields.items():
        below = model_in(field.annotation)
        found[field.alias or to_camel(name)] = names(below) if below and below is not Toleration else None
    return found


def test_the_chart_knows_the_fields_of_profiles() -> None:
    """A misspelt name is refused by Helm, and not only by an operator that does not start."""
    schema = json.loads((CHART / "values.schema.json").read_text())

    def in_schema(node: dict[str, Any]) -> dict[str, object]:
        node = node.get("items", node)
        if "$ref" in node:
            node = schema["definitions"][node["$ref"].rpartition("/")[2]]
        return {name: in_schema(below) or None for name, below in node.get("properties", {}).items()}

    for definition, model in (
        ("gpuClass", GpuClass),
        ("namespacePolicy", NamespacePolicy),
        ("podResources", PodResources),
    ):
        assert in_schema({"$ref": f"#/definitions/{definition}"}) == names(model), definition
