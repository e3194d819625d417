"""Signs of life while files are written, and how the supervisor reads them."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from luthier_api.metrics import HEARTBEAT_AGE, read_samples
from luthier_trainer.runtime.heartbeat import HEARTBEAT_FILE, STARTING_FILE, beat, beating_while_growing
from luthier_trainer.runtime.run_folder import run_dir
from luthier_trainer.runtime.telemetry import Telemetry
from luthier_trainer.supervisor import hang

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


def test_the_age_of_a_heartbeat_is_served(tmp_path: Path) -> None:
    telemetry = Telemetry()
    telemetry.serve(0)

    def served() -> dict[str, float]:
        return read_samples(generate_latest(telemetry.registry).decode())

    assert HEARTBEAT_AGE.name not in served(), "it is still loading"
    beat()
    changed = time.time() - 400
    os.utime(run_dir() / HEARTBEAT_FILE, (changed, changed))
    assert served()[HEARTBEAT_AGE.name] >= 400
    beat()
    assert served()[HEARTBEAT_AGE.name] < 400


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
    monkeypatch.setattr(hang, "START_SECONDS", 0)
    monkeypatch.setattr(hang.time, "monotonic", lambda: now)
    watch = hang.HeartbeatWatch(tmp_path, hang.StepLimit(10))
    for name in case.written:
        (tmp_path / name).touch()
        assert not watch.lost()
    now += case.silent_seconds
    assert watch.lost() == case.lost
    for name in case.written:
        os.utime(tmp_path / name, ns=(1, 1))  # as any other time: clocks of nodes and volumes differ
        assert not watch.lost()


@dataclass(frozen=True)
class LimitCase:
    name: str
    limit: hang.StepLimit
    heartbeats: int
    longest: float
    seconds: float


LIMITS = [
    LimitCase(
        name="the job's own limit is kept as it is",
        limit=hang.StepLimit(7200),
        heartbeats=100,
        longest=1,
        seconds=7200,
    ),
    LimitCase(
        name="the administrator's limit holds until enough steps were seen",
        limit=hang.StepLimit(1800, is_derived=True),
        heartbeats=19,
        longest=1,
        seconds=1800,
    ),
    LimitCase(
        name="short steps: ten minutes",
        limit=hang.StepLimit(1800, is_derived=True),
        heartbeats=20,
        longest=1,
        seconds=600,
    ),
    LimitCase(
        name="longer steps: twenty times the longest",
        limit=hang.StepLimit(1800, is_derived=True),
        heartbeats=20,
        longest=45,
        seconds=900,
    ),
    LimitCase(
        name="long steps: never more than the administrator's limit",
        limit=hang.StepLimit(1800, is_derived=True),
        heartbeats=20,
        longest=400,
        seconds=1800,
    ),
    LimitCase(
        name="an administrator's limit below ten minutes",
        limit=hang.StepLimit(120, is_derived=True),
        heartbeats=20,
        longest=1,
        seconds=120,
    ),
    LimitCase(
        name="a save may take twice what is planned",
        limit=hang.StepLimit(60, save_seconds=500),
        heartbeats=20,
        longest=1,
        seconds=1000,
    ),
]


@pytest.mark.parametrize("case", LIMITS, ids=lambda case: case.name)
def test_the_limit_follows_the_steps(case: LimitCase) -> None:
    assert case.limit.between_steps(case.heartbeats, case.longest) == case.seconds


def test_the_start_has_its_own_patience() -> None:
    assert hang.StepLimit(30).before_first_step() == 1800
    assert hang.StepLimit(1800).before_first_step() == 5400


def test_the_watch_knows_the_last_step_and_the_longest_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(hang.time, "monotonic", lambda: now)
    watch = hang.HeartbeatWatch(tmp_path, hang.StepLimit(1800, is_derived=True))
    file = tmp_path / HEARTBEAT_FILE
    for step, seconds in enumerate([300.0, *[2.0] * 10, 40.0, *[2.0] * 10]):
        now += seconds
        file.write_text(str(step))
        os.utime(file, ns=(step + 1, step + 1))
        assert not watch.lost()
    assert (watch.step, watch.limit) == (21, 800), "the first heartbeat ends the start, and is no step"
    file.write_text("")  # as while it is written
    os.utime(file, ns=(99, 99))
    assert not watch.lost()
    assert watch.step == 21
