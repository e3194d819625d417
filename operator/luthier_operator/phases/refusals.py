"""What the cluster says about pods that it does not create and volumes that it does not find, with field and remedy.

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
    """What helps where the message of the cluster contains `text`."""

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


def remedy(message: str) -> Remedy | None:
    """What helps against a refusal of the cluster, if it is known."""
    return next((known for known in REMEDIES if known.text in message.lower()), None)


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
    # Resources of the other phases are not those of the job's own pods.
    named = found.field and not (found.field == "resources" and phase != "run")
    field = f"spec.{found.field}: " if named else ""
    return f"{field}{text}. To solve it: {found.remedy}"


def missing_volume(ctx: Context, phase: Phase, pod: str, message: str) -> str:
    """`message` of the scheduler about a volume of `pod`, with the field that names its claim, and what helps."""
    fields = claims(ctx, phase)
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
