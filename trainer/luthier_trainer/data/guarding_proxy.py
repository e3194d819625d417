"""A proxy on this machine through which the library of the object stores sends its requests.

The library connects by itself, so nobody could look at the address before a request is sent: a job may name any server,
and a server could redirect, to where the cloud hands out credentials of the node. Here each connection is looked at, as
those of `remote` are. What is encrypted passes as it is.
"""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from luthier_trainer.data.remote import CHUNK, SILENCE_SECONDS, Guard, parsed_ip
from luthier_trainer.runtime.failure import Failure

HOP = {"connection", "keep-alive", "proxy-authorization", "proxy-connection"}  # headers for a proxy alone


class GuardingProxy(ThreadingHTTPServer):
    """Forwards requests to servers that `guard` does not refuse."""

    daemon_threads = True

    def __init__(self, guard: Guard, domains: tuple[str, ...] = (), identity: frozenset[str] = frozenset()) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self.guard = guard
        self.domains = domains
        """Of the cloud: its servers may have private addresses."""
        self.identity = identity
        """Hosts that the administrator lets the pod ask for its identity."""
        self.refusal: Failure | None = None
        """Why a request was refused."""
        self.trouble = ""
        """Why there was no connection, the last time."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def connected(self, scheme: str, host: str, port: int) -> tuple[socket.socket, bool]:
        """Return a connection to a server, or to the proxy of the network, and whether it is such a proxy.

        Raises OSError, HTTPException, or Failure for a server that is never asked.
        """
        if host not in self.identity:
            with suppress(ValueError):  # a name; the proxy of the network decides which addresses it has
                self.guard.refuse_metadata(parsed_ip(host))
        outer = None if proxy_bypass(host) else getproxies().get(scheme)
        if outer is not None and host not in self.identity:
            parts = urlsplit(outer if "://" in outer else f"http://{outer}")
            connection = http.client.HTTPConnection(str(parts.hostname), parts.port or 80, timeout=SILENCE_SECONDS)
            if scheme == "https":
                connection.set_tunnel(host, port)
            connection.connect()
            return connection.sock, scheme == "http"
        if host not in self.identity:
            self.guard.check_name(host, port)
        found = socket.create_connection((host, port), SILENCE_SECONDS)
        if host not in self.identity:
            try:
                self._check(host, found.getpeername()[0])
            except Failure:
                found.close()
                raise
        return found, False

    def _check(self, host: str, address: str) -> None:
        """Raise Failure if the server at this IP address must not be asked."""
        if any(host.endswith(f".{domain}") for domain in self.domains):
            self.guard.refuse_metadata(parsed_ip(address))
        else:
            self.guard.check_server(address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing: the library reports what it misses."""


class _Request(BaseHTTPRequestHandler):
    server: GuardingProxy
    protocol_version = "HTTP/1.1"
    timeout: ClassVar[float] = SILENCE_SECONDS

    def do_CONNECT(self) -> None:
        """Open a tunnel to a server."""
        parts = urlsplit(f"//{self.path}")
        if there := self._connected("https", str(parts.hostname), parts.port or 443):
            self.send_response(200)
            self.end_headers()
            with there[0] as server:
                _relay(self.connection, server)

    def do_GET(self) -> None:
        """Forward a request that is not encrypted."""
        parts = urlsplit(self.path)
        there = self._connected("http", str(parts.hostname), parts.port or 80)
        if there is None:
            return
        server, is_proxy = there
        target = self.path if is_proxy else parts._replace(scheme="", netloc="").geturl() or "/"
        head = [f"{self.command} {target} HTTP/1.1"]
        head += [f"{name}: {value}" for name, value in self.headers.items() if name.lower() not in HOP]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with server:
            server.sendall("\r\n".join([*head, "Connection: close", "", ""]).encode("latin-1") + body)
            while data := server.recv(CHUNK):
                self.wfile.write(data)

    do_HEAD = do_POST = do_PUT = do_GET

    def _connected(self, scheme: str, host: str, port: int) -> tuple[socket.socket, bool] | None:
        """Return a connection; None if there is none, which has been answered."""
        self.close_connection = True
        try:
            return self.server.connected(scheme, host, port)
        except Failure as failure:
            self.server.refusal = failure
            self.send_error(403)
        except (OSError, http.client.HTTPException) as error:
            self.server.trouble = f"{host}: {error}"
            self.send_error(502)
        return None

    def log_message(self, *args: Any) -> None:
        """Print nothing."""


def _relay(one: socket.socket, other: socket.socket) -> None:
    """Send what comes from either side to the other one, until both are silent."""

    def forward(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(CHUNK):
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    back = threading.Thread(target=forward, args=(other, one), daemon=True)
    back.start()
    forward(one, other)
    back.join()


@contextmanager
def serving(proxy: GuardingProxy) -> Iterator[GuardingProxy]:
    """Let the proxy work in a thread of its own."""
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
