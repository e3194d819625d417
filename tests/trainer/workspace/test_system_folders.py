"""Which paths of a job are refused because they lead to files of the pod, and not to data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from luthier_trainer.data.files import find_files
from luthier_trainer.models.sources import check_folder
from luthier_trainer.runtime.failure import Failure


def link(folder: Path, target: str) -> Path:
    """A link in `folder`, as a user may have put it on a volume."""
    path = folder / "link"
    path.symlink_to(target)
    return path


@dataclass(frozen=True)
class Case:
    name: str
    path: Callable[[Path], Path]
    """From the folder of a volume."""
    real: str


CASES = [
    Case(
        name="a link to the environment",
        path=lambda volume: link(volume, "/proc/self/environ"),
        real="/proc/",
    ),
    Case(
        name="a path that leaves the volume",
        path=lambda volume: Path(f"{volume}/{'../' * 20}etc/passwd"),
        real="/etc/passwd",
    ),
    Case(
        name="below a link to a folder",
        path=lambda volume: link(volume, "/etc") / "passwd",
        real="/etc/passwd",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_file_of_the_pod_is_no_data(tmp_path: Path, case: Case) -> None:
    path = case.path(tmp_path)
    with pytest.raises(Failure) as refused:
        find_files([str(path)], "spec.dataset.files")
    assert str(refused.value).startswith(f"spec.dataset.files[0]: {path} leads to {case.real}")


def test_a_link_to_a_folder_of_the_pod_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(Failure, match=r"^spec\.model\.path: .*/link leads to /proc/\d+, a file of the pod itself"):
        check_folder(link(tmp_path, "/proc/self"), "spec.model.path")


def test_a_link_on_the_volume_is_data(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    assert find_files([str(link(tmp_path, "rows.jsonl"))], "spec.dataset.files") == [tmp_path / "link"]
