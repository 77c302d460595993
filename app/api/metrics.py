"""Figures for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from app.core.states import ENDED, State
from app.engine.service import Service
from app.engine.views import DomainState

METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Metrics:
    """Counts and times of requests, and the service's own figures as they are when `text` is called."""

    def __init__(self, service: Service | None, version: str) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "blockjobd_http_requests",
            "Requests by route, method and status",
            ["route", "method", "status"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "blockjobd_http_request_seconds",
            "Time to answer a request, event streams left out",
            ["route", "method"],
            registry=self._registry,
        )
        # There are few counters, and finding a counter takes longer than counting.
        self._count = lru_cache(maxsize=None)(self._requests.labels)
        self._duration = lru_cache(maxsize=None)(self._seconds.labels)
        if service is not None:
            self._registry.register(_Figures(service, version))

    def answered(self, *, route: str, method: str, status: int, seconds: float | None) -> None:
        """Count a request; `route` is a template, `seconds` None for a stream."""
        known = method if method in METHODS else "other"
        self._count(route, known, str(status)).inc()
        if seconds is not None:
            self._duration(route, known).observe(seconds)

    def text(self) -> bytes:
        """All figures in Prometheus's text format (version 0.0.4)."""
        return generate_latest(self._registry)


class _Figures(Collector):
    def __init__(self, service: Service, version: str) -> None:
        self._service = service
        self._version = version

    def collect(self) -> Iterator[Metric]:
        """The figures as they are now."""
        yield InfoMetricFamily("blockjobd", "The service", {"version": self._version})
        counts = self._service.counts()
        jobs = GaugeMetricFamily("blockjobd_jobs", "Unfinished jobs by state", labels=["state"])
        for state in State:
            if state not in ENDED:
                jobs.add_metric([state.value], counts.jobs.get(state.value, 0))
        yield jobs
        domains = GaugeMetricFamily("blockjobd_domains", "Known domains by state", labels=["state"])
        for condition in DomainState:
            domains.add_metric([condition.value], counts.domains.get(condition.value, 0))
        yield domains
        yield GaugeMetricFamily("blockjobd_event_subscribers", "Open event streams", counts.subscribers)
        journal = GaugeMetricFamily("blockjobd_journal_bytes", "Size of the journal by part", labels=["part"])
        for part, size in sorted(counts.journal.items()):
            journal.add_metric([part], size)
        yield journal
