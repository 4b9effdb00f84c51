"""Prometheus metrics of the engine."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serving.engine import Engine, Loaded
from serving.registry import Flip

MILLISECONDS = (0.01, 0.1, 0.5, 1, 2, 5, 10, 25, 50, 100, 250, 1000, 10000)


class Metrics:
    """Counts what happens; reads what is there when it is scraped."""

    def __init__(self, engine: Engine) -> None:
        self.registry = registry = CollectorRegistry()
        self._requests = Counter("eternad_serve_requests", "Requests admitted", ["version"], registry=registry)
        self._refused = Counter("eternad_serve_refused", "Requests refused", ["status"], registry=registry)
        self._prompt = Counter("eternad_serve_prompt_tokens", "Prompt tokens admitted", registry=registry)
        self._tokens = Counter("eternad_serve_tokens", "Tokens handed to clients", registry=registry)
        self._swap = Histogram(
            "eternad_serve_swap_milliseconds", "Time of a swap by part: stage, commit, wait, flip, persist", ["part"],
            buckets=MILLISECONDS, registry=registry,
        )  # fmt: skip
        running = Gauge("eternad_serve_running", "Requests being decoded", registry=registry)
        running.set_function(lambda: engine.scheduler.load()[0])
        waiting = Gauge("eternad_serve_waiting", "Requests in the queue", registry=registry)
        waiting.set_function(lambda: engine.scheduler.load()[1])
        used = Gauge("eternad_serve_slots_used", "Adapter slots in use, draining ones included", registry=registry)
        used.set_function(lambda: len(engine.registry.adapters()))

    def admitted(self, version: str, prompt_tokens: int) -> None:
        """A request has a lease and a place in the queue."""
        self._requests.labels(version).inc()
        self._prompt.inc(prompt_tokens)

    def produced(self, tokens: int) -> None:
        """Tokens on their way to a client."""
        self._tokens.inc(tokens)

    def refused(self, status: int) -> None:
        """A request got an error status."""
        self._refused.labels(str(status)).inc()

    def loaded(self, loaded: Loaded) -> None:
        """An adapter was loaded."""
        for part, value in (("stage", loaded.stage_ms), ("commit", loaded.commit_ms), ("wait", loaded.wait_ms)):
            self._swap.labels(part).observe(value)

    def flipped(self, flip: Flip) -> None:
        """An alias points elsewhere."""
        self._swap.labels("flip").observe(flip.flip_ms)
        self._swap.labels("persist").observe(flip.persist_ms)

    def forget(self, version: str) -> None:
        """An unloaded version's label goes, or labels would pile up for ever."""
        self._requests.remove_by_labels({"version": version})

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
