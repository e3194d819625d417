"""The metrics of a pod: gauges by the table in `luthier_api.metrics`, served by the first process of the pod."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, start_http_server

from luthier_api.metrics import HEARTBEAT_AGE, POD_METRICS, Metric
from luthier_trainer.runtime import heartbeat
from luthier_trainer.runtime.run_folder import run_dir

# Steps take from a tenth of a second (small models) to minutes (large batches).
STEP_BUCKETS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)
PORT_FILE = "metrics-port"

# prometheus_client would add a gauge with the time of creation to each counter, which no table documents.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Telemetry:
    """Metrics of one process. A metric that was never set is not served."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._metrics: dict[str, Gauge | Counter | Histogram] = {}

    def _metric(self, metric: Metric) -> Gauge | Counter | Histogram:
        """The collector of a metric. Raises KeyError for a metric that is not in the table of those of pods."""
        if metric not in POD_METRICS:
            raise KeyError(metric.name)
        if metric.name not in self._metrics:
            make: dict[str, type[Gauge] | type[Counter]] = {"gauge": Gauge, "counter": Counter}
            self._metrics[metric.name] = (
                Histogram(metric.name, metric.help, registry=self.registry, buckets=STEP_BUCKETS)
                if metric.type == "histogram"
                else make[metric.type](metric.name, metric.help, metric.labels, registry=self.registry)
            )
        return self._metrics[metric.name]

    def set(self, metric: Metric, value: float, *labels: str) -> None:
        """Set a gauge. `labels`: the values of its labels."""
        gauge = self._metric(metric)
        assert isinstance(gauge, Gauge)
        (gauge.labels(*labels) if labels else gauge).set(value)

    def add(self, metric: Metric, value: float = 1) -> None:
        counter = self._metric(metric)
        assert isinstance(counter, Counter)
        counter.inc(value)

    def observe(self, metric: Metric, value: float) -> None:
        histogram = self._metric(metric)
        assert isinstance(histogram, Histogram)
        histogram.observe(value)

    def serve(self, port: int) -> None:
        """Serve on `port`; with 0 on any free one, whose number goes to `metrics-port` in the run folder."""
        age = self._metric(HEARTBEAT_AGE)
        assert isinstance(age, Gauge)
        age.set_function(heartbeat.age)
        server, _ = start_http_server(port, registry=self.registry)
        (run_dir() / PORT_FILE).write_text(str(server.server_port))
