"""What the server tells Prometheus; a registry of its own, so that two servers in one process keep apart."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0)


class Metrics:
    """Counters, gauges and histograms, by model where that means something."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        here = self.registry
        self.requests = Counter(
            "accuquant_requests", "Answered requests for pictures", ["model", "status"], registry=here
        )
        self.pictures = Counter("accuquant_pictures", "Pictures painted and sent", ["model"], registry=here)
        self.disconnects = Counter(
            "accuquant_disconnects", "Requests whose sender left before the answer", registry=here
        )
        self.unread = Counter(
            "accuquant_unread", "Connections cut off because nobody read what was sent", registry=here
        )
        self.latency = Histogram(
            "accuquant_request_seconds", "From a request to its pictures", ["model"], buckets=SECONDS, registry=here
        )
        self.batch = Histogram("accuquant_batch_seconds", "Painting a batch", ["model"], buckets=SECONDS, registry=here)
        self.fill = Histogram(
            "accuquant_batch_pictures",
            "Pictures in a batch",
            ["model"],
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=here,
        )
        self._waiting = Gauge("accuquant_queue_pictures", "Pictures waiting for a batch", ["model"], registry=here)
        self._painting = Gauge("accuquant_painting_pictures", "Pictures in the present batch", ["model"], registry=here)

    def watch(self, model: str, waiting: Callable[[], int], painting: Callable[[], int]) -> None:
        """Show a model's queue from now on."""
        self._waiting.labels(model).set_function(waiting)
        self._painting.labels(model).set_function(painting)

    def answered(self, model: str, pictures: int, seconds: float) -> None:
        self.pictures.labels(model).inc(pictures)
        self.latency.labels(model).observe(seconds)

    def on_batch(self, model: str) -> Callable[[int, float], None]:
        def finished(pictures: int, seconds: float) -> None:
            self.fill.labels(model).observe(pictures)
            self.batch.labels(model).observe(seconds)

        return finished

    def text(self) -> bytes:
        return generate_latest(self.registry)
