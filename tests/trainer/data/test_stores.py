"""Files of object stores: what is read, tried again and refused.

S3 is a real server where there is one (versitygw). Otherwise, and for all faults, for Google's and for Azure's stores,
it is a server of this file, which speaks what the three protocols need for reading and checks signatures by itself.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import json
import re
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest
from cases import versitygw

from luthier_api.dataset import TrainingData
from luthier_api.exitcodes import ExitCode
from luthier_api.secrets import STORES as CREDENTIALS
from luthier_api.stores import STORES, Store
from luthier_trainer.data import store_credentials, stores
from luthier_trainer.data.guarding_proxy import GuardingProxy, serving
from luthier_trainer.data.load import Loader, Rows
from luthier_trainer.data.remote import Guard
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.workspace import provenance

ACCOUNT_KEY = base64.b64encode(b"key-of-the-storage-account").decode()
OBJECTS = {
    "x/a.jsonl": b'{"text": "a"}\n',
    "x/b.jsonl": b'{"text": "b"}\n{"text": "c"}\n',
    "x/sub/d e%41+ü.jsonl": b'{"text": "d"}\n',
    "x/_SUCCESS": b"",
    "y.csv": b"text\ne\n",
}
Answer = tuple[int, dict[str, str], bytes]
WRITTEN = {"Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
CUT: Answer = (200, {"Content-Length": "999", "ETag": '"a"', **WRITTEN}, b"{")
TOO_BUSY: Answer = (503, {}, b"<Error><Code>SlowDown</Code></Error>")


@dataclass
class Bucket:
    """The server's one bucket: what it holds, and what it answers instead, one after the other."""

    objects: dict[str, bytes] = field(default_factory=lambda: dict(OBJECTS))
    instead: list[Answer | None] = field(default_factory=list)
    """None: an ordinary answer."""
    asked: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    url: str = ""
    server: ThreadingHTTPServer | None = None


def signature_of_s3(method: str, path: str, query: str, headers: Any) -> bool:
    """Whether a request is signed by version 4 of AWS, as its description says."""
    given = dict(re.findall(r"(\w+)=([^, ]+)", headers.get("Authorization", "")))
    if not given:
        return False
    names = given["SignedHeaders"].split(";")
    parts = sorted((quote(k, safe="-_.~"), quote(v, safe="-_.~")) for k, v in parse_qsl(query, keep_blank_values=True))
    canonical = "\n".join(
        [
            method,
            path,
            "&".join(f"{k}={v}" for k, v in parts),
            *(f"{name}:{headers[name].strip()}" for name in names),
            "",
            given["SignedHeaders"],
            headers["x-amz-content-sha256"],
        ]
    )
    _, *scope = given["Credential"].split("/")
    text = ["AWS4-HMAC-SHA256", headers["x-amz-date"], "/".join(scope), hashlib.sha256(canonical.encode()).hexdigest()]
    key = b"AWS4" + versitygw.PASSWORD.encode()
    for part in (*scope, "\n".join(text)):
        key = hmac.digest(key, part.encode(), "sha256")
    return hmac.compare_digest(key.hex(), given["Signature"])


def signature_of_azure(method: str, path: str, query: str, headers: Any) -> bool:
    """Whether a request is signed by Shared Key of Azure, as its description says."""
    ours = sorted((name.lower(), value) for name, value in headers.items() if name.lower().startswith("x-ms-"))
    standard = "Content-Encoding Content-Language Content-Length Content-MD5 Content-Type Date If-Modified-Since"
    names = [*standard.split(), "If-Match", "If-None-Match", "If-Unmodified-Since", "Range"]
    values = [headers.get(name, "") for name in names]
    values[2] = values[2].removeprefix("0")  # an empty body counts as no length
    text = [method, *values, *(f"{name}:{value}" for name, value in ours)]
    resource = [f"/account{path}", *(f"{name}:{value}" for name, value in sorted(parse_qsl(query)))]
    digest = hmac.digest(base64.b64decode(ACCOUNT_KEY), "\n".join([*text, *resource]).encode(), "sha256")
    return bool(headers.get("Authorization") == f"SharedKey account:{base64.b64encode(digest).decode()}")


def listing_of_s3(found: dict[str, bytes]) -> str:
    items = (
        f"<Contents><Key>{escape(name)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>{tag(body)}"
        f"</ETag><Size>{len(body)}</Size></Contents>"
        for name, body in found.items()
    )
    return f"<ListBucketResult><IsTruncated>false</IsTruncated>{''.join(items)}</ListBucketResult>"


def listing_of_azure(found: dict[str, bytes]) -> str:
    items = (
        f"<Blob><Name>{escape(name)}</Name><Properties><Last-Modified>Thu, 01 Jan 2026 00:00:00 GMT</Last-Modified>"
        f"<Content-Length>{len(body)}</Content-Length><Content-Type>x</Content-Type><Etag>{tag(body)}</Etag>"
        "<ResourceType>file</ResourceType></Properties></Blob>"
        for name, body in found.items()
    )
    return f"<EnumerationResults><Blobs>{''.join(items)}</Blobs><NextMarker/></EnumerationResults>"


def tag(body: bytes) -> str:
    return f'"{hashlib.md5(body).hexdigest()}"'


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    there = Bucket()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            there.asked.append(self.path)
            there.headers.append({name.lower(): value for name, value in self.headers.items()})
            status, headers, body = (there.instead.pop(0) if there.instead else None) or self.answer(
                parts.path, parts.query
            )
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)
            self.close_connection = True

        do_HEAD = do_GET

        def answer(self, path: str, query: str) -> Answer:
            is_azure = "x-ms-version" in self.headers
            asked = dict(parse_qsl(query))
            signed = signature_of_azure if is_azure else signature_of_s3
            sent = "Authorization" in self.headers or "sig" in asked
            if sent and not asked.get("sig") and not signed(self.command, path, query, self.headers):
                return error(403, "SignatureDoesNotMatch")
            name, _, key = unquote(path).strip("/").partition("/")
            if name != "bucket":
                return error(404, "ContainerNotFound" if is_azure else "NoSuchBucket")
            if name == "bucket" and not key:
                found = {k: v for k, v in there.objects.items() if k.startswith(asked.get("prefix", ""))}
                listing = listing_of_azure if is_azure else listing_of_s3
                return 200, {}, listing(found).encode()
            if key not in there.objects:
                return error(404, "BlobNotFound" if is_azure else "NoSuchKey")
            held = there.objects[key]
            return 200, {"ETag": tag(held), **WRITTEN}, held

        def log_message(self, *args: Any) -> None:
            pass

    def error(status: int, code: str) -> Answer:
        return status, {}, f"<Error><Code>{code}</Code></Error>".encode()

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    there.url, there.server = f"http://127.0.0.1:{running.server_port}", running
    for name in ("init_backoff", "max_backoff"):
        monkeypatch.setitem(stores.RETRIES["backoff"], name, stores.RETRIES["backoff"][name] / 1000)
    yield there
    running.shutdown()
    running.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables of a pod of `prepare`."""
    for info in STORES.values():
        for name in info.identity:
            monkeypatch.delenv(name, raising=False)
    account = {"disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": "", "gcs_base_url": ""}
    given = {
        "accessKeyId": versitygw.USER,
        "secretAccessKey": f"{versitygw.PASSWORD}\n",
        "sessionToken": "token-of-a-session",
        "serviceAccountKey": json.dumps(account),
        "accountKey": ACCOUNT_KEY,
        "sasToken": "?sv=2026&sig=signature-of-the-token",
    }
    for credential, variable in CREDENTIALS.variables.items():
        monkeypatch.setenv(variable, given[credential])


def store(
    server: str | None, kind: str = "s3", keys: tuple[str, ...] = ("accessKeyId", "secretAccessKey"), **of: Any
) -> Store:
    """A store with the credentials `keys`."""
    secret = {"secretRef": {"name": "login", "keys": {key: key for key in keys}}} if keys else {}
    endpoint = {"endpoint": server} if server else {}
    return Store.model_validate({"type": kind} | endpoint | secret | of)


def load(tmp_path: Path, given: Store, *files: str) -> Rows:
    source = TrainingData.model_validate({"files": list(files)})
    loader = Loader(source, "spec.dataset", tmp_path / "cache", columns=("text",), others=False, stores=[given])
    return loader.split("train", "split")


@dataclass(frozen=True)
class Case:
    name: str
    files: list[str]
    texts: list[str]
    addresses: list[str]


READ = [
    Case(
        name="one file",
        files=["s3://bucket/x/a.jsonl"],
        texts=["a"],
        addresses=["s3://bucket/x/a.jsonl"],
    ),
    Case(
        name="a pattern of a folder",
        files=["s3://bucket/x/*.jsonl"],
        texts=["a", "b", "c"],
        addresses=["s3://bucket/x/a.jsonl", "s3://bucket/x/b.jsonl"],
    ),
    Case(
        name="a pattern of all folders",
        files=["s3://bucket/**/*.jsonl"],
        texts=["a", "b", "c", "d"],
        addresses=["s3://bucket/x/a.jsonl", "s3://bucket/x/b.jsonl", "s3://bucket/x/sub/d e%41+ü.jsonl"],
    ),
    Case(
        name="all files below, without what a program has left there",
        files=["s3://bucket/x/"],
        texts=["a", "b", "c", "d"],
        addresses=["s3://bucket/x/a.jsonl", "s3://bucket/x/b.jsonl", "s3://bucket/x/sub/d e%41+ü.jsonl"],
    ),
    Case(
        name="a file twice",
        files=["s3://bucket/x/sub/d e%41+ü.jsonl", "s3://bucket/x/sub/"],
        texts=["d"],
        addresses=["s3://bucket/x/sub/d e%41+ü.jsonl"],
    ),
]


@pytest.mark.parametrize("case", READ, ids=lambda case: case.name)
def test_files_of_s3(case: Case, bucket: Bucket, tmp_path: Path) -> None:
    rows = load(tmp_path, store(bucket.url), *case.files)
    assert rows.data["text"][:] == case.texts
    assert [origin.path for origin in rows.origins] == case.addresses
    provenance.refuse_changes(rows.origins)


def test_files_of_a_real_server(tmp_path: Path) -> None:
    folder = tmp_path / "buckets"
    for name, body in OBJECTS.items():
        (folder / "bucket" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "bucket" / name).write_bytes(body)
    with versitygw.serving(folder) as port:
        given = store(f"http://127.0.0.1:{port}", region="us-east-1")
        for i, case in enumerate(READ):
            rows = load(tmp_path / f"{i}", given, *case.files)
            assert rows.data["text"][:] == case.texts, case.name
            assert [origin.path for origin in rows.origins] == case.addresses
        for wrong, message, code in (
            (
                given.model_copy(update={"secret_ref": None}),
                "may not be read without credentials",
                ExitCode.UNAUTHORIZED,
            ),
            (given.model_copy(update={"region": "eu-west-1"}), "is in another region", ExitCode.INVALID_SPEC),
        ):
            with pytest.raises(Failure, match=message) as failure:
                load(tmp_path / "none", wrong, "s3://bucket/x/*.jsonl")
            assert failure.value.code == code
        with pytest.raises(Failure, match="there is no s3://nowhere/"):
            load(tmp_path / "none", given, "s3://nowhere/x/*.jsonl")


OTHERS = [
    ("gs", "gs://bucket/x/", ("serviceAccountKey",), {}),
    ("gs", "gs://bucket/x/", (), {}),
    ("az", "az://bucket/x/", ("accountKey",), {"account": "account"}),
    ("az", "az://bucket/x/", ("sasToken",), {"account": "account"}),
    ("az", "abfss://bucket@account.dfs.core.windows.net/x/", ("accountKey",), {}),
    ("s3", "s3://bucket/x/", ("accessKeyId", "secretAccessKey", "sessionToken"), {}),
    ("s3", "s3://bucket/x/", (), {"anonymous": True}),
]


@pytest.mark.parametrize(("kind", "address", "keys", "others"), OTHERS, ids=lambda value: str(value))
def test_other_stores_and_credentials(
    kind: str, address: str, keys: tuple[str, ...], others: dict[str, str], bucket: Bucket, tmp_path: Path
) -> None:
    rows = load(tmp_path, store(bucket.url, kind, keys, **others), address)
    assert rows.data["text"][:] == ["a", "b", "c", "d"]
    signed = {"authorization" in headers for headers in bucket.headers}
    assert signed == {bool(keys) and keys[0] not in ("serviceAccountKey", "sasToken")}, "a signature that was checked"
    assert all("signature-of-the-token" in asked for asked in bucket.asked) == (keys == ("sasToken",))


def test_what_is_temporary_is_tried_again(bucket: Bucket, tmp_path: Path) -> None:
    bucket.instead = [TOO_BUSY, (429, {}, b""), None, TOO_BUSY, CUT]
    assert load(tmp_path, store(bucket.url), "s3://bucket/x/a*").data["text"][:] == ["a"]


CERTIFICATES = """
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -keyout ca.key -out ca.pem -subj /CN=ca
openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout key.pem -out leaf.csr -subj /CN=leaf
openssl x509 -req -in leaf.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile names -out leaf.pem
"""


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the program openssl, which makes certificates")
def test_an_encrypted_connection(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "names").write_text("subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\n")
    for command in CERTIFICATES.strip().splitlines():
        subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "leaf.pem", tmp_path / "key.pem")
    assert bucket.server is not None
    bucket.server.socket = context.wrap_socket(bucket.server.socket, server_side=True)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    given = store(bucket.url.replace("http://", "https://"))
    with pytest.raises(Failure, match=r"the certificate of the server is not trusted .* in SSL_CERT_FILE") as failure:
        load(tmp_path, given, "s3://bucket/x/*.jsonl")
    assert failure.value.code == ExitCode.MISCONFIGURED
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    assert load(tmp_path, given, "s3://bucket/x/*.jsonl").data["text"][:] == ["a", "b", "c"]


def test_a_second_attempt_downloads_nothing_again(bucket: Bucket, tmp_path: Path) -> None:
    for _ in range(2):
        files = stores.fetched("s3://bucket/x/", "f", tmp_path, [store(bucket.url)])
    assert len({file.path for file in files}) == 3
    before = files[0].path.stat().st_mtime_ns
    bucket.objects["x/a.jsonl"] = b'{"text": "z"}\n'
    again = stores.fetched("s3://bucket/x/", "f", tmp_path, [store(bucket.url)])
    assert again[0].path.read_bytes() == b'{"text": "z"}\n'
    assert again[1:] == files[1:]
    assert files[0].path.stat().st_mtime_ns == before


@dataclass(frozen=True)
class Refused:
    name: str
    message: str
    code: ExitCode
    file: str = "s3://bucket/x/a.jsonl"
    given: dict[str, Any] = field(default_factory=dict)
    answers: list[Answer | None] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)


REFUSED = [
    Refused(
        name="no such file",
        file="s3://bucket/x/none.jsonl",
        message="there is no file s3://bucket/x/none.jsonl. Correct the address",
        code=ExitCode.NOT_FOUND,
    ),
    Refused(
        name="a folder",
        file="s3://bucket/x",
        message="there is no file s3://bucket/x. It is a folder: write s3://bucket/x/ for all files below",
        code=ExitCode.NOT_FOUND,
    ),
    Refused(
        name="an empty listing",
        file="s3://bucket/z/*.jsonl",
        message="there is no file s3://bucket/z/*.jsonl. Correct the address",
        code=ExitCode.NOT_FOUND,
    ),
    Refused(
        name="a pattern that fits none of the files",
        file="s3://bucket/x/*.csv",
        message="there is no file s3://bucket/x/*.csv. 4 files begin with s3://bucket/x/. Correct the address",
        code=ExitCode.NOT_FOUND,
    ),
    Refused(
        name="no such bucket",
        file="s3://buckets/x/a.jsonl",
        message="s3://buckets/x/a.jsonl: there is no s3://buckets/ (404 NoSuchBucket). Correct the address",
        code=ExitCode.NOT_FOUND,
    ),
    Refused(
        name="no bucket",
        file="s3://bucket",
        message="s3://bucket names no file. Write s3://BUCKET/rows.jsonl, a pattern such as s3://BUCKET/rows/*.jsonl",
        code=ExitCode.INVALID_SPEC,
    ),
    Refused(
        name="no key",
        file="s3://bucket/x/../y.csv",
        message="s3://bucket/x/../y.csv is no address of a file",
        code=ExitCode.INVALID_SPEC,
    ),
    Refused(
        name="a password",
        file="s3://me:secret@bucket/a.jsonl",
        message="an address with a name or a password in it can be read by everyone who sees the job. Remove them, and"
        " name credentials in spec.stores[].secretRef",
        code=ExitCode.INVALID_SPEC,
    ),
    Refused(
        name="a wrong key",
        variables={"AWS_SECRET_ACCESS_KEY": "another-secret"},
        message="s3://bucket/x/a.jsonl may not be read with the credentials of spec.stores.secretRef (403"
        " SignatureDoesNotMatch). Correct the Secret, or let its owner read and list the bucket",
        code=ExitCode.UNAUTHORIZED,
    ),
    Refused(
        name="denied to everyone",
        given={"keys": ()},
        answers=[(403, {}, b"<Error><Code>AccessDenied</Code></Error>")],
        message="s3://bucket/x/a.jsonl may not be read without credentials (403 AccessDenied). Name credentials in"
        " spec.stores[].secretRef",
        code=ExitCode.UNAUTHORIZED,
    ),
    Refused(
        name="an unknown key",
        answers=[(404, {}, b"<Error><Code>InvalidAccessKeyId</Code></Error>")],
        message="s3://bucket/x/a.jsonl may not be read with the credentials of spec.stores.secretRef (404",
        code=ExitCode.UNAUTHORIZED,
    ),
    Refused(
        name="an empty credential",
        variables={"AWS_ACCESS_KEY_ID": "\n"},
        message="spec.stores.secretRef.keys.accessKeyId: it is empty, or AWS_ACCESS_KEY_ID is not set here",
        code=ExitCode.UNAUTHORIZED,
    ),
    Refused(
        name="a credential that is none",
        file="gs://bucket/x/a.jsonl",
        given={"kind": "gs", "keys": ("serviceAccountKey",)},
        variables={"GOOGLE_SERVICE_ACCOUNT_KEY": "secret-that-is-no-json"},
        message="spec.stores.secretRef: serviceAccountKey: cannot be used for Google Cloud Storage. Correct the Secret",
        code=ExitCode.INVALID_SPEC,
    ),
    Refused(
        name="another region",
        answers=[(400, {}, b"<Error><Code>AuthorizationHeaderMalformed</Code></Error>")],
        message="s3://bucket/x/a.jsonl: the bucket is in another region (400 AuthorizationHeaderMalformed). Set"
        " spec.stores[].region",
        code=ExitCode.INVALID_SPEC,
    ),
    Refused(
        name="no storage account",
        file="az://bucket/x/a.jsonl",
        given={"kind": "az", "keys": ("accountKey",)},
        message="spec.stores: az://bucket/ does not say in which storage account it is. Add {type: az, account: NAME}",
        code=ExitCode.INVALID_SPEC,
    ),
    Refused(
        name="a file that is always cut off",
        answers=[CUT] * 50,
        message="s3://bucket/x/a.jsonl was cut off in 5 attempts, or changes while it is read. Start the job when it is"
        " written",
        code=ExitCode.HUB_UNAVAILABLE,
    ),
    Refused(
        name="a server that is always too busy",
        answers=[TOO_BUSY] * 5,
        message="s3://bucket/x/a.jsonl could not be read in 5 attempts: 503 SlowDown",
        code=ExitCode.HUB_UNAVAILABLE,
    ),
    Refused(
        name="no server",
        given={"server": "http://127.0.0.1:1"},
        message="s3://bucket/x/a.jsonl could not be read in 5 attempts: 127.0.0.1: [Errno 111] Connection refused."
        " If the server has another address, set spec.stores[].endpoint",
        code=ExitCode.HUB_UNAVAILABLE,
    ),
    Refused(
        name="the credentials of the node, as a server",
        file="s3://latest/meta-data/iam",
        given={"server": "http://169.254.169.254"},
        message="it leads to 169.254.169.254, an address of the node or the cloud, which is never asked",
        code=ExitCode.INVALID_SPEC,
    ),
    Refused(
        name="the credentials of the node, by a redirect",
        answers=[(307, {"Location": "http://169.254.169.254/latest/meta-data/iam"}, b"")],
        message="it leads to 169.254.169.254, an address of the node or the cloud, which is never asked",
        code=ExitCode.INVALID_SPEC,
    ),
    Refused(
        name="the credentials of the node, by a key of a service account",
        file="gs://latest/meta-data/iam",
        given={"kind": "gs", "keys": ("serviceAccountKey",), "server": None},
        variables={
            "GOOGLE_SERVICE_ACCOUNT_KEY": '{"gcs_base_url": "http://169.254.169.254", "disable_oauth": true,'
            ' "client_email": "", "private_key": "", "private_key_id": ""}'
        },
        message="gs://latest/meta-data/iam could not be read",
        code=ExitCode.HUB_UNAVAILABLE,
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_an_address_is_refused(
    case: Refused, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    bucket.instead = [*case.answers]
    for name, value in case.variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Failure) as failure:
        load(tmp_path, store(**{"server": bucket.url} | case.given), case.file)
    field = "" if case.message.startswith("spec.stores") else "spec.dataset.files[0]: "
    assert failure.value.message.startswith(f"{field}{case.message}")
    assert failure.value.code == case.code
    shown = failure.value.message + "".join(capfd.readouterr())
    assert not any(text in shown for text in ("another-secret", "secret-that-is-no-json", versitygw.PASSWORD))


@dataclass(frozen=True)
class Unused:
    name: str
    files: list[str]
    types: list[str]
    refused: str = ""


UNUSED = [
    Unused(name="each is used", files=["s3://bucket/a.jsonl", "abfs://c/a.jsonl"], types=["s3", "az"]),
    Unused(name="none", files=["/data/a.jsonl"], types=[]),
    Unused(
        name="no address", files=["/data/a.jsonl"], types=["s3"], refused="spec.stores[0]: no file of the job is in"
    ),
    Unused(name="another address", files=["s3://b/a.jsonl"], types=["s3", "gs"], refused="spec.stores[1]: no file of"),
]


@pytest.mark.parametrize("case", UNUSED, ids=lambda case: case.name)
def test_a_store_that_no_file_is_in_is_refused(case: Unused) -> None:
    given = [Store.model_validate({"type": kind, "anonymous": True}) for kind in case.types]
    data = TrainingData.model_validate({"mix": {"sources": [{"files": case.files}, {"id": "org/rows"}]}})
    with pytest.raises(Failure, match=re.escape(case.refused)) if case.refused else nullcontext():
        stores.refuse_unused(given, data)


def test_files_must_fit_the_workspace(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "volume", lambda folder: (20, 1000))
    with pytest.raises(Failure, match=r"the 2 files of s3://bucket/x/\*.jsonl have .* are free. Enlarge its claim"):
        load(tmp_path, store(bucket.url), "s3://bucket/x/*.jsonl")


@dataclass(frozen=True)
class Who:
    name: str
    given: dict[str, Any]
    variables: dict[str, str]
    mode: str


TOKEN_FILE = {"AWS_WEB_IDENTITY_TOKEN_FILE": "/var/run/token"}
WHO = [
    Who("nothing", {}, {}, mode="anonymous"),
    Who("an identity of the pod", {}, TOKEN_FILE, mode="identity"),
    Who("an identity that is not to be used", {"anonymous": True}, TOKEN_FILE, mode="anonymous"),
    Who("an identity, and a server of the job", {"endpoint": "https://example.org"}, TOKEN_FILE, mode="anonymous"),
    Who("the identity of the node", {}, {"LUTHIER_METADATA_IDENTITY": "true"}, mode="identity"),
    Who("a Secret, and an identity", {"keys": ("accessKeyId", "secretAccessKey")}, TOKEN_FILE, mode="secret"),
]


@pytest.mark.parametrize("case", WHO, ids=lambda case: case.name)
def test_as_whom_a_store_is_read(case: Who, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in CREDENTIALS.variables.values():
        monkeypatch.delenv(variable)
    for name, value in case.variables.items():
        monkeypatch.setenv(name, value)
    assert store_credentials.mode_of(store(**{"server": None, "keys": ()} | case.given)) == case.mode


def test_only_the_administrator_lets_a_pod_ask_for_its_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    assert store_credentials.identity_hosts() == frozenset()
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://169.254.170.23/v1/credentials")
    assert store_credentials.identity_hosts() == {"169.254.170.23"}
    monkeypatch.setenv("LUTHIER_METADATA_IDENTITY", "true")
    assert store_credentials.identity_hosts() == {"169.254.170.23", *store_credentials.METADATA_SERVICE}


class Counting(GuardingProxy):
    """The proxy of a network, which counts what it forwards."""

    asked = 0

    def connected(self, scheme: str, host: str, port: int) -> tuple[socket.socket, bool]:
        self.asked += 1
        return socket.create_connection((host, port)), False


@pytest.mark.parametrize("outer", [False, True], ids=["directly", "through the proxy of the network"])
def test_a_tunnel_and_a_plain_request(outer: bool, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is encrypted passes a tunnel; for the proxy it is the same what is in it."""
    host, _, port = bucket.url.removeprefix("http://").partition(":")
    for name in ("no_proxy", "NO_PROXY", "http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving(Counting(Guard("outer"))) as network, serving(GuardingProxy(Guard("f"))) as proxy:
        if outer:
            monkeypatch.setenv("http_proxy", network.url)
            monkeypatch.setenv("https_proxy", network.url)
        inside = http.client.HTTPConnection("127.0.0.1", proxy.server_port, timeout=10)
        inside.set_tunnel(host, int(port))
        inside.request("GET", "/bucket/y.csv")
        assert inside.getresponse().read() == OBJECTS["y.csv"]
        inside.close()
        plain = http.client.HTTPConnection("127.0.0.1", proxy.server_port, timeout=10)
        plain.request("GET", f"{bucket.url}/bucket/y.csv")
        assert plain.getresponse().read() == OBJECTS["y.csv"]
        plain.close()
        for method, target in (("CONNECT", "169.254.169.254:443"), ("GET", "http://169.254.169.254/latest")):
            refused = http.client.HTTPConnection("127.0.0.1", proxy.server_port, timeout=10)
            refused.request(method, target)
            assert refused.getresponse().status == 403
            assert proxy.refusal is not None
            refused.close()
        assert network.asked == (2 if outer else 0)


@pytest.mark.parametrize(
    ("host", "addresses", "passes"),
    [
        ("bucket.s3.amazonaws.com", ["8.8.8.8", "10.0.0.1"], True),
        ("bucket.s3.amazonaws.com", ["169.254.169.254"], False),
        ("amazonaws.com.example.org", ["8.8.8.8", "10.0.0.1"], False),
        ("minio.storage.svc", ["10.0.0.1"], True),
    ],
)
def test_which_servers_are_asked(host: str, addresses: list[str], passes: bool) -> None:
    """In a private network, servers of the cloud may have private addresses, and its others public ones."""
    with GuardingProxy(Guard("f"), STORES["s3"].domains) as proxy:
        try:
            for address in addresses:
                proxy._check(host, address)
            passed = True
        except Failure:
            passed = False
    assert passed == passes
