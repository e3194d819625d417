"""Repositories in a folder: blobs by their sha256, and one JSON file a repository with its commits and refs.

    ROOT/blobs/<sha256>                       ROOT/repos/<type>--<namespace>--<name>.json

A commit holds its whole tree, as a map from path to file: repositories here are small.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

TYPES = ("model", "dataset", "space")
# What the Hub puts in the first commit of a repository; the suffixes decide which uploads go by LFS.
LFS_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".onnx",
    ".msgpack",
    ".parquet",
    ".arrow",
    ".zip",
    ".gz",
    ".tar",
    ".npy",
)
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
LFS_BYTES = 10 * 1024 * 1024


@dataclass(frozen=True)
class File:
    size: int
    sha256: str
    oid: str  # git's name for it: of the content, or of the LFS pointer
    lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    description: str
    date: str
    parent: str | None
    files: dict[str, File]


@dataclass
class Repo:
    type: str
    id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def prefix(self) -> str:
        """Of its pages: models have none."""
        return "" if self.type == "model" else f"{self.type}s/"

    def resolve(self, revision: str) -> Commit | None:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return self.commits.get(oid)

    def history(self, commit: Commit) -> Iterator[Commit]:
        step: Commit | None = commit
        while step:
            yield step
            step = self.commits.get(step.parent or "")


def is_lfs(path: str, size: int, sample: bytes) -> bool:
    return path.endswith(LFS_SUFFIXES) or size >= LFS_BYTES or b"\0" in sample


def pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Store:
    def __init__(self, root: Path) -> None:
        self.blobs, self.records = root / "blobs", root / "repos"
        self.blobs.mkdir(parents=True, exist_ok=True)
        self.records.mkdir(parents=True, exist_ok=True)
        self.repos = {(repo.type, repo.id): repo for repo in map(read_repo, self.records.glob("*.json"))}

    def blob(self, sha256: str) -> Path:
        return self.blobs / sha256

    def add_blob(self, content: bytes) -> str:
        sha256 = hashlib.sha256(content).hexdigest()
        if not self.blob(sha256).exists():
            partial = self.blobs / f"{sha256}.partial"
            partial.write_bytes(content)
            partial.rename(self.blob(sha256))
        return sha256

    def regular(self, content: bytes) -> File:
        return File(len(content), self.add_blob(content), git_oid(content), lfs=False)

    def large(self, sha256: str) -> File:
        """Raises FileNotFoundError when the blob has not been uploaded."""
        size = self.blob(sha256).stat().st_size
        return File(size, sha256, git_oid(pointer(sha256, size)), lfs=True)

    def create(self, type: str, id: str, private: bool = False, gated: bool = False) -> Repo:
        repo = self.repos[type, id] = Repo(type, id, private, gated)
        self.commit(repo, "main", "initial commit", "", {".gitattributes": self.regular(GITATTRIBUTES)})
        return repo

    def delete(self, repo: Repo) -> None:
        del self.repos[repo.type, repo.id]
        self.record(repo).unlink()

    def commit(self, repo: Repo, branch: str, title: str, description: str, files: dict[str, File]) -> Commit:
        """Sets `branch` to a commit whose whole tree is `files`."""
        parent, date = repo.branches.get(branch), datetime.now(UTC).isoformat()
        tree = {path: asdict(file) for path, file in sorted(files.items())}
        identity = json.dumps([repo.type, repo.id, parent, title, date, tree]).encode()
        commit = Commit(hashlib.sha1(identity).hexdigest(), title, description, date, parent, files)
        repo.commits[commit.oid] = commit
        repo.branches[branch] = commit.oid
        self.save(repo)
        return commit

    def seed(self, type: str, id: str, folder: Path, private: bool = False, gated: bool = False) -> Commit:
        """A repository with one more commit: the files of `folder`."""
        repo = self.create(type, id, private, gated)
        files = dict(repo.commits[repo.branches["main"]].files)
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            name, content = path.relative_to(folder).as_posix(), path.read_bytes()
            large = is_lfs(name, len(content), content[:512])
            files[name] = self.large(self.add_blob(content)) if large else self.regular(content)
        return self.commit(repo, "main", f"Seeded from {folder.name}", "", files)

    def record(self, repo: Repo) -> Path:
        return self.records / f"{repo.type}--{repo.id.replace('/', '--')}.json"

    def save(self, repo: Repo) -> None:
        self.record(repo).write_text(json.dumps(asdict(repo)))


def read_repo(path: Path) -> Repo:
    record = json.loads(path.read_text())
    commits = {
        oid: Commit(**{**commit, "files": {name: File(**file) for name, file in commit["files"].items()}})
        for oid, commit in record.pop("commits").items()
    }
    return Repo(**record, commits=commits)


def folders(files: dict[str, File]) -> set[str]:
    return {str(parent) for path in files for parent in PurePosixPath(path).parents} - {"."}
