"""Accept: what the CRD's own rules cannot see. Is there what the job names, and does the cluster have what it needs?

Looked at until `prepare` has begun: from then on the job stands on what it found.
"""

from __future__ import annotations

from luthier_api.conditions import ConditionType, Reason
from luthier_api.exitcodes import ExitCode
from luthier_api.status import State
from luthier_operator.phases.step import Situation, Step
from luthier_operator.render.configmap import LIMIT_BYTES, configmap
from luthier_operator.versions import INSTALL_JOBSET

LOOK_AGAIN_SECONDS = 30

ACCEPTED = ConditionType.ACCEPTED
CAN_RUN = "The job can run"


def accept(s: Situation) -> Step:
    if s.child("prepare") or s.status.is_true(ConditionType.PREPARED):
        # Begun, and yet not said: the status was not written then.
        return (
            s.goes_on() if s.status.is_true(ACCEPTED) else s.say(ACCEPTED, "True", Reason.ACCEPTED, CAN_RUN).goes_on()
        )
    if mistake := invalid(s):
        return s.say(ACCEPTED, "False", Reason.INVALID_SPEC, mistake).fails(ExitCode.INVALID_SPEC.reason, mistake)
    if wait := for_jobset(s, ACCEPTED):
        return wait
    for field, name in s.workload.sources.items():
        source = s.observed.sources.get(name)
        if source and (source.status.is_true(ConditionType.TRAINED) or source.status.is_true(ConditionType.COMPLETE)):
            continue
        if source and source.status.is_true(ConditionType.FAILED):
            failed = (
                f'{field}: FineTuneJob "{name}" has failed, so there is no result to start from. Create this job again'
                " once it has succeeded"
            )
            return s.say(ACCEPTED, "False", Reason.SOURCE_FAILED, failed).fails(Reason.SOURCE_FAILED, failed)
        state = (
            f'FineTuneJob "{name}" is {source.status.state or State.PENDING}'
            if source
            else f'there is no FineTuneJob "{name}" in this namespace'
        )
        waiting = f"{field}: {state}; waiting for its result"
        return s.say(ACCEPTED, "False", Reason.WAITING_FOR_JOB, waiting).stops(requeue_after=LOOK_AGAIN_SECONDS)
    return s.say(ACCEPTED, "True", Reason.ACCEPTED, CAN_RUN + remarks(s)).goes_on()


def for_jobset(s: Situation, condition: ConditionType) -> Step | None:
    """Waits until JobSet is installed. None where it is, or is not needed."""
    if s.observed.jobset_installed or s.workload.run_child_kind != "JobSet":
        return None
    missing = f"FineTuneJobs need JobSet, which this cluster does not have. Install it: {INSTALL_JOBSET}"
    return s.say(condition, "False", Reason.JOB_SET_MISSING, missing).stops(requeue_after=LOOK_AGAIN_SECONDS)


def invalid(s: Situation) -> str | None:
    """A mistake that can never come right."""
    if mistake := s.workload.find_mistake():
        return mistake
    size = len(next(iter(configmap(s.workload, s.settings, s.places())["data"].values())).encode())
    if size > LIMIT_BYTES:
        return (
            f"spec: {size} bytes as a run config, more than the {LIMIT_BYTES} that a ConfigMap holds; put the rows into"
            " a file (spec.inputs.dataset.files)"
        )
    return None


def remarks(s: Situation) -> str:
    queue = s.job.spec.scheduling.queue_name
    return (
        f'. spec.scheduling.queueName: "{queue}" is not asked, because the job holds no GPUs'
        if queue and not s.workload.gpus_per_pod
        else ""
    )
