"""What `/metrics` reports to Prometheus."""

from collections.abc import Iterator

import torch
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vidlada.serve.service import Service

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class ServiceCollector(Collector):
    """Reads the counts that the engine and its neighbours keep anyway."""

    def __init__(self, service: Service):
        self.service = service

    def collect(self) -> Iterator[Metric]:
        """Gauges, then counters."""
        service, engine = self.service, self.service.engine
        gauges: dict[str, tuple[str, float]] = {
            "arriving_bodies": ("Bodies of requests being received", len(service.arrivals.arriving)),
            "admitted_requests": ("Requests being answered or waiting", service.admitted),
            "queued_requests": ("Requests waiting for the model", engine.queued),
            "running_requests": ("Requests being denoised", len(engine.running)),
            "frame_store_bytes": ("Decoded frames kept", service.loader.store.nbytes),
            "feature_store_bytes": ("Vision features kept", engine.features.nbytes),
            "visual_store_bytes": ("Keys and values of frames kept", engine.visual.nbytes),
            "upload_bytes": ("Uploads and fetched files", service.files.nbytes),
            "gpu_memory_bytes": (
                "Allocated by torch",
                torch.cuda.memory_allocated() if torch.cuda.is_available() else 0,
            ),
        }
        totals = engine.totals
        counters: dict[str, tuple[str, float]] = {
            "denoising_steps": ("Steps, counted for every request", totals.steps),
            "model_steps": ("Steps of the whole batch", totals.turns_with_steps),
            "model_step_seconds": ("Time in them", totals.stepping_seconds),
            "generated_tokens": ("Answer slots decided", totals.tokens),
            "encoded_frames": ("Frames through the vision tower", totals.frames_encoded),
            "finished_answers": ("Answers completed", totals.finished),
            "cancelled_answers": ("Answers given up by their clients", totals.cancelled),
            "failed_answers": ("Answers the model failed to give", totals.failed),
            "preempted_answers": ("Answers begun again because memory ran out", totals.preempted),
            "decoder_deaths": ("Worker processes that died over a video", service.decoders.deaths),
            "feature_store_hits": ("Videos found encoded", engine.features.hits),
            "feature_store_misses": ("Videos not found encoded", engine.features.misses),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"vidlada_{name}", text, value=value)
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"vidlada_{name}", text, value=value)
        refreshes = CounterMetricFamily("vidlada_cache_refreshes", "Recomputations by caches", labels=["segment"])
        for segment, count in totals.refreshes.items():
            refreshes.add_metric([segment], count)
        yield refreshes


class Metrics:
    """The metrics of one server."""

    def __init__(self, service: Service):
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.registry.register(ServiceCollector(service))
        self.responses = Counter(
            "vidlada_responses", "Responses by route and status", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "vidlada_request_seconds", "Time of an answer, by phase", ["phase"], buckets=SECONDS, registry=self.registry
        )

    def observe(self, seconds: dict[str, float]) -> None:
        """An answer's time by phase."""
        for phase, value in seconds.items():
            self.seconds.labels(phase).observe(value)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self.registry)
