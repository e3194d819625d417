"""A tracker that is slow, away or broken neither slows nor stops who reports, and what is lost is counted."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import pytest

from luthier_trainer.runtime import notices
from luthier_trainer.tracking import channel as channel_module
from luthier_trainer.tracking.base import Report
from luthier_trainer.tracking.channel import Channel


@dataclass
class Recorder:
    """A tracker that fails as often as it is told, and hangs until `open` is set."""

    failures: int = 0
    open: threading.Event = field(default_factory=threading.Event)
    sent: list[int] = field(default_factory=list)
    completed: bool | None = None

    def send(self, report: Report) -> None:
        self.open.wait()
        if self.failures:
            self.failures -= 1
            raise ConnectionError("no route to http://tracker")
        self.sent.append(report.step)

    def close(self, complete: bool) -> None:
        self.completed = complete


@dataclass(frozen=True)
class Case:
    name: str
    failures: int = 0
    hangs: bool = False
    limit: int = 100
    sent: tuple[int, ...] = (0, 1, 2, 3, 4)
    notices: tuple[str, ...] = ()


CASES = [
    Case(
        name="well",
    ),
    Case(
        name="away for a while: nothing is lost, and the order is kept",
        failures=3,
    ),
    Case(
        name="away for good",
        failures=1000,
        sent=(),
        notices=(
            "spec.tracking: Recorder lacks 5 of 5 reports of the training: ConnectionError: no route to http://tracker",
        ),
    ),
    Case(
        name="hanging",
        hangs=True,
        sent=(),
        notices=("spec.tracking: Recorder lacks 5 of 5 reports of the training: it did not take them within 0.2 s",),
    ),
    Case(
        name="hanging with a full buffer",
        hangs=True,
        limit=2,
        sent=(),
        notices=("spec.tracking: Recorder lacks 5 of 5 reports of the training: it did not take them within 0.2 s",),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_channel(case: Case) -> None:
    tracker = Recorder(failures=case.failures)
    if not case.hangs:
        tracker.open.set()
    channel = Channel("Recorder", tracker, limit=case.limit, retry=0.01)
    for step in range(5):
        channel.put(Report(step, {"loss": 1.0}))
    if case.failures == 3:
        while len(tracker.sent) < 5:  # `close` sends each report at most once more
            threading.Event().wait(0.005)
    channel.close(True, 0.2)
    assert tuple(tracker.sent) == case.sent
    assert tuple(notices.given()) == case.notices
    assert tracker.completed is (None if case.notices else True)
    tracker.open.set()


def test_a_full_buffer_keeps_the_oldest() -> None:
    tracker = Recorder()
    channel = Channel("Recorder", tracker, limit=3)
    for step in range(5):
        channel.put(Report(step, {}))
    tracker.open.set()
    channel.close(False)
    assert tracker.completed is False
    assert tracker.sent == [0, 1, 2]
    assert notices.given() == [
        "spec.tracking: Recorder lacks 2 of 5 reports of the training: too many reports waited for it"
    ]


@pytest.mark.parametrize("long_enough", [True, False])
def test_an_interruption_after_which_nothing_is_lost(long_enough: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "AWAY_SECONDS", 0.0 if long_enough else 3600.0)
    tracker = Recorder(failures=2)
    tracker.open.set()
    channel = Channel("Recorder", tracker, retry=0.01)
    channel.put(Report(0, {}))
    while not tracker.sent:
        threading.Event().wait(0.005)
    channel.close(True)
    words = "spec.tracking: Recorder took no reports for 0 s, and has all of them now: ConnectionError: no route to"
    assert [text.startswith(words) for text in notices.given()] == [True] * long_enough
