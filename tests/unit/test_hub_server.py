"""The Hub of the tests against the real client: what a test of ours proves there must hold on the real one."""

import hashlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hub.access import CLOSED_NAMESPACE, READ_TOKEN, WRITE_TOKEN
from hub.server import Running
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

REPO = "luthier/adapter"
WEIGHTS = bytes(range(256)) * 4096  # has NUL bytes: goes by LFS
FILES = {
    "README.md": b"# An adapter\n",
    "adapter_config.json": b'{"r": 8}',
    "adapter_model.safetensors": WEIGHTS,
    "logs/empty.txt": b"",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """Uploads take the LFS path; a client's own retries wait no second."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    with Running(tmp_path / "hub") as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        path = tmp_path / "result" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "result"


def api(hub: Running, token: str | bool = WRITE_TOKEN) -> HfApi:
    return HfApi(endpoint=hub.url, token=token)


def publish(hub: Running, folder: Path, repo: str = REPO, private: bool = False) -> str:
    """Returns the commit."""
    api(hub).create_repo(repo, private=private, exist_ok=True)
    return str(api(hub).upload_folder(repo_id=repo, folder_path=folder).oid)


def test_an_uploaded_folder_is_listed_with_sizes_and_digests(hub: Running, folder: Path) -> None:
    commit = publish(hub, folder)
    tree = {
        entry.path: entry
        for entry in api(hub).list_repo_tree(REPO, recursive=True, revision=commit)
        if hasattr(entry, "size")
    }
    assert {path: tree[path].size for path in FILES} == {path: len(content) for path, content in FILES.items()}
    assert tree["adapter_model.safetensors"].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert tree["adapter_config.json"].lfs is None
    assert tree["adapter_config.json"].blob_id == hashlib.sha1(b"blob 8\0" + FILES["adapter_config.json"]).hexdigest()
    assert set(tree) == {*FILES, ".gitattributes"}


def test_what_was_uploaded_comes_back_at_the_commit(hub: Running, folder: Path, tmp_path: Path) -> None:
    commit = publish(hub, folder)
    (folder / "README.md").write_text("changed since")
    later = publish(hub, folder)
    for revision, readme in [(commit, FILES["README.md"]), (later, b"changed since"), ("main", b"changed since")]:
        copy = Path(snapshot_download(REPO, revision=revision, endpoint=hub.url, cache_dir=tmp_path / "cache"))
        assert {name: (copy / name).read_bytes() for name in FILES} == FILES | {"README.md": readme}
        assert copy.name == (commit if revision == commit else later)


def test_an_unchanged_folder_makes_no_commit(hub: Running, folder: Path) -> None:
    assert publish(hub, folder) == publish(hub, folder)


def test_information_names_the_commit_of_a_branch_a_tag_and_a_commit(hub: Running, folder: Path) -> None:
    commit = publish(hub, folder)
    api(hub).create_tag(REPO, tag="v1")
    api(hub).create_tag(REPO, tag="v1", exist_ok=True)
    assert [api(hub).model_info(REPO, revision=r).sha for r in (None, "main", "v1", commit)] == [commit] * 4
    info = api(hub).model_info(REPO, files_metadata=True)
    assert {s.rfilename: s.size for s in info.siblings or []}.items() >= {
        path: len(content) for path, content in FILES.items()
    }.items()
    assert next(c.commit_id for c in api(hub).list_repo_commits(REPO)) == commit
    assert [tag.name for tag in api(hub).list_repo_refs(REPO).tags] == ["v1"]


def test_paths_info_knows_files_and_folders(hub: Running, folder: Path) -> None:
    publish(hub, folder)
    found = api(hub).get_paths_info(REPO, ["README.md", "logs", "nothing"])
    assert [(type(entry).__name__, entry.path) for entry in found] == [
        ("RepoFile", "README.md"),
        ("RepoFolder", "logs"),
    ]


def test_whoami_tells_the_role_of_a_token(hub: Running) -> None:
    assert api(hub).whoami()["auth"]["accessToken"]["role"] == "write"
    assert api(hub, READ_TOKEN).whoami()["auth"]["accessToken"]["role"] == "read"


@dataclass(frozen=True)
class Case:
    name: str
    token: str | bool
    call: Callable[[HfApi], object]
    error: type[Exception]
    status: int


REFUSALS = [
    Case(
        name="no such repository, with a token",
        token=READ_TOKEN,
        call=lambda a: a.model_info("luthier/nothing"),
        error=RepositoryNotFoundError,
        status=404,
    ),
    Case(
        name="no such repository, without",
        token=False,
        call=lambda a: a.model_info("luthier/nothing"),
        error=RepositoryNotFoundError,
        status=401,
    ),
    Case(
        name="a name without a namespace",
        token=READ_TOKEN,
        call=lambda a: a.model_info("gpt2"),
        error=RepositoryNotFoundError,
        status=404,
    ),
    Case(
        name="a model asked for as a dataset",
        token=READ_TOKEN,
        call=lambda a: a.dataset_info("luthier/private"),
        error=RepositoryNotFoundError,
        status=404,
    ),
    Case(
        name="a private repository, without a token",
        token=False,
        call=lambda a: a.model_info("luthier/private"),
        error=RepositoryNotFoundError,
        status=401,
    ),
    Case(
        name="a wrong token",
        token="hf_wrong",
        call=lambda a: a.model_info("luthier/private"),
        error=HfHubHTTPError,
        status=401,
    ),
    Case(
        name="a wrong token, whoami",
        token="hf_wrong",
        call=lambda a: a.whoami(),
        error=HfHubHTTPError,
        status=401,
    ),
    Case(
        name="no such revision",
        token=READ_TOKEN,
        call=lambda a: a.model_info("luthier/private", revision="v9"),
        error=RevisionNotFoundError,
        status=404,
    ),
    Case(
        name="no such folder",
        token=READ_TOKEN,
        call=lambda a: list(a.list_repo_tree("luthier/private", "nothing")),
        error=RemoteEntryNotFoundError,
        status=404,
    ),
    Case(
        name="no such file",
        token=READ_TOKEN,
        call=lambda a: a.hf_hub_download("luthier/private", "nothing.json"),
        error=RemoteEntryNotFoundError,
        status=404,
    ),
    Case(
        name="a gated file, without a token",
        token=False,
        call=lambda a: a.hf_hub_download("luthier/gated", "README.md"),
        error=GatedRepoError,
        status=401,
    ),
    Case(
        name="a gated file, by a reader",
        token=READ_TOKEN,
        call=lambda a: a.hf_hub_download("luthier/gated", "README.md"),
        error=GatedRepoError,
        status=403,
    ),
    Case(
        name="writing with a read token",
        token=READ_TOKEN,
        call=lambda a: a.create_repo("luthier/mine"),
        error=HfHubHTTPError,
        status=403,
    ),
    Case(
        name="writing without a token",
        token=False,
        call=lambda a: a.create_repo("luthier/mine"),
        error=HfHubHTTPError,
        status=401,
    ),
    Case(
        name="writing to another's namespace",
        token=WRITE_TOKEN,
        call=lambda a: a.create_repo(f"{CLOSED_NAMESPACE}/theirs"),
        error=HfHubHTTPError,
        status=403,
    ),
    Case(
        name="creating what exists",
        token=WRITE_TOKEN,
        call=lambda a: a.create_repo("luthier/private"),
        error=HfHubHTTPError,
        status=409,
    ),
    Case(
        name="committing on an old parent",
        token=WRITE_TOKEN,
        call=lambda a: upload(a, parent_commit="0" * 40),
        error=HfHubHTTPError,
        status=412,
    ),
]


def upload(client: HfApi, **options: str) -> None:
    client.upload_file(path_or_fileobj=b"text", path_in_repo="notes.txt", repo_id="luthier/private", **options)


@pytest.mark.parametrize("case", REFUSALS, ids=lambda case: case.name)
def test_refusals_are_the_clients_own_exceptions(
    hub: Running, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    hub.store.seed("model", "luthier/private", folder, private=True)
    hub.store.seed("model", "luthier/gated", folder, gated=True)
    with pytest.raises(case.error) as raised:
        case.call(api(hub, case.token))
    assert (type(raised.value), raised.value.response.status_code) == (case.error, case.status)


def test_content_with_another_digest_is_refused(hub: Running) -> None:
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(urllib.request.Request(f"{hub.url}/_blobs/{'0' * 64}", data=b"x", method="PUT"))
    api(hub).create_repo(REPO)
    line = {"key": "lfsFile", "value": {"path": "x.bin", "algo": "sha256", "oid": "0" * 64, "size": 1}}
    body = "\n".join(map(json.dumps, [{"key": "header", "value": {"summary": "s", "description": ""}}, line])).encode()
    commit = urllib.request.Request(
        f"{hub.url}/api/models/{REPO}/commit/main", body, {"Authorization": f"Bearer {WRITE_TOKEN}"}
    )
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(commit)


def test_a_part_of_a_large_file_can_be_read(hub: Running, folder: Path) -> None:
    publish(hub, folder)
    url = f"{hub.url}/{REPO}/resolve/main/adapter_model.safetensors"
    for header, expect in [
        ("bytes=10-19", WEIGHTS[10:20]),
        ("bytes=-5", WEIGHTS[-5:]),
        (f"bytes={len(WEIGHTS) - 3}-", WEIGHTS[-3:]),
    ]:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Range": header})) as response:
            assert (response.status, response.read()) == (206, expect)


def control(hub: Running, method: str, fault: dict[str, object] | None = None) -> dict[str, list[dict[str, object]]]:
    request = urllib.request.Request(
        f"{hub.url}/_control", json.dumps(fault).encode() if fault else None, method=method
    )
    with urllib.request.urlopen(request) as response:
        return dict(json.load(response))


def test_a_hub_that_is_away_for_some_requests(hub: Running, folder: Path) -> None:
    """`repo_info` has no retry of its own, so the test sees each answer."""
    publish(hub, folder)
    control(hub, "DELETE")
    control(hub, "PUT", {"status": 503, "count": 2, "path": "/api/models/"})
    statuses = []
    for _ in range(3):
        try:
            statuses.append(api(hub).model_info(REPO).sha and 200)
        except HfHubHTTPError as error:
            statuses.append(error.response.status_code)
    assert statuses == [503, 503, 200]
    assert [(r["method"], r["status"], r["role"]) for r in control(hub, "GET")["requests"]] == [
        ("GET", s, "write") for s in statuses
    ]


def test_a_hub_that_is_away_for_a_time(hub: Running, folder: Path) -> None:
    commit = publish(hub, folder)
    control(hub, "PUT", {"status": 503, "for_seconds": 0.3})
    began = time.monotonic()
    with pytest.raises(HfHubHTTPError):
        api(hub).model_info(REPO)
    while time.monotonic() - began < 0.31:
        pass  # the client's own sleep is switched off
    assert api(hub).model_info(REPO).sha == commit


def test_an_upload_survives_faults_that_the_client_retries(hub: Running, folder: Path) -> None:
    control(hub, "POST", {"status": 500, "count": 2, "method": "PUT", "path": "/_blobs/"})
    control(hub, "POST", {"status": 503, "count": 1, "path": "/preupload/"})
    publish(hub, folder)
    log = control(hub, "GET")["requests"]
    assert [r["status"] for r in log if "/_blobs/" in str(r["path"])] == [500, 500, 200]
    assert WRITE_TOKEN not in json.dumps(log)


def test_an_unknown_fault_field_is_refused(hub: Running) -> None:
    with pytest.raises(urllib.error.HTTPError, match="400"):
        control(hub, "PUT", {"state": 503})


def test_a_download_from_a_hub_that_is_away_says_so(hub: Running, folder: Path, tmp_path: Path) -> None:
    publish(hub, folder)
    control(hub, "PUT", {"status": 503, "for_seconds": 60})
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download(REPO, "README.md", endpoint=hub.url, cache_dir=tmp_path / "cache")


def test_repositories_outlive_the_server(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with Running(tmp_path / "hub") as first:
        commit = publish(first, folder)
    with Running(tmp_path / "hub") as second:
        assert api(second).model_info(REPO).sha == commit


ROWS = [{"text": "hello", "label": 0}, {"text": "world", "label": 1}]
DATASETS = {
    "train.csv": b"text,label\nhello,0\nworld,1\n",
    "train.jsonl": b"".join(json.dumps(row).encode() + b"\n" for row in ROWS),
    "train.parquet": None,
}
LOAD = """
import json, sys
from datasets import load_dataset
print(json.dumps([load_dataset(name, split="train").to_list() for name in sys.argv[1:]]))
"""


def test_load_dataset_reads_a_repository_of_each_format(hub: Running, tmp_path: Path) -> None:
    """In a process of its own: `datasets` reads HF_ENDPOINT when it is imported."""
    pytest.importorskip("datasets")
    from pyarrow import Table, parquet

    for name, content in DATASETS.items():
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        if content is None:
            parquet.write_table(Table.from_pylist(ROWS), folder / name)
        else:
            (folder / name).write_bytes(content)
        hub.store.seed("dataset", f"luthier/{folder.name}", folder)
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    names = [f"luthier/{name.replace('.', '-')}" for name in DATASETS]
    done = subprocess.run([sys.executable, "-c", LOAD, *names], env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [ROWS] * len(DATASETS)
