"""The chart's admission policies on a real API server, tried by impersonation: who may name a Secret, and what the
operator's own account may create.
"""

from __future__ import annotations

import copy
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import yaml
from cases.api import FINE_TUNE, GENERATE

from cluster.test_chart import IMAGES, template
from luthier_api.kinds import parse_job
from luthier_operator.objects import objects
from luthier_operator.settings import Settings

pytestmark = pytest.mark.cluster
Object = dict[str, Any]

NAMESPACE, SYSTEM = "luthier-policies", "luthier-policies-system"
OPERATOR = f"system:serviceaccount:{SYSTEM}:policies-luthier"
READER, WRITER = "reader-of-secrets", "writer-of-jobs"
"""Both may write jobs; only the first may read the Secret `hf`."""
HUB = {"repo": "org/result", "tokenSecretRef": {"name": "hf"}}
EFFECT_SECONDS = 30
"""The API server's plug-in reads new policies in the background."""


def kubectl(*arguments: str, documents: list[Object] | None = None) -> subprocess.CompletedProcess[str]:
    text = None if documents is None else json.dumps({"apiVersion": "v1", "kind": "List", "items": documents})
    return subprocess.run(["kubectl", *arguments], capture_output=True, text=True, check=False, input=text)


def create(user: str, document: Object) -> subprocess.CompletedProcess[str]:
    """What the API server says when `user` creates the object; nothing is stored."""
    return kubectl("create", f"--as={user}", "--dry-run=server", "-f", "-", documents=[document])


def rights(name: str, user: str, rules: list[Object]) -> list[Object]:
    meta = {"name": name, "namespace": NAMESPACE}
    return [
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": meta, "rules": rules},
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": meta,
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name},
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}],
        },
    ]


def namespace(name: str) -> Object:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}


@pytest.fixture(scope="module", autouse=True)
def policies(cluster: None) -> Iterator[None]:
    """The chart's roles and policies for one namespace, and two users."""
    kubectl("delete", "namespace", NAMESPACE, SYSTEM, "--ignore-not-found", "--timeout=60s")
    rendered = template(f"watchNamespaces: [{NAMESPACE}]", "--namespace", SYSTEM, release="policies")
    assert rendered.returncode == 0, rendered.stderr
    kept = ("CustomResourceDefinition", "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding", "Role")
    chart = [o for o in yaml.safe_load_all(rendered.stdout) if o and o["kind"].startswith(kept)]
    jobs = {"apiGroups": ["luthier.dev"], "resources": ["*"], "verbs": ["*"]}
    secret = {"apiGroups": [""], "resources": ["secrets"], "resourceNames": ["hf"], "verbs": ["get"]}
    setup = [
        namespace(NAMESPACE),
        namespace(SYSTEM),
        *rights("writers", WRITER, [jobs]),
        *rights("readers", READER, [jobs, secret]),
        *chart,
    ]
    applied = kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", documents=setup)
    assert applied.returncode == 0, applied.stderr
    deadline = time.monotonic() + EFFECT_SECONDS
    while create(WRITER, job(FINE_TUNE, hub=HUB)).returncode == 0:
        assert time.monotonic() < deadline, "the policy has no effect"
        time.sleep(0.5)
    yield
    mine = [o for o in chart if o["kind"].startswith("ValidatingAdmissionPolicy")]
    kubectl("delete", "--wait=false", "-f", "-", documents=mine)
    kubectl("delete", "namespace", NAMESPACE, SYSTEM, "--wait=false")


def job(base: Object, **spec: Any) -> Object:
    found = copy.deepcopy(base)
    found["metadata"] = {"name": "tuned", "namespace": NAMESPACE}
    found["spec"] |= spec
    return found


def tracking(secret: str) -> list[Object]:
    return [{"type": "mlflow", "url": "http://mlflow", "secretRef": {"name": secret, "keys": {"token": "token"}}}]


def stores(secret: str) -> list[Object]:
    return [{"type": "gs", "secretRef": {"name": secret, "keys": {"serviceAccountKey": "key"}}}]


@dataclass(frozen=True)
class AuthorCase:
    name: str
    user: str
    document: Object
    refused: str | None
    """How the message begins."""


AUTHORS = [
    AuthorCase(
        name="a FineTuneJob that names a Secret, by a reader of it",
        user=READER,
        document=job(FINE_TUNE, hub=HUB),
        refused=None,
    ),
    AuthorCase(
        name="a FineTuneJob that names a Secret, by another author",
        user=WRITER,
        document=job(FINE_TUNE, hub=HUB),
        refused='spec.hub.tokenSecretRef.name: writer-of-jobs may not read the Secret "hf"',
    ),
    AuthorCase(
        name="a GenerateJob that names a Secret, by another author",
        user=WRITER,
        document=job(GENERATE, hub=HUB),
        refused='spec.hub.tokenSecretRef.name: writer-of-jobs may not read the Secret "hf"',
    ),
    AuthorCase(
        name="a Secret that the reader of another one may not read",
        user=READER,
        document=job(FINE_TUNE, hub={"tokenSecretRef": {"name": "production"}}),
        refused='spec.hub.tokenSecretRef.name: reader-of-secrets may not read the Secret "production"',
    ),
    AuthorCase(
        name="a tracker with a Secret, by a reader of it",
        user=READER,
        document=job(FINE_TUNE, tracking=tracking("hf")),
        refused=None,
    ),
    AuthorCase(
        name="a tracker with a Secret, by another author",
        user=WRITER,
        document=job(FINE_TUNE, tracking=[{"type": "tensorboard"}, *tracking("hf")]),
        refused='spec.tracking.secretRef.name: writer-of-jobs may not read the Secret "hf"',
    ),
    AuthorCase(
        name="a store with a Secret, by a reader of it",
        user=READER,
        document=job(GENERATE, stores=stores("hf")),
        refused=None,
    ),
    AuthorCase(
        name="a store with a Secret, by another author",
        user=WRITER,
        document=job(GENERATE, stores=[{"type": "s3", "anonymous": True}, *stores("hf")]),
        refused='spec.stores.secretRef.name: writer-of-jobs may not read the Secret "hf"',
    ),
    AuthorCase(
        name="one Secret that may be read and one that may not",
        user=READER,
        document=job(FINE_TUNE, hub=HUB, tracking=tracking("production")),
        refused='spec.tracking.secretRef.name: reader-of-secrets may not read the Secret "production"',
    ),
    AuthorCase(
        name="no Secret",
        user=WRITER,
        document=job(FINE_TUNE),
        refused=None,
    ),
]


@pytest.mark.parametrize("case", AUTHORS, ids=lambda case: case.name)
def test_who_names_a_secret_may_read_it(case: AuthorCase) -> None:
    answer = create(case.user, case.document)
    assert (answer.returncode != 0) == bool(case.refused), answer.stderr
    if case.refused:
        assert case.refused in answer.stderr


@dataclass(frozen=True)
class ChangeCase:
    name: str
    patch: Object
    refused: bool


CHANGES = [
    ChangeCase(
        name="stopping the job",
        patch={"spec": {"suspend": True}},
        refused=False,
    ),
    ChangeCase(
        name="a label",
        patch={"metadata": {"labels": {"team": "a"}}},
        refused=False,
    ),
    ChangeCase(
        name="another repository for the token of somebody else",
        patch={"spec": {"hub": {"repo": "writer/own"}}},
        refused=True,
    ),
    ChangeCase(
        name="no token any more",
        patch={"spec": {"hub": None}},
        refused=False,
    ),
    ChangeCase(
        name="another server for the token of somebody else",
        patch={"spec": {"suspend": True, "tracking": [tracking("hf")[0] | {"url": "http://writer"}]}},
        refused=True,
    ),
    ChangeCase(
        name="no tracker any more",
        patch={"spec": {"suspend": True, "tracking": None}},
        refused=False,
    ),
]


@pytest.mark.parametrize("case", CHANGES, ids=lambda case: case.name)
def test_a_change_of_what_names_a_secret_needs_the_secret(case: ChangeCase) -> None:
    kubectl(
        "apply",
        "--server-side",
        "--force-conflicts",
        "-f",
        "-",
        documents=[job(FINE_TUNE, hub=HUB, tracking=tracking("hf"))],
    )
    answer = kubectl(
        "patch",
        "finetunejob",
        "tuned",
        f"--namespace={NAMESPACE}",
        f"--as={WRITER}",
        "--type=merge",
        "--dry-run=server",
        f"--patch={json.dumps(case.patch)}",
    )
    assert (answer.returncode != 0) == case.refused, answer.stderr


def children() -> dict[str, Object]:
    """The Jobs and the JobSet of a tracked and published FineTuneJob, as the operator would create them: by the
    phase.
    """
    found = job(FINE_TUNE, hub=HUB, tracking=tracking("mlflow"))
    # Not the name of a job that exists: an operator that is installed creates the children of that one.
    found["metadata"] |= {"name": "drawn", "uid": "6e0d4bd4-94a3-4a5c-9a3a-0d6b1b4ef6a1", "generation": 1}
    settings = Settings(trainer_image=f"{IMAGES['trainer.image.repository']}:0.1.0")
    return {
        o["metadata"]["labels"]["luthier.dev/phase"]: o
        for o in objects(parse_job(found), settings)
        if o["kind"] in ("Job", "JobSet")
    }


def pod(child: Object) -> Object:
    """The pod spec of a Job or JobSet."""
    spec = child["spec"]
    if child["kind"] == "JobSet":
        spec = spec["replicatedJobs"][0]["template"]["spec"]
    found: Object = spec["template"]["spec"]
    return found


def container(child: Object) -> Object:
    found: Object = pod(child)["containers"][0]
    return found


SECRET_VARIABLE = {"name": "STOLEN", "valueFrom": {"secretKeyRef": {"name": "production", "key": "password"}}}


@dataclass(frozen=True)
class PodCase:
    name: str
    change: Callable[[Object], Any]
    message: str | None
    phases: tuple[str, ...] = field(default=("prepare", "run"))
    """A Job and a JobSet."""


PODS = [
    PodCase(
        name="what the operator creates",
        change=lambda child: None,
        message=None,
        phases=("prepare", "run", "publish"),
    ),
    PodCase(
        name="the image by its digest",
        change=lambda child: container(child).update(
            image=f"{IMAGES['trainer.image.repository']}@sha256:{'a' * 64}",
        ),
        message=None,
    ),
    PodCase(
        name="no owner",
        change=lambda child: child["metadata"].pop("ownerReferences"),
        message="that a FineTuneJob or GenerateJob owns",
    ),
    PodCase(
        name="an owner of another kind",
        change=lambda child: child["metadata"]["ownerReferences"][0].update(apiVersion="v1", kind="ConfigMap"),
        message="that a FineTuneJob or GenerateJob owns",
    ),
    PodCase(
        name="another image",
        change=lambda child: container(child).update(image="registry.example/trainer-of-somebody:0.1.0"),
        message="may only start the image registry.example/trainer",
    ),
    PodCase(
        name="an init container",
        change=lambda child: pod(child).update(initContainers=[container(child) | {"name": "first"}]),
        message="may only start the image registry.example/trainer",
    ),
    PodCase(
        name="another service account",
        change=lambda child: pod(child).update(serviceAccountName="admin"),
        message="under the service account default",
    ),
    PodCase(
        name="a token of the API server",
        change=lambda child: pod(child).update(automountServiceAccountToken=True),
        message="without a token",
    ),
    PodCase(
        name="a Secret as a volume",
        change=lambda child: pod(child)["volumes"].append({"name": "s", "secret": {"secretName": "production"}}),
        message="may only mount claims, config maps and empty folders",
    ),
    PodCase(
        name="a folder of the node",
        change=lambda child: pod(child)["volumes"].append({"name": "h", "hostPath": {"path": "/"}}),
        message="may only mount claims, config maps and empty folders",
    ),
    PodCase(
        name="a Secret in a variable",
        change=lambda child: container(child)["env"].append(SECRET_VARIABLE),
        message="may only hand a Secret to these variables in this phase: ",
    ),
    PodCase(
        name="the token of the Hub in the pods of run",
        change=lambda child: container(child)["env"].append(SECRET_VARIABLE | {"name": "HF_TOKEN"}),
        message="in this phase: MLFLOW_TRACKING_PASSWORD, MLFLOW_TRACKING_TOKEN, MLFLOW_TRACKING_USERNAME, TRACKIO_",
        phases=("run",),
    ),
    PodCase(
        name="credentials of a tracker in the pod of prepare",
        change=lambda child: container(child)["env"].append(SECRET_VARIABLE | {"name": "MLFLOW_TRACKING_TOKEN"}),
        message="in this phase: HF_TOKEN",
        phases=("prepare", "publish"),
    ),
    PodCase(
        name="a Secret as all variables",
        change=lambda child: container(child).update(envFrom=[{"secretRef": {"name": "production"}}]),
        message="may only hand a Secret to these variables in this phase: ",
    ),
]


@pytest.mark.parametrize(
    ("case", "phase"),
    [(case, phase) for case in PODS for phase in case.phases],
    ids=lambda part: getattr(part, "name", part),
)
def test_the_operator_creates_only_its_own_pods(case: PodCase, phase: str) -> None:
    child = children()[phase]
    case.change(child)
    answer = create(OPERATOR, child)
    assert (answer.returncode == 0) == (case.message is None), answer.stderr
    if case.message:
        assert case.message in answer.stderr


def test_others_create_what_they_want() -> None:
    """The policy is about the operator's account only."""
    child = children()["prepare"]
    child["metadata"].pop("ownerReferences")
    container(child).update(image="somebody/else:1")
    answer = kubectl("create", "--dry-run=server", "-f", "-", documents=[child])
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize("policy", ["tokenSecrets", "operatorPods"])
def test_a_policy_can_be_left_out(policy: str) -> None:
    rendered = template(f"admissionPolicies: {{{policy}: false}}")
    kinds = [o["kind"] for o in yaml.safe_load_all(rendered.stdout) if o]
    assert kinds.count("ValidatingAdmissionPolicy") == kinds.count("ValidatingAdmissionPolicyBinding") == 1
