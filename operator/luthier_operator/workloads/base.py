"""What a kind of job answers about itself: its pods, its commands, its sources, its restarts, its progress.

Phases, builders of manifests and the command line ask a `Workload`. None of them asks which kind a job is, so that a
new kind is one file here and one row in `workloads.WORKLOADS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from luthier_api.conditions import ConditionType
from luthier_api.decides import run_part
from luthier_api.exitcodes import ExitCode, Retry
from luthier_api.kinds import KINDS, JobKind
from luthier_api.status import Attempt, JobStatus, Phase, Progress
from luthier_operator import naming
from luthier_operator.failure.cause import Failure
from luthier_operator.model import ChildRef, Job, Object, PodEnd
from luthier_operator.naming import Place

if TYPE_CHECKING:
    from luthier_operator.settings import Settings

LOOPBACK = "127.0.0.1"

Samples = Mapping[int, dict[str, float]]
"""Node rank or shard → name of a metric → value."""


@dataclass(frozen=True)
class Restarts:
    """Failures and restarts of the run so far."""

    attempts: Sequence[Attempt]
    total: int
    charged: int
    """Those that count against the job's budget of restarts."""


class Workload(Protocol):
    """One job, seen as the work of its kind."""

    job: Job

    kind: ClassVar[JobKind]
    run_verb: ClassVar[str]
    """Verb of the trainer image in the pods of `run`."""
    run_child_kind: ClassVar[Literal["Job", "JobSet"]]
    pod_noun: ClassVar[str]
    row_noun: ClassVar[str]
    """What `prepare` counts."""
    gpus_field: ClassVar[str]
    """Field of the spec with the GPUs of each pod."""
    pods_field: ClassVar[str]
    """Field of the spec with the pods that work at once."""
    has_checkpoints: ClassVar[bool]

    def __init__(self, job: Any) -> None: ...

    # What it is

    @property
    def done(self) -> ConditionType:
        """The condition that is True once `run` has succeeded."""
        return KINDS[self.kind].done

    def verb(self, phase: Phase) -> str:
        """Verb of the trainer image in the pods of `phase`."""
        return self.run_verb if phase == "run" else phase

    def child(self, phase: Phase) -> ChildRef:
        """The Job or JobSet that does the work of `phase`."""
        return ChildRef(self.run_child_kind if phase == "run" else "Job", naming.child_name(self.job, phase))

    def find_mistake(self) -> str | None:
        """A mistake in the object that CEL rules of an older CRD may have let pass. None where there is none."""
        return None

    @property
    def sources(self) -> dict[str, str]:
        """Field of the spec → the job whose result it uses, as `kinds.source_name` calls it."""
        name = self.job.spec.model.job
        return {"spec.model.job": name} if name else {}

    @property
    def run_spec(self) -> Any:
        """The spec as the pods read it."""
        return run_part(self.job.spec)

    # Pods of `run`

    @property
    def pods(self) -> int: ...

    @property
    def parallel_pods(self) -> int:
        """Pods that work at once."""
        return self.pods

    @property
    def gpus_per_pod(self) -> int:
        return self.job.spec.resources.gpus_per_pod

    @property
    def processes_per_pod(self) -> int: ...

    @property
    def groups(self) -> list[list[int]]:
        """Pods by index, as one machine runs them: those of a group at once, the groups one after another."""
        ...

    @property
    def rendezvous_host(self) -> str:
        """Host name of rank 0, where several pods work together."""
        return LOOPBACK

    @property
    def gpus_at_once(self) -> int:
        """GPUs that one machine needs to run the job."""
        return len(self.groups[0]) * self.gpus_per_pod

    @property
    def shape(self) -> str:
        """Pods times the GPUs of each: `2×8`, `1×CPU`."""
        return f"{self.pods}×{self.gpus_per_pod or 'CPU'}"

    def describe_pods(self) -> str:
        """`2 pods on 16 GPUs`, `100 shards, 8 at once, on 8 GPUs of class a100`."""
        gpus = self.parallel_pods * self.gpus_per_pod
        hardware = plural(gpus, "GPU") if gpus else "CPU"
        if gpus and (name := self.job.spec.resources.gpu_class):
            hardware += f" of class {name}"
        pods = plural(self.pods, self.pod_noun)
        if self.parallel_pods < self.pods:
            pods += f", {self.parallel_pods} at once,"
        return f"{pods} on {hardware}"

    def describe_processes(self) -> dict[str, object]:
        """What `luthier plan --quick` shows besides the pods."""
        return {}

    def run_manifest(self, settings: Settings, sources: Mapping[str, Place], restarts: int, charged: int) -> Object:
        """The child of `run`. `restarts`, `charged`: those of the children before it, when a suspended job resumes."""
        ...

    # Restarts of `run`

    def restarts(self, child: Object, status: JobStatus, ends: Sequence[PodEnd], pods: Sequence[Object]) -> Restarts:
        """Failures and restarts up to now, as `status` has them and as the child of `run` and its pods show them."""
        ...

    def restarts_before(self, status: JobStatus) -> int:
        """The number of restarts before a child of `run` that is made now. Its attempts are numbered from there."""
        return status.restarts

    def current_restart(self, child: Object) -> int | None:
        """The restart of the group whose pods are to run now. None where pods are restarted one by one."""
        return None

    def is_running(self, running: int, succeeded: int) -> bool:
        """Whether the condition Running is True with so many pods running and so many succeeded."""
        ...

    def no_progress(self, attempts: Sequence[Attempt], ends: Sequence[PodEnd]) -> str | None:
        """The message about restarts that make no progress, else None."""
        ...

    def repeated_failure(self, attempts: Sequence[Attempt]) -> Failure | None:
        """The last failure, where the cluster is about to start the pods again although they would fail again."""
        return None

    def is_final(self, attempt: Attempt, status: JobStatus) -> bool:
        """Whether the cluster is about to end the run, or the shard, after this failure instead of restarting it."""
        return attempt.exit_code in ExitCode.codes(Retry.NEVER)

    def smaller_micro_batch(self, status: JobStatus) -> int | None:
        """Rows of a forward pass with which the run starts again after CUDA has run out of memory. None if it fails."""
        return None

    def describe_budget(self, child: Object, condition: Object) -> str:
        """What to add to the message of a failure: which budget it used up. `condition`: Failed, of `child`."""
        ...

    @staticmethod
    def restart_reasons(attempts: Sequence[Attempt], restarts: int) -> dict[int, str]:
        """Number of a restart of `run`, from 0 → reason of the failure before it, as far as `attempts` know."""
        ...

    @staticmethod
    def cause_of_restart(attempts: Sequence[Attempt], restarts: int) -> Attempt | None:
        """The failure before the last restart of `run`. None while it is not among `attempts`, those of `run`."""
        ...

    # Progress and results of `run`

    @staticmethod
    def serves_progress(index: int) -> bool:
        """Whether progress is read from the pod of this node rank or shard."""
        ...

    def progress(self, samples: Samples, read_at: datetime | None) -> Progress | None:
        """Progress of the whole job from the metrics of its pods. None when they report nothing yet."""
        ...

    def final_metrics(self, metrics: Samples) -> dict[str, float] | None:
        """Metrics of the result from those of its pods. None until all that count have reported."""
        ...


def plural(count: int, noun: str) -> str:
    """`1 pod`, `2 pods`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
