"""Downloads the files that a job names by an address of an object store: s3://, gs://, az://. Only `prepare` does this.

The library obstore (object_store, in Rust) knows the protocols, the credentials, and what is tried again. All its
requests pass a proxy in this process (`guarding_proxy`). Its messages are not shown: they have whole addresses, which
may hold a signature, and answers of the server.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from luthier_api.base import ApiModel
from luthier_api.exitcodes import ExitCode
from luthier_api.stores import STORES, TYPE_OF_SCHEME, Store, StoreType
from luthier_trainer.data.guarding_proxy import GuardingProxy, serving
from luthier_trainer.data.remote import CHUNK, Guard
from luthier_trainer.data.store_credentials import (
    FIELD,
    OPTIONS,
    REMEDY,
    WITH,
    Mode,
    identity_hosts,
    keys_of,
    mode_of,
    own_variables,
    secret_of,
    without,
)
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.workspace.space import amount, volume

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ObjectStore

PATTERN = re.compile(r"[*?\[]")
AT_ONCE = 8  # files that are downloaded at the same time
ATTEMPTS = 5
HIDDEN = ("_", ".")  # how names begin that programs leave beside data, such as _SUCCESS
# Of object_store: the pause doubles from `init_backoff` on, so that five attempts take about 8 seconds, and a server
# that does not answer is given up after three minutes.
RETRIES: Any = {
    "max_retries": ATTEMPTS - 1,
    "backoff": {"init_backoff": timedelta(seconds=0.5), "max_backoff": timedelta(seconds=15), "base": 2},
    "retry_timeout": timedelta(minutes=3),
}
# The limit of a whole request is 30 seconds by default, in which a large file does not come.
TIMEOUTS = {"connect_timeout": "20s", "read_timeout": "60s", "timeout": "7d"}

STATUS = re.compile(r"status code: (\d{3})")
UNTRUSTED = re.compile(r"invalid peer certificate: (\w+)|InvalidCertificate\(\s*(\w+)")
UNKNOWN_KEYS = ("InvalidAccessKeyId", "ExpiredToken", "InvalidToken")  # not with the same status everywhere
CODE = re.compile(r"<Code>(\w+)</Code>|\"reason\": ?\"(\w+)\"")


def is_in_a_store(path: str) -> bool:
    """Return whether a path of the spec is the address of an object store."""
    return path.partition("://")[0] in TYPE_OF_SCHEME and "://" in path


def refuse_unused(stores: Sequence[Store], data: ApiModel | None) -> None:
    """Raises Failure for a store of the spec in which `data`, a block of the spec, names no file: its Secret would stay
    unused without a word.
    """
    used = {TYPE_OF_SCHEME[text.partition("://")[0]] for text in _texts(data) if is_in_a_store(text)}
    for number, store in enumerate(stores):
        if store.type not in used:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{FIELD}[{number}]: no file of the job is in a store of type {store.type}. Remove it, or name files by"
                f" addresses such as {STORES[store.type].schemes[0]}://...",
            )


def _texts(value: Any) -> Iterator[str]:
    """All texts in a part of a spec."""
    if isinstance(value, ApiModel):
        value = value.model_dump(mode="json", exclude_none=True)
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for part in value.values() for text in _texts(part))
    elif isinstance(value, list):
        yield from (text for part in value for text in _texts(part))


@dataclass(frozen=True)
class Fetched:
    """A file that was downloaded."""

    path: Path
    address: str


@dataclass(frozen=True)
class Address:
    """An address, in its parts."""

    type: StoreType
    bucket: str
    key: str
    root: str
    """The address up to the key."""
    account: str | None = None

    @classmethod
    def of(cls, text: str, field: str) -> Address:
        """Raises Failure for an address that names no file."""
        scheme, _, rest = text.partition("://")
        kind = TYPE_OF_SCHEME[scheme]
        place, _, key = rest.partition("/")
        bucket, _, host = place.partition("@")
        account = host.partition(".")[0] or None
        if host and (kind != "az" or not re.fullmatch("[a-z0-9]{3,24}", account or "")):
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{field}: an address with a name or a password in it can be read by everyone who sees the job. Remove"
                f" them, and name credentials in {FIELD}[].secretRef",
            )
        example = f"{scheme}://{'CONTAINER' if kind == 'az' else 'BUCKET'}/rows.jsonl"
        if not bucket or PATTERN.search(bucket) or not key:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{field}: {text} names no file. Write {example}, a pattern such as"
                f" {example.replace('rows.jsonl', 'rows/*.jsonl')}, or all files below: {scheme}://.../rows/",
            )
        return cls(kind, bucket, key, f"{scheme}://{place}/", account)

    @property
    def is_one_file(self) -> bool:
        return not self.key.endswith("/") and not PATTERN.search(self.key)


def fetched(text: str, field: str, folder: Path, stores: Sequence[Store]) -> list[Fetched]:
    """Return the files that an address, a pattern or a prefix names, sorted, in folders of their own below `folder`.

    A file that an earlier attempt has downloaded is not downloaded again. Raises Failure if there are none, if they may
    not be read, if the server cannot be reached, or if they do not fit the volume.
    """
    address = Address.of(text, field)
    given = next((store for store in stores if store.type == address.type), Store(type=address.type))
    with _opened(given, address, field) as bucket:
        found = [] if address.is_one_file else bucket.listed(text)
        sizes = sum(meta["size"] for meta in found)
        folder.mkdir(parents=True, exist_ok=True)
        free, _ = volume(folder)
        if sizes > free:
            raise Failure(
                ExitCode.STORAGE_ERROR,
                f"{field}: the {len(found)} files of {text} have {amount(sizes)}, and {amount(free)} of the workspace"
                " are free. Enlarge its claim (spec.workspace.size), or name fewer files",
            )
        keys = [meta["path"] for meta in found] or [address.key]
        with ThreadPoolExecutor(AT_ONCE) as threads:
            files = list(threads.map(lambda key: bucket.downloaded(key, folder / "remote"), keys))
    total = sum(file.path.stat().st_size for file in files)
    many = f"{len(files)} files of {text} are" if len(files) > 1 else f"{files[0].address} is"
    print(f"{field}: {many} downloaded {WITH[bucket.mode]}, {total} bytes", flush=True)
    return files


@dataclass(frozen=True)
class Bucket:
    """A bucket, and how it is read."""

    store: ObjectStore
    proxy: GuardingProxy
    mode: Mode
    address: Address
    field: str

    def listed(self, text: str) -> list[ObjectMeta]:
        """Return the objects that the address names by a pattern, or by the prefix with which it ends, sorted.

        Raises Failure if there are none.
        """
        from fsspec.utils import glob_translate

        key = self.address.key
        fixed = PATTERN.split(key)[0].rpartition("/")[0]
        every = self._asked(text, lambda: [meta for some in self.store.list(fixed or None) for meta in some])
        if key.endswith("/"):
            found = [meta for meta in every if not PurePosixPath(meta["path"]).name.startswith(HIDDEN)]
            if lost := len(every) - len(found):
                print(
                    f"{self.field}: {lost} of {len(every)} files are left out, whose names begin with _ or .",
                    flush=True,
                )
        else:
            matches = re.compile(glob_translate(key)).fullmatch
            found = [meta for meta in every if matches(meta["path"])]
        if not found:
            near = f". {len(every)} files begin with {self.address.root}{fixed}/" if every else ""
            raise Failure(ExitCode.NOT_FOUND, f"{self.field}: there is no file {text}{near}. Correct the address")
        return sorted(found, key=lambda meta: meta["path"])

    def downloaded(self, key: str, folder: Path) -> Fetched:
        """Return a file. What is cut off is read once more from its beginning. Raises Failure."""
        text = f"{self.address.root}{key}"
        for attempt in range(1, ATTEMPTS + 1):
            if file := self._asked(text, lambda: self._written(key, folder)):
                return Fetched(file, text)
            if attempt < ATTEMPTS:
                time.sleep(RETRIES["backoff"]["init_backoff"].total_seconds() * 2 ** (attempt - 1))
        raise Failure(
            ExitCode.HUB_UNAVAILABLE,
            f"{self.field}: {text} was cut off in {ATTEMPTS} attempts, or changes while it is read. Start the job when"
            " it is written and the server can be reached",
        )

    def _written(self, key: str, folder: Path) -> Path | None:
        """Return the file with an object; None if it was cut off, or has changed meanwhile."""
        from obstore.exceptions import BaseError

        answer = self.store.get(key)
        got = answer.meta
        version = f"{self.address.root}{key} {got.get('e_tag')} {got['size']} {got['last_modified']}"
        target = folder / hashlib.sha256(version.encode()).hexdigest()[:16] / PurePosixPath(key).name
        if target.exists() and target.stat().st_size == got["size"]:
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.partial")
        with partial.open("wb") as file:
            try:
                for chunk in answer.stream(CHUNK):
                    file.write(chunk)
            except BaseError:
                return None
            size = file.tell()
        return partial.rename(target) if size == got["size"] else None

    def _asked(self, text: str, ask: Callable[[], Any]) -> Any:
        """Return what `ask` returns. Raises Failure for an error of the store."""
        from obstore.exceptions import BaseError

        try:
            return ask()
        except ValueError:  # such as of `..`
            raise Failure(ExitCode.INVALID_SPEC, f"{self.field}: {text} is no address of a file. Correct it") from None
        except (BaseError, FileNotFoundError) as error:
            if isinstance(error, FileNotFoundError) and error.filename is not None:
                raise  # an error of the volume
            raise self.proxy.refusal or self._failure(text, error) from None

    def _failure(self, text: str, error: Exception) -> Failure:
        """Return the Failure for an error of the store, which object_store has tried again where that may help."""
        message = str(error).partition("\nDebug source")[0]
        status = int(found[1]) if (found := STATUS.search(message)) else None
        code = next((name for name in found.groups() if name), "") if (found := CODE.search(message)) else ""
        said = f"{status or ''} {code}".strip()
        place, where = f"{self.field}: {text}", f"{self.address.root}"
        if status in (401, 403) or code in UNKNOWN_KEYS:
            return Failure(
                ExitCode.UNAUTHORIZED,
                f"{place} may not be read {WITH[self.mode]} ({said}). {REMEDY[self.mode]}",
            )
        if isinstance(error, FileNotFoundError) or status == 404:
            if code in ("NoSuchBucket", "ContainerNotFound"):
                return Failure(ExitCode.NOT_FOUND, f"{place}: there is no {where} ({said}). Correct the address")
            near = self._near()
            return Failure(ExitCode.NOT_FOUND, f"{self.field}: there is no file {text}{near}. Correct the address")
        if (
            (status and 300 <= status < 400)
            or "redirect" in message
            or "Region" in code
            or code.startswith("Authorization")
        ):
            return Failure(
                ExitCode.INVALID_SPEC,
                f"{place}: the bucket is in another region ({said or 'a redirect'}). Set {FIELD}[].region",
            )
        if status is not None and status < 500 and status not in (408, 429):
            return Failure(
                ExitCode.INVALID_SPEC,
                f"{place} was answered with {said}. Correct the address, or {FIELD}[].endpoint",
            )
        if found := UNTRUSTED.search(str(error)):
            return Failure(
                ExitCode.MISCONFIGURED,
                f"{place}: the certificate of the server is not trusted ({found[1] or found[2]}). Name a file"
                " with that of its issuer in SSL_CERT_FILE: the administrator in jobs.env of the chart, or you for"
                " luthier run",
            )
        why = self.proxy.trouble or said or "the connection was lost"
        return Failure(
            ExitCode.HUB_UNAVAILABLE,
            f"{place} could not be read in {ATTEMPTS} attempts: {why}. If the server has another"
            f" address, set {FIELD}[].endpoint",
        )

    def _near(self) -> str:
        """Return a hint if the key is that of a folder."""
        from obstore.exceptions import BaseError

        try:
            below = next(iter(self.store.list(self.address.key, chunk_size=1)), None)
        except (BaseError, FileNotFoundError):
            return ""
        return f". It is a folder: write {self.address.root}{self.address.key}/ for all files below" if below else ""


@contextmanager
def _opened(given: Store, address: Address, field: str) -> Iterator[Bucket]:
    """Open the bucket of an address. Raises Failure if `given` does not describe how."""
    from obstore.exceptions import BaseError
    from obstore.store import AzureStore, GCSStore, S3Store

    names, info = OPTIONS[given.type], STORES[given.type]
    mode = mode_of(given)
    options: dict[str, Any] = {names["bucket"]: address.bucket} | secret_of(given, names)
    if mode == "anonymous":
        options["skip_signature"] = True
    if given.endpoint:
        options[names["endpoint"]] = given.endpoint.rstrip("/")
    if given.region:
        options["region"] = given.region
    if given.type == "az":
        account = address.account or given.account or os.environ.get("AZURE_STORAGE_ACCOUNT_NAME")
        if account is None:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{FIELD}: {address.root} does not say in which storage account it is. Add {{type: az, account: NAME}}",
            )
        options["account_name"] = account
    proxy = GuardingProxy(Guard(field), info.domains, identity_hosts() if mode == "identity" else frozenset())
    client: Any = TIMEOUTS | {"proxy_url": proxy.url, "user_agent": "luthier"}
    client["allow_http"] = bool(given.endpoint and given.endpoint.startswith("http://")) or mode == "identity"
    if bundle := os.environ.get("SSL_CERT_FILE"):
        client["root_certificate"] = Path(bundle).read_bytes()
    make: Any = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}[given.type]
    with serving(proxy):
        try:
            with without(() if mode == "identity" else own_variables(given)):
                store = make(config=options, client_options=client, retry_config=RETRIES)
        except (BaseError, ValueError):  # the message may hold what cannot be read
            what = (
                f"{FIELD}.secretRef: {', '.join(keys_of(given))}: cannot be used for {info.title}. Correct the Secret"
            )
            if mode != "secret":
                what = f"{field}: {address.root} is no bucket of {info.title}. Correct the address"
            raise Failure(ExitCode.INVALID_SPEC, what) from None
        yield Bucket(store, proxy, mode, address, field)
