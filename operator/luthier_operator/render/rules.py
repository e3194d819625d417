"""The failure rules of Jobs and JobSets, rendered from the exit codes, so that the code and the cluster agree.

The Job controller sees the exit code, JobSet only the message of the Job. Measured on a cluster: 64 ends the JobSet
without a restart, 75 restarts it and is not charged, 70 restarts it and is charged.
"""

from __future__ import annotations

from luthier_api.exitcodes import ExitCode, Retry
from luthier_operator.model import Object
from luthier_operator.naming import CONTAINER

DISRUPTED = [{"type": "DisruptionTarget", "status": "True"}]


def _on_exit(action: str, retry: Retry) -> Object:
    return {
        "action": action,
        "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": ExitCode.codes(retry)},
    }


def _pattern(retry: Retry) -> str:
    """A pattern (RE2) for the message of a Job. The blank at the end keeps 7 from matching 75."""
    codes = "|".join(map(str, ExitCode.codes(retry)))
    if "|" in codes:
        codes = f"({codes})"
    return f"failed with exit code {codes} "


def member() -> Object:
    """Rules of the Job in a JobSet: any failure ends the Job, and its message tells JobSet the class of the failure.

    Fatal exit codes come first: a pod that was also preempted must not be restarted.
    """
    return {
        "rules": [
            _on_exit("FailJob", Retry.NEVER),
            {"action": "FailJob", "onPodConditions": DISRUPTED},
            _on_exit("FailJob", Retry.FREE),
        ]
    }


def group(max_restarts: int) -> Object:
    """The failurePolicy of a JobSet."""
    return {
        "maxRestarts": max_restarts,
        "restartStrategy": "BlockingRecreate",
        "rules": [
            {
                "name": "userError",
                "action": "FailJobSet",
                "onJobFailureReasons": ["PodFailurePolicy"],
                "onJobFailureMessagePatterns": [_pattern(Retry.NEVER)],
            },
            {
                "name": "disrupted",
                "action": "RestartJobSetAndIgnoreMaxRestarts",
                "onJobFailureReasons": ["PodFailurePolicy"],
                "onJobFailureMessagePatterns": ["has condition DisruptionTarget", _pattern(Retry.FREE)],
            },
        ],
    }


def alone(on_fatal: str) -> Object:
    """Rules of a Job without a JobSet. `on_fatal`: FailJob, or FailIndex where indexes are restarted independently.

    Never FailJob for an uncharged end: under Kueue an eviction would then fail the job permanently.
    """
    return {
        "rules": [
            _on_exit(on_fatal, Retry.NEVER),
            {"action": "Ignore", "onPodConditions": DISRUPTED},
            _on_exit("Ignore", Retry.FREE),
        ]
    }
