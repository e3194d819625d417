"""For all tests: the cluster of the session, where a test needs one; imported modules that the garbage collector leaves
alone; which files come first; and a plain word at the end about the tests that were not run without a cluster.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cluster() -> None:
    """A running cluster, started if need be: KUBECONFIG and PATH of this process point at it afterwards.

    Ends the session where the tests would delete what is somebody's.
    """
    from cluster import choice

    ours = choice.cluster()
    try:
        os.environ.update(ours.ensure())
        ours.check_free()
    except SystemExit as refused:
        pytest.exit(str(refused), returncode=1)


LONGEST = (
    "trainer/distributed/test_failing_rank.py",
    "trainer/supervisor/test_supervisor.py",
    "operator/test_faults.py",
    "trainer/training/test_train.py",
    "trainer/training/test_stream.py",
    "trainer/generation/test_reading.py",
    "trainer/generation/test_generate.py",
    "trainer/test_worker.py",
    "trainer/training/test_resume.py",
)
"""Files that take longest. Each is run by one worker of xdist, so they come first: what is short then fills the gaps,
and all workers end together.
"""


class GarbageCollection:
    """Keeps what was imported out of the garbage collector's sight.

    torch, transformers and diffusers leave more than a million objects, and a full collection looks at all of them:
    0.2 s and more, at the beginning of every training (`Accelerator.free_memory`) and now and then in between.
    """

    def __init__(self) -> None:
        self._modules = 0
        gc.disable()  # while test modules are imported: nearly all objects stay

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        """Before a test, if anything was imported since the last time, also by a test."""
        gc.enable()
        if len(sys.modules) == self._modules:
            return
        self._modules = len(sys.modules)
        gc.collect()  # what is frozen is never collected
        gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-cells", action="store_true", help="train all of docs/matrix.md, with each strategy")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(GarbageCollection())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bring the tests of LONGEST to the front, and leave the order of all others."""
    places = {Path(__file__).parent / file: place for place, file in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """`make test` runs no cluster and no slow test: say what it left out."""
    if not any("e2e" in str(argument) or "cluster" in str(argument) for argument in config.args):
        terminalreporter.write_line(
            "Not run here, because they need a cluster: tests/cluster and tests/e2e (`make e2e`, an hour)."
        )
    if config.option.markexpr == "not slow":
        terminalreporter.write_line(
            "Not run here, because they take minutes: the tests that are marked as slow (`pytest -m slow`; `make e2e`)."
        )
