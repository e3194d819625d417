"""The phase that delivers: the result as one commit on the Hub, compared file by file with the manifest before and
after.

The same commit takes away what an older result left there, known by its manifest, and replaces README.md; files that
were never ours stay. Everything in it may be done twice: what the Hub has already is not sent again, and the same
content makes no second commit. So a pod that loses its Hub ends, and the next one goes on.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from luthier_api.exitcodes import ExitCode
from luthier_api.run import FineTuneRun, GenerateRun
from luthier_api.status import HubStatus
from luthier_api.termination import TerminationMessage
from luthier_api.workspace import MANIFEST, WorkspaceFolder
from luthier_trainer.generation.ledger import shard_manifest
from luthier_trainer.models.hub import REPO, TOKEN, endpoint, hub_api, hub_token, patiently
from luthier_trainer.publish import model_card
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.workspace import manifest
from luthier_trainer.workspace.prepared import read_prepared

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

CARD = "README.md"
MANIFESTS = {
    "model": re.compile(re.escape(MANIFEST)),
    "dataset": re.compile(rf"shard-\d{{5}}-of-\d{{5}}\.{re.escape(MANIFEST)}"),
}
"""Type of repository → the manifests that a result has there: `result_manifest` and `shard_manifest`."""
PATTERNS = 200  # the client holds every file of the repository against every pattern of what is to be deleted


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
        raise Failure(
            ExitCode.UNAUTHORIZED,
            f"{TOKEN}: the token is empty. Put one with write access under key"
            f" {hub.token_secret_ref and hub.token_secret_ref.key!r}",
        )
    files = verified_files(run)
    api = hub_api()
    kind = "model" if isinstance(run, FineTuneRun) else "dataset"
    target = create(api, Target(hub.repo, kind, hub.branch, hub.private))
    with tempfile.TemporaryDirectory(prefix="luthier-publish-") as folder:
        staged = stage(run, files, Path(folder))
        gone: set[str] = set()
        revision = patiently(
            lambda: send(api, target, f"{run.kind} {run.name}", Path(folder), staged, gone), REPO, target.what
        )
        compare(api, target, revision, staged, gone)
        size = sum(path.stat().st_size for path in staged.values())
    status = HubStatus(repo=target.repo, revision=revision, url=target.url(revision), files=len(staged), bytes=size)
    print(f"published {status.files} files ({size} bytes) as {status.url}", flush=True)
    return TerminationMessage(phase="publish", code=0, reason=ExitCode.COMPLETED.reason, hub=status)


def verified_files(run: FineTuneRun | GenerateRun) -> list[Path]:
    """The files of the result, relative to it; each as its manifest says. Raises Failure when one is missing or has
    changed.
    """
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
            raise Failure(
                ExitCode.MISCONFIGURED, f"{path}: missing. The job's run has not ended well in this workspace"
            ) from None
        except (OSError, ValueError, KeyError) as error:
            raise Failure(ExitCode.STORAGE_ERROR, f"{path}: cannot be read: {error}") from error
        for entry in entries:
            file = folder.result / entry["path"]
            if not file.is_file() or file.stat().st_size != entry["size"] or manifest.sha256(file) != entry["sha256"]:
                raise Failure(
                    ExitCode.STORAGE_ERROR,
                    f"{file}: is not what {path.name} says (missing, cut or changed); nothing was published",
                )
            files.append(Path(entry["path"]))
        files.append(path.relative_to(folder.result))
    return files


def create(api: HfApi, target: Target) -> Target:
    """The repository and its branch, made where they are missing; the target with its full name. Raises Failure if the
    owner does not exist.
    """

    def make() -> str:
        return str(api.create_repo(target.repo, repo_type=target.type, private=target.private, exist_ok=True).repo_id)

    try:
        name = patiently(make, REPO, target.what)
    except Failure as failure:
        if failure.code is ExitCode.NOT_FOUND:
            namespace = target.repo.partition("/")[0]
            raise Failure(
                ExitCode.NOT_FOUND,
                f"{REPO}: {target.repo} cannot be created: there is no user or organisation {namespace!r} on"
                f" {endpoint()}",
            ) from failure
        raise
    named = Target(name, target.type, target.branch, target.private)
    if named.branch != "main":
        patiently(
            lambda: api.create_branch(name, repo_type=named.type, branch=named.branch, exist_ok=True), REPO, named.what
        )
    return named


def stage(run: FineTuneRun | GenerateRun, files: list[Path], folder: Path) -> dict[str, Path]:
    """A folder of links to the result's files, with the card beside them: path in the repository → file."""
    result = WorkspaceFolder(Path(run.workspace)).result
    for file in files:
        link = folder / file
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to((result / file).resolve())
    (folder / CARD).unlink(missing_ok=True)  # what a library left there is not the card of this result
    (folder / CARD).write_text(model_card.card(run, read_prepared(run), result))
    return {str(path): folder / path for path in sorted({*files, Path(CARD)})}


def send(api: HfApi, target: Target, title: str, folder: Path, staged: Mapping[str, Path], gone: set[str]) -> str:
    """One attempt to put `folder` in the place of the older result; the commit that holds it. What was taken away is
    added to `gone`.

    The commit builds on the very one that was looked at: when another one came between, or an answer was lost, the Hub
    refuses it and the next attempt looks again. By Xet the client makes a commit of each few hundred files; the first
    one deletes.
    """
    from huggingface_hub import CommitOperationDelete

    repo = {"repo_id": target.repo, "repo_type": target.type, "revision": target.branch}
    parent = str(api.repo_info(**repo).sha)
    there = listed(api, target, parent)
    stale = sorted(left_behind(api, target, parent, there, staged))
    gone |= set(stale)
    if stale:
        shown = ", ".join(stale[:5]) + (", ..." if len(stale) > 5 else "")
        print(
            f"{target.what}: {len(stale)} files of an older result go, as this one has no such files: {shown}",
            flush=True,
        )
    if CARD in there and there[CARD].blob_id != git_blob(staged[CARD]):
        print(f"{target.what}: {CARD} is replaced by the card of this result", flush=True)
    if len(stale) > PATTERNS:
        operations = [CommitOperationDelete(name, is_folder=False) for name in stale]
        parent = str(
            api.create_commit(
                **repo, operations=operations, commit_message=f"{title}: older result", parent_commit=parent
            ).oid
        )
        stale = []
    patterns = [glob.escape(name) for name in stale]
    commit = api.upload_folder(
        **repo, folder_path=folder, commit_message=title, delete_patterns=patterns or None, parent_commit=parent
    )
    return str(commit.oid)


def left_behind(
    api: HfApi, target: Target, revision: str, there: Mapping[str, RepoFile], staged: Collection[str]
) -> set[str]:
    """The files at `revision` that an older result brought and this one does not: what its manifests name, and they
    themselves.

    Only what lies there by that very name is among them, so no path can lead out of the repository; names with a dot in
    front (.gitattributes) are git's and the Hub's.
    """
    named: set[str] = set()
    for name in filter(MANIFESTS[target.type].fullmatch, there):
        with tempfile.TemporaryDirectory(prefix="luthier-manifest-") as folder:
            path = api.hf_hub_download(target.repo, name, repo_type=target.type, revision=revision, local_dir=folder)
            files = manifest.names_in(Path(path).read_bytes())
        if files is None:
            print(
                f"{target.what}: its {name} is no manifest of ours, so nothing is deleted for it",
                file=sys.stderr,
                flush=True,
            )
        else:
            named |= {name, *files}
    return {
        n
        for n in named & there.keys() - set(staged)
        if not any(part.startswith(".") for part in PurePosixPath(n).parts)
    }


def listed(api: HfApi, target: Target, revision: str) -> dict[str, RepoFile]:
    """Every file at `revision`, by its path."""
    from huggingface_hub.hf_api import RepoFile

    tree = api.list_repo_tree(target.repo, repo_type=target.type, revision=revision, recursive=True)
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def compare(api: HfApi, target: Target, revision: str, staged: Mapping[str, Path], gone: Collection[str] = ()) -> None:
    """Size and digest of every file as the Hub lists them, and that none of `gone` is left. Raises
    Failure(STORAGE_ERROR).
    """
    remote = patiently(lambda: listed(api, target, revision), REPO, target.what)
    for name, path in staged.items():
        entry = remote.get(name)
        if (
            entry is None
            or entry.size != path.stat().st_size
            or (entry.lfs.sha256 != manifest.sha256(path) if entry.lfs else entry.blob_id != git_blob(path))
        ):
            raise Failure(
                ExitCode.STORAGE_ERROR, f"{REPO}: {name} is not on {target.url(revision)} as it was sent; publish again"
            )
    if left := sorted(remote.keys() & set(gone)):
        raise Failure(
            ExitCode.STORAGE_ERROR,
            f"{REPO}: {left[0]} of an older result is still on {target.url(revision)}; publish again",
        )


def git_blob(path: Path) -> str:
    """Git's id of a file: what the Hub names small files by."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
