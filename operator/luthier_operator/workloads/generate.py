"""A GenerateJob: shards, each of which writes its own part of the outputs and is restarted alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, ClassVar, Literal

from luthier_api.kinds import GenerateJob, JobKind, source_name
from luthier_api.metrics import generation_progress
from luthier_api.status import Attempt, JobStatus, Progress, finite
from luthier_api.tasks import GENERATION_TASKS
from luthier_operator import children, naming
from luthier_operator.failure.attempts import ATTEMPTS_KEPT, attempts_of_pods, no_progress_of_shards
from luthier_operator.model import Object, PodEnd
from luthier_operator.naming import Place
from luthier_operator.render.job import shards
from luthier_operator.workloads.base import Restarts, Samples, Workload

if TYPE_CHECKING:
    from luthier_operator.settings import Settings


@dataclass(frozen=True)
class Generate(Workload):
    job: GenerateJob

    kind: ClassVar = JobKind.GENERATE
    run_verb: ClassVar[str] = "generate"
    run_child_kind: ClassVar[Literal["Job", "JobSet"]] = "Job"
    pod_noun: ClassVar[str] = "shard"
    row_noun: ClassVar[str] = "outputs"
    gpus_field: ClassVar[str] = "spec.resources.gpus"
    pods_field: ClassVar[str] = "spec.parallelism"
    has_checkpoints: ClassVar[bool] = False

    @property
    def sources(self) -> dict[str, str]:
        found = super().sources
        for i, adapter in enumerate(self.job.spec.adapters):
            if adapter.job:
                found[f"spec.adapters[{i}].job"] = adapter.job
        if self.job.spec.inputs.job:
            found["spec.inputs.job"] = source_name(JobKind.GENERATE, self.job.spec.inputs.job)
        return found

    @property
    def pods(self) -> int:
        return self.job.spec.shards

    @property
    def parallel_pods(self) -> int:
        return min(self.pods, self.job.spec.parallelism or self.pods)

    @property
    def processes_per_pod(self) -> int:
        return 1

    @property
    def groups(self) -> list[list[int]]:
        return [[shard] for shard in range(self.pods)]

    def run_manifest(self, settings: Settings, sources: Mapping[str, Place], restarts: int, charged: int) -> Object:
        """An Indexed Job."""
        spec, before = self.job.spec, naming.restarts_before(restarts, charged)
        return shards(self, settings, sources, spec.retries_per_shard, spec.max_failed_shards, before)

    def restarts(self, child: Object, status: JobStatus, ends: Sequence[PodEnd], pods: Sequence[Object]) -> Restarts:
        """The sums over all shards. Each pod knows how often its index was started before, so the newest pod of each
        index is enough.
        """
        starts = {end.index: (end.attempt, end.uncharged_before) for end in sorted(ends, key=lambda end: end.attempt)}
        for pod in pods:
            shard = children.index(pod)
            starts[shard] = max(children.starts_before(pod), starts.get(shard, (0, 0)))
        before, charged_before = children.restarts_before(child)
        total = before + sum(started for started, _ in starts.values())
        charged = charged_before + sum(started - uncharged for started, uncharged in starts.values())
        # Pods that were deleted while no operator ran are missing here: what the status counted stays counted.
        return Restarts(
            attempts=attempts_of_pods(status.attempts, ends, "run"),
            total=max(total, status.restarts),
            charged=max(charged, status.restarts_charged),
        )

    def is_running(self, running: int, succeeded: int) -> bool:
        """Each shard works alone."""
        return running > 0 or succeeded >= self.pods

    def no_progress(self, attempts: Sequence[Attempt], ends: Sequence[PodEnd]) -> str | None:
        return no_progress_of_shards(ends)

    def describe_budget(self, child: Object, condition: Object) -> str:
        failed = child.get("status", {}).get("failedIndexes", "")
        several = re.search("[,-]", failed)
        ended = f". This ended {'shards' if several else 'shard'} {failed} of {self.pods} for good"
        kept = "what was generated stays in the workspace"
        if condition.get("reason") == "MaxFailedIndexesExceeded":
            limit = f"spec.maxFailedShards: {self.job.spec.max_failed_shards}"
            return f"{ended}, and {limit} stopped the others; {kept}"
        if condition.get("reason") == "FailedIndexes":
            return f"{ended}; the others are complete, and {kept}"
        return ""

    @staticmethod
    def restart_reasons(attempts: Sequence[Attempt], restarts: int) -> dict[int, str]:
        """Each shard numbers its own attempts, so the newest failures are taken for those before the last restarts."""
        return {restarts - 1 - age: attempt.reason for age, attempt in enumerate(reversed(attempts))}

    @staticmethod
    def cause_of_restart(attempts: Sequence[Attempt], restarts: int) -> Attempt | None:
        """The newest failure, unless there are more restarts than failures: then it has not been seen yet."""
        return attempts[-1] if attempts and len(attempts) >= min(restarts, ATTEMPTS_KEPT) else None

    @staticmethod
    def serves_progress(index: int) -> bool:
        return True

    def progress(self, samples: Samples, read_at: datetime | None) -> Progress | None:
        return generation_progress([samples[shard] for shard in sorted(samples)], read_at, self.outputs)

    @property
    def outputs(self) -> int | None:
        """Outputs of the whole job. None before `prepare` has counted the rows."""
        prepared = self.job.status.prepared
        return prepared.dataset.outputs if prepared else None

    def final_metrics(self, metrics: Samples) -> dict[str, float] | None:
        """The sums over all shards, and the scores of all outputs, which the last shard that has ended reports. None
        while a shard is missing.
        """
        if len(metrics) < self.pods:
            return None
        scores = {metric.name for metric in GENERATION_TASKS[self.job.spec.task].metrics}
        total: Counter[str] = Counter()
        last: dict[str, float] = {}
        for of_shard in metrics.values():
            total.update({name: value for name, value in of_shard.items() if name not in scores})
            last |= {name: value for name, value in of_shard.items() if name in scores}
        return finite({**total, **last})
