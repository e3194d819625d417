"""What the cluster says about pods that it does not create or place and volumes that it does not find, with field and
remedy.

The controllers report a refused pod only in Events of its Job. `reconcile` reads them when `decide` asks for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from luthier_api.status import Phase
from luthier_operator import naming
from luthier_operator.phases.context import Context

CLAIM = re.compile(r'persistentvolumeclaim "(?P<name>[^"]+)"', re.IGNORECASE)
"""In the scheduler's message about a claim that it does not find."""


@dataclass(frozen=True)
class Remedy:
    """What helps where `text`, a regular expression, is found in the message of the cluster."""

    text: str
    """In lower case."""
    field: str
    remedy: str
    may_pass: bool = False
    """Whether the refusal ends when other pods do, so that there is no limit to waiting for it."""


REMEDIES = (
    Remedy(
        text="exceeded quota",
        field="resources",
        remedy="ask for less, wait until other pods of the namespace have ended, or have its ResourceQuota raised",
        may_pass=True,
    ),
    Remedy(
        text="failed quota",
        field="resources",
        remedy="set what the ResourceQuota of the namespace asks for",
    ),
    Remedy(
        text="usage per",
        field="resources",
        remedy="stay within the LimitRange of the namespace, or have it changed",
    ),
    Remedy(
        text="must be less than or equal to",  # a limit of the LimitRange below what the pod requests
        field="resources",
        remedy="stay within the LimitRange of the namespace, or have it changed",
    ),
    Remedy(
        text="no priorityclass",
        field="scheduling.priorityClassName",
        remedy="name one that `kubectl get priorityclasses` shows",
    ),
    Remedy(
        text="violates podsecurity",
        field="",
        remedy="an administrator has to allow pods of the level `restricted` in this namespace",
    ),
)


GPUS = "GPUs"
"""Stands for the field that says how many GPUs a pod has: each kind has its own."""
LESS = "ask for no more than one node has, or wait until other pods have ended"
NO_NODE = (
    Remedy(text=r"insufficient cpu", field="resources.cpu", remedy=LESS),
    Remedy(text=r"insufficient memory", field="resources.memory", remedy=LESS),
    Remedy(text=r"insufficient ephemeral-storage", field="resources.ephemeralStorage", remedy=LESS),
    Remedy(text=r"insufficient [\w.-]+/", field=GPUS, remedy=LESS),  # nvidia.com/gpu, for example
    Remedy(
        text=r"node affinity/selector",
        field="scheduling",
        remedy="set nodeSelector and affinity to labels that `kubectl get nodes --show-labels` shows",
    ),
    Remedy(
        text=r"untolerated taint",
        field="scheduling.tolerations",
        remedy="tolerate the taints of the nodes that the job may use",
    ),
    Remedy(
        text=r"topology spread",
        field="scheduling.topologySpreadConstraints",
        remedy="use fewer pods than the constraints allow, or `whenUnsatisfiable: ScheduleAnyway`",
    ),
    Remedy(
        text=r"volume node affinity conflict",
        field="workspace",
        remedy="the volume belongs to other nodes than the job may use: let it use those, or take another volume",
    ),
)
"""Why the scheduler finds no node, in the order in which the fields are named."""


def remedy(message: str) -> Remedy | None:
    """What helps against a refusal of the cluster, if it is known."""
    return next((known for known in REMEDIES if re.search(known.text, message.lower())), None)


def may_pass(message: str) -> bool:
    """Whether a refusal of the cluster ends by itself."""
    found = remedy(message)
    return found is not None and found.may_pass


def refused_pods(phase: Phase, described: str, message: str) -> str:
    """`message` of the cluster about the pods of `described`, a Job or JobSet, with the field and what helps."""
    text = f"the cluster refuses the pods of {described}: {message}"
    found = remedy(message)
    if found is None:
        return text
    field = f"{in_spec(found.field, phase)}: " if found.field else ""
    return f"{field}{text}. To solve it: {found.remedy}"


def in_spec(field: str, phase: Phase) -> str:
    """`field` as it is named for the pods of `phase`: `prepare` and `publish` have resources of their own."""
    block, _, rest = field.partition(".")
    if block != "resources" or phase == "run":
        return f"spec.{field}"
    return f"spec.{phase}.{rest}" if rest else f"spec.{phase}"


def no_node(ctx: Context, phase: Phase, message: str) -> str:
    """`message` of the scheduler about a pod of `phase` that no node takes, with the fields and what helps."""
    found = [known for known in NO_NODE if re.search(known.text, message.lower())]
    if not found:
        return message
    fields = [ctx.workload.gpus_field if known.field == GPUS else in_spec(known.field, phase) for known in found]
    remedies = dict.fromkeys(known.remedy for known in found)
    return f"{', '.join(fields)}: {message} To solve it: {'; '.join(remedies)}"


def missing_volume(ctx: Context, phase: Phase, pod: str, message: str) -> str:
    """`message` of the scheduler about a volume of `pod`, with the field that names its claim, and what helps."""
    fields = claims(ctx, phase)
    message = re.sub(r"\. not found$", ".", message)  # the scheduler's word about preemption, without a subject
    match = CLAIM.search(message)
    name = match["name"] if match and match["name"] in fields else naming.place(ctx.job).claim
    return f"{fields[name]}: claim {name} is not ready: {message} (pod {pod}). {remedy_for(ctx, name)}"


def remedy_for(ctx: Context, name: str) -> str:
    """What helps where the claim `name` is not bound."""
    workspace = ctx.job.spec.workspace
    own = naming.place(ctx.job).claim
    if name != own or workspace.claim_name:
        return (
            "Create that claim in this namespace, or name another one;"
            f" `kubectl describe pvc {name}` says what it lacks"
        )
    storage_class = workspace.storage_class_name
    described = f"storage class {storage_class}" if storage_class else "the cluster's default storage class"
    return (
        f"Nothing provides a volume of {workspace.size or ctx.settings.workspace_size} with {described}: set"
        " spec.workspace.storageClassName, accessMode or size to what the cluster has, or claimName to a claim that"
        f" exists; `kubectl describe pvc {name}` says more"
    )


def claims(ctx: Context, phase: Phase) -> Mapping[str, str]:
    """The claims that the pods of `phase` mount, with the field that names each."""
    spec = ctx.job.spec
    found = {place.claim: "the job whose result this one uses" for place in ctx.places().values()}
    found |= {v.claim_name: f"spec.volumes[{i}].claimName" for i, v in enumerate(spec.volumes) if v.claim_name}
    own = naming.place(ctx.job).claim
    found[own] = "spec.workspace.claimName" if spec.workspace.claim_name else "spec.workspace"
    return found
