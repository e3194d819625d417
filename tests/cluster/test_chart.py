"""The chart as Helm reads it: values become the operator's settings, and a wrong value is refused before anything is
installed.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from luthier_api.tracking import Tracker
from luthier_operator.profiles import (
    Defaults,
    GpuClass,
    Maxima,
    NamespacePolicy,
    Network,
    PodResources,
    ResourceAmounts,
)
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


@dataclass(frozen=True)
class ValueCase:
    name: str
    value: str
    field: str
    expect: object


VALUES = [
    ValueCase(
        name="seconds to save",
        value="jobs: {graceSeconds: 120}",
        field="grace_seconds",
        expect=120,
    ),
    ValueCase(
        name="seconds to start",
        value="jobs: {startTimeoutSeconds: 600}",
        field="start_timeout_seconds",
        expect=600,
    ),
    ValueCase(
        name="seconds of a step",
        value="jobs: {stepTimeoutSeconds: 3600}",
        field="step_timeout_seconds",
        expect=3600,
    ),
    ValueCase(
        name="retries",
        value="jobs: {publishRetries: 0}",
        field="publish_retries",
        expect=0,
    ),
    ValueCase(
        name="a size",
        value="jobs: {workspaceSize: 1Ti}",
        field="workspace_size",
        expect="1Ti",
    ),
    ValueCase(
        name="a whole number of cores",
        value="jobs: {prepareResources: {requests: {cpu: 2}}}",
        field="prepare_resources",
        expect=PodResources(requests=ResourceAmounts(cpu="2", memory="512Mi")),
    ),
    ValueCase(
        name="a part of a core",
        value="jobs: {publishResources: {limits: {cpu: 0.5}}}",
        field="publish_resources",
        expect=PodResources(requests=ResourceAmounts(cpu="100m", memory="512Mi"), limits=ResourceAmounts(cpu="0.5")),
    ),
    ValueCase(
        name="a number of bytes",
        value="jobs: {tmpSize: 1000000000}",
        field="tmp_size",
        expect="1000000000",
    ),
    ValueCase(
        name="a million seconds",
        value="jobs: {graceSeconds: 1000000}",
        field="grace_seconds",
        expect=1_000_000,
    ),
    ValueCase(
        name="keys that jobs may set",
        value="jobs: {allowedLabels: [team, example.com/*]}",
        field="allowed_labels",
        expect=("team", "example.com/*"),
    ),
    ValueCase(
        name="a class of GPUs",
        value="gpuClasses: {h100: {nodeSelector: {gpu: h100}, peakFlops: 989e12, network: {perPod: {rdma/hca: 1}}}}",
        field="gpu_classes",
        expect={
            "h100": GpuClass(
                node_selector={"gpu": "h100"}, peak_flops=989e12, network=Network(per_pod={"rdma/hca": "1"})
            )
        },
    ),
    ValueCase(
        name="a policy of all namespaces",
        value="namespacePolicies: {'*': {defaults: {cpu: 8}, maxima: {gpus: 64, memory: 1000000000000}}}",
        field="namespace_policies",
        expect={"*": NamespacePolicy(defaults=Defaults(cpu="8"), maxima=Maxima(gpus=64, memory="1000000000000"))},
    ),
    ValueCase(
        name="a default tracker",
        value="namespacePolicies: {'*': {defaults: {tracking: [{type: mlflow, url: 'http://m', runName: a}]}}}",
        field="namespace_policies",
        expect={
            "*": NamespacePolicy(defaults=Defaults(tracking=[Tracker(type="mlflow", url="http://m", run_name="a")]))
        },
    ),
    ValueCase(
        name="pull secrets",
        value="imagePullSecrets: [{name: one}, {name: two}]",
        field="image_pull_secrets",
        expect=("one", "two"),
    ),
    ValueCase(
        name="a service account",
        value="jobs: {serviceAccount: trainers}",
        field="service_account",
        expect="trainers",
    ),
    ValueCase(
        name="a user of the namespace",
        value="runAsUser: 1000650000",
        field="run_as_user",
        expect=1000650000,
    ),
    ValueCase(
        name="the group root",
        value="runAsGroup: 0",
        field="run_as_group",
        expect=0,
    ),
    ValueCase(
        name="a user that the cluster chooses",
        value="runAsUser: ''",
        field="run_as_user",
        expect=None,
    ),
    ValueCase(
        name="how often progress is read",
        value="jobs: {progressEvery: 2.5}",
        field="progress_every",
        expect=2.5,
    ),
    ValueCase(
        name="a mirror",
        value="hub: {endpoint: https://hub.example}",
        field="hub_endpoint",
        expect="https://hub.example",
    ),
    ValueCase(
        name="namespaces",
        value="watchNamespaces: [team-a, team-b]",
        field="namespaces",
        expect=("team-a", "team-b"),
    ),
    ValueCase(
        name="an image by digest",
        value="trainer: {image: {digest: 'sha256:" + "a" * 64 + "'}}",
        field="trainer_image",
        expect=f"registry.example/trainer@sha256:{'a' * 64}",
    ),
]


@pytest.mark.parametrize("case", VALUES, ids=lambda case: case.name)
def test_values_become_settings(monkeypatch: pytest.MonkeyPatch, case: ValueCase) -> None:
    assert getattr(settings(monkeypatch, case.value), case.field) == case.expect


@dataclass(frozen=True)
class OptionCase:
    option: str
    field: str
    expect: object


SET = [
    OptionCase(
        option="jobs.progressEvery=0.5",
        field="progress_every",
        expect=0.5,
    ),
    OptionCase(
        option="jobs.progressEvery=2",
        field="progress_every",
        expect=2.0,
    ),
    OptionCase(
        option="jobs.prepareResources.requests.cpu=0.5",
        field="prepare_resources",
        expect=PodResources(requests=ResourceAmounts(cpu="0.5", memory="512Mi")),
    ),
    OptionCase(
        option="jobs.tmpSize=1000000000",
        field="tmp_size",
        expect="1000000000",
    ),
]


@pytest.mark.parametrize("case", SET, ids=lambda case: case.option)
def test_options_become_settings(monkeypatch: pytest.MonkeyPatch, case: OptionCase) -> None:
    """`--set` gives a fraction as text."""
    assert getattr(settings(monkeypatch, "", "--set", case.option), case.field) == case.expect


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


@dataclass(frozen=True)
class RefusedCase:
    name: str
    value: str
    message: str


REFUSED = [
    RefusedCase(
        name="too short a grace",
        value="jobs: {graceSeconds: 5}",
        message="graceSeconds",
    ),
    RefusedCase(
        name="a size that is none",
        value="jobs: {workspaceSize: many}",
        message="workspaceSize",
    ),
    RefusedCase(
        name="no size at all",
        value="jobs: {workspaceSize: 0}",
        message="workspaceSize",
    ),
    RefusedCase(
        name="a field that no class of GPUs has",
        value="gpuClasses: {h100: {nodes: {gpu: h100}}}",
        message="nodes",
    ),
    RefusedCase(
        name="a maximum that there is not",
        value="namespacePolicies: {team-a: {maxima: {tpus: 8}}}",
        message="tpus",
    ),
    RefusedCase(
        name="parts of bytes",
        value="jobs: {prepareResources: {limits: {memory: 100m}}}",
        message="memory",
    ),
    RefusedCase(
        name="a name that is none",
        value="jobs: {serviceAccount: My Account}",
        message="serviceAccount",
    ),
    RefusedCase(
        name="a secret without a name",
        value="imagePullSecrets: [{}]",
        message="imagePullSecrets",
    ),
    RefusedCase(
        name="no progress",
        value="jobs: {progressEvery: 0}",
        message="progressEvery",
    ),
    RefusedCase(
        name="no progress, as a text",
        value="jobs: {progressEvery: '0.0'}",
        message="progressEvery",
    ),
    RefusedCase(
        name="a variable that is no text",
        value="extraEnv: [{name: A, value: 1000000}]",
        message="extraEnv",
    ),
    RefusedCase(
        name="a label that the Deployment selects by",
        value="podLabels: {app.kubernetes.io/name: mine}",
        message="podLabels: app.kubernetes.io/name is what the Deployment selects",
    ),
    RefusedCase(
        name="another one",
        value="podLabels: {app.kubernetes.io/instance: mine}",
        message="podLabels: app.kubernetes.io/instance",
    ),
    RefusedCase(
        name="a value that does not exist",
        value="jobs: {grace: 60}",
        message="grace",
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_a_wrong_value_is_refused(case: RefusedCase) -> None:
    refused = template(case.value)
    assert refused.returncode != 0
    assert case.message in refused.stderr


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


def test_an_operator_that_starts_slowly_is_not_killed() -> None:
    """On a node without free CPU it took a minute until it served its probes."""
    (deployment,) = objects("Deployment", "")
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    startup, liveness = container["startupProbe"], container["livenessProbe"]
    assert startup["httpGet"] == liveness["httpGet"]
    assert startup["failureThreshold"] * startup["periodSeconds"] >= 300


@dataclass(frozen=True)
class ReplicaCase:
    name: str
    values: str
    replicas: int
    budgets: int


REPLICAS = [
    ReplicaCase(
        name="two",
        values="",
        replicas=2,
        budgets=1,
    ),
    ReplicaCase(
        name="one",
        values="replicas: 1",
        replicas=1,
        budgets=0,
    ),
]


@pytest.mark.parametrize("case", REPLICAS, ids=lambda case: case.name)
def test_a_drain_leaves_one_of_several(case: ReplicaCase) -> None:
    """A budget over a single one would stop every drain."""
    (deployment,) = objects("Deployment", case.values)
    assert deployment["spec"]["replicas"] == case.replicas
    assert len(objects("PodDisruptionBudget", case.values)) == case.budgets


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


@dataclass(frozen=True)
class RoleCase:
    name: str
    values: str
    kind: str
    expect: list[tuple[str, str | None, set[str], set[str]]]


ROLES = [
    RoleCase(
        name="the whole cluster",
        values="",
        kind="ClusterRole",
        expect=[("editor", None, EDIT, {"edit"}), ("viewer", None, VIEW, {"view"})],
    ),
    RoleCase(
        name="not added to others",
        values="rbac: {userRoles: {aggregate: false}}",
        kind="ClusterRole",
        expect=[("editor", None, EDIT, set()), ("viewer", None, VIEW, set())],
    ),
    RoleCase(
        name="none",
        values="rbac: {userRoles: {create: false}}",
        kind="ClusterRole",
        expect=[],
    ),
    RoleCase(
        name="no rights at all",
        values="rbac: {create: false}",
        kind="ClusterRole",
        expect=[],
    ),
    RoleCase(
        name="some namespaces",
        values="watchNamespaces: [a, b]",
        kind="Role",
        expect=[
            ("editor", "a", EDIT, set()),
            ("editor", "b", EDIT, set()),
            ("viewer", "a", VIEW, set()),
            ("viewer", "b", VIEW, set()),
        ],
    ),
]


@pytest.mark.parametrize("case", ROLES, ids=lambda case: case.name)
def test_roles_for_users(case: RoleCase) -> None:
    assert user_roles(case.kind, case.values) == sorted(
        ((f"luthier-{name}", *rest) for name, *rest in case.expect), key=str
    )


def test_one_namespace_needs_no_cluster_role() -> None:
    for kind in ("ClusterRole", "ClusterRoleBinding"):
        assert objects(kind, "watchNamespaces: [a]") == []
