"""Where a process is that hangs: read from what faulthandler writes, and from the kernel where it writes nothing."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from luthier_trainer.supervisor.stacks import innermost, state


def test_the_innermost_frame_is_that_of_the_main_thread(tmp_path: Path) -> None:
    """faulthandler writes every thread, and the main one last."""
    stop = threading.Event()

    def other_thread() -> None:
        stop.wait()

    threads = [threading.Thread(target=other_thread) for _ in range(3)]
    for thread in threads:
        thread.start()

    def all_reduce() -> None:
        with (tmp_path / "stacks").open("w") as file:
            faulthandler.dump_traceback(file)

    all_reduce()
    stop.set()
    for thread in threads:
        thread.join()
    assert innermost((tmp_path / "stacks").read_text()).startswith("all_reduce (test_stacks.py:")


def test_a_process_without_a_frame_of_python() -> None:
    assert innermost("Current thread 0x1 (most recent call first):\n  <no Python frame>\n") == "code outside Python"


@pytest.mark.parametrize(("number", "letter"), [(signal.SIGSTOP, "T"), (signal.SIGKILL, "Z")])
def test_the_kernel_says_why_a_process_does_not_react(number: signal.Signals, letter: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        os.kill(process.pid, number)
        until = time.monotonic() + 10
        while state(process.pid) != letter and time.monotonic() < until:
            time.sleep(0.02)
        assert state(process.pid) == letter
    finally:
        process.kill()
        process.wait()
    assert state(process.pid) == ""
