"""Names, labels and annotations of the children of a job, and the place of its folder.

All of them follow from the job alone, so nothing has to be stored or looked up.
"""

from __future__ import annotations

from dataclasses import dataclass

from luthier_api.kinds import KINDS, JobKind
from luthier_api.status import PHASES, Phase, WorkspaceStatus
from luthier_operator.model import Job

KIND_LABEL = "luthier.dev/kind"
JOB_LABEL = "luthier.dev/job"
PHASE_LABEL = "luthier.dev/phase"
UID_LABEL = "luthier.dev/job-uid"
MANAGED_BY = {"app.kubernetes.io/managed-by": "luthier"}

HUB_ANNOTATION = "luthier.dev/hub-hash"
TARGET_ANNOTATION = "luthier.dev/hub-target"
"""On the publish Job: repository and branch to which it uploads."""
SOURCES_ANNOTATION = "luthier.dev/sources"
"""On the prepare Job: where the jobs whose results it uses keep their work. They may be deleted before `run` begins.
Copied into `status.sources`, because the Job is deleted some time after the end of its job.
"""
BEFORE_ANNOTATION = "luthier.dev/restarts-before"
"""On the child of `run`: restarts, and those charged, of the children before it. A suspended job gets another child
when it resumes.
"""

RESUMES_ANNOTATION = "luthier.dev/resumes"
"""On a child: `status.resumes` when it was made. One with a lower number is in the way of the next."""

INDEX_ANNOTATION = "batch.kubernetes.io/job-completion-index"
INDEX_FAILURES_ANNOTATION = "batch.kubernetes.io/job-index-failure-count"
INDEX_IGNORED_ANNOTATION = "batch.kubernetes.io/job-index-ignored-failure-count"
"""On a pod: failures of its index before it, those that were counted and those that were ignored."""
RESTART_LABEL = "jobset.sigs.k8s.io/restart-attempt"
CHILD_LABELS = ("jobset.sigs.k8s.io/jobset-uid", "batch.kubernetes.io/controller-uid")
"""On a pod: uid of its JobSet, or else of its Job."""
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"

CONTAINER = "trainer"
NODE = "node"
"""The one replicated job of a JobSet."""
WORKSPACE = "/workspace"
SOURCES = "/sources"
CONFIG = "/etc/luthier"
RUN_FILE = "run.json"
UNKNOWN_UID = "00000000-0000-0000-0000-000000000000"
"""Replaces the uid of a job that exists in no cluster (`luthier render`)."""


@dataclass(frozen=True)
class Place:
    """Where a job keeps its work: a claim in its namespace, and a folder on it."""

    claim: str
    folder: str


def kind(job: Job) -> JobKind:
    return JobKind(job.kind)


def uid(job: Job) -> str:
    return job.metadata.uid or UNKNOWN_UID


def stem(kind: JobKind, name: str) -> str:
    """The common beginning of the names of all children of a job."""
    return f"{KINDS[kind].short}-{name}"


def config_name(job: Job) -> str:
    return stem(kind(job), job.metadata.name)


def child_name(job: Job, phase: Phase) -> str:
    """Name of the Job or JobSet that does the work of `phase`."""
    return f"{config_name(job)}-{phase}"


def job_names(kind: JobKind, name: str) -> set[str]:
    """Names of the Jobs whose pods do the work of a job: JobSet names its Jobs after itself."""
    begin = stem(kind, name)
    return {*(f"{begin}-{phase}" for phase in PHASES), f"{begin}-run-{NODE}-0"}


def job_of_child(name: str, phase: Phase) -> tuple[JobKind, str] | None:
    """Kind and name of the job whose child of `phase` would have this name. None for other names."""
    for kind, info in KINDS.items():
        begin, end = f"{info.short}-", f"-{phase}"
        job = name.removeprefix(begin).removesuffix(end)
        if job and name == f"{begin}{job}{end}":
            return kind, job
    return None


def restarts_before(restarts: int, charged: int) -> dict[str, str]:
    """Annotation of the child of `run`: restarts of the children before it, and those of them that were charged."""
    return {BEFORE_ANNOTATION: f"{restarts},{charged}"} if restarts else {}


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
