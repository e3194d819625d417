"""The queue's promises, at a clock of our own."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from luthier_api.kinds import JobKind
from luthier_operator.model import Key
from luthier_operator.queue import BACKOFF_LIMIT, Queue


def key(name: str) -> Key:
    return Key(JobKind.FINE_TUNE, "default", name)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def play(steps: str, backoff: float = 1.0) -> str:
    """Carry out `steps` and return what each `take` gave.

    +a add · ^a add before all others · ~a soon · ~a~1 soon, in a second · a@5 add in 5 seconds · ? take · -a done
    !a retry · ok:a forget · t3 three seconds pass · took:a:0.2 the decision took 0.2 seconds
    a%5 check in 5 seconds · needs:a the check will find that a look is needed
    """
    clock = Clock()
    needed = set[Key]()
    queue = Queue(clock, backoff, jitter=lambda: 1.0, is_needed=needed.__contains__)
    taken = []
    for step in steps.split():
        if step == "?":
            found = queue.take()
            taken.append(found.name if found else "·")
        elif step.startswith("took:"):
            _, name, seconds = step.split(":")
            queue.took(key(name), float(seconds))
        elif step.startswith("needs:"):
            needed.add(key(step[6:]))
        elif step.startswith("t"):
            clock.now += float(step[1:])
        elif step.startswith("ok:"):
            queue.forget(key(step[3:]))
        elif step[0] == "^":
            queue.add(key(step[1:]), first=True)
        elif step[0] == "~" and step.count("~") == 2:
            _, name, seconds = step.split("~")
            queue.soon(key(name), float(seconds))
        elif step[0] in "+~-!":
            {"+": queue.add, "~": queue.soon, "-": queue.done, "!": queue.retry}[step[0]](key(step[1:]))
        else:
            name, seconds = step.replace("%", "@").split("@")
            queue.add_after(key(name), float(seconds), check="%" in step)
    return " ".join(taken)


@dataclass(frozen=True)
class Case:
    name: str
    steps: str
    expect: str


CASES = [
    Case(
        name="events of a job settle in proportion to the last decision about it",
        steps="took:a:0.2 ~a ~b t1 ? ? t1 ?",
        expect="b · a",
    ),
    Case(
        name="but not for long",
        steps="took:a:60 ~a t5 ?",
        expect="a",
    ),
    Case(
        name="a change that is only told to people settles for longer, with those that follow",
        steps="~a~1 t0.9 ~a~1 ? t0.1 ?",
        expect="· a",
    ),
    Case(
        name="but not where something is to be done",
        steps="~a~1 ~a t0.11 ? -a t5 ?",
        expect="a ·",
    ),
    Case(
        name="an edit does not wait for that",
        steps="took:a:0.2 ~a +a ?",
        expect="a",
    ),
    Case(
        name="a job that has become small settles like the others",
        steps="took:a:0.2 took:a:0.001 ~a t0.5 ?",
        expect="a",
    ),
    Case(
        name="nothing",
        steps="?",
        expect="·",
    ),
    Case(
        name="in the order of their coming",
        steps="+a +b ? ?",
        expect="a b",
    ),
    Case(
        name="a key that waits is not added again",
        steps="+a +a +b ? ? ?",
        expect="a b ·",
    ),
    Case(
        name="an edit goes before all others",
        steps="+a +b ^c ? ? ?",
        expect="c a b",
    ),
    Case(
        name="an edit of a key that waits moves it to the front",
        steps="+a +b ^b ? ? ?",
        expect="b a ·",
    ),
    Case(
        name="an edit while the key is worked on goes before all others",
        steps="+a ? +b ^a -a ? ?",
        expect="a a b",
    ),
    Case(
        name="one worker a key",
        steps="+a ? +a ?",
        expect="a ·",
    ),
    Case(
        name="what came in meanwhile is worked on after",
        steps="+a ? +a -a ?",
        expect="a a",
    ),
    Case(
        name="many that came in meanwhile are one",
        steps="+a ? +a +a -a ? -a ?",
        expect="a a ·",
    ),
    Case(
        name="done and nothing new",
        steps="+a ? -a ?",
        expect="a ·",
    ),
    Case(
        name="later is not now",
        steps="a@5 ? t4 ?",
        expect="· ·",
    ),
    Case(
        name="later comes",
        steps="a@5 t5 ?",
        expect="a",
    ),
    Case(
        name="what comes with it is one look",
        steps="~a ? t0.05 ~a ~a t0.06 ? -a t1 ?",
        expect="· a ·",
    ),
    Case(
        name="events of many jobs are given more time",
        steps="~a ~b ~c t0.1 ? t0.003 ? t0.002 ?",
        expect="a b c",
    ),
    Case(
        name="a look replaces those that were planned",
        steps="~a a@5 +a ? -a t9 ?",
        expect="a ·",
    ),
    Case(
        name="nobody waits because others keep coming",
        steps="~a t0.06 ~a t0.06 ?",
        expect="a",
    ),
    Case(
        name="what came soon while it was worked on",
        steps="+a ? ~a ? -a ? t0.1 ?",
        expect="a · · a",
    ),
    Case(
        name="the earliest of two wishes counts",
        steps="a@5 a@3 t3 ? -a t2 ?",
        expect="a ·",
    ),
    Case(
        name="a later wish does not put off",
        steps="a@3 a@5 t3 ?",
        expect="a",
    ),
    Case(
        name="in no seconds is now",
        steps="a@0 ?",
        expect="a",
    ),
    Case(
        name="a wish does not hold an add up",
        steps="a@60 +a ?",
        expect="a",
    ),
    Case(
        name="a check that is not needed by then",
        steps="a%5 t9 ? +b ? -b t9 ?",
        expect="· b ·",
    ),
    Case(
        name="a check that is needed by then",
        steps="a%5 needs:a t4 ? t1 ?",
        expect="· a",
    ),
    Case(
        name="a check takes nothing from what is planned anyway",
        steps="a%3 a@5 t4 ? t1 ?",
        expect="· a",
    ),
    Case(
        name="nor does that take anything from a check",
        steps="a@5 a%3 needs:a t3 ? -a t9 ?",
        expect="a ·",
    ),
    Case(
        name="a look replaces a check",
        steps="a%3 needs:a +a ? -a t9 ?",
        expect="a ·",
    ),
    Case(
        name="a check that is planned by a look",
        steps="+a ? a%3 needs:a -a t3 ?",
        expect="a a",
    ),
    Case(
        name="a check comes while the key is worked on",
        steps="+a ? a%3 t3 ? -a ?",
        expect="a · a",
    ),
    Case(
        name="a wish while at work is kept",
        steps="+a ? a@2 t2 ? -a ?",
        expect="a · a",
    ),
    Case(
        name="after an error: one second",
        steps="+a ? !a -a ? t1 ?",
        expect="a · a",
    ),
    Case(
        name="after two: two more",
        steps="+a ? !a -a t1 ? !a -a t1 ? t1 ?",
        expect="a a · a",
    ),
    Case(
        name="after success the first delay again",
        steps="+a ? !a -a t1 ? !a -a t2 ? ok:a !a -a t1 ?",
        expect="a a a a",
    ),
    Case(
        name="an event does not wait for the back-off",
        steps="+a ? !a -a +a ?",
        expect="a a",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_queue(case: Case) -> None:
    assert play(case.steps) == case.expect


async def test_backoff_has_a_limit() -> None:
    queue = Queue(Clock(), 1.0, jitter=lambda: 1.0)
    assert [queue.retry(key("a")) for _ in range(40)][-1] == BACKOFF_LIMIT


async def test_keys_that_fail_together_do_not_come_back_together() -> None:
    queue = Queue(Clock(), 1.0)
    delays = {queue.retry(key(str(n))) for n in range(100)}
    assert len(delays) > 50
    assert 0.5 <= min(delays) <= max(delays) <= 1.0, "never later than the back-off says"


async def test_no_more_workers_than_asked_and_none_of_the_keys_lost() -> None:
    queue, at_work, most, seen = Queue(), 0, 0, []

    async def work(found: Key) -> None:
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        await asyncio.sleep(0.001)
        seen.append(found.name)
        at_work -= 1

    serving = asyncio.create_task(queue.serve(work, 3))
    for number in range(20):
        queue.add(key(str(number)))
    queue.add_after(key("late"), 0.02)
    async with asyncio.timeout(5):
        while len(seen) < 21:
            await asyncio.sleep(0.001)
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    assert (most, len(set(seen)), seen[-1]) == (3, 21, "late")


async def test_work_under_way_is_finished_when_the_operator_stops() -> None:
    queue, ended = Queue(), asyncio.Event()
    began = asyncio.Event()

    async def work(_: Key) -> None:
        began.set()
        await asyncio.sleep(0.02)
        ended.set()

    serving = asyncio.create_task(queue.serve(work, 1))
    queue.add(key("a"))
    await began.wait()
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    assert ended.is_set()


async def test_work_that_never_ends_does_not_hold_the_stop_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier_operator.queue.STOP_SECONDS", 0.05)
    queue, began, cut = Queue(), asyncio.Event(), asyncio.Event()

    async def work(_: Key) -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            cut.set()

    serving = asyncio.create_task(queue.serve(work, 1))
    queue.add(key("a"))
    await began.wait()
    serving.cancel()
    await asyncio.wait([serving], timeout=5)
    assert serving.done()
    await asyncio.wait_for(cut.wait(), 5)
