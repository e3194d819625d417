"""The chart as Helm reads it: values become the operator's settings, and a wrong value is refused before anything is
installed.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from luthier_operator.settings import Settings

pytestmark = pytest.mark.usefixtures("cluster")  # which brings helm
CHART = Path(__file__).parents[2] / "charts/luthier"
IMAGES = {"image.repository": "registry.example/operator", "trainer.image.repository": "registry.example/trainer"}


def template(
    values: str, *options: str, release: str = "luthier", images: dict[str, str] = IMAGES
) -> subprocess.CompletedProcess[str]:
    """`values` as YAML."""
    needed = [word for name, image in images.items() for word in ("--set", f"{name}={image}")]
    command = ["helm", "template", release, str(CHART), "--kube-version", "1.30.0", "--values", "-", *needed, *options]
    return subprocess.run(command, input=values, capture_output=True, text=True, check=False)


def objects(kind: str, values: str, *options: str, release: str = "luthier") -> list[dict[str, Any]]:
    """The objects of one kind that the chart makes of `values`."""
    rendered = template(values, *options, release=release)
    assert rendered.returncode == 0, rendered.stderr
    return [o for o in yaml.safe_load_all(rendered.stdout) if o and o["kind"] == kind]


def settings(monkeypatch: pytest.MonkeyPatch, values: str, *options: str) -> Settings:
    """What the operator of a chart with these values reads."""
    (deployment,) = objects("Deployment", values, *options)
    for variable in deployment["spec"]["template"]["spec"]["containers"][0]["env"]:
        # The name of the pod is filled in by Kubernetes
        monkeypatch.setenv(variable["name"], variable.get("value", "pod"))
    return Settings()


VALUES = [
    ("seconds to save", "jobs: {graceSeconds: 120}", "grace_seconds", 120),
    ("retries", "jobs: {publishRetries: 0}", "publish_retries", 0),
    ("a size", "jobs: {workspaceSize: 1Ti}", "workspace_size", "1Ti"),
    ("a whole number of cores", "jobs: {cpuRequest: 2}", "cpu_request", "2"),
    ("a part of a core", "jobs: {cpuRequest: 0.5}", "cpu_request", "0.5"),
    ("a number of bytes", "jobs: {memoryRequest: 1000000000}", "memory_request", "1000000000"),
    ("a million seconds", "jobs: {graceSeconds: 1000000}", "grace_seconds", 1_000_000),
    ("pull secrets", "imagePullSecrets: [{name: one}, {name: two}]", "image_pull_secrets", ("one", "two")),
    ("a service account", "jobs: {serviceAccount: trainers}", "service_account", "trainers"),
    ("how often progress is read", "jobs: {progressEvery: 2.5}", "progress_every", 2.5),
    ("a mirror", "hub: {endpoint: https://hub.example}", "hub_endpoint", "https://hub.example"),
    ("namespaces", "watchNamespaces: [team-a, team-b]", "namespaces", ("team-a", "team-b")),
    (
        "an image by digest",
        "trainer: {image: {digest: 'sha256:" + "a" * 64 + "'}}",
        "trainer_image",
        f"registry.example/trainer@sha256:{'a' * 64}",
    ),
]


@pytest.mark.parametrize(("value", "field", "expect"), [v[1:] for v in VALUES], ids=[v[0] for v in VALUES])
def test_values_become_settings(monkeypatch: pytest.MonkeyPatch, value: str, field: str, expect: object) -> None:
    assert getattr(settings(monkeypatch, value), field) == expect


SET = [
    ("jobs.progressEvery=0.5", "progress_every", 0.5),
    ("jobs.progressEvery=2", "progress_every", 2.0),
    ("jobs.cpuRequest=0.5", "cpu_request", "0.5"),
    ("jobs.memoryRequest=1000000000", "memory_request", "1000000000"),
]


@pytest.mark.parametrize(("option", "field", "expect"), SET, ids=[s[0] for s in SET])
def test_options_become_settings(monkeypatch: pytest.MonkeyPatch, option: str, field: str, expect: object) -> None:
    """`--set` gives a fraction as text."""
    assert getattr(settings(monkeypatch, "", "--set", option), field) == expect


def test_without_values_the_settings_are_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = Settings(trainer_image="registry.example/trainer:0.1.0", lease="default/luthier", identity="pod")
    assert settings(monkeypatch, "") == defaults


@pytest.mark.parametrize("missing", IMAGES)
def test_no_image_of_a_strangers_is_run_by_default(missing: str) -> None:
    refused = template("", images={name: image for name, image in IMAGES.items() if name != missing})
    assert refused.returncode != 0
    assert (
        f"{missing}: needed, the repository of an image that you have built and pushed: --set {missing}=REGISTRY/"
        in refused.stderr
    )


REFUSED = [
    ("too short a grace", "jobs: {graceSeconds: 5}", "graceSeconds"),
    ("a size that is none", "jobs: {workspaceSize: many}", "workspaceSize"),
    ("no size at all", "jobs: {workspaceSize: 0}", "workspaceSize"),
    ("parts of bytes", "jobs: {memoryRequest: 100m}", "memoryRequest"),
    ("a name that is none", "jobs: {serviceAccount: My Account}", "serviceAccount"),
    ("a secret without a name", "imagePullSecrets: [{}]", "imagePullSecrets"),
    ("no progress", "jobs: {progressEvery: 0}", "progressEvery"),
    ("no progress, as a text", "jobs: {progressEvery: '0.0'}", "progressEvery"),
    ("a variable that is no text", "extraEnv: [{name: A, value: 1000000}]", "extraEnv"),
    (
        "a label that the Deployment selects by",
        "podLabels: {app.kubernetes.io/name: mine}",
        "podLabels: app.kubernetes.io/name is what the Deployment selects",
    ),
    ("another one", "podLabels: {app.kubernetes.io/instance: mine}", "podLabels: app.kubernetes.io/instance"),
    ("a value that does not exist", "jobs: {grace: 60}", "grace"),
]


@pytest.mark.parametrize(("value", "named"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_a_wrong_value_is_refused(value: str, named: str) -> None:
    refused = template(value)
    assert refused.returncode != 0
    assert named in refused.stderr


def test_labels_of_the_pod_are_the_users_too() -> None:
    (deployment,) = objects("Deployment", "podLabels: {team: a, app.kubernetes.io/version: mine}")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert (labels["team"], labels["app.kubernetes.io/version"]) == ("a", "mine")
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()


@pytest.mark.parametrize("release", ["a" * 50, "a" * 46 + "-b", "luthier"])
def test_names_fit(release: str) -> None:
    """Names of Services are labels of DNS."""
    (service,) = objects("Service", "", release=release)
    assert len(service["metadata"]["name"]) <= 63
    assert service["metadata"]["name"].endswith("-metrics")
    assert "--" not in service["metadata"]["name"]


REPLICAS = [("two", "", 2, 1), ("one", "replicas: 1", 1, 0)]


@pytest.mark.parametrize(("values", "replicas", "budgets"), [r[1:] for r in REPLICAS], ids=[r[0] for r in REPLICAS])
def test_a_drain_leaves_one_of_several(values: str, replicas: int, budgets: int) -> None:
    """A budget over a single one would stop every drain."""
    (deployment,) = objects("Deployment", values)
    assert deployment["spec"]["replicas"] == replicas
    assert len(objects("PodDisruptionBudget", values)) == budgets


def test_the_lease_is_a_right_of_its_own() -> None:
    """In the chart's namespace, whichever are watched, and on no other Lease there."""
    (role,) = [
        r
        for r in objects("Role", "watchNamespaces: [a]", "--namespace", "system")
        if r["metadata"]["name"] == "luthier-lease"
    ]
    assert role["metadata"]["namespace"] == "system"
    assert [(r["verbs"], r.get("resourceNames")) for r in role["rules"]] == [
        (["create"], None),
        (["get", "patch"], ["luthier"]),
    ]


EDIT = {"create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"}
VIEW = {"get", "list", "watch"}
AGGREGATE = "rbac.authorization.k8s.io/aggregate-to-"


def user_roles(kind: str, values: str) -> list[tuple[str, str | None, set[str], set[str]]]:
    """Name, namespace, verbs and the roles of Kubernetes that it is added to, of each role for users."""
    found = []
    for role in objects(kind, values):
        meta = role["metadata"]
        if meta["name"] not in ("luthier", "luthier-lease"):
            (rule,) = role["rules"]
            assert (rule["apiGroups"], rule["resources"]) == (["luthier.dev"], ["finetunejobs", "generatejobs"])
            added = {label.removeprefix(AGGREGATE) for label in meta["labels"] if label.startswith(AGGREGATE)}
            found.append((meta["name"], meta.get("namespace"), set(rule["verbs"]), added))
    return sorted(found, key=str)


ROLES = [
    # given                          values                                              kind           expect
    ("the whole cluster", "", "ClusterRole", [("editor", None, EDIT, {"edit"}), ("viewer", None, VIEW, {"view"})]),
    (
        "not added to others",
        "rbac: {userRoles: {aggregate: false}}",
        "ClusterRole",
        [("editor", None, EDIT, set()), ("viewer", None, VIEW, set())],
    ),
    ("none", "rbac: {userRoles: {create: false}}", "ClusterRole", []),
    ("no rights at all", "rbac: {create: false}", "ClusterRole", []),
    (
        "some namespaces",
        "watchNamespaces: [a, b]",
        "Role",
        [
            ("editor", "a", EDIT, set()),
            ("editor", "b", EDIT, set()),
            ("viewer", "a", VIEW, set()),
            ("viewer", "b", VIEW, set()),
        ],
    ),
]


@pytest.mark.parametrize(("values", "kind", "expect"), [r[1:] for r in ROLES], ids=[r[0] for r in ROLES])
def test_roles_for_users(values: str, kind: str, expect: list[tuple[str, str | None, set[str], set[str]]]) -> None:
    assert user_roles(kind, values) == sorted(((f"luthier-{name}", *rest) for name, *rest in expect), key=str)


def test_one_namespace_needs_no_cluster_role() -> None:
    for kind in ("ClusterRole", "ClusterRoleBinding"):
        assert objects(kind, "watchNamespaces: [a]") == []
