"""Signs of life while files are written, and how the supervisor reads them."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from luthier_trainer.runtime.heartbeat import HEARTBEAT_FILE, STARTING_FILE, beating_while_growing
from luthier_trainer.runtime.run_folder import run_dir
from luthier_trainer.supervisor import main as supervisor

LOOK = 0.02


def beats(seconds: float = 0.5) -> bool:
    """Whether a sign of life comes within `seconds`. It is taken away, so that the next one is seen."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if (run_dir() / HEARTBEAT_FILE).exists():
            time.sleep(2 * LOOK)
            (run_dir() / HEARTBEAT_FILE).unlink()
            return True
        time.sleep(LOOK)
    return False


def test_a_folder_that_grows_is_a_sign_of_life(tmp_path: Path) -> None:
    folder = tmp_path / ".staging-checkpoint-7"
    with beating_while_growing(folder, LOOK):
        assert not beats(0.2), "nothing is written yet"
        (folder / "global_step7").mkdir(parents=True)
        file = folder / "global_step7/zero_pp_rank_0_mp_rank_00_optim_states.pt"
        file.write_bytes(b"x" * 10)
        assert beats()
        assert not beats(0.2), "a write that stands still is none"
        file.write_bytes(b"x" * 20)
        assert beats()
    file.write_bytes(b"x" * 30)
    assert not beats(0.2), "it is over"


@dataclass(frozen=True)
class Case:
    written: list[str]
    silent_seconds: float
    lost: bool  # at a limit of 10 s


SILENCES = [
    Case(
        written=[],
        silent_seconds=25,
        lost=False,
    ),
    Case(
        written=[],
        silent_seconds=31,
        lost=True,
    ),
    Case(
        written=[STARTING_FILE],
        silent_seconds=25,
        lost=False,
    ),
    Case(
        written=[STARTING_FILE],
        silent_seconds=31,
        lost=True,
    ),
    Case(
        written=[STARTING_FILE, HEARTBEAT_FILE],
        silent_seconds=9,
        lost=False,
    ),
    Case(
        written=[STARTING_FILE, HEARTBEAT_FILE],
        silent_seconds=11,
        lost=True,
    ),
]


@pytest.mark.parametrize("case", SILENCES, ids=lambda case: f"{case.silent_seconds:g} s after {case.written}")
def test_reading_a_checkpoint_leaves_the_patience_for_the_first_step(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: now)
    watch = supervisor.HeartbeatWatch(tmp_path, limit=10)
    for name in case.written:
        (tmp_path / name).touch()
        assert not watch.lost()
    now += case.silent_seconds
    assert watch.lost() == case.lost
    for name in case.written:
        os.utime(tmp_path / name, ns=(1, 1))  # as any other time: clocks of nodes and volumes differ
        assert not watch.lost()
