"""The phase that delivers: the result as one commit on the Hub, compared file by file with the manifest before and after.

Everything in it may be done twice: what the Hub has already is not sent again, and the same content makes no second commit. So a pod
that loses its Hub ends, and the next one goes on. Neighbours: `hub` (patience), `modelcard` (the README), `manifest`.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_api.run import FineTuneRun, GenerateRun
from luthier_api.status import HubStatus
from luthier_api.termination import TerminationMessage
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer import manifest, modelcard
from luthier_trainer.ending import Failure
from luthier_trainer.generation.shard import shard_manifest
from luthier_trainer.hub import endpoint, hub_api, hub_token, patiently
from luthier_trainer.prepared import read_prepared

if TYPE_CHECKING:
    from huggingface_hub import HfApi

REPO, TOKEN, CARD = "spec.hub.repo", "spec.hub.tokenSecret", "README.md"


@dataclass(frozen=True)
class Target:
    """Where the result goes."""

    repo: str
    type: str
    branch: str
    private: bool

    @property
    def what(self) -> str:
        return f"{self.type} {self.repo}"

    def url(self, revision: str) -> str:
        return f"{endpoint()}/{'datasets/' if self.type == 'dataset' else ''}{self.repo}/tree/{revision}"


def main(run: FineTuneRun | GenerateRun) -> TerminationMessage:
    """Publish the result of one job. Raises Failure."""
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    hub = run.spec.hub
    if hub is None or hub.repo is None:
        raise Failure(ExitCode.INVALID_SPEC, f"{REPO}: nothing is published without it")
    if not hub_token():
        raise Failure(ExitCode.UNAUTHORIZED, f"{TOKEN}: the token is empty. Put one with write access under key {hub.token_secret and hub.token_secret.key!r}")
    files = verified_files(run)
    api = hub_api()
    kind = "model" if isinstance(run, FineTuneRun) else "dataset"
    target = create(api, Target(hub.repo, kind, hub.branch, hub.private))
    with tempfile.TemporaryDirectory(prefix="luthier-publish-") as folder:
        staged = stage(run, files, Path(folder))
        commit = patiently(
            lambda: api.upload_folder(
                repo_id=target.repo, repo_type=target.type, folder_path=folder, revision=target.branch,
                commit_message=f"{run.kind} {run.name}",
            ),
            REPO, target.what,
        )  # fmt: skip
        revision = str(commit.oid)
        compare(api, target, revision, staged)
        size = sum(path.stat().st_size for path in staged.values())
    status = HubStatus(repo=target.repo, revision=revision, url=target.url(revision), files=len(staged), bytes=size)
    print(f"published {status.files} files ({size} bytes) as {status.url}", flush=True)
    return TerminationMessage(phase="publish", code=0, reason=ExitCode.COMPLETED.reason, hub=status)


def verified_files(run: FineTuneRun | GenerateRun) -> list[Path]:
    """The files of the result, relative to it; each as its manifest says. Raises Failure when one is missing or has changed."""
    folder = WorkspaceFolder(Path(run.workspace))
    if isinstance(run, FineTuneRun):
        manifests = [folder.result_manifest]
    else:
        manifests = [shard_manifest(folder, i, run.spec.shards) for i in range(run.spec.shards)]
    files: list[Path] = []
    for path in manifests:
        try:
            entries = json.loads(path.read_text())["files"]
        except FileNotFoundError:
            raise Failure(ExitCode.MISCONFIGURED, f"{path}: missing. The job's run has not ended well in this workspace") from None
        except (OSError, ValueError, KeyError) as error:
            raise Failure(ExitCode.STORAGE_ERROR, f"{path}: cannot be read: {error}") from error
        for entry in entries:
            file = folder.result / entry["path"]
            if not file.is_file() or file.stat().st_size != entry["size"] or manifest.sha256(file) != entry["sha256"]:
                raise Failure(ExitCode.STORAGE_ERROR, f"{file}: is not what {path.name} says (missing, cut or changed); nothing was published")
            files.append(Path(entry["path"]))
        files.append(path.relative_to(folder.result))
    return files


def create(api: HfApi, target: Target) -> Target:
    """The repository and its branch, made where they are missing; the target with its full name."""

    def make() -> str:
        return str(api.create_repo(target.repo, repo_type=target.type, private=target.private, exist_ok=True).repo_id)

    try:
        name = patiently(make, REPO, target.what)
    except Failure as failure:
        if failure.code is ExitCode.NOT_FOUND:
            namespace = target.repo.partition("/")[0]
            raise Failure(
                ExitCode.NOT_FOUND, f"{REPO}: {target.repo} cannot be created: there is no user or organisation {namespace!r} on {endpoint()}"
            ) from failure
        raise
    named = Target(name, target.type, target.branch, target.private)
    if named.branch != "main":
        patiently(lambda: api.create_branch(name, repo_type=named.type, branch=named.branch, exist_ok=True), REPO, named.what)
    return named


def stage(run: FineTuneRun | GenerateRun, files: list[Path], folder: Path) -> dict[str, Path]:
    """A folder of links to the result's files, with the card beside them: path in the repository → file."""
    result = WorkspaceFolder(Path(run.workspace)).result
    for file in files:
        link = folder / file
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to((result / file).resolve())
    (folder / CARD).unlink(missing_ok=True)  # what a library left there is not the card of this result
    (folder / CARD).write_text(modelcard.card(run, read_prepared(run), result))
    return {str(path): folder / path for path in sorted({*files, Path(CARD)})}


def compare(api: HfApi, target: Target, revision: str, staged: dict[str, Path]) -> None:
    """Size and digest of every file as the Hub lists them. Raises Failure(STORAGE_ERROR) when one differs."""
    remote: dict[str, Any] = patiently(
        lambda: {f.path: f for f in api.list_repo_tree(target.repo, repo_type=target.type, revision=revision, recursive=True)}, REPO, target.what
    )
    for name, path in staged.items():
        entry = remote.get(name)
        lfs = getattr(entry, "lfs", None)
        if entry is None or entry.size != path.stat().st_size or (
            lfs.sha256 != manifest.sha256(path) if lfs else entry.blob_id != git_blob(path)
        ):
            raise Failure(ExitCode.STORAGE_ERROR, f"{REPO}: {name} is not on {target.url(revision)} as it was sent; publish again")


def git_blob(path: Path) -> str:
    """Git's id of a file: what the Hub names small files by."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
