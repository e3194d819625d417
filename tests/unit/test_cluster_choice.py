"""Which cluster the tests take, by what is set and what is there."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cluster import choice, kind
from cluster.kind import Kind
from cluster.local.cluster import Local


@dataclass(frozen=True)
class Case:
    name: str
    expect: type
    environment: dict[str, str] = field(default_factory=dict)
    tools: set[str] = field(default_factory=set)
    docker_runs: bool = True
    local_runs: bool = False


CASES = [
    Case(
        name="nothing is there",
        expect=Local,
    ),
    Case(
        name="kind and Docker are there",
        tools={"kind", "docker"},
        expect=Kind,
    ),
    Case(
        name="kind is there, and Docker does not run",
        tools={"kind", "docker"},
        docker_runs=False,
        expect=Local,
    ),
    Case(
        name="Docker alone",
        tools={"docker"},
        expect=Local,
    ),
    Case(
        name="the local cluster has been started before",
        tools={"kind", "docker"},
        local_runs=True,
        expect=Local,
    ),
    Case(
        name="the local one is asked for",
        tools={"kind", "docker"},
        environment={"CLUSTER": "local"},
        expect=Local,
    ),
    Case(
        name="kind is asked for",
        environment={"CLUSTER": "kind"},
        expect=Kind,
    ),
    Case(
        name="somebody else's",
        tools={"kind", "docker"},
        environment={"KUBECONFIG": "/theirs"},
        expect=choice.Given,
    ),
    Case(
        name="the line that make cluster prints for kind",
        tools={"kind", "docker"},
        environment={"KUBECONFIG": str(kind.KUBECONFIG)},
        expect=Kind,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_which_cluster(case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("KUBECONFIG", "CLUSTER"):
        monkeypatch.delenv(name, raising=False)
    for name, value in case.environment.items():
        monkeypatch.setenv(name, value)
    kubeconfig = tmp_path / "admin.kubeconfig"
    if case.local_runs:
        kubeconfig.touch()
    monkeypatch.setattr(choice, "KUBECONFIG", kubeconfig)
    monkeypatch.setattr(choice.shutil, "which", lambda tool: f"/bin/{tool}" if tool in case.tools else None)
    info = subprocess.CompletedProcess(["docker", "info"], 0 if case.docker_runs else 1)
    monkeypatch.setattr(choice.subprocess, "run", lambda *arguments, **options: info)
    choice.prebuilt.cache_clear()
    assert type(choice.cluster()) is case.expect
    choice.prebuilt.cache_clear()


def test_a_cluster_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setenv("CLUSTER", "minikube")
    with pytest.raises(SystemExit, match="CLUSTER=minikube: one of local, kind"):
        choice.cluster()
