"""The files of a stream: on a volume they are read where they are, and by address they are downloaded while they are
read.

All processes of a run read the same files at about the same time. The first one that needs a file downloads it into the
workspace, and the last one that has read it removes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from luthier_api.exitcodes import ExitCode
from luthier_trainer.data import remote
from luthier_trainer.models.hub import FIRST_PAUSE, LONGEST_PAUSE, deadline_seconds
from luthier_trainer.runtime.failure import START_OVER, Failure
from luthier_trainer.runtime.heartbeat import beat, beating_while_growing
from luthier_trainer.workspace import provenance

NAME, READER = "name", "reader-"


@dataclass
class Shards:
    """Opens the files of a stream."""

    files: list[str]
    """Paths or addresses."""
    field: str
    """The path of the files in the spec, for messages."""
    folder: Path
    """For downloads; the same for all processes."""
    reader: str = "0"
    """Which process this is."""
    digests: dict[int, str] = dataclasses.field(default_factory=dict)
    """Number of a file → what it was known by when it was first read. Another content is refused: a run that goes on
    would read other rows.
    """

    @contextmanager
    def open(self, number: int) -> Iterator[Path]:
        """Provide a file on a volume, which may be gone afterwards. Raises Failure if there is none any more."""
        name = self.files[number]
        if remote.is_remote(name):
            with self._downloaded(number) as path:
                self._check(number, path)
                yield path
            return
        path = Path(name)
        if not path.is_file():
            raise Failure(ExitCode.NOT_FOUND, f"{self.field}: {name}, of which rows are still to be read, is gone")
        self._check(number, path)
        yield path

    def _check(self, number: int, path: Path) -> None:
        """Raise Failure if a file is another than it was."""
        digest = provenance.edges(path)
        if self.digests.setdefault(number, digest) != digest:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{self.field}: {remote.without_query(self.files[number])} has changed since this job has read it, and"
                f" other rows would follow. {START_OVER}",
            )

    @contextmanager
    def _downloaded(self, number: int) -> Iterator[Path]:
        from filelock import FileLock

        folder = self.folder / str(number)
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / f"{number}.lock")
        with beating_while_growing(self.folder), lock:
            folder.mkdir(exist_ok=True)
            if not (folder / NAME).exists():
                path = self._patiently(number, folder)
                (folder / NAME).write_text(str(path.relative_to(folder)))
            path = folder / (folder / NAME).read_text()
            (folder / f"{READER}{self.reader}").touch()
        try:
            yield path
        finally:
            with contextlib.suppress(OSError), lock:
                (folder / f"{READER}{self.reader}").unlink(missing_ok=True)
                if not any(folder.glob(f"{READER}*")):
                    shutil.rmtree(folder, ignore_errors=True)

    def _patiently(self, number: int, folder: Path) -> Path:
        """Return the file, downloaded. While the server cannot be reached, it tries for as long as `prepare` would."""
        until, pause = time.monotonic() + deadline_seconds(), FIRST_PAUSE
        while True:
            remote.downloaded.cache_clear()  # an earlier download of the same file may be removed already
            try:
                return remote.downloaded(self.files[number], folder, self.field)
            except Failure as failure:
                if failure.code is not ExitCode.HUB_UNAVAILABLE or time.monotonic() + pause > until:
                    raise
                print(f"{failure.message}; trying again in {pause:.0f} s", flush=True)
                beat()
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
