"""Downloads data files that a job names by an address, http:// or https://. Only `prepare` does this.

The standard library sends the requests, because each connection has to be looked at before anything is sent over it: a
server could redirect to an address where the cloud hands out credentials of the node. The HTTP file system of fsspec
follows redirects without asking.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.client
import ipaddress
import shutil
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import unquote, urljoin, urlsplit

from luthier_api.exitcodes import ExitCode
from luthier_trainer.runtime.failure import Failure

SCHEMES = ("http", "https")
SILENCE_SECONDS = 60.0  # limit for a connection, and between two packets of an answer
ATTEMPTS = 5
FIRST_PAUSE = 1.0  # seconds; the pause doubles after each attempt
CHUNK = 1 << 20  # bytes
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
REDIRECTS = 10  # as urllib does
# Where clouds hand out credentials, beside the link-local addresses that most of them use: AWS by IPv6, Alibaba Cloud,
# Oracle Cloud.
METADATA = {ipaddress.ip_address(address) for address in ("fd00:ec2::254", "100.100.100.200", "192.0.0.192")}


def is_remote(path: str) -> bool:
    """Return whether a path of the spec is an address."""
    return "://" in path


def without_query(url: str) -> str:
    """Return an address without its query, which may hold a signature. In one of a store, ? belongs to a pattern."""
    return url.partition("?")[0] if url.partition("://")[0] in SCHEMES else url


@functools.cache
def downloaded(url: str, folder: Path, field: str) -> Path:
    """Return the file that `url` was downloaded to, in a folder of its own below `folder`, under its name.

    Raises Failure if there is no such file, if it may not be read, or if the server cannot be reached.
    """
    shown = _checked(url, field)
    name = unquote(PurePosixPath(urlsplit(url).path).name)
    target = folder / "remote" / hashlib.sha256(url.encode()).hexdigest()[:16] / name
    target.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            size = _fetch(url, target, field)
            break
        except urllib.error.HTTPError as error:
            error.close()
            if error.code < 500 and error.code not in (408, 429):
                raise _refusal(error.code, f"{field}: {shown} was answered with {error.code} {error.reason}") from None
            why = f"{error.code} {error.reason}"
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.filename is not None:
                raise  # an error of the volume
            why = str(getattr(error, "reason", error)) or type(error).__name__
        if attempt == ATTEMPTS:
            raise Failure(
                ExitCode.HUB_UNAVAILABLE,
                f"{field}: {shown} could not be downloaded in {ATTEMPTS} attempts: {' '.join(why.split())[:200]}",
            )
        time.sleep(FIRST_PAUSE * 2 ** (attempt - 1))
    print(f"{field}: {shown} is downloaded, {size} bytes", flush=True)
    return target


def _checked(url: str, field: str) -> str:
    """Return how messages show the address. Raises Failure if it cannot be used."""
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: addresses of {parts.scheme}:// are not read, only http://, https://, s3://, gs:// and az://."
            " Copy the files to a volume (spec.volumes), or name such an address of them",
        )
    if parts.username is not None or parts.password is not None:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: an address with a name or a password in it can be read by everyone who sees the job. Remove"
            " them",
        )
    if "*" in parts.path or not PurePosixPath(parts.path).name:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: {without_query(url)} names no file; a server does not list its files, so name each of them",
        )
    return without_query(url)


def _refusal(status: int, what: str) -> Failure:
    """Return the Failure for an answer that another attempt would not change."""
    if status in (401, 403):
        return Failure(
            ExitCode.UNAUTHORIZED,
            f"{what}. There is no field for credentials of HTTP: name a signed address, or copy the file to a volume",
        )
    return Failure(ExitCode.NOT_FOUND, f"{what}. Correct the address")


def _fetch(url: str, target: Path, field: str) -> int:
    """Write what the server sends into `target`, which is there only when it is complete. Returns its bytes.

    Raises OSError or HTTPException if another attempt may help, HTTPError for an answer, and Failure.
    """
    partial = target.with_name(f"{target.name}.partial")
    guard = Guard(field)
    with contextlib.closing(guard.open(url)) as answer, partial.open("wb") as file:
        expected = answer.headers.get("Content-Length")
        shutil.copyfileobj(answer, file, CHUNK)
        size = file.tell()
    if expected is not None and size != int(expected):
        raise http.client.IncompleteRead(b"", int(expected) - size)
    partial.rename(target)
    return size


class Guard:
    """Sends a request and follows its redirects, and looks at the address of each server."""

    def __init__(self, field: str) -> None:
        self.field = field
        self.first: Address | None = None
        """Of the server that was asked first."""

    def open(self, url: str) -> Any:
        """Return the answer, to be read and closed. Raises HTTPError, OSError, or Failure for a forbidden address."""
        opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler(),
            _Http(self),
            _Https(self),
            _Redirects(self),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPErrorProcessor(),
        ):
            opener.add_handler(handler)
        opener.addheaders = [("User-Agent", "luthier"), ("Accept-Encoding", "identity")]
        return opener.open(url, timeout=SILENCE_SECONDS)

    def check_name(self, host: str, port: int) -> None:
        """Raise Failure if one of the IP addresses of a host is never asked. Raises OSError if it has none."""
        for *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            self.refuse_metadata(parsed_ip(str(address[0])))

    def check_server(self, address: str) -> None:
        """Raise Failure if the server at this IP address, to which there is a connection, must not be asked.

        Between two look-ups a name may get another address. A public server must not redirect into the cluster.
        """
        ip = parsed_ip(address)
        self.refuse_metadata(ip)
        if self.first is not None and self.first.is_global and not ip.is_global:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{self.field}: {self.first} redirects to {ip}, which is no public address; this is not followed. Name"
                " that server itself if it is meant",
            )
        self.first = self.first or ip

    def refuse_metadata(self, ip: Address) -> None:
        """Raise Failure if nobody may name this address: the cloud may hand out credentials of the node there."""
        if ip.is_link_local or ip.is_multicast or ip.is_unspecified or ip in METADATA:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{self.field}: it leads to {ip}, an address of the node or the cloud, which is never asked. Name the"
                " server that has the file",
            )


def parsed_ip(address: str) -> Address:
    """Return an IP address; one of IPv4 that is written as IPv6 as what it is."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    return getattr(ip, "ipv4_mapped", None) or ip


class _Http(urllib.request.HTTPHandler):
    def __init__(self, guard: Guard) -> None:
        super().__init__()
        self.guard = guard

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        guard = self.guard

        class Connection(http.client.HTTPConnection):
            def connect(self) -> None:
                guard.check_name(self.host, self.port)
                super().connect()
                guard.check_server(self.sock.getpeername()[0])

        return self.do_open(Connection, req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, guard: Guard) -> None:
        super().__init__()
        self.guard = guard

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        guard = self.guard

        class Connection(http.client.HTTPSConnection):
            def connect(self) -> None:
                guard.check_name(self.host, self.port)
                super().connect()
                guard.check_server(self.sock.getpeername()[0])

        return self.do_open(Connection, req)


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = REDIRECTS

    def __init__(self, guard: Guard) -> None:
        self.guard = guard

    def http_error_302(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: http.client.HTTPMessage
    ) -> Any:
        """Follow a redirect. Raises Failure if it leaves HTTP, or its encryption."""
        scheme = urlsplit(urljoin(req.full_url, headers.get("Location", ""))).scheme
        if scheme not in SCHEMES or (req.type == "https" and scheme != "https"):
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{self.guard.field}: {without_query(req.full_url)} redirects from {req.type}:// to {scheme}://, which"
                " is not followed. Name the address that it leads to",
            )
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302
