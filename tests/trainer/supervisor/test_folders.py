"""Folders that can be written to, and those that cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from luthier_trainer.runtime.failure import Failure
from luthier_trainer.supervisor.folders import check_writable, folders

PLACES: list[tuple[dict[str, str], dict[str, str]]] = [
    # variables                                   what decides → the folder, beside the workspace and the run folder
    ({}, {"TMPDIR": "/tmp"}),
    ({"TMPDIR": "/scratch"}, {"TMPDIR": "/scratch"}),
    ({"TMP": "/scratch"}, {"TMP": "/scratch"}),
    ({"TMPDIR": "", "TMP": "/b", "TEMP": "/a"}, {"TEMP": "/a"}),
    ({"HF_HOME": "/cache", "HF_HUB_CACHE": ""}, {"TMPDIR": "/tmp", "HF_HOME": "/cache"}),
]


@pytest.mark.parametrize(("variables", "expect"), PLACES)
def test_the_folders_that_are_looked_at(
    variables: dict[str, str], expect: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TMPDIR", "TEMP", "TMP", "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = {name: str(folder) for folder, name in folders(Path("/workspace/job"))}
    assert found == {"spec.workspace": "/workspace/job", "LUTHIER_RUN_DIR": os.environ["LUTHIER_RUN_DIR"]} | expect


def test_looking_whether_a_folder_can_be_written_to_leaves_nothing_there(tmp_path: Path) -> None:
    check_writable(tmp_path / "job" / "folder", "spec.workspace")
    assert list((tmp_path / "job" / "folder").iterdir()) == []


def test_a_folder_of_somebody_else(tmp_path: Path) -> None:
    """As another user, because root may write anywhere."""
    folder = Path("/usr/share")
    code = (
        "import os, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "from pathlib import Path\n"
        "from luthier_trainer.supervisor.folders import check_writable\n"
        f"check_writable(Path({str(folder)!r}), 'spec.workspace')"
        if os.getuid() == 0
        else ""
    )
    if not code:
        with pytest.raises(Failure) as failure:
            check_writable(folder, "spec.workspace")
        text = failure.value.message
    else:
        prelude = "import luthier_trainer.supervisor.folders\n"  # while it may still read our files
        text = subprocess.run([sys.executable, "-c", prelude + code], capture_output=True, text=True, timeout=30).stderr
    assert (
        "spec.workspace: cannot write to /usr/share: Permission denied. /usr/share belongs to 0:0, mode 0755; this"
        " process is" in text
    )
