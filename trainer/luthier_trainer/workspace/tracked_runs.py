"""Where trackers show a training: a small file for each tracker, in its folder of the workspace.

The process that trains reports it when it ends, and `publish` writes it into the model card.
"""

from __future__ import annotations

from pathlib import Path

from luthier_api.status import TrackedRun
from luthier_trainer.workspace.manifest import replace_file

FILE = "tracked-run.json"
LONGEST_URL = 1024  # characters; a termination message has 4,096 bytes


def keep(folder: Path, tracker: str, run: str, url: str | None = None) -> None:
    """Write that the tracker of this type, to which `folder` belongs, shows the training in `run`, on page `url`."""
    page = url if url and len(url) <= LONGEST_URL else None
    folder.mkdir(parents=True, exist_ok=True)
    found = TrackedRun(type=tracker, url=page, run=run)
    replace_file(folder / FILE, found.model_dump_json(exclude_none=True).encode())


def read(folder: Path) -> list[TrackedRun]:
    """The runs below `folder`, the one of all trackers; those with a page first."""
    found = [TrackedRun.model_validate_json(file.read_bytes()) for file in sorted(folder.glob(f"*/{FILE}"))]
    return sorted(found, key=lambda run: run.url is None)
