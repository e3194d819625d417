"""`publish` against a Hub that can be made to fail: what lands there, what is refused, and what is waited for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from hub.faults import Fault
from hub.repos import changed
from hub.server import Running
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from luthier_api.exitcodes import ExitCode
from luthier_api.run import FineTuneRun, GenerateRun, PreparedRecord
from luthier_api.status import Plan, ResolvedDataset, ResolvedSource
from luthier_api.termination import TerminationMessage
from luthier_api.variables import Variables
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.generation.result import shard_manifest, shard_name
from luthier_trainer.models.hub import explain
from luthier_trainer.prepare.main import main as prepare
from luthier_trainer.publish.main import git_blob, main
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.workspace.manifest import sha256, write_manifest
from luthier_trainer.workspace.prepared import FINGERPRINT, fingerprint, write_prepared

MakeRun = Callable[..., FineTuneRun]
HUB = {"repo": "luthier/reference", "tokenSecretRef": {"name": "hf"}}
RECORD = PreparedRecord(
    model=ResolvedSource(source="org/base", revision="abc123"),
    dataset=ResolvedDataset(source="rows.jsonl", rows=90, eval_rows=10),
    plan=Plan(strategy="none", steps=7),
    model_path="m",
    dataset_path="d",
)


def remember(run: FineTuneRun | GenerateRun) -> WorkspaceFolder:
    folder = WorkspaceFolder(Path(run.workspace))
    folder.prepared.mkdir(parents=True)
    folder.result.mkdir()
    (folder.prepared / FINGERPRINT).write_text(fingerprint(run))
    write_prepared(run, RECORD)
    return folder


@pytest.fixture
def trained(make_run: MakeRun) -> FineTuneRun:
    """A FineTuneJob whose result, an adapter, lies in its workspace."""
    run = make_run(hub=HUB, model={"id": "org/base"})
    folder = remember(run)
    (folder.result / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder.result / "adapter_model.safetensors").write_bytes(os.urandom(50_000))
    (folder.result / "metrics.json").write_text('{"evalLoss": 1.25, "steps": 7}')
    (folder.result / "README.md").write_text("what a library left here")
    write_manifest(folder.result)
    return run


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch, hub: Running) -> HfApi:
    """A client with the token that may write; `publish` has it too."""
    monkeypatch.setenv(Variables.TOKEN, "hf_writer")
    return HfApi(endpoint=hub.url, token="hf_writer")


def commits(server: Running) -> int:
    return sum(1 for r in server.control.requests if "/commit/" in r["path"] and r["status"] == 200)


def test_what_lies_in_the_workspace_lies_on_the_hub(trained: FineTuneRun, writer: HfApi, tmp_path: Path) -> None:
    status = main(trained).hub
    assert status is not None
    assert (status.repo, status.files) == ("luthier/reference", 5)
    assert status.url == f"{writer.endpoint}/luthier/reference/tree/{status.revision}"
    copy = Path(writer.snapshot_download(status.repo, revision=status.revision, local_dir=tmp_path / "copy"))
    result = WorkspaceFolder(Path(trained.workspace)).result
    for file in ("adapter_config.json", "adapter_model.safetensors", "metrics.json", "MANIFEST.json"):
        assert sha256(copy / file) == sha256(result / file), file
    assert writer.repo_info(status.repo).private


def test_the_card_says_what_it_is(trained: FineTuneRun, writer: HfApi, tmp_path: Path) -> None:
    main(trained)
    text = Path(writer.hf_hub_download("luthier/reference", "README.md", local_dir=tmp_path / "copy")).read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "tags": ["luthier", "lora", "causal-lm"],
    }
    for line in (
        "| Held-out loss | 1.25 |",
        "| Base model | org/base @ abc123 |",
        "| Rows | 90, 10 held out |",
        "| Method | lora (rank 16, alpha 32, dropout 0.0, targetModules all-linear, bias none) |",
    ):
        assert line in body
    assert 'AutoPeftModelForCausalLM.from_pretrained("luthier/reference")' in body


def test_publishing_twice_makes_one_commit(trained: FineTuneRun, writer: HfApi, hub: Running) -> None:
    assert main(trained).hub == main(trained).hub
    assert commits(hub) == 1


def test_a_branch_of_its_own(trained: FineTuneRun, writer: HfApi) -> None:
    run = trained.model_copy(
        update={
            "spec": trained.spec.model_copy(update={"hub": trained.spec.hub.model_copy(update={"branch": "trial"})})
        }
    )  # type: ignore[union-attr]
    status = main(run).hub
    assert status is not None
    assert writer.repo_info(status.repo, revision="trial").sha == status.revision
    assert writer.repo_info(status.repo).sha != status.revision


FAULTS: list[tuple[str, dict[str, Any]]] = [
    ("the commit fails twice", {"status": 503, "count": 2, "path": "/commit/"}),
    ("too many requests", {"status": 429, "count": 1, "path": "/preupload/"}),
    ("away for two seconds", {"status": 503, "for_seconds": 2}),
    ("the upload of a file fails", {"status": 500, "count": 1, "method": "PUT"}),
    ("the tree cannot be read", {"status": 502, "count": 1, "path": "/tree/"}),
    ("a request that took too long", {"status": 408, "count": 1, "path": "/commit/"}),
    ("somebody else commits", {"status": 409, "count": 1, "path": "/commit/"}),
    ("somebody else has committed", {"status": 412, "count": 1, "path": "/commit/"}),
    ("the answer to the commit is lost", {"status": 504, "count": 1, "path": "/commit/", "lost": True}),
]


@pytest.mark.parametrize(("name", "fault"), FAULTS, ids=[f[0] for f in FAULTS])
def test_a_hub_that_comes_back_is_waited_for(
    name: str, fault: dict[str, Any], trained: FineTuneRun, writer: HfApi, hub: Running
) -> None:
    hub.control.faults.append(Fault(**fault))
    status = main(trained).hub
    assert status is not None
    assert writer.repo_info(status.repo).sha == status.revision


@dataclass(frozen=True)
class PermanentCase:
    name: str
    fault: dict[str, Any]
    code: ExitCode
    message: str


PERMANENT = [
    PermanentCase(
        name="a card that it does not take",
        fault={"status": 400, "path": "/api/validate-yaml", "message": "license: unknown"},
        code=ExitCode.INVALID_SPEC,
        message="spec.hub.repo: model luthier/reference on HUB refused (400): license: unknown",
    ),
    PermanentCase(
        name="a commit that it does not take",
        fault={"status": 400, "path": "/commit/", "message": "Too many files"},
        code=ExitCode.INVALID_SPEC,
        message="spec.hub.repo: model luthier/reference on HUB refused (400): Too many files",
    ),
    PermanentCase(
        name="money",
        fault={"status": 402, "path": "/api/repos/create", "message": "Payment required"},
        code=ExitCode.INVALID_SPEC,
        message="spec.hub.repo: model luthier/reference on HUB refused (402): Payment required",
    ),
    PermanentCase(
        name="too much at once",
        fault={"status": 413, "path": "/commit/", "message": "Payload too large"},
        code=ExitCode.INVALID_SPEC,
        message="spec.hub.repo: model luthier/reference on HUB refused (413): Payload too large",
    ),
    PermanentCase(
        name="a name that it does not take",
        fault={"status": 422, "path": "/api/repos/create", "message": "Name is reserved"},
        code=ExitCode.INVALID_SPEC,
        message="spec.hub.repo: model luthier/reference on HUB refused (422): Name is reserved",
    ),
    PermanentCase(
        name="a quota",
        fault={"status": 403, "path": "/preupload/", "message": "Private storage quota exceeded."},
        code=ExitCode.UNAUTHORIZED,
        message=(
            "spec.hub.tokenSecretRef: the Hub refused the token for model luthier/reference on HUB (403): Private"
            " storage quota exceeded. Check its value and its rights"
        ),
    ),
    PermanentCase(
        name="a token that was taken back",
        fault={"status": 401, "path": "/api/repos/create", "message": "Invalid username or password."},
        code=ExitCode.UNAUTHORIZED,
        message=(
            "spec.hub.tokenSecretRef: the Hub refused the token for model luthier/reference on HUB (401): Invalid"
            " username or password. Check its"
        ),
    ),
]


@pytest.mark.parametrize("case", PERMANENT, ids=lambda case: case.name)
def test_what_the_hub_refuses_is_not_asked_again(
    case: PermanentCase, trained: FineTuneRun, writer: HfApi, hub: Running
) -> None:
    hub.control.faults.append(Fault(**case.fault))
    expect = case.message.replace("HUB", hub.url)
    found, text = refused(trained)
    assert (found, text[: len(expect)]) == (case.code, expect)
    assert sum(case.fault["path"] in request["path"] for request in hub.control.requests) == 1


STORED = "https://s3.example/blob?X-Amz-Credential=me&X-Amz-Signature=0123"


@dataclass(frozen=True)
class AnswerCase:
    name: str
    status: int
    url: str
    code: ExitCode


ANSWERS = [
    AnswerCase(
        name="the object store: a slow socket",
        status=400,
        url=STORED,
        code=ExitCode.HUB_UNAVAILABLE,
    ),
    AnswerCase(
        name="the object store: an old signature",
        status=403,
        url=STORED,
        code=ExitCode.HUB_UNAVAILABLE,
    ),
    AnswerCase(
        name="the content network: an old signature",
        status=403,
        url="https://cdn.example/x?Expires=1&Signature=ab&Key-Pair-Id=K",
        code=ExitCode.HUB_UNAVAILABLE,
    ),
    AnswerCase(
        name="the Hub, under another name",
        status=403,
        url="https://huggingface.co/api/models/a/b",
        code=ExitCode.UNAUTHORIZED,
    ),
    AnswerCase(
        name="a server that is broken",
        status=500,
        url="https://huggingface.co/api/models/a/b",
        code=ExitCode.HUB_UNAVAILABLE,
    ),
]


@pytest.mark.parametrize("case", ANSWERS, ids=lambda case: case.name)
def test_who_refuses(case: AnswerCase) -> None:
    """As `_wrapped_lfs_upload` of the client raises it."""
    response = httpx2.Response(case.status, request=httpx2.Request("PUT", case.url), text="<Code>RequestTimeout</Code>")
    error = RuntimeError(f"Error while uploading 'model.safetensors' to '{case.url}'.")
    error.__cause__ = HfHubHTTPError(
        f"{case.status} Client Error", response=response, server_message="<Code>RequestTimeout</Code>"
    )
    failure = explain(error, "spec.hub.repo", "model a/b")
    assert failure.code is case.code
    assert "Signature" not in failure.message


def test_a_repository_that_others_keep_changing(
    trained: FineTuneRun, writer: HfApi, hub: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUTHIER_HUB_DEADLINE", "1")
    hub.control.faults.append(Fault(status=409, path="/commit/", message="Another commit is in progress"))
    code, message = refused(trained)
    assert code is ExitCode.HUB_UNAVAILABLE
    assert message.endswith("is being changed by another client (409): Another commit is in progress")


def refused(run: FineTuneRun | GenerateRun) -> tuple[ExitCode, str]:
    with pytest.raises(Failure) as failure:
        main(run)
    return failure.value.code, failure.value.message


def test_a_hub_that_stays_away_ends_the_pod(
    trained: FineTuneRun, writer: HfApi, hub: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUTHIER_HUB_DEADLINE", "1")
    hub.control.faults.append(Fault(status=503))
    began = time.monotonic()
    code, message = refused(trained)
    assert code is ExitCode.HUB_UNAVAILABLE
    assert "spec.hub.repo: model luthier/reference on http://127.0.0.1" in message
    assert "cannot be reached" in message
    assert time.monotonic() - began < 30


def test_a_hub_that_never_answers_ends_the_pod(
    trained: FineTuneRun, writer: HfApi, hub: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    from luthier_trainer.models import hub as client

    monkeypatch.setattr(client, "SILENCE_SECONDS", 0.5)
    monkeypatch.setenv("LUTHIER_HUB_DEADLINE", "1")
    huggingface_hub.close_session()  # the next request makes a client with the shorter limit
    hub.control.faults.append(Fault(delay_seconds=20, path="/api/repos/create"))
    assert refused(trained)[0] is ExitCode.HUB_UNAVAILABLE
    huggingface_hub.close_session()


@dataclass(frozen=True)
class RefusedCase:
    name: str
    token: str
    code: ExitCode
    message: str
    wish: dict[str, Any] = field(default_factory=dict)


REFUSED = [
    RefusedCase(
        name="a wrong token",
        token="hf_wrong",
        code=ExitCode.UNAUTHORIZED,
        message="spec.hub.tokenSecretRef: the Hub refused the token for model luthier/reference",
    ),
    RefusedCase(
        name="a token that may only read",
        token="hf_reader",
        code=ExitCode.UNAUTHORIZED,
        message="spec.hub.tokenSecretRef: the Hub refused the token",
    ),
    RefusedCase(
        name="no token",
        token="",
        code=ExitCode.UNAUTHORIZED,
        message="spec.hub.tokenSecretRef: the token is empty. Put one with write access under key 'token'",
    ),
    RefusedCase(
        name="somebody else's namespace",
        token="hf_writer",
        wish={"repo": "elsewhere/x"},
        code=ExitCode.UNAUTHORIZED,
        message="spec.hub.tokenSecretRef: the Hub refused the token",
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_a_refusal_names_the_field(
    case: RefusedCase, trained: FineTuneRun, hub: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(Variables.TOKEN, case.token)
    run = FineTuneRun.model_validate(trained.dump() | {"spec": trained.spec.dump() | {"hub": HUB | case.wish}})
    found, text = refused(run)
    assert (found, text[: len(case.message)]) == (case.code, case.message)
    assert case.token not in text or not case.token
    assert (Path(run.workspace) / "result" / "adapter_model.safetensors").exists()


SECRET = "s3cret"
UNSENDABLE = [
    ("a control character", f"{SECRET} of the\x0bcompany hub"),
    ("a blank", f"{SECRET} 2"),
    ("a letter beyond ASCII", f"{SECRET}ü"),
    ("bytes that are no text", f"{SECRET}\udcff"),
    ("an escape", f"{SECRET}\x1b[0m"),
]


@pytest.mark.parametrize(("name", "token"), UNSENDABLE, ids=[u[0] for u in UNSENDABLE])
@pytest.mark.parametrize("phase", [main, prepare], ids=["publish", "prepare"])
def test_a_token_that_cannot_be_sent_is_not_shown(
    phase: Callable[[FineTuneRun], TerminationMessage],
    name: str,
    token: str,
    trained: FineTuneRun,
    hub: Running,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(Variables.TOKEN, token)
    with pytest.raises(Failure) as failure:
        phase(trained)
    assert failure.value.code is ExitCode.UNAUTHORIZED
    assert failure.value.message.startswith(
        "spec.hub.tokenSecretRef: the token (HF_TOKEN in the pod) holds a blank or another character that no"
    )
    assert SECRET not in failure.value.message + "".join(capfd.readouterr())
    assert hub.control.requests == []


NO_NAMES = [
    ("two dashes", "me/a--b"),
    ("two dots", "me/a..b"),
    ("a suffix of git", "me/x.git"),
    ("too long", f"me/{'x' * 97}"),
]


@pytest.mark.parametrize(("name", "repo"), NO_NAMES, ids=[n[0] for n in NO_NAMES])
@pytest.mark.parametrize("phase", [main, prepare], ids=["publish", "prepare"])
def test_a_name_that_the_hub_does_not_take(
    phase: Callable[[FineTuneRun], TerminationMessage],
    name: str,
    repo: str,
    trained: FineTuneRun,
    writer: HfApi,
    hub: Running,
) -> None:
    """`prepare` says it already: not after all the work."""
    assert trained.spec.hub is not None
    wish = trained.spec.hub.model_copy(update={"repo": repo})
    with pytest.raises(Failure) as failure:
        phase(trained.model_copy(update={"spec": trained.spec.model_copy(update={"hub": wish})}))
    assert failure.value.code is ExitCode.INVALID_SPEC
    assert re.match(r"spec\.hub\.repo: the Hub does not accept this name: .*" + re.escape(repo), failure.value.message)
    assert hub.control.requests == []


def test_a_namespace_that_does_not_exist(trained: FineTuneRun, writer: HfApi, hub: Running) -> None:
    hub.control.faults.append(Fault(status=404, path="/api/repos/create"))
    code, message = refused(trained)
    assert code is ExitCode.NOT_FOUND
    assert re.match(
        r"spec\.hub\.repo: luthier/reference cannot be created: there is no user or organisation 'luthier' on http",
        message,
    )


def test_a_damaged_result_is_not_published(trained: FineTuneRun, writer: HfApi, hub: Running) -> None:
    (Path(trained.workspace) / "result" / "adapter_model.safetensors").write_bytes(b"x" * 50_000)
    code, message = refused(trained)
    assert code is ExitCode.STORAGE_ERROR
    assert "adapter_model.safetensors: is not what MANIFEST.json says" in message
    assert hub.control.requests == []


def test_a_run_that_did_not_end_is_not_published(trained: FineTuneRun, writer: HfApi) -> None:
    (Path(trained.workspace) / "result" / "MANIFEST.json").unlink()
    assert refused(trained)[0] is ExitCode.MISCONFIGURED


@pytest.fixture
def generated(generate: Callable[[int], GenerateRun]) -> GenerateRun:
    """A GenerateJob of two shards, both complete."""
    return generate(2)


@pytest.fixture
def generate(make_generate_run: Callable[..., GenerateRun]) -> Callable[[int], GenerateRun]:
    """GenerateJobs of so many shards, all complete, that publish to one repository."""

    def make(shards: int) -> GenerateRun:
        run = make_generate_run(name=f"gen-{shards}", hub=HUB, shards=shards)
        folder = remember(run)
        for i in range(shards):
            (folder.result / f"images/{i}").mkdir(parents=True)
            files = {
                f"{shard_name(i, shards)}.jsonl": b'{"row": %d}\n' % i,
                f"images/{i}/a.png": b"\x89PNG" + bytes([i]) * 99,
            }
            for name, content in files.items():
                (folder.result / name).write_bytes(content)
            entries = [{"path": n, "size": len(c), "sha256": sha256(folder.result / n)} for n, c in files.items()]
            shard_manifest(folder, i, shards).write_text(
                json.dumps({"metrics": {"rows": 4, "failedRows": i}, "kind": {"row": "int64"}, "files": entries})
            )
        return run

    return make


def test_the_outputs_of_all_shards_become_a_dataset(generated: GenerateRun, writer: HfApi) -> None:
    status = main(generated).hub
    assert status is not None
    names = sorted(writer.list_repo_files(status.repo, repo_type="dataset", revision=status.revision))
    assert [n for n in names if not n.startswith(".")] == [
        "README.md",
        "images/0/a.png",
        "images/1/a.png",
        "shard-00000-of-00002.MANIFEST.json",
        "shard-00000-of-00002.jsonl",
        "shard-00001-of-00002.MANIFEST.json",
        "shard-00001-of-00002.jsonl",
    ]
    assert "/datasets/luthier/reference/tree/" in status.url


def files_there(writer: HfApi, kind: str, branch: str = "main") -> set[str]:
    return set(writer.list_repo_files("luthier/reference", repo_type=kind, revision=branch)) - {".gitattributes"}


def shards_of(count: int) -> set[str]:
    names = {f"{shard_name(i, count)}.{suffix}" for i in range(count) for suffix in ("jsonl", "MANIFEST.json")}
    return names | {f"images/{i}/a.png" for i in range(count)}


AFTER_FAULTS: list[tuple[str, dict[str, Any]]] = [
    ("at once", {}),
    ("the answer to the commit is lost", {"status": 504, "count": 1, "path": "/commit/", "lost": True}),
    ("the commit fails", {"status": 503, "count": 1, "path": "/commit/"}),
    ("a manifest cannot be read", {"status": 503, "count": 1, "path": "/resolve/"}),
]


@pytest.mark.parametrize("patterns", [200, 1], ids=["in one commit", "too many for one"])
@pytest.mark.parametrize(("name", "fault"), AFTER_FAULTS, ids=[f[0] for f in AFTER_FAULTS])
def test_what_an_older_result_left_goes(
    name: str,
    fault: dict[str, Any],
    patterns: int,
    generate: Callable[[int], GenerateRun],
    writer: HfApi,
    hub: Running,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("luthier_trainer.publish.main.PATTERNS", patterns)
    main(generate(4))
    writer.upload_file(
        path_or_fileobj=b"mine", path_in_repo="images/9/mine.png", repo_id="luthier/reference", repo_type="dataset"
    )
    writer.upload_file(
        path_or_fileobj=b"# mine", path_in_repo="README.md", repo_id="luthier/reference", repo_type="dataset"
    )
    before, younger = commits(hub), generate(2)
    if fault:
        hub.control.faults.append(Fault(**fault))
    status = main(younger).hub
    assert status is not None
    assert files_there(writer, "dataset") == shards_of(2) | {"README.md", "images/9/mine.png"}
    assert status.revision == writer.repo_info("luthier/reference", repo_type="dataset").sha
    said = capfd.readouterr().out
    assert (
        "dataset luthier/reference: 10 files of an older result go, as this one has no such files: images/2/a.png,"
        " images/3/a.png, " in said
    )
    assert "dataset luthier/reference: README.md is replaced by the card of this result" in said
    lost = bool(fault.get("lost"))  # a commit that was answered with 504, and counts all the same
    assert commits(hub) - before + lost == (1 if patterns > 1 else 2)
    assert main(younger).hub == status
    assert commits(hub) - before + lost == (1 if patterns > 1 else 2)


def test_an_adapter_gives_way_to_a_whole_model(trained: FineTuneRun, writer: HfApi, make_run: MakeRun) -> None:
    main(trained)
    whole = make_run(name="whole", hub=HUB, model={"id": "org/base"}, method={"type": "full"})
    result = remember(whole).result
    (result / "config.json").write_text("{}")
    (result / "model.safetensors").write_bytes(os.urandom(50_000))
    write_manifest(result)
    main(whole)
    assert files_there(writer, "model") == {"README.md", "config.json", "model.safetensors", "MANIFEST.json"}


def test_the_older_result_stays_on_its_branch(generate: Callable[[int], GenerateRun], writer: HfApi) -> None:
    main(generate(3))
    run = generate(1)
    assert run.spec.hub is not None
    trial = run.spec.hub.model_copy(update={"branch": "trial"})
    main(run.model_copy(update={"spec": run.spec.model_copy(update={"hub": trial})}))
    assert files_there(writer, "dataset") == shards_of(3) | {"README.md"}
    assert files_there(writer, "dataset", "trial") == shards_of(1) | {"README.md"}


def manifest_of(*names: str) -> str:
    return json.dumps({"files": [{"path": name, "size": 1, "sha256": "0" * 64} for name in names]})


@dataclass(frozen=True)
class ForeignCase:
    name: str
    manifest: str  # MANIFEST.json of the repository
    deleted: set[str]
    notice: bool  # a notice says that Luthier did not write the manifest


FOREIGN = [
    ForeignCase(
        name="no JSON",
        manifest="{",
        deleted=set(),
        notice=True,
    ),
    ForeignCase(
        name="bytes",
        manifest="\0\1",
        deleted=set(),
        notice=True,
    ),
    ForeignCase(
        name="a list",
        manifest="[]",
        deleted=set(),
        notice=True,
    ),
    ForeignCase(
        name="without files",
        manifest='{"files": 3}',
        deleted=set(),
        notice=True,
    ),
    ForeignCase(
        name="files of another form",
        manifest='{"files": ["mine.txt", "a[1].txt"]}',
        deleted=set(),
        notice=True,
    ),
    ForeignCase(
        name="one entry of another form",
        manifest='{"files": [{"path": "mine.txt", "size": 1, "sha256": "x"}]}',
        deleted=set(),
        notice=True,
    ),
    ForeignCase(
        name="ours",
        manifest=manifest_of("mine.txt"),
        deleted={"mine.txt"},
        notice=False,
    ),
    ForeignCase(
        name="a name with signs of a pattern",
        manifest=manifest_of("a[1].txt", "sub/*"),
        deleted={"a[1].txt"},
        notice=False,
    ),
    ForeignCase(
        name="names that lead out, or are the Hub's",
        manifest=manifest_of(
            "../mine.txt", "/mine.txt", "sub/../mine.txt", ".gitattributes", ".hidden/x", "sub", "sub/"
        ),
        deleted=set(),
        notice=False,
    ),
    ForeignCase(
        name="names of what is not there",
        manifest=manifest_of("gone.txt", ""),
        deleted=set(),
        notice=False,
    ),
]


@pytest.mark.parametrize("case", FOREIGN, ids=lambda case: case.name)
def test_what_was_never_ours_stays(
    case: ForeignCase,
    trained: FineTuneRun,
    writer: HfApi,
    hub: Running,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    theirs = {"mine.txt", "a[1].txt", "a1.txt", "sub/x.txt", ".hidden/x", "shard-00000-of-00001.MANIFEST.json"}
    for file in theirs:
        (tmp_path / "theirs" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "theirs" / file).write_text(manifest_of("mine.txt"))
    (tmp_path / "theirs" / "MANIFEST.json").write_text(case.manifest)
    hub.store.seed("model", "luthier/reference", tmp_path / "theirs")
    main(trained)
    ours = {"README.md", "adapter_config.json", "adapter_model.safetensors", "metrics.json", "MANIFEST.json"}
    assert files_there(writer, "model") == ours | theirs - case.deleted
    assert (
        "MANIFEST.json was not written by Luthier, so nothing is deleted for it" in capfd.readouterr().err
    ) is case.notice


def test_what_should_have_gone_is_looked_for(
    generate: Callable[[int], GenerateRun], writer: HfApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(generate(2))
    monkeypatch.setattr(
        "hub.repos.changed",
        lambda files, lines, store: changed(files, [x for x in lines if x["key"] != "deletedFile"], store),
    )
    code, message = refused(generate(1))
    assert code is ExitCode.STORAGE_ERROR
    assert message.startswith("spec.hub.repo: images/1/a.png of an older result is still on ")


def test_a_missing_shard_is_not_passed_over(generated: GenerateRun, writer: HfApi, hub: Running) -> None:
    shard_manifest(WorkspaceFolder(Path(generated.workspace)), 1, 2).unlink()
    code, message = refused(generated)
    assert code is ExitCode.MISCONFIGURED
    assert "shard-00001-of-00002.MANIFEST.json: missing" in message
    assert hub.control.requests == []


def test_the_phase_as_the_pod_runs_it(trained: FineTuneRun, writer: HfApi, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(trained.dump()))
    done = subprocess.run(
        [sys.executable, "-m", "luthier_trainer", "publish", "--run", str(tmp_path / "run.json")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    message = TerminationMessage.read((tmp_path / "run" / "termination-log").read_text())
    assert done.returncode == 0, done.stderr
    assert message is not None
    assert message.hub is not None
    assert message.hub.revision == writer.repo_info("luthier/reference").sha


def test_small_files_have_the_name_that_git_gives_them(tmp_path: Path) -> None:
    path = tmp_path / "hello"
    path.write_text("hello\n")
    assert git_blob(path) == "ce013625030ba8dba906f756967f9e9ca394464a"  # as `git hash-object` says
