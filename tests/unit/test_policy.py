"""Profiles of the administrator: the defaults that jobs get, and what is refused, with the field and the limit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
from cases.observed import BEGIN, NOW, SETTINGS, child, describe, fine_tune, generate, observed, said, status

from luthier_operator.decide import decide
from luthier_operator.model import Job
from luthier_operator.objects import objects
from luthier_operator.policy import NotAllowed, describe_defaults, with_defaults
from luthier_operator.profiles import GpuClass, NamespacePolicy
from luthier_operator.settings import Settings
from luthier_operator.statuses import text


def settings(**policies: dict[str, Any]) -> Settings:
    """With these policies: namespace (`everywhere` stands for `*`) to policy, as in the values of the chart."""
    return SETTINGS.model_copy(
        update={
            "gpu_classes": {"h100": GpuClass(), "mig": GpuClass(max_per_pod=1), "l4": GpuClass()},
            "namespace_policies": {
                {"everywhere": "*"}.get(name, name): NamespacePolicy.model_validate(policy)
                for name, policy in policies.items()
            },
        }
    )


@dataclass(frozen=True)
class DefaultCase:
    name: str
    job: Job
    settings: Settings
    expect: dict[str, Any]
    """Fields of the spec that were filled in."""
    message: str


TRACKING = [
    {"type": "mlflow", "url": "http://mlflow", "secretRef": {"name": "mlflow", "keys": {"token": "token"}}},
    {"type": "tensorboard"},
]
DEFAULTS = [
    DefaultCase(
        name="nothing is set",
        job=fine_tune(),
        settings=SETTINGS,
        expect={},
        message="",
    ),
    DefaultCase(
        name="for all namespaces",
        job=fine_tune(),
        settings=settings(everywhere={"defaults": {"gpuClass": "h100", "activeDeadlineSeconds": 60}}),
        expect={"resources": {"gpuClass": "h100"}, "activeDeadlineSeconds": 60},
        message="spec.resources.gpuClass: h100, spec.activeDeadlineSeconds: 60",
    ),
    DefaultCase(
        name="the namespace's own win, one by one",
        job=fine_tune(),
        settings=settings(
            ml={"defaults": {"queueName": "team-a"}},
            everywhere={"defaults": {"queueName": "all", "cpu": 8}},
            other={"defaults": {"memory": "1Gi"}},
        ),
        expect={"scheduling": {"queueName": "team-a"}, "resources": {"cpu": "8"}},
        message="spec.scheduling.queueName: team-a, spec.resources.cpu: 8",
    ),
    DefaultCase(
        name="the job's own stay",
        job=fine_tune(scheduling={"queueName": "mine"}, activeDeadlineSeconds=7),
        settings=settings(everywhere={"defaults": {"queueName": "all", "activeDeadlineSeconds": 60}}),
        expect={},
        message="",
    ),
    DefaultCase(
        name="no class for what holds no GPU",
        job=fine_tune(resources={"gpusPerNode": 0}),
        settings=settings(everywhere={"defaults": {"gpuClass": "h100", "memory": "4Gi"}}),
        expect={"resources": {"memory": "4Gi"}},
        message="spec.resources.memory: 4Gi",
    ),
    DefaultCase(
        name="trackers of a training",
        job=fine_tune(),
        settings=settings(everywhere={"defaults": {"tracking": TRACKING}}),
        expect={"tracking": TRACKING},
        message="spec.tracking: mlflow (http://mlflow) and tensorboard",
    ),
    DefaultCase(
        name="a training with a tracker of its own",
        job=fine_tune(tracking=[{"type": "tensorboard"}]),
        settings=settings(everywhere={"defaults": {"tracking": TRACKING}}),
        expect={},
        message="",
    ),
    DefaultCase(
        name="no trackers for a GenerateJob",
        job=generate(),
        settings=settings(everywhere={"defaults": {"tracking": TRACKING}}),
        expect={},
        message="",
    ),
    DefaultCase(
        name="a new claim",
        job=generate(),
        settings=settings(everywhere={"defaults": {"workspaceSize": "1Ti", "storageClassName": "fast"}}),
        expect={"workspace": {"size": "1Ti", "storageClassName": "fast"}},
        message="spec.workspace.size: 1Ti, spec.workspace.storageClassName: fast",
    ),
    DefaultCase(
        name="a claim of the user",
        job=generate(workspace={"claimName": "mine"}),
        settings=settings(everywhere={"defaults": {"workspaceSize": "1Ti", "storageClassName": "fast"}}),
        expect={},
        message="",
    ),
]


@pytest.mark.parametrize("case", DEFAULTS, ids=lambda case: case.name)
def test_defaults_of_a_namespace(case: DefaultCase) -> None:
    plain = case.job.spec.dump()
    filled = with_defaults(case.job, case.settings).spec.dump()
    expect = plain | {k: plain.get(k, {}) | v if isinstance(v, dict) else v for k, v in case.expect.items()}  # type: ignore[operator]
    assert filled == expect
    begins = ". Left out, and set by the administrator for this namespace: "
    assert describe_defaults(case.job, case.settings) == (begins + case.message if case.message else "")


def test_a_job_is_rendered_and_judged_with_its_defaults() -> None:
    job = fine_tune(status("Accepted", "Prepared", start_time=text(BEGIN), active_since=text(BEGIN)))
    prepared = child(job, "prepare", "Complete")
    (made,) = decide(observed(job, prepared), settings(ml={"defaults": {"queueName": "team-a"}}), NOW).apply
    assert made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
    late = decide(observed(job, prepared), settings(ml={"defaults": {"activeDeadlineSeconds": 60}}), NOW)
    assert describe(late) == "Failed DeadlineExceeded"


def test_other_defaults_wake_no_job_that_has_failed() -> None:
    """A job resumes when its user changes it, and not when the administrator changes what it was given."""
    job = fine_tune()
    failed = decide(observed(job), settings(ml={"maxima": {"gpus": 1}, "defaults": {"cpu": 4}}), NOW)
    assert describe(failed) == "Failed NotAllowed"
    assert failed.status.applied_spec is not None
    # Its user has changed a field that makes no job resume.
    edited = fine_tune(failed.status, ttlSecondsAfterFinished=60)
    edited = edited.model_copy(update={"metadata": edited.metadata.model_copy(update={"generation": 2})})
    again = decide(observed(edited), settings(ml={"defaults": {"cpu": 8}}), NOW)
    assert describe(again).startswith("Failed NotAllowed")


def rewarded(*types: str, **spec: Any) -> Job:
    """A job of task grpo with rewards of these types."""
    rewards = [{"type": name} | ({"file": "/code/rewards.py"} if name == "python" else {}) for name in types]
    return fine_tune(task="grpo", grpo={"rewards": rewards}, **spec)


@dataclass(frozen=True)
class RefusedCase:
    name: str
    job: Job
    message: str


MAXIMA = settings(
    ml={"maxima": {"gpus": 16, "memory": "64Gi"}, "gpuClasses": ["h100", "mig"]},
    everywhere={
        "defaults": {"memory": "8Gi", "activeDeadlineSeconds": 60},
        "maxima": {
            "gpus": 8,
            "pods": 4,
            "cpu": 32,
            "ephemeralStorage": "100Gi",
            "workspaceSize": "1Ti",
            "activeDeadlineSeconds": 3600,
        },
    },
)
REFUSED = [
    RefusedCase(
        name="too many GPUs",
        job=fine_tune(resources={"nodes": 3, "gpusPerNode": 8}, training={"batchSize": 24}),
        message=(
            "spec.resources.gpusPerNode: 24 GPUs at once (3 pods with 8 each), but a job in namespace ml may have 16 at"
            " most (set by the administrator: namespacePolicies.ml.maxima.gpus in the values of Luthier's chart). Ask"
            " for less, or ask the administrator to raise it"
        ),
    ),
    RefusedCase(
        name="too many shards at once",
        job=generate(shards=100, parallelism=5),
        message=(
            "spec.parallelism: 5 pods at once, but a job in namespace ml may have 4 at most (set by the administrator:"
            " namespacePolicies.*.maxima.pods in the values of Luthier's chart). Ask for less, or ask the administrator"
            " to raise it"
        ),
    ),
    RefusedCase(
        name="too much memory",
        job=fine_tune(resources={"memory": "65Gi"}),
        message="spec.resources.memory: 65Gi, but a job in namespace ml may have 64Gi at most (set by the"
        " administrator: namespacePolicies.ml.maxima.memory in",
    ),
    RefusedCase(
        name="too much memory for prepare",
        job=fine_tune(prepare={"memory": "65Gi"}),
        message="spec.prepare.memory: 65Gi, but",
    ),
    RefusedCase(
        name="too many cores",
        job=fine_tune(resources={"cpu": "33000m"}),
        message="spec.resources.cpu: 33000m, but",
    ),
    RefusedCase(
        name="too much disk",
        job=fine_tune(publish={"ephemeralStorage": "1Ti"}),
        message="spec.publish.ephemeralStorage: 1Ti, but",
    ),
    RefusedCase(
        name="too large a claim",
        job=fine_tune(workspace={"size": "2Ti"}),
        message="spec.workspace.size: 2Ti, but",
    ),
    RefusedCase(
        name="too late a deadline",
        job=fine_tune(activeDeadlineSeconds=3601),
        message="spec.activeDeadlineSeconds: 3601, but",
    ),
    RefusedCase(
        name="a class that does not exist",
        job=fine_tune(resources={"gpuClass": "b200"}),
        message=(
            'spec.resources.gpuClass: there is no class "b200" (known: h100, l4, mig; set by the administrator:'
            " gpuClasses in the values of Luthier's chart). Choose one of these, or remove gpuClass"
        ),
    ),
    RefusedCase(
        name="a class of others",
        job=fine_tune(resources={"gpuClass": "l4"}),
        message="spec.resources.gpuClass: jobs in namespace ml may not use l4, only h100, mig (set by the"
        " administrator: namespacePolicies.ml.gpuClasses in",
    ),
    RefusedCase(
        name="more than a node has",
        job=fine_tune(resources={"gpuClass": "mig", "gpusPerNode": 2}),
        message="spec.resources.gpusPerNode: 2, but a node has 1 of class mig at most (set by the administrator:"
        " gpuClasses.mig.maxPerPod in",
    ),
    RefusedCase(
        name="a label",
        job=fine_tune(scheduling={"labels": {"team": "nlp", "app": "payments"}}),
        message=(
            "spec.scheduling.labels: app is not among the keys that jobs may set (team, project, cost-center; set by"
            " the administrator: jobs.allowedLabels in the values of Luthier's chart). Remove it, or ask the"
            " administrator to add it"
        ),
    ),
    RefusedCase(
        name="code of its own",
        job=rewarded("json", "python"),
        message=(
            "spec.grpo.rewards[1].type: python runs code of the job in its pods, which is not allowed (set by the"
            " administrator: jobs.pythonRewards in the values of Luthier's chart). Choose another type, or ask the"
        ),
    ),
    RefusedCase(
        name="an annotation",
        job=fine_tune(scheduling={"annotations": {"iam.amazonaws.com/role": "admin"}}),
        message="spec.scheduling.annotations: iam.amazonaws.com/role is not among the keys that jobs may set",
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_what_is_refused_names_field_value_limit_and_who_set_it(case: RefusedCase) -> None:
    decision = decide(observed(case.job), MAXIMA, NOW)
    assert describe(decision) == "Failed NotAllowed", "nothing is created"
    assert said(decision, "Accepted").startswith(f"False NotAllowed: {case.message}")
    with pytest.raises(NotAllowed) as refused:
        objects(case.job, MAXIMA)
    assert str(refused.value).startswith(case.message)


ALLOWED = [
    fine_tune(resources={"nodes": 2, "gpusPerNode": 8, "gpuClass": "h100", "memory": "64Gi", "cpu": 32}),
    generate(shards=100, parallelism=4),
    fine_tune(workspace={"claimName": "mine"}),
    fine_tune(
        scheduling={
            "labels": {"team": "nlp"},
            "annotations": {"karpenter.sh/do-not-disrupt": "true", "kueue.x-k8s.io/podset-preferred-topology": "rack"},
        }
    ),
]


@pytest.mark.parametrize("job", ALLOWED)
def test_what_keeps_to_the_limits_goes_on(job: Job) -> None:
    decision = decide(observed(job), MAXIMA, NOW)
    assert said(decision, "Accepted").startswith("True Accepted: The job can run. Left out, and set by")
    assert decision.apply


@pytest.mark.parametrize("tracking", [None, [{"type": "tensorboard"}]])
def test_code_is_run_without_credentials_where_it_is_allowed(tracking: list[dict[str, Any]] | None) -> None:
    """A tracker of the job replaces the default."""
    given = settings(everywhere={"defaults": {"tracking": TRACKING}}).model_copy(update={"python_rewards": True})
    job = rewarded("python", tracking=tracking) if tracking else rewarded("python")
    said_of = said(decide(observed(job), given, NOW), "Accepted")
    if tracking:
        assert said_of.startswith("True Accepted")
        return
    assert said_of.startswith(
        "False NotAllowed: spec.tracking: the administrator's default for this namespace has credentials, which the"
        " code of a reward of type python could read in the pods of run"
    )


UNLIMITED = [("memory", "64Gi", "spec.resources.memory"), ("activeDeadlineSeconds", 60, "spec.activeDeadlineSeconds")]


@pytest.mark.parametrize(("maximum", "value", "field"), UNLIMITED)
def test_a_job_without_a_limit_is_beyond_every_maximum(maximum: str, value: Any, field: str) -> None:
    given = settings(everywhere={"maxima": {maximum: value}})
    assert said(decide(observed(fine_tune()), given, NOW), "Accepted").startswith(
        f"False NotAllowed: {field}: not set, so there is no limit, but a job in namespace ml may have {value} at most"
    )


def test_settings_that_have_changed_hold_for_the_run() -> None:
    """A job may have been prepared under other settings, or was edited while it was suspended."""
    job = fine_tune(
        status("Accepted", "Prepared", start_time=text(BEGIN)), resources={"gpusPerNode": 8, "gpuClass": "h100"}
    )
    known = observed(job, child(job, "prepare", "Complete"))
    assert [o["kind"] for o in decide(known, settings(), NOW).apply] == ["JobSet"]
    gone = decide(known, SETTINGS, NOW)
    assert describe(gone) == "Failed NotAllowed"
    assert said(gone, "Running").startswith('False NotAllowed: spec.resources.gpuClass: there is no class "h100"')
    assert replace(gone, events=()).apply == ()
