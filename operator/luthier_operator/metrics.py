"""The metrics of the operator: those of controller-runtime, for which dashboards and alerts exist, and those of the
jobs.

The metrics are created, and the tables of the docs are written, from one table. The name of a job is never a label,
because the number of jobs has no limit.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from luthier_api.conditions import ConditionType
from luthier_api.kinds import JobKind
from luthier_api.metrics import Metric
from luthier_api.status import JobStatus
from luthier_operator.model import Key
from luthier_operator.workloads import WORKLOADS

# Without this, each series would have another one with its creation time.
disable_created_metrics()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class OperatorMetric(Metric):
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


# Seconds. Reconciles take milliseconds; while the API server does not answer, they take its timeouts.
SHORT = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 30)
# Seconds. Jobs take minutes to days.
LONG = (10, 60, 300, 900, 3600, 3 * 3600, 10 * 3600, 24 * 3600, 3 * 24 * 3600, 7 * 24 * 3600)

RECONCILES = OperatorMetric(
    "controller_runtime_reconcile_total", "Reconciles by result", "counter", ("controller", "result")
)
RECONCILE_ERRORS = OperatorMetric(
    "controller_runtime_reconcile_errors_total", "Reconciles that ended in an error", "counter", ("controller",)
)
RECONCILE_SECONDS = OperatorMetric(
    "controller_runtime_reconcile_time_seconds", "Time of a reconcile", "histogram", ("controller",), SHORT
)
ACTIVE_WORKERS = OperatorMetric("controller_runtime_active_workers", "Reconciles under way", "gauge", ("controller",))
MAX_WORKERS = OperatorMetric(
    "controller_runtime_max_concurrent_reconciles", "Reconciles that may run at once", "gauge", ("controller",)
)
QUEUE_DEPTH = OperatorMetric("workqueue_depth", "Jobs that wait for a reconcile", "gauge", ("name",))
QUEUE_ADDS = OperatorMetric("workqueue_adds_total", "Jobs that came into the queue", "counter", ("name",))
QUEUE_SECONDS = OperatorMetric(
    "workqueue_queue_duration_seconds", "Time that a job waited for a reconcile", "histogram", ("name",), SHORT
)
WORK_SECONDS = OperatorMetric(
    "workqueue_work_duration_seconds", "Time that a job was being worked on", "histogram", ("name",), SHORT
)
QUEUE_RETRIES = OperatorMetric("workqueue_retries_total", "Jobs that came back after an error", "counter", ("name",))
REQUESTS = OperatorMetric(
    "rest_client_requests_total",
    "Requests to the API server, except the lists and watches that kopf makes",
    "counter",
    ("code", "method", "host"),
)
LEADS = OperatorMetric(
    "leader_election_master_status", "1 where this replica holds the Lease, 0 where it stands by", "gauge", ("name",)
)
BUILD = OperatorMetric("luthier_build_info", "Always 1; the label says the version", "gauge", ("version",))
JOBS = OperatorMetric("luthier_jobs", "Jobs by the state that kubectl shows", "gauge", ("kind", "namespace", "state"))
JOB_SECONDS = OperatorMetric(
    "luthier_job_duration_seconds",
    "Time for which a job that has ended was at work, without suspensions and queues",
    "histogram",
    ("kind", "result"),
    LONG,
)
JOB_QUEUE_SECONDS = OperatorMetric(
    "luthier_job_queue_seconds", "From the creation of a job until its pods run", "histogram", ("kind",), LONG
)
JOB_RESTARTS = OperatorMetric(
    "luthier_job_restarts_total", "Restarts, by the reason of the failure before", "counter", ("kind", "reason")
)
JOB_FAILURES = OperatorMetric(
    "luthier_job_failures_total", "Jobs that failed, by reason", "counter", ("kind", "reason")
)
EVENTS_DROPPED = OperatorMetric(
    "luthier_events_dropped_total", "Events that were not posted: too many at once, or refused", "counter"
)
PROGRESS_READS = OperatorMetric(
    "luthier_progress_reads_total",
    "Readings of the metrics of pods, by result: ok, timeout, unreachable, refused, too_large, invalid",
    "counter",
    ("result",),
)
PROGRESS_INTERVAL = OperatorMetric(
    "luthier_progress_interval_seconds",
    "Seconds between two readings of the progress of a job; grows with the number of running jobs",
)
HUB_BYTES = OperatorMetric("luthier_hub_upload_bytes_total", "Bytes of published results", "counter", ("kind",))
HUB_FAILURES = OperatorMetric(
    "luthier_hub_upload_failures_total", "Pods of publish that failed, by reason", "counter", ("kind", "reason")
)

OPERATOR_METRICS: tuple[OperatorMetric, ...] = (
    RECONCILES,
    RECONCILE_ERRORS,
    RECONCILE_SECONDS,
    ACTIVE_WORKERS,
    MAX_WORKERS,
    QUEUE_DEPTH,
    QUEUE_ADDS,
    QUEUE_SECONDS,
    WORK_SECONDS,
    QUEUE_RETRIES,
    REQUESTS,
    LEADS,
    BUILD,
    JOBS,
    JOB_SECONDS,
    JOB_QUEUE_SECONDS,
    JOB_RESTARTS,
    JOB_FAILURES,
    EVENTS_DROPPED,
    PROGRESS_READS,
    PROGRESS_INTERVAL,
    HUB_BYTES,
    HUB_FAILURES,
)
CONTROLLER = "luthier"


def create(metric: OperatorMetric, registry: CollectorRegistry) -> Gauge | Counter | Histogram:
    """The collector of one metric."""
    match metric.type:
        case "gauge":
            return Gauge(metric.name, metric.help, metric.labels, registry=registry)
        case "counter":
            return Counter(metric.name, metric.help, metric.labels, registry=registry)
        case "histogram":
            return Histogram(metric.name, metric.help, metric.labels, registry=registry, buckets=metric.buckets)


class Metrics:
    """The metrics of one operator, in their own registry."""

    def __init__(self, version: str, host: str = "", workers: int = 0) -> None:
        self.registry = CollectorRegistry()
        self._made = {metric: create(metric, self.registry) for metric in OPERATOR_METRICS}
        self._series: dict[tuple[str, ...], Gauge | Counter | Histogram] = {}
        self._host = urlsplit(host).netloc
        self.set(BUILD, 1, version)
        self.set(MAX_WORKERS, workers, CONTROLLER)
        # Series exist before their first event, so that their rate starts at zero.
        for result in ("success", "error", "requeue_after"):
            self.add(RECONCILES, 0, CONTROLLER, result)
        for metric in (RECONCILE_ERRORS, QUEUE_ADDS, QUEUE_RETRIES):
            self.add(metric, 0, CONTROLLER)
        for metric in (ACTIVE_WORKERS, QUEUE_DEPTH):
            self.set(metric, 0, CONTROLLER)

    def set(self, metric: OperatorMetric, value: float, *labels: str) -> None:
        gauge = self._find(metric, labels)
        assert isinstance(gauge, Gauge)
        gauge.set(value)

    def add(self, metric: OperatorMetric, value: float, *labels: str) -> None:
        counter = self._find(metric, labels)
        assert isinstance(counter, Counter)
        counter.inc(value)

    def observe(self, metric: OperatorMetric, value: float, *labels: str) -> None:
        histogram = self._find(metric, labels)
        assert isinstance(histogram, Histogram)
        histogram.observe(value)

    def _find(self, metric: OperatorMetric, labels: tuple[str, ...]) -> Gauge | Counter | Histogram:
        """The series with these labels. Each request and each reconcile counts in several."""
        known = self._series.get((metric.name, *labels))
        if known is None:
            made = self._made[metric]
            known = self._series[metric.name, *labels] = made.labels(*labels) if labels else made
        return known

    def text(self, states: Iterable[tuple[Key, str]]) -> bytes:
        """The metrics as Prometheus text. `states`: of all jobs, which are counted now."""
        jobs = Tally((key.kind.value, key.namespace, state) for key, state in states)
        gauge = self._made[JOBS]
        assert isinstance(gauge, Gauge)
        gauge.clear()  # there may be series of states that no job has any more
        for labels, number in jobs.items():
            gauge.labels(*labels).set(number)
        return generate_latest(self.registry)

    # What the queue, the client and the reconciler report

    def requested(self, method: str, code: str) -> None:
        self.add(REQUESTS, 1, code, method, self._host)

    def added(self, depth: int) -> None:
        self.add(QUEUE_ADDS, 1, CONTROLLER)
        self.set(QUEUE_DEPTH, depth, CONTROLLER)

    def taken(self, waited: float, depth: int) -> None:
        self.observe(QUEUE_SECONDS, waited, CONTROLLER)
        self.set(QUEUE_DEPTH, depth, CONTROLLER)

    def retried(self) -> None:
        self.add(QUEUE_RETRIES, 1, CONTROLLER)

    def active(self, workers: int) -> None:
        self.set(ACTIVE_WORKERS, workers, CONTROLLER)

    def reconciled(self, result: str, seconds: float) -> None:
        self.add(RECONCILES, 1, CONTROLLER, result)
        if result == "error":
            self.add(RECONCILE_ERRORS, 1, CONTROLLER)
        self.observe(RECONCILE_SECONDS, seconds, CONTROLLER)
        self.observe(WORK_SECONDS, seconds, CONTROLLER)

    def status_changed(self, kind: JobKind, created: str | None, before: JobStatus, after: JobStatus) -> None:
        """Update the metrics of jobs after a status was written."""
        for reason in _restarted(kind, before, after):
            self.add(JOB_RESTARTS, 1, kind, reason)
        if created and after.run_start_time and not before.run_start_time:
            self.observe(JOB_QUEUE_SECONDS, _seconds(created, after.run_start_time), kind)
        if after.hub is not None and before.hub is None:
            self.add(HUB_BYTES, after.hub.bytes or 0, kind)
        seen = {(a.pod, a.time) for a in before.attempts}
        for attempt in after.attempts:
            if attempt.phase == "publish" and (attempt.pod, attempt.time) not in seen:
                self.add(HUB_FAILURES, 1, kind, attempt.reason)
        if not before.finished and after.finished:
            failed = after.condition(ConditionType.FAILED)
            if after.is_true(ConditionType.FAILED) and failed is not None:
                self.add(JOB_FAILURES, 1, kind, failed.reason)
            if after.start_time:
                result = "failed" if after.is_true(ConditionType.FAILED) else "complete"
                self.observe(JOB_SECONDS, after.active_seconds, kind, result)


def _restarted(kind: JobKind, before: JobStatus, after: JobStatus) -> Iterator[str]:
    """The reason of each restart since `before`."""
    attempts = [attempt for attempt in after.attempts if attempt.phase == "run"]
    reasons = WORKLOADS[kind].restart_reasons(attempts, after.restarts)
    return (reasons.get(number, "Unknown") for number in range(before.restarts, after.restarts))


def _seconds(start: str, end: str) -> float:
    return max(0.0, (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds())
