"""The chart as Helm reads it: values become the operator's settings, and a wrong value is refused before anything is installed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from luthier_operator.settings import Settings

pytestmark = pytest.mark.usefixtures("cluster")  # which brings helm
CHART = Path(__file__).parents[2] / "charts/luthier"


def template(values: str) -> subprocess.CompletedProcess[str]:
    """`values` as YAML."""
    command = ["helm", "template", "luthier", str(CHART), "--kube-version", "1.30.0", "--values", "-"]
    return subprocess.run(command, input=values, capture_output=True, text=True, check=False)


def settings(monkeypatch: pytest.MonkeyPatch, values: str) -> Settings:
    """What the operator of a chart with these values reads."""
    rendered = template(values)
    assert rendered.returncode == 0, rendered.stderr
    (deployment,) = (o for o in yaml.safe_load_all(rendered.stdout) if o and o["kind"] == "Deployment")
    for variable in deployment["spec"]["template"]["spec"]["containers"][0]["env"]:
        monkeypatch.setenv(variable["name"], variable["value"])
    return Settings()


VALUES = [
    ("seconds to save", "jobs: {graceSeconds: 120}", "grace_seconds", 120),
    ("retries", "jobs: {publishRetries: 0}", "publish_retries", 0),
    ("a size", "jobs: {workspaceSize: 1Ti}", "workspace_size", "1Ti"),
    ("a whole number of cores", "jobs: {cpuRequest: 2}", "cpu_request", "2"),
    ("a service account", "jobs: {serviceAccount: trainers}", "service_account", "trainers"),
    ("how often progress is read", "jobs: {progressEvery: 2.5}", "progress_every", 2.5),
    ("a mirror", "hub: {endpoint: https://hub.example}", "hub_endpoint", "https://hub.example"),
    ("namespaces", "watchNamespaces: [team-a, team-b]", "namespaces", ("team-a", "team-b")),
    ("an image by digest", "trainer: {image: {digest: 'sha256:" + "a" * 64 + "'}}", "trainer_image", f"luthier/trainer@sha256:{'a' * 64}"),
]


@pytest.mark.parametrize(("value", "field", "expect"), [v[1:] for v in VALUES], ids=[v[0] for v in VALUES])
def test_values_become_settings(monkeypatch: pytest.MonkeyPatch, value: str, field: str, expect: object) -> None:
    assert getattr(settings(monkeypatch, value), field) == expect


def test_without_values_the_settings_are_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = Settings()
    assert settings(monkeypatch, "") == defaults


REFUSED = [
    ("too short a grace", "jobs: {graceSeconds: 5}", "graceSeconds"),
    ("a size that is none", "jobs: {workspaceSize: many}", "workspaceSize"),
    ("a value that does not exist", "jobs: {grace: 60}", "grace"),
]


@pytest.mark.parametrize(("value", "named"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_a_wrong_value_is_refused(value: str, named: str) -> None:
    refused = template(value)
    assert refused.returncode != 0
    assert named in refused.stderr
