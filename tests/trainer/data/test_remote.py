"""Data files by address, from a real server on this machine: what is read, tried again, and refused."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from luthier_api.dataset import TrainingData
from luthier_api.exitcodes import ExitCode
from luthier_trainer.data import remote
from luthier_trainer.data.load import Loader, Rows
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.workspace import provenance

ROWS = b'{"text": "a"}\n{"text": "b"}\n'


@dataclass
class Answers:
    """What the server answers, one after the other; the last one again and again."""

    url: str = ""
    of: dict[str, list[tuple[int, dict[str, str], bytes]]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Answers]:
    answers = Answers()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            answers.asked.append(self.path)
            given = answers.of[path]
            status, headers, body = given.pop(0) if len(given) > 1 else given[0]
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    answers.url = f"http://127.0.0.1:{running.server_port}"
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    remote.downloaded.cache_clear()
    yield answers
    running.shutdown()
    running.server_close()
    thread.join()


def load(tmp_path: Path, *files: str, **dataset: Any) -> Rows:
    source = TrainingData.model_validate({"files": list(files), **dataset})
    return Loader(source, "spec.dataset", tmp_path / "cache", columns=("text",), others=False).split("train", "split")


def test_files_of_addresses_and_of_volumes_are_read(server: Answers, tmp_path: Path) -> None:
    local = tmp_path / "c.jsonl"
    local.write_text('{"text": "c"}\n')
    server.of = {
        "/a.jsonl": [(200, {}, ROWS)],
        "/x/d%20e.jsonl.gz": [(200, {}, gzip.compress(b'{"text": "d"}\n'))],
    }
    names = [f"{server.url}/a.jsonl?Signature=secret", str(local), f"{server.url}/x/d%20e.jsonl.gz"]
    rows = load(tmp_path, *names)
    assert rows.data["text"][:] == ["a", "b", "c", "d"]
    assert rows.place(3) == "row 3, counted from 0 (line 1 of d e.jsonl.gz)"
    assert [origin.path for origin in rows.origins] == [f"{server.url}/a.jsonl", str(local), names[2]]
    assert rows.origins[0].size == len(ROWS)
    provenance.refuse_changes(rows.origins)
    load(tmp_path, *names, split="train[:1]")
    assert len(server.asked) == 2, "a file is downloaded once"


def test_what_is_temporary_is_tried_again(server: Answers, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (200, {}, ROWS)
    server.of = {"/a.jsonl": [(503, {}, b""), (429, {}, b""), (200, {"Content-Length": "999"}, ROWS), whole]}
    assert load(tmp_path, f"{server.url}/a.jsonl").data["text"][:] == ["a", "b"]
    assert len(server.asked) == 4
    assert f"spec.dataset.files[0]: {server.url}/a.jsonl is downloaded, {len(ROWS)} bytes" in capsys.readouterr().out


def test_a_redirect_is_followed(server: Answers, tmp_path: Path) -> None:
    server.of = {"/a.jsonl": [(302, {"Location": "/b"}, b"")], "/b": [(200, {}, ROWS)]}
    assert len(load(tmp_path, f"{server.url}/a.jsonl").data) == 2


@dataclass(frozen=True)
class Refused:
    name: str
    message: str
    code: ExitCode
    url: str = "SERVER/a.jsonl"
    answer: tuple[int, dict[str, str], bytes] = (200, {}, ROWS)


REFUSED = [
    Refused(
        name="not there",
        answer=(404, {}, b""),
        message="SERVER/a.jsonl was answered with 404 Not Found. Correct the address",
        code=ExitCode.NOT_FOUND,
    ),
    Refused(
        name="forbidden",
        url="SERVER/a.jsonl?Signature=secret",
        answer=(403, {}, b""),
        message="SERVER/a.jsonl was answered with 403 Forbidden. There is no field for credentials",
        code=ExitCode.UNAUTHORIZED,
    ),
    Refused(
        name="always too busy",
        answer=(503, {}, b""),
        message="SERVER/a.jsonl could not be downloaded in 5 attempts: 503 Service Unavailable",
        code=ExitCode.HUB_UNAVAILABLE,
    ),
    Refused(
        name="cut short",
        answer=(200, {"Content-Length": "999"}, ROWS),
        message="SERVER/a.jsonl could not be downloaded in 5 attempts: IncompleteRead",
        code=ExitCode.HUB_UNAVAILABLE,
    ),
    Refused(
        name="a redirect to the credentials of the node",
        answer=(302, {"Location": "http://169.254.169.254/latest/meta-data/iam/"}, b""),
        message="it leads to 169.254.169.254, an address of the node or the cloud, which is never asked",
        code=ExitCode.INVALID_SPEC,
    ),
    Refused(
        name="the credentials of the node, as IPv6",
        url="http://[::ffff:169.254.169.254]/a.jsonl",
        message="it leads to 169.254.169.254, an address of the node",
        code=ExitCode.INVALID_SPEC,
    ),
    Refused(
        name="a redirect to a file",
        answer=(302, {"Location": "file:///etc/passwd"}, b""),
        message="SERVER/a.jsonl redirects from http:// to file://",
        code=ExitCode.INVALID_SPEC,
    ),
    Refused(
        name="a password",
        url="http://me:secret@127.0.0.1/a.jsonl",
        message="an address with a name or a password in it can be read by everyone",
        code=ExitCode.INVALID_SPEC,
    ),
    Refused(
        name="another scheme",
        url="ftp://bucket/a.jsonl",
        message="addresses of ftp:// are not read, only http://, https://, s3://, gs:// and az://",
        code=ExitCode.INVALID_SPEC,
    ),
    Refused(
        name="a pattern",
        url="SERVER/*.jsonl",
        message="SERVER/*.jsonl names no file",
        code=ExitCode.INVALID_SPEC,
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_an_address_is_refused(case: Refused, server: Answers, tmp_path: Path) -> None:
    server.of = {"/a.jsonl": [case.answer]}
    with pytest.raises(Failure) as failure:
        load(tmp_path, case.url.replace("SERVER", server.url))
    assert failure.value.message.startswith(f"spec.dataset.files[0]: {case.message.replace('SERVER', server.url)}")
    assert failure.value.code == case.code
    assert "secret" not in failure.value.message


def test_folders_of_images_have_no_address(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="folders of images are read from volumes only"):
        load(tmp_path, "https://example.org/images", format="imagefolder")


@dataclass(frozen=True)
class Hops:
    name: str
    addresses: list[str]
    passes: bool


HOPS = [
    Hops("public servers", ["8.8.8.8", "2606:4700::1"], passes=True),
    Hops("servers of the cluster", ["10.0.0.1", "127.0.0.1"], passes=True),
    Hops("from the cluster to the world", ["10.0.0.1", "8.8.8.8"], passes=True),
    Hops("from the world into the cluster", ["8.8.8.8", "10.0.0.1"], passes=False),
    Hops("link-local of IPv6", ["fe80::1%eth0"], passes=False),
    Hops("credentials of AWS by IPv6", ["fd00:ec2::254"], passes=False),
    Hops("credentials of Alibaba Cloud", ["100.100.100.200"], passes=False),
    Hops("no address", ["0.0.0.0"], passes=False),
]


@pytest.mark.parametrize("case", HOPS, ids=lambda case: case.name)
def test_which_servers_are_asked(case: Hops) -> None:
    guard = remote.Guard("f")
    try:
        for address in case.addresses:
            guard.check_server(address)
        passed = True
    except Failure:
        passed = False
    assert passed == case.passes
