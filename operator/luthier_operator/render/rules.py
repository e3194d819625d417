"""What a pod's exit code costs, as the failure rules of Job and JobSet: rendered from the enum, so that code and
cluster agree.

The Job controller sees the exit code, JobSet only the Job's message. Measured on a cluster: exit 64 ends the JobSet
with no restart, 75 restarts it at nobody's charge, 70 is charged.
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
    """RE2 over the Job's message. The blank at the end keeps 7 from matching 75."""
    codes = "|".join(map(str, ExitCode.codes(retry)))
    return f"failed with exit code {f'({codes})' if '|' in codes else codes} "


def member() -> Object:
    """For the Job within a JobSet: any failure ends the Job, and its message tells JobSet which kind it was.

    Mistakes come first: a pod that was preempted after its mistake must not come back.
    """
    return {
        "rules": [
            _on_exit("FailJob", Retry.NEVER),
            {"action": "FailJob", "onPodConditions": DISRUPTED},
            _on_exit("FailJob", Retry.FREE),
        ]
    }


def group(max_restarts: int) -> Object:
    """JobSet's failurePolicy."""
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


def alone(on_mistake: str) -> Object:
    """For a Job of its own. `on_mistake`: FailJob, or FailIndex where indexes stand for themselves.

    Never FailJob on a free end: under Kueue an eviction would end the job for good.
    """
    return {
        "rules": [
            _on_exit(on_mistake, Retry.NEVER),
            {"action": "Ignore", "onPodConditions": DISRUPTED},
            _on_exit("Ignore", Retry.FREE),
        ]
    }
