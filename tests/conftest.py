"""The cluster of the session, for the tests that need one; and a plain word at the end about those that were not run
without it.
"""

from __future__ import annotations

import os

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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """`make test` runs without a cluster: say what it left out."""
    if not any("e2e" in str(argument) or "cluster" in str(argument) for argument in config.args):
        terminalreporter.write_line(
            "Not run here, because they need a cluster: tests/cluster and tests/e2e (`make e2e`, about 20 minutes)."
        )
