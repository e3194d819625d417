"""The phase `publish`: uploads the result to the Hub in one commit, and verifies every file before and after.

The same commit deletes the files of an older result, which its manifest lists, and replaces README.md. All other files
in the repository stay. The phase is idempotent: files that the Hub already has are not sent again, and the same content
makes no second commit. A pod that loses its connection can therefore fail, and the next pod continues.
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
from luthier_api.outputs import EXPORT_MANIFEST, LINES
from luthier_api.run import FineTuneRun, GenerateRun
from luthier_api.status import HubStatus
from luthier_api.termination import TerminationMessage
from luthier_api.workspace import MANIFEST, WorkspaceFolder
from luthier_trainer.generation.result import shard_manifest
from luthier_trainer.models.hub import REPO, TOKEN, endpoint, hub_api, hub_token, patiently
from luthier_trainer.publish import contact_sheet, model_card
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.workspace import manifest
from luthier_trainer.workspace.prepared import read_prepared

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

CARD = "README.md"
MANIFESTS = {
    "model": re.compile(re.escape(MANIFEST)),
    "dataset": re.compile(rf"shard-\d{{5}}-of-\d{{5}}\.{re.escape(MANIFEST)}|{re.escape(EXPORT_MANIFEST)}"),
}
"""Type of repository → pattern of the manifests that a result has: `result_manifest`; `shard_manifest`, or that of
outputs in another form.
"""
BESIDE: Mapping[str, frozenset[str]] = {"model": frozenset(), "dataset": frozenset({contact_sheet.FILE})}
"""Type of repository → files that no manifest lists, and that go with an older result unless this one has them, too."""
PATTERNS = 200  # the client compares every file of the repository with every pattern of files to delete


@dataclass(frozen=True)
class Target:
    """The repository and branch that the result is published to. `type`: model or dataset."""

    repo: str
    type: str
    branch: str
    private: bool

    @property
    def what(self) -> str:
        """Type and name of the repository, for messages."""
        return f"{self.type} {self.repo}"

    def url(self, revision: str) -> str:
        """Return the address of the repository's files at `revision`."""
        return f"{endpoint()}/{'datasets/' if self.type == 'dataset' else ''}{self.repo}/tree/{revision}"


def main(run: FineTuneRun | GenerateRun) -> TerminationMessage:
    """Publish the result of a job, and return the termination message.

    Raises Failure if the result is incomplete, or if the Hub refuses it or does not store it as it was sent.
    """
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
    """Return the paths of all files of the result, relative to its folder, after comparing them with their manifests.

    Raises Failure if a file is missing or has changed.
    """
    folder = WorkspaceFolder(Path(run.workspace))
    if isinstance(run, FineTuneRun):
        manifests = [folder.result_manifest]
    elif run.spec.outputs.format != LINES:
        manifests = [folder.result / EXPORT_MANIFEST]
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
    """Create the repository and its branch if they are missing, and return the target with the repository's full name.

    Raises Failure if the owner does not exist, or if the Hub refuses.
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
    """Fill `folder` with links to the files of the result, with the card, and with the contact sheet of images.

    Returns path in the repository → file.
    """
    result = WorkspaceFolder(Path(run.workspace)).result
    for file in files:
        link = folder / file
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to((result / file).resolve())
    (folder / CARD).unlink(missing_ok=True)  # replaces a card that a library has written into the result
    (folder / CARD).write_text(model_card.card(run, read_prepared(run), result))
    own = {Path(CARD)}
    if isinstance(run, GenerateRun) and (page := contact_sheet.page(run, result)) is not None:
        (folder / contact_sheet.FILE).write_text(page, encoding="utf-8")
        own.add(Path(contact_sheet.FILE))
    return {str(path): folder / path for path in sorted({*files, *own})}


def send(api: HfApi, target: Target, title: str, folder: Path, staged: Mapping[str, Path], gone: set[str]) -> str:
    """Replace the older result by the files in `folder`, in one attempt, and return the id of the new commit.

    The paths of deleted files are added to `gone`. The parent of the commit is the revision that was listed. If another
    commit came between, or if a response was lost, the Hub refuses the commit, and the next attempt lists the files
    again. With Xet the client makes a commit for every few hundred files; the first one deletes.
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
    """Return the files at `revision` that belong to an older result but not to this one.

    These are its manifests and the files that they list. Only files that exist under exactly that name are returned, so
    no path can lead out of the repository. Names that start with a dot (.gitattributes) belong to git and the Hub.
    """
    named: set[str] = set()
    for name in filter(MANIFESTS[target.type].fullmatch, there):
        with tempfile.TemporaryDirectory(prefix="luthier-manifest-") as folder:
            path = api.hf_hub_download(target.repo, name, repo_type=target.type, revision=revision, local_dir=folder)
            files = manifest.names_in(Path(path).read_bytes())
        if files is None:
            print(
                f"{target.what}: its {name} was not written by Luthier, so nothing is deleted for it",
                file=sys.stderr,
                flush=True,
            )
        else:
            named |= {name, *files, *BESIDE[target.type]}
    return {
        n
        for n in named & there.keys() - set(staged)
        if not any(part.startswith(".") for part in PurePosixPath(n).parts)
    }


def listed(api: HfApi, target: Target, revision: str) -> dict[str, RepoFile]:
    """Return all files at `revision`, by path."""
    from huggingface_hub.hf_api import RepoFile

    tree = api.list_repo_tree(target.repo, repo_type=target.type, revision=revision, recursive=True)
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def compare(api: HfApi, target: Target, revision: str, staged: Mapping[str, Path], gone: Collection[str] = ()) -> None:
    """Compare size and digest of every file with those that the Hub lists, and check that no file of `gone` is left.

    Raises Failure(STORAGE_ERROR) if a file differs or is left.
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
    """Return the id that git gives a file, by which the Hub identifies files that are not in LFS."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
