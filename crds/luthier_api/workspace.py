"""Where things lie in a workspace: the folder in which the phases of one job meet, on a volume or on a laptop."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class WorkspaceFolder:
    """Paths below the folder of one job. Nothing is created here."""

    root: Path

    @property
    def prepared(self) -> Path:
        """What `prepare` made. Complete once `prepared_record` exists: it is written last."""
        return self.root / "prepared"

    @property
    def prepared_record(self) -> Path:
        """`luthier_api.run.PreparedRecord` as JSON."""
        return self.prepared / "prepared.json"

    @property
    def checkpoints(self) -> Path:
        """Folders `checkpoint-<step>`, each with a manifest (FineTuneJob)."""
        return self.root / "checkpoints"

    @property
    def shards(self) -> Path:
        """What each shard has written so far (GenerateJob)."""
        return self.root / "shards"

    @property
    def tracking(self) -> Path:
        """What trackers keep in the workspace, a folder for each by its type (FineTuneJob)."""
        return self.root / "tracking"

    @property
    def stream(self) -> Path:
        """The files of a stream that are being read, if they are downloaded; empty after the training (FineTuneJob)."""
        return self.root / "stream"

    @property
    def compiled(self) -> Path:
        """Kernels that torch has compiled, which an attempt that resumes loads (FineTuneJob)."""
        return self.root / "compiled"

    @property
    def result(self) -> Path:
        """The model or the outputs, with a manifest: complete once `result_manifest` exists."""
        return self.root / "result"

    @property
    def result_manifest(self) -> Path:
        return self.result / MANIFEST


def shard_manifests(folder: WorkspaceFolder) -> list[Path]:
    """The manifests of all shards of a GenerateJob, in their order; none while a shard has no result.

    Of several numbers of shards, which another spec may have had, the one with the newest manifest counts.
    """
    by_count: dict[int, list[Path]] = {}
    for path in sorted(folder.result.glob(f"shard-?????-of-?????.{MANIFEST}")):
        by_count.setdefault(int(path.name[15:20]), []).append(path)
    whole = [paths for count, paths in by_count.items() if len(paths) == count]
    return max(whole, key=lambda paths: max(path.stat().st_mtime_ns for path in paths), default=[])


MANIFEST = "MANIFEST.json"
DATA_REPORT = "data-report.json"
"""What `prepare` found in the rows, in `prepared`."""
METRICS_FILE = "metrics.json"
"""The metrics of a training, in its result."""
