"""A FineTuneJob: the nodes of one group, which start together and restart together from the newest checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, ClassVar, Literal

from luthier_api.decides import run_part
from luthier_api.finetune import FineTuneJobSpec
from luthier_api.kinds import FineTuneJob, JobKind
from luthier_api.metrics import training_progress
from luthier_api.status import Attempt, JobStatus, Progress
from luthier_operator import children, naming
from luthier_operator.failure.attempts import attempts_of_group, no_progress_of_group
from luthier_operator.failure.cause import Failure, repeated_out_of_memory
from luthier_operator.model import Object, PodEnd
from luthier_operator.naming import Place
from luthier_operator.render.jobset import jobset
from luthier_operator.workloads.base import Restarts, Samples, Workload

if TYPE_CHECKING:
    from luthier_operator.settings import Settings

POD_SUFFIX = "-node-0-{index}-abcde"  # JobSet refuses names whose pods would exceed a DNS label
DNS_LABEL_CHARACTERS = 63
RANK_0 = 0


@dataclass(frozen=True)
class FineTune(Workload):
    job: FineTuneJob

    kind: ClassVar = JobKind.FINE_TUNE
    run_verb: ClassVar[str] = "train"
    run_child_kind: ClassVar[Literal["Job", "JobSet"]] = "JobSet"
    pod_noun: ClassVar[str] = "pod"
    row_noun: ClassVar[str] = "rows"
    gpus_field: ClassVar[str] = "spec.resources.gpusPerNode"
    pods_field: ClassVar[str] = "spec.resources.nodes"
    has_checkpoints: ClassVar[bool] = True

    def find_mistake(self) -> str | None:
        name = self.job.metadata.name
        for field, source in self.sources.items():
            if source == name:
                return f"{field}: {name} is this job itself; name the job whose result it starts from"
        longest = self.child("run").name + POD_SUFFIX.format(index=self.pods - 1)
        excess = len(longest) - DNS_LABEL_CHARACTERS
        if excess > 0:
            return (
                f"metadata.name: with spec.resources.nodes: {self.pods}, at most {len(name) - excess} characters, so"
                " that the names of pods fit; choose a shorter one"
            )
        return None

    @property
    def sources(self) -> dict[str, str]:
        found = super().sources
        for i, reward in enumerate(self.job.spec.grpo.rewards if self.job.spec.grpo else []):
            if reward.model and reward.model.job:
                found[f"spec.grpo.rewards[{i}].model.job"] = reward.model.job
        return found

    @property
    def run_spec(self) -> FineTuneJobSpec:
        """With the micro-batch that was reduced after CUDA had run out of memory."""
        spec, rows = run_part(self.job.spec), self.job.status.reduced_micro_batch_size
        if rows is None:
            return spec
        return spec.model_copy(update={"training": spec.training.model_copy(update={"micro_batch_size": rows})})

    @property
    def pods(self) -> int:
        return self.job.spec.resources.nodes

    @property
    def processes_per_pod(self) -> int:
        return self.job.spec.resources.processes

    @property
    def groups(self) -> list[list[int]]:
        return [list(range(self.pods))]

    @property
    def rendezvous_host(self) -> str:
        """The name of a JobSet is also that of its headless service."""
        group = self.child("run").name
        return f"{group}-{naming.NODE}-0-{RANK_0}.{group}"

    def describe_processes(self) -> dict[str, object]:
        resources = self.job.spec.resources
        return {
            "processes": resources.world_size,
            "gpus": self.pods * self.gpus_per_pod,
            "strategy": self.job.spec.strategy,
        }

    def run_manifest(self, settings: Settings, sources: Mapping[str, Place], restarts: int, charged: int) -> Object:
        """A JobSet. What earlier JobSets were charged stays charged."""
        max_restarts = max(0, self.job.spec.restarts.max - charged)
        before = naming.restarts_before(restarts, charged)
        return jobset(self, settings, sources, max_restarts, before)

    def restarts(self, child: Object, status: JobStatus, ends: Sequence[PodEnd], pods: Sequence[Object]) -> Restarts:
        """The JobSet counts its restarts itself."""
        before, _ = children.restarts_before(child)
        total, charged = children.restarts(child)
        failed = children.failed(child)
        fatal = failed is not None and failed.get("reason") == "FailJobSetFailurePolicyAction"
        step = status.checkpoint.step if status.checkpoint else None
        attempts = attempts_of_group(status.attempts, ends, before, step, fatal)
        if total == status.restarts + 1:
            # Whether the restart was charged was estimated from the exit code. JobSet has decided it now.
            was_charged = charged > status.restarts_charged
            attempts = [with_charge(attempt, status.restarts, was_charged) for attempt in attempts]
        return Restarts(attempts, total, charged)

    def restarts_before(self, status: JobStatus) -> int:
        """The attempt that ended the JobSet before has a number that must not be used again."""
        used = [attempt.attempt for attempt in status.attempts if attempt.phase == "run"]
        return max([status.restarts, *(number + 1 for number in used)])

    def current_restart(self, child: Object) -> int | None:
        restarts: int = child.get("status", {}).get("restarts", 0)
        return restarts

    def is_running(self, running: int, succeeded: int) -> bool:
        """The nodes of a group work together or not at all."""
        return running + succeeded >= self.pods

    def no_progress(self, attempts: Sequence[Attempt], ends: Sequence[PodEnd]) -> str | None:
        return no_progress_of_group(attempts)

    def repeated_failure(self, attempts: Sequence[Attempt]) -> Failure | None:
        return repeated_out_of_memory(attempts)

    def is_final(self, attempt: Attempt, status: JobStatus) -> bool:
        """Also the failure that uses up the budget."""
        if attempt.attempt != status.restarts:  # the group was restarted since
            return False
        used_up = attempt.charged and status.restarts_charged >= self.job.spec.restarts.max
        return used_up or super().is_final(attempt, status)

    def smaller_micro_batch(self, status: JobStatus) -> int | None:
        """Half of the rows, or the next smaller number that divides a process's share of a step; once in a plan.

        Where a layer normalises over these rows (BatchNorm), or the loss compares them, fewer would change the result.
        """
        plan = status.prepared.plan if status.prepared else None
        if plan is None or not plan.micro_batch_size or status.reduced_micro_batch_size:
            return None
        if plan.normalizes_over_batch or self.job.spec.compares_rows:
            return None
        share = plan.micro_batch_size * (plan.accumulation_steps or 1)
        return next((rows for rows in range(plan.micro_batch_size // 2, 0, -1) if share % rows == 0), None)

    def describe_budget(self, child: Object, condition: Object) -> str:
        if condition.get("reason") != "ReachedMaxRestarts":
            return ""
        return f". That was the last of {self.job.spec.restarts.max} restarts (spec.restarts.max)"

    @staticmethod
    def restart_reasons(attempts: Sequence[Attempt], restarts: int) -> dict[int, str]:
        """A group numbers its attempts."""
        return {attempt.attempt: attempt.reason for attempt in attempts}

    @staticmethod
    def cause_of_restart(attempts: Sequence[Attempt], restarts: int) -> Attempt | None:
        return next((attempt for attempt in attempts if attempt.attempt == restarts - 1), None)

    @staticmethod
    def serves_progress(index: int) -> bool:
        return index == RANK_0

    def progress(self, samples: Samples, read_at: datetime | None) -> Progress | None:
        return training_progress([samples[rank] for rank in sorted(samples)], read_at)

    def final_metrics(self, metrics: Samples) -> dict[str, float] | None:
        """Those of rank 0: they are over all ranks already."""
        return metrics.get(RANK_0)


def with_charge(attempt: Attempt, number: int, charged: bool) -> Attempt:
    """`attempt` with `charged`, if it is the one of `run` with this number."""
    if (attempt.phase, attempt.attempt) != ("run", number):
        return attempt
    return attempt.model_copy(update={"charged": charged})
