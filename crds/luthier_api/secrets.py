"""The Secrets that a job may name: one row for each field of a spec that names one.

A row says in which phases the pods need the Secret, and in which environment variables they get it. From the rows
follow the environment of the pods, what `luthier run` takes over from its own environment, what is hidden in logs, and
the admission policies of the chart. No types of the API are imported, because PID 1 hides credentials without them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from luthier_api.variables import Variables


@dataclass(frozen=True)
class SecretUse:
    """A field that names a Secret of the job's namespace."""

    field: str
    """Path in the spec; `[]` stands for the items of a list."""
    phases: tuple[str, ...]
    """Phases whose pods need the credentials. No other pod gets them."""
    variables: Mapping[str, str]
    """Credential, as the field's `keys` call it → environment variable. Libraries and users know it by this name."""
    required: bool
    """Whether a pod waits for a Secret or key that is missing; else it starts without, and the trainer says so."""


HUB = SecretUse(
    field="hub.tokenSecretRef",
    phases=("prepare", "publish"),
    variables={"token": Variables.TOKEN},
    required=True,
)
TRACKING = SecretUse(
    field="tracking[].secretRef",
    phases=("run",),
    variables={
        "token": "MLFLOW_TRACKING_TOKEN",
        "username": "MLFLOW_TRACKING_USERNAME",
        "password": "MLFLOW_TRACKING_PASSWORD",
        "apiKey": "WANDB_API_KEY",
        "writeToken": "TRACKIO_WRITE_TOKEN",
    },
    required=False,
)
STORES = SecretUse(
    field="stores[].secretRef",
    phases=("prepare",),
    variables={
        "accessKeyId": "AWS_ACCESS_KEY_ID",
        "secretAccessKey": "AWS_SECRET_ACCESS_KEY",
        "sessionToken": "AWS_SESSION_TOKEN",
        "serviceAccountKey": "GOOGLE_SERVICE_ACCOUNT_KEY",
        "accountKey": "AZURE_STORAGE_ACCOUNT_KEY",
        "sasToken": "AZURE_STORAGE_SAS_TOKEN",
    },
    required=True,
)
USES: tuple[SecretUse, ...] = (HUB, TRACKING, STORES)
VARIABLES: frozenset[str] = frozenset(name for use in USES for name in use.variables.values())
"""All environment variables that hold credentials."""


def variables_of(phase: str) -> frozenset[str]:
    """The environment variables that may hold credentials in the pods of `phase`."""
    return frozenset(name for use in USES if phase in use.phases for name in use.variables.values())


@dataclass(frozen=True)
class Reference:
    """A credential that a job uses."""

    use: SecretUse
    variable: str
    secret: str
    key: str

    @property
    def field(self) -> str:
        """Of the spec, as messages name it."""
        return f"spec.{self.use.field.replace('[]', '')}"


def references(spec: Any, phase: str) -> Iterator[Reference]:
    """The credentials that the pods of `phase` of a job with `spec` need."""
    for use in USES:
        if phase in use.phases:
            for named in _found(spec, use.field.split(".")):
                for credential, key in named.credentials().items():
                    yield Reference(use, use.variables[credential], named.name, key)


def secret_fields(spec: Any, phase: str) -> dict[str, str]:
    """Name of each Secret that the pods of `phase` need → the field that names it."""
    return {reference.secret: reference.field for reference in references(spec, phase)}


def _found(found: Any, steps: list[str]) -> Iterator[Any]:
    """What is at the path of `steps` below `found`; nothing where a step is missing."""
    if found is None:
        return
    if not steps:
        yield found
        return
    name = re.sub("[A-Z]", lambda letter: f"_{letter[0].lower()}", steps[0].removesuffix("[]"))
    value = getattr(found, name, None)
    for item in value or [] if steps[0].endswith("[]") else [value]:
        yield from _found(item, steps[1:])


def chart_values() -> list[dict[str, Any]]:
    """The rows as the chart's templates read them, with the CEL of admission policies.

    `names`: CEL for the names of the Secrets in `variables.spec`. `block`: the first step of the path.
    """
    return [
        {
            "field": use.field.replace("[]", ""),
            "variable": re.sub("[^a-zA-Z]+", "_", use.field),
            "block": re.split(r"\W", use.field)[0],
            "names": _names("variables.spec", use.field.split(".")),
            "phases": list(use.phases),
            "variables": sorted(use.variables.values()),
        }
        for use in USES
    ]


def _names(this: str, steps: list[str]) -> str:
    """CEL for the list of names of Secrets at the path of `steps` below the object `this`.

    Raises NotImplementedError for a row whose Secret is deeper below a list.
    """
    if not steps:
        return f"[{this}.name]"
    name = steps[0].removesuffix("[]")
    value = f"{this}.{name}"
    if not steps[0].endswith("[]"):
        return f"(has({value}) ? {_names(value, steps[1:])} : [])"
    if len(steps) != 2:
        raise NotImplementedError(f"{steps}: only the items of a list can name a Secret, not what is below them")
    there = f"has(item.{steps[1]})"
    return f"(has({value}) ? {value}.filter(item, {there}).map(item, item.{steps[1]}.name) : [])"
