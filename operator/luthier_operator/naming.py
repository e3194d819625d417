"""Names and labels: which children a job has, what they are called, and where its folder lies.

All of them follow from the job alone, so nothing has to be remembered or looked up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from luthier_api.kinds import KINDS, FineTuneJob, JobKind
from luthier_api.status import Phase, WorkspaceStatus
from luthier_operator.model import ChildRef, Job

KIND_LABEL = "luthier.dev/kind"
JOB_LABEL = "luthier.dev/job"
PHASE_LABEL = "luthier.dev/phase"
UID_LABEL = "luthier.dev/job-uid"
MANAGED_BY = {"app.kubernetes.io/managed-by": "luthier"}

HUB_ANNOTATION = "luthier.dev/hub-hash"
TARGET_ANNOTATION = "luthier.dev/hub-target"
"""On the publish Job: which spec.hub it was made from."""
SOURCES_ANNOTATION = "luthier.dev/sources"
"""On the prepare Job: where the jobs that it names keep their work, because they may be deleted before our run begins.
"""
BEFORE_ANNOTATION = "luthier.dev/restarts-before"
"""On the child of `run`: restarts, and those charged, of the children before it (a suspended job gets another one when
it goes on).
"""

INDEX_ANNOTATION = "batch.kubernetes.io/job-completion-index"
INDEX_FAILURES_ANNOTATION = "batch.kubernetes.io/job-index-failure-count"
INDEX_IGNORED_ANNOTATION = "batch.kubernetes.io/job-index-ignored-failure-count"
"""On a pod: failures of its index before it, those that were counted and those that were free."""
RESTART_LABEL = "jobset.sigs.k8s.io/restart-attempt"
CHILD_LABELS = ("jobset.sigs.k8s.io/jobset-uid", "batch.kubernetes.io/controller-uid")
"""On a pod: uid of its JobSet, else of its Job."""
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"

CONTAINER = "trainer"
NODE = "node"
"""The one replicated job of a JobSet."""
WORKSPACE = "/workspace"
SOURCES = "/sources"
CONFIG = "/etc/luthier"
RUN_FILE = "run.json"
UNKNOWN_UID = "00000000-0000-0000-0000-000000000000"
"""Stands for the uid of a job that no API server has seen (`luthier render`)."""


@dataclass(frozen=True)
class Place:
    """Where a job keeps its work: a claim of its namespace, and its folder there."""

    claim: str
    folder: str


def kind(job: Job) -> JobKind:
    return JobKind(job.kind)


def uid(job: Job) -> str:
    return job.metadata.uid or UNKNOWN_UID


def stem(kind: JobKind, name: str) -> str:
    """What the names of all children of a job begin with."""
    return f"{KINDS[kind].short}-{name}"


def config_name(job: Job) -> str:
    return stem(kind(job), job.metadata.name)


def child(job: Job, phase: Phase) -> ChildRef:
    """The child that does the work of `phase`."""
    group = phase == "run" and kind(job) is JobKind.FINE_TUNE
    return ChildRef("JobSet" if group else "Job", f"{config_name(job)}-{phase}")


def place(job: Job) -> Place:
    """Claim and folder of a job's workspace."""
    return Place(job.spec.workspace.claim_name or config_name(job), f"{config_name(job)}-{uid(job)[:8]}")


def workspace_status(job: Job) -> WorkspaceStatus:
    where = place(job)
    return WorkspaceStatus(claim_name=where.claim, folder=where.folder)


def labels(job: Job, phase: Phase | None = None) -> dict[str, str]:
    """Labels of a child and of its pods."""
    own = {KIND_LABEL: job.kind, JOB_LABEL: job.metadata.name, UID_LABEL: uid(job)}
    return MANAGED_BY | own | ({PHASE_LABEL: phase} if phase else {})


def rendezvous_host(job: Job) -> str:
    """Host name of rank 0 (FineTuneJob): JobSet's name is also that of its headless service."""
    group = child(job, "run").name
    return f"{group}-{NODE}-0-0.{group}" if kind(job) is JobKind.FINE_TUNE else "127.0.0.1"


def needed_jobs(job: Job, find: Callable[[str], FineTuneJob | None]) -> dict[str, FineTuneJob | None]:
    """Name → FineTuneJob of each workspace that `job` reads: of the jobs that it names and, where a result is an
    adapter, of the model below.

    A model below that was an adapter itself was merged into the workspace of the job that went on from it.
    """
    found = {name: find(name) for name in source_jobs(job).values()}
    adapters = [source for source in found.values() if source and source.spec.method.type != "full"]
    below = {name: find(name) for adapter in adapters for name in source_jobs(adapter).values()}
    return {name: base for name, base in below.items() if base and base.spec.method.type == "full"} | found


def source_jobs(job: Job) -> dict[str, str]:
    """Field of the spec → name of the FineTuneJob that it names."""
    found = {"spec.model.job": job.spec.model.job} | {
        f"spec.adapters[{i}].job": adapter.job for i, adapter in enumerate(getattr(job.spec, "adapters", []))
    }
    return {field: name for field, name in found.items() if name}
