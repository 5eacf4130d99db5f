"""Numbers for Prometheus: what goes on, what has been done, where time and bytes come from."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from kimi_lite.apps.server.state import ServerState

_GAUGES = {
    "num_running": ("requests_running", "Requests that are being answered."),
    "num_waiting": ("requests_waiting", "Requests in the queue."),
    "prompt_tok_s": ("prompt_tokens_per_second", "Prompt tokens read in the last ten seconds."),
    "generation_tok_s": ("generation_tokens_per_second", "Tokens generated in the last ten seconds."),
}


def render(state: ServerState) -> tuple[bytes, str]:
    """All metrics as text, and its media type."""
    registry = CollectorRegistry()
    registry.register(_Collector(state))
    return generate_latest(registry), CONTENT_TYPE_LATEST


class _Collector:
    def __init__(self, state: ServerState) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        """Asked by prometheus_client."""
        load = self._state.service.load()
        for name, (metric, help_text) in _GAUGES.items():
            yield GaugeMetricFamily(f"kimi_lite_{metric}", help_text, getattr(load, name))
        for name, value in self._state.service.totals().items():
            yield CounterMetricFamily(f"kimi_lite_{name}", f"{name.replace('_', ' ')} since the start", value)
        family = GaugeMetricFamily("kimi_lite_engine", "The engine's own counters.", labels=["name"])
        for name, value in self._state.service.snapshot.counters.items():
            family.add_metric([name], value)
        yield family
