"""As whom files of object stores are read: with a Secret, with the identity of the pod, or as nobody."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal
from urllib.parse import urlsplit

from luthier_api.exitcodes import ExitCode
from luthier_api.secrets import STORES as CREDENTIALS
from luthier_api.stores import STORES, Store, StoreType
from luthier_api.variables import Variables
from luthier_trainer.runtime.failure import Failure

FIELD = "spec.stores"
METADATA_SERVICE = frozenset({"169.254.169.254", "metadata.google.internal"})
Mode = Literal["secret", "identity", "anonymous"]
WITH: Mapping[Mode, str] = {
    "secret": f"with the credentials of {FIELD}.secretRef",
    "identity": "with the identity that the pod has from the cluster",
    "anonymous": "without credentials",
}
REMEDY: Mapping[Mode, str] = {
    "secret": "Correct the Secret, or let its owner read and list the bucket",
    "identity": f"Let it read and list the bucket, or name other credentials in {FIELD}[].secretRef",
    "anonymous": f"Name credentials in {FIELD}[].secretRef",
}
OPTIONS: Mapping[StoreType, Mapping[str, str]] = {
    "s3": {
        "bucket": "bucket",
        "endpoint": "endpoint",
        "accessKeyId": "access_key_id",
        "secretAccessKey": "secret_access_key",
        "sessionToken": "session_token",
    },
    "gs": {"bucket": "bucket", "endpoint": "base_url", "serviceAccountKey": "service_account_key"},
    "az": {"bucket": "container_name", "endpoint": "endpoint", "accountKey": "account_key", "sasToken": "sas_key"},
}
"""What obstore calls the container of a store, its server, and the credentials of `secretRef.keys`."""


def mode_of(given: Store) -> Mode:
    """Return as whom a store is read.

    An identity of the pod is not shown to a server that the author of a job has chosen: some are tokens with which it
    could read all that the pod may.
    """
    if given.secret_ref:
        return "secret"
    if given.anonymous or given.endpoint:
        return "anonymous"
    there = (
        any(os.environ.get(name) for name in own_variables(given))
        or os.environ.get(Variables.METADATA_IDENTITY) == "true"
    )
    return "identity" if there else "anonymous"


def own_variables(given: Store) -> tuple[str, ...]:
    """Return the variables in which obstore looks for credentials or for an identity."""
    info = STORES[given.type]
    return (*info.identity, *(CREDENTIALS.variables[name] for some in info.credentials for name in some))


@contextmanager
def without(names: Collection[str]) -> Iterator[None]:
    """Hide environment variables from obstore, which would use them beside what it is given."""
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def secret_of(given: Store, names: Mapping[str, str]) -> dict[str, str]:
    """Return the credentials of `secretRef`. Raises Failure if one is missing."""
    found = {}
    for credential in keys_of(given):
        variable = CREDENTIALS.variables[credential]
        found[names[credential]] = os.environ.get(variable, "").strip()
        if not found[names[credential]]:
            raise Failure(
                ExitCode.UNAUTHORIZED,
                f"{FIELD}.secretRef.keys.{credential}: it is empty, or {variable} is not set here. Correct the Secret",
            )
    return found


def keys_of(given: Store) -> list[str]:
    return list(given.secret_ref.credentials()) if given.secret_ref else []


def identity_hosts() -> frozenset[str]:
    """Return the hosts that the pod may ask for its identity: the administrator has set these variables."""
    asked = os.environ.get("AWS_CONTAINER_CREDENTIALS_FULL_URI", "")
    own = {str(urlsplit(asked).hostname)} if asked else set()
    return frozenset(own | (METADATA_SERVICE if os.environ.get(Variables.METADATA_IDENTITY) == "true" else set()))
