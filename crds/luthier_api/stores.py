"""Object stores whose files a job may name by an address: the table of their kinds, and how a job describes one.

The trainer (`luthier_trainer.data.stores`) has an implementation for each row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from luthier_api.base import ApiModel, Format, Rule, map_by
from luthier_api.spec import KeyName, ObjectName
from luthier_api.variants import rules

StoreType = Literal["s3", "gs", "az"]


@dataclass(frozen=True)
class StoreInfo:
    """What is known of a kind of store."""

    title: str
    """Its own name."""
    schemes: tuple[str, ...]
    """How its addresses begin, before `://`."""
    fields: tuple[str, ...]
    """Fields of an item of `stores` that it takes, besides its type."""
    credentials: tuple[tuple[str, ...], ...]
    """Which credentials `secretRef.keys` may name: one of these sets."""
    domains: tuple[str, ...]
    """Where the cloud has its servers. In a private network they may have private addresses."""
    identity: tuple[str, ...]
    """Environment variables by which a cluster gives a pod an identity of its own (workload identity)."""
    required: tuple[str, ...] = ()


COMMON = ("endpoint", "anonymous", "secretRef")
STORES: Mapping[StoreType, StoreInfo] = {
    "s3": StoreInfo(
        title="Amazon S3",
        schemes=("s3",),
        fields=(*COMMON, "region"),
        credentials=(("accessKeyId", "secretAccessKey"), ("accessKeyId", "secretAccessKey", "sessionToken")),
        domains=("amazonaws.com", "amazonaws.com.cn"),
        identity=(
            "AWS_WEB_IDENTITY_TOKEN_FILE",
            "AWS_CONTAINER_CREDENTIALS_FULL_URI",
            "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        ),
    ),
    "gs": StoreInfo(
        title="Google Cloud Storage",
        schemes=("gs",),
        fields=COMMON,
        credentials=(("serviceAccountKey",),),
        domains=("googleapis.com",),
        identity=("GOOGLE_APPLICATION_CREDENTIALS",),
    ),
    "az": StoreInfo(
        title="Azure Blob Storage",
        schemes=("az", "abfs", "abfss"),
        fields=(*COMMON, "account"),
        credentials=(("accountKey",), ("sasToken",)),
        domains=("core.windows.net", "microsoftonline.com"),
        identity=("AZURE_FEDERATED_TOKEN_FILE",),
    ),
}
TYPE_OF_SCHEME: Mapping[str, StoreType] = {scheme: name for name, info in STORES.items() for scheme in info.schemes}


class StoreKeys(ApiModel):
    """Which key of a Secret holds which credential of a store."""

    access_key_id: KeyName | None = None
    """Name of the access key, together with `secretAccessKey` (s3)."""
    secret_access_key: KeyName | None = None
    """The access key itself (s3)."""
    session_token: KeyName | None = None
    """Token of a temporary access key (s3)."""
    service_account_key: KeyName | None = None
    """Key of a service account, a JSON document (gs)."""
    account_key: KeyName | None = None
    """Key of the storage account (az)."""
    sas_token: KeyName | None = None
    """Shared access signature that may read and list (az)."""


class StoreSecret(ApiModel):
    """Credentials of a store in a Secret of the job's namespace."""

    name: ObjectName
    """Name of the Secret."""
    keys: StoreKeys
    """Keys of the Secret, for example {accessKeyId: id, secretAccessKey: key}."""

    def credentials(self) -> dict[str, str]:
        """Credential → key of the Secret, for `luthier_api.secrets`."""
        return {name: str(key) for name, key in self.keys.dump().items()}


class Store(ApiModel):
    """How `prepare` reads the addresses of one kind: s3://BUCKET/KEY, gs://BUCKET/OBJECT, az://CONTAINER/BLOB."""

    type: StoreType
    """s3: Amazon S3, and stores that are compatible with it. gs: Google Cloud Storage. az: Azure Blob Storage."""
    endpoint: Annotated[
        str | None,
        Field(max_length=2048),
        Format(
            "^https?://[^/@? ]+(/[^? ]*)?$",
            "must be an address such as https://minio.example.org, without a bucket, a name or a password in it",
        ),
    ] = None
    """Address of the server, for example of MinIO or Ceph; that of the cloud when left out."""
    region: Annotated[
        str | None,
        Field(max_length=64),
        Format("^[a-z0-9][-a-z0-9]*$", "must be the name of a region, such as eu-central-1"),
    ] = None
    """Region of the buckets (s3); us-east-1 when left out."""
    account: Annotated[
        str | None,
        Field(max_length=24),
        Format("^[a-z0-9]{3,24}$", "must be the name of a storage account: 3 to 24 small letters and digits"),
    ] = None
    """Storage account of the containers (az). Addresses abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/BLOB name it
    themselves.
    """
    anonymous: bool = False
    """Send no credentials, also where the pods of `prepare` have an identity of their own."""
    secret_ref: StoreSecret | None = None
    """Credentials: `accessKeyId` and `secretAccessKey`, with temporary ones `sessionToken` (s3); `serviceAccountKey`
    (gs); `accountKey` or `sasToken` (az). Only the pods of `prepare` get them. When left out, files are read with the
    identity that the cluster gives these pods, if it gives one and there is no `endpoint`; else without credentials.
    """

    rules: ClassVar[tuple[Rule, ...]] = (
        *rules("stores", STORES),
        Rule(
            "!self.anonymous || !has(self.secretRef)",
            "stores.anonymous: sends no credentials; remove it, or remove secretRef",
        ),
    )


Stores = Annotated[list[Store], Field(max_length=3), map_by("type")]
