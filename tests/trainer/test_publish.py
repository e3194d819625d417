"""`publish` against a Hub that can be made to fail: what lands there, what is refused, and what is waited for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub.faults import Fault
from hub.server import Running
from huggingface_hub import HfApi

from luthier_api.exitcodes import ExitCode
from luthier_api.run import FineTuneRun, GenerateRun, PreparedRecord, Variables
from luthier_api.status import Plan, ResolvedDataset, ResolvedSource
from luthier_api.termination import TerminationMessage
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.ending import Failure
from luthier_trainer.generation.shard import shard_manifest
from luthier_trainer.manifest import sha256, write_manifest
from luthier_trainer.prepared import FINGERPRINT, fingerprint, write_prepared
from luthier_trainer.publish import git_blob, main

MakeRun = Callable[..., FineTuneRun]
HUB = {"repo": "luthier/reference", "tokenSecret": {"name": "hf"}}
RECORD = PreparedRecord(
    model=ResolvedSource(source="org/base", revision="abc123"), dataset=ResolvedDataset(source="rows.jsonl", rows=90, eval_rows=10),
    plan=Plan(strategy="none", steps=7), model_path="m", dataset_path="d",
)  # fmt: skip


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
        "library_name": "peft", "pipeline_tag": "text-generation", "base_model": "org/base", "base_model_relation": "adapter",
        "tags": ["luthier", "lora", "causal-lm"],
    }  # fmt: skip
    for line in ("| Held-out loss | 1.25 |", "| Base model | org/base @ abc123 |", "| Rows | 90, 10 held out |", "| Method | lora (rank 16, alpha 32) |"):
        assert line in body
    assert 'AutoPeftModelForCausalLM.from_pretrained("luthier/reference")' in body


def test_publishing_twice_makes_one_commit(trained: FineTuneRun, writer: HfApi, hub: Running) -> None:
    assert main(trained).hub == main(trained).hub
    assert commits(hub) == 1


def test_a_branch_of_its_own(trained: FineTuneRun, writer: HfApi) -> None:
    run = trained.model_copy(update={"spec": trained.spec.model_copy(update={"hub": trained.spec.hub.model_copy(update={"branch": "trial"})})})  # type: ignore[union-attr]
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
]


@pytest.mark.parametrize(("name", "fault"), FAULTS, ids=[f[0] for f in FAULTS])
def test_a_hub_that_comes_back_is_waited_for(name: str, fault: dict[str, Any], trained: FineTuneRun, writer: HfApi, hub: Running) -> None:
    hub.control.faults.append(Fault(**fault))
    status = main(trained).hub
    assert status is not None
    assert writer.repo_info(status.repo).sha == status.revision


def refused(run: FineTuneRun | GenerateRun) -> tuple[ExitCode, str]:
    with pytest.raises(Failure) as failure:
        main(run)
    return failure.value.code, failure.value.message


def test_a_hub_that_stays_away_ends_the_pod(trained: FineTuneRun, writer: HfApi, hub: Running, monkeypatch: pytest.MonkeyPatch) -> None:
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

    from luthier_trainer import hub as client

    monkeypatch.setattr(client, "SILENCE_SECONDS", 0.5)
    monkeypatch.setenv("LUTHIER_HUB_DEADLINE", "1")
    huggingface_hub.close_session()  # the next request makes a client with the shorter limit
    hub.control.faults.append(Fault(delay_seconds=20, path="/api/repos/create"))
    assert refused(trained)[0] is ExitCode.HUB_UNAVAILABLE
    huggingface_hub.close_session()


REFUSED: list[tuple[str, str, dict[str, Any], ExitCode, str]] = [
    ("a wrong token", "hf_wrong", {}, ExitCode.UNAUTHORIZED, "spec.hub.tokenSecret: the Hub refused the token for model luthier/reference"),
    ("a token that may only read", "hf_reader", {}, ExitCode.UNAUTHORIZED, "spec.hub.tokenSecret: the Hub refused the token"),
    ("no token", "", {}, ExitCode.UNAUTHORIZED, "spec.hub.tokenSecret: the token is empty. Put one with write access under key 'token'"),
    ("somebody else's namespace", "hf_writer", {"repo": "elsewhere/x"}, ExitCode.UNAUTHORIZED, "spec.hub.tokenSecret: the Hub refused the token"),
]


@pytest.mark.parametrize(("name", "token", "wish", "code", "message"), REFUSED, ids=[r[0] for r in REFUSED])
def test_a_refusal_names_the_field(
    name: str, token: str, wish: dict[str, Any], code: ExitCode, message: str, trained: FineTuneRun, hub: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(Variables.TOKEN, token)
    run = FineTuneRun.model_validate(trained.dump() | {"spec": trained.spec.dump() | {"hub": HUB | wish}})
    found, text = refused(run)
    assert (found, text[: len(message)]) == (code, message)
    assert token not in text or not token
    assert (Path(run.workspace) / "result" / "adapter_model.safetensors").exists()


def test_a_namespace_that_does_not_exist(trained: FineTuneRun, writer: HfApi, hub: Running) -> None:
    hub.control.faults.append(Fault(status=404, path="/api/repos/create"))
    code, message = refused(trained)
    assert code is ExitCode.NOT_FOUND
    assert re.match(r"spec\.hub\.repo: luthier/reference cannot be created: there is no user or organisation 'luthier' on http", message)


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
def generated(make_generate_run: Callable[..., GenerateRun]) -> GenerateRun:
    """A GenerateJob of two shards, both complete."""
    run = make_generate_run(hub=HUB, shards=2)
    folder = remember(run)
    for i in range(2):
        (folder.result / f"images/{i}").mkdir(parents=True)
        files = {f"shard-{i:05d}-of-00002.jsonl": b'{"row": %d}\n' % i, f"images/{i}/a.png": b"\x89PNG" + bytes([i]) * 99}
        for name, content in files.items():
            (folder.result / name).write_bytes(content)
        entries = [{"path": n, "size": len(c), "sha256": sha256(folder.result / n)} for n, c in files.items()]
        shard_manifest(folder, i, 2).write_text(json.dumps({"shard": i, "metrics": {"rows": 4, "failedRows": i}, "files": entries}))
    return run


def test_the_outputs_of_all_shards_become_a_dataset(generated: GenerateRun, writer: HfApi) -> None:
    status = main(generated).hub
    assert status is not None
    names = sorted(writer.list_repo_files(status.repo, repo_type="dataset", revision=status.revision))
    assert [n for n in names if not n.startswith(".")] == [
        "README.md", "images/0/a.png", "images/1/a.png", "shard-00000-of-00002.MANIFEST.json", "shard-00000-of-00002.jsonl",
        "shard-00001-of-00002.MANIFEST.json", "shard-00001-of-00002.jsonl",
    ]  # fmt: skip
    assert "/datasets/luthier/reference/tree/" in status.url


def test_a_missing_shard_is_not_passed_over(generated: GenerateRun, writer: HfApi, hub: Running) -> None:
    shard_manifest(WorkspaceFolder(Path(generated.workspace)), 1, 2).unlink()
    code, message = refused(generated)
    assert code is ExitCode.MISCONFIGURED
    assert "shard-00001-of-00002.MANIFEST.json: missing" in message
    assert hub.control.requests == []


def test_the_phase_as_the_pod_runs_it(trained: FineTuneRun, writer: HfApi, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(trained.dump()))
    done = subprocess.run(
        [sys.executable, "-m", "luthier_trainer", "publish", "--run", str(tmp_path / "run.json")], capture_output=True, text=True, timeout=60
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
