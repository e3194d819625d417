"""Where and when the pods of a job run, and the metadata that others read on them.

An allow-list: these fields of a pod belong to the user, all others to Luthier or to the administrator. Types of
Kubernetes have its names, so that a block of a pod spec can be copied here.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from luthier_api.base import ApiModel, Format, Rule, map_by
from luthier_api.spec import LABEL, WORD, ObjectName, QueueName, Seconds

LabelKey = Annotated[
    str,
    Field(max_length=317),
    Format(
        f"^({LABEL}([.]{LABEL})*/)?[a-zA-Z0-9]([-_.a-zA-Z0-9]{{0,61}}[a-zA-Z0-9])?$",
        "must be the key of a label or annotation, such as gpu or example.com/gpu",
    ),
]
LabelValue = Annotated[
    str,
    Field(max_length=63),
    Format(f"^({WORD})?$", "must be the value of a label: letters, digits, '-', '_' and '.', such as h100"),
]

RESERVED_KEYS = (
    "luthier[.]dev/",
    "app[.]kubernetes[.]io/managed-by$",
    "batch[.]kubernetes[.]io/",
    "job-name$",
    "controller-uid$",
    "jobset[.]sigs[.]k8s[.]io/",
    "kueue[.]x-k8s[.]io/(queue-name|priority-class|managed|pod-group-name|prebuilt-workload-name)$",
)
"""Patterns of keys that Luthier, the Job controller, JobSet and Kueue set on pods, or would act on."""


def not_reserved(field: str) -> Rule:
    return Rule(
        f"!has(self.{field}) || self.{field}.all(key, !key.matches('^({'|'.join(RESERVED_KEYS)})'))",
        f"scheduling.{field}: keys of luthier.dev, batch.kubernetes.io, jobset.sigs.k8s.io and of Kueue's queues are"
        " set by Luthier and by those controllers; remove them. A queue is scheduling.queueName",
    )


class Toleration(ApiModel):
    """A taint that the pods accept, as in a pod spec."""

    key: LabelKey
    """Key of the taint, for example nvidia.com/gpu."""
    operator: Literal["Exists", "Equal"] = "Equal"
    """Exists: whatever the taint's value. Equal: only `value`."""
    value: LabelValue | None = None
    """Value of the taint, for Equal; empty when left out."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint; all effects when left out."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.operator != 'Exists' || !has(self.value) || self.value == ''",
            "tolerations.value: operator Exists takes any value; remove value, or use operator: Equal",
        ),
    )


class Expression(ApiModel):
    """A condition on a label."""

    key: LabelKey
    """Key of the label."""
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"]
    """In, NotIn: compare with `values`. Exists, DoesNotExist: whether there is such a label. Gt, Lt: compare as whole
    numbers with the one value; for nodes only.
    """
    values: Annotated[list[LabelValue], Field(max_length=16)] = Field(default_factory=list)
    """What the label is compared with."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "(self.operator in ['Exists', 'DoesNotExist']) != (has(self.values) && size(self.values) > 0)",
            "matchExpressions.values: In, NotIn, Gt and Lt compare with values; Exists and DoesNotExist have none",
        ),
        Rule(
            "!(self.operator in ['Gt', 'Lt']) || (has(self.values) && size(self.values) == 1 &&"
            " self.values[0].matches('^[0-9]+$'))",
            "matchExpressions.values: Gt and Lt compare with one whole number",
        ),
    )


Expressions = Annotated[list[Expression], Field(max_length=8)]


class NodeTerm(ApiModel):
    """Conditions on the labels of a node, all of which must hold."""

    match_expressions: Annotated[Expressions, Field(min_length=1)]
    """Conditions on labels."""


class NodeSelector(ApiModel):
    """Terms, one of which must hold."""

    node_selector_terms: Annotated[list[NodeTerm], Field(min_length=1, max_length=8)]
    """Alternatives."""


class PreferredNodes(ApiModel):
    """Nodes that are preferred."""

    weight: Annotated[int, Field(ge=1, le=100)]
    """How much, compared with the other preferences."""
    preference: NodeTerm


class NodeAffinity(ApiModel):
    """Nodes by their labels."""

    required_during_scheduling_ignored_during_execution: NodeSelector | None = None
    """Nodes on which the pods may run."""
    preferred_during_scheduling_ignored_during_execution: Annotated[list[PreferredNodes], Field(max_length=8)] = Field(
        default_factory=list
    )
    """Nodes on which the pods had better run."""


class PodSelector(ApiModel):
    """Pods of the job's namespace, by their labels."""

    match_labels: Annotated[dict[LabelKey, LabelValue], Field(max_length=8)] = Field(default_factory=dict)
    """Labels that they have."""
    match_expressions: Expressions = Field(default_factory=list)
    """Conditions on their labels."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.matchExpressions) || self.matchExpressions.all(e, !(e.operator in ['Gt', 'Lt']))",
            "labelSelector.matchExpressions: Gt and Lt compare labels of nodes only; use In or NotIn",
        ),
    )


class PodTerm(ApiModel):
    """Pods, and what counts as the same place."""

    label_selector: PodSelector
    topology_key: LabelKey
    """Label of nodes: those with the same value are one place, for example kubernetes.io/hostname."""


class PreferredPods(ApiModel):
    """Pods near which, or away from which, the pods had better run."""

    weight: Annotated[int, Field(ge=1, le=100)]
    """How much, compared with the other preferences."""
    pod_affinity_term: PodTerm


PodTerms = Annotated[list[PodTerm], Field(max_length=4)]


class PodAffinity(ApiModel):
    """Where the pods run by the pods that are there already."""

    required_during_scheduling_ignored_during_execution: PodTerms = Field(default_factory=list)
    """What must hold."""
    preferred_during_scheduling_ignored_during_execution: Annotated[list[PreferredPods], Field(max_length=4)] = Field(
        default_factory=list
    )
    """What is preferred."""


class Affinity(ApiModel):
    """As in a pod spec."""

    node_affinity: NodeAffinity | None = None
    pod_affinity: PodAffinity | None = None
    """In the same place as these pods."""
    pod_anti_affinity: PodAffinity | None = None
    """In another place than these pods."""


class Spread(ApiModel):
    """How evenly the pods of the run are spread, as in a pod spec; which pods are counted is known."""

    topology_key: LabelKey
    """Label of nodes: those with the same value are one place, for example topology.kubernetes.io/zone."""
    max_skew: Annotated[int, Field(ge=1, le=4096)] = 1
    """By how many pods two places may differ."""
    when_unsatisfiable: Literal["DoNotSchedule", "ScheduleAnyway"] = "ScheduleAnyway"
    """Whether a pod that would make them differ more has to wait."""
    min_domains: Annotated[int, Field(ge=1, le=4096)] | None = None
    """How many places there must be; for DoNotSchedule."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.minDomains) || self.whenUnsatisfiable == 'DoNotSchedule'",
            "topologySpreadConstraints.minDomains: needs whenUnsatisfiable: DoNotSchedule; set that, or remove"
            " minDomains",
        ),
    )


class Scheduling(ApiModel):
    """Where and when the pods that do the work run."""

    queue_name: QueueName | None = None
    """Kueue LocalQueue of the namespace, for the pods that train or generate; without it they start as soon as they
    fit. `prepare` and `publish` are not queued.
    """
    priority_class_name: ObjectName | None = None
    """PriorityClass of the pods of all phases; the cluster's default when left out."""
    node_selector: Annotated[dict[LabelKey, LabelValue], Field(max_length=32)] = Field(default_factory=dict)
    """Labels that a node must have for the pods that train or generate, for example {gpu: h100}. `prepare` and
    `publish` run anywhere.
    """
    affinity: Affinity | None = None
    """On which nodes, near which pods and away from which the pods that train or generate run."""
    topology_spread_constraints: Annotated[list[Spread], Field(max_length=4), map_by("topologyKey")] = Field(
        default_factory=list
    )
    """How the pods that train or generate are spread over nodes, racks or zones. Left out: one on each node where there
    are enough.
    """
    scheduler_name: ObjectName | None = None
    """Scheduler of the pods that train or generate; the cluster's default when left out."""
    runtime_class_name: ObjectName | None = None
    """RuntimeClass of the pods that train or generate, for example nvidia. Left out: that of `resources.gpuClass`, or
    the node's default.
    """
    tolerations: Annotated[list[Toleration], Field(max_length=32)] = Field(default_factory=list)
    """Taints that the pods of all phases accept. Pods leave an unreachable node after one minute."""
    labels: Annotated[dict[LabelKey, LabelValue], Field(max_length=32)] = Field(default_factory=dict)
    """More labels of the pods of all phases. The administrator says which keys may be used (`jobs.allowedLabels` of the
    chart).
    """
    annotations: Annotated[dict[LabelKey, Annotated[str, Field(max_length=4096)]], Field(max_length=32)] = Field(
        default_factory=dict
    )
    """Annotations of the pods of all phases, for example {karpenter.sh/do-not-disrupt: "true"}. The administrator says
    which keys may be used (`jobs.allowedAnnotations` of the chart).
    """
    grace_period_seconds: Annotated[Seconds, Field(ge=15)] | None = None
    """Seconds between SIGTERM and SIGKILL of the pods that train or generate (terminationGracePeriodSeconds). Left out:
    what the plan needs to save a checkpoint, and no less than the operator's setting. Spot nodes and the cluster
    autoscaler may give less.
    """
    step_timeout_seconds: Annotated[Seconds, Field(ge=30)] | None = None
    """Seconds without a step of the training, a batch of an evaluation or an output of a generation, after which the
    pods count as hung: the stacks of all processes are written to the log, and the pods end with 80 and are started
    again. A save that is planned to take longer is waited for, and the first step may take three times as long, or
    half an hour. Left out: 20 times the longest step so far, but no less than 10 minutes and no more than the
    operator's setting.
    """

    rules: ClassVar[tuple[Rule, ...]] = (not_reserved("labels"), not_reserved("annotations"))
