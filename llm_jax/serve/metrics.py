"""What the server counts, for Prometheus: its own requests and times, and the engine's `stats()` as they are."""

from collections.abc import Iterator
from typing import Any

import prometheus_client as prometheus
from prometheus_client import core

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class _Engine:
  """Reads the engine when it is asked for. What ends in `_total` only grows, but for the number of blocks that there
  are; the rest goes up and down."""

  def __init__(self, engine: Any):
    self._engine = engine

  def collect(self) -> Iterator[Any]:
    for name, value in self._engine.stats().items():
      name = 'blocks' if name == 'blocks_total' else name
      words = name.replace('_', ' ')
      if name.endswith('_total'):
        yield core.CounterMetricFamily(f'llm_jax_engine_{name[:-6]}', words, value=value)
      else:
        yield core.GaugeMetricFamily(f'llm_jax_engine_{name}', words, value=value)


class Metrics:
  """The numbers of one server. requests: by route and status; seconds: of a whole request; first: until the first piece
  of a stream; between: from one piece to the next."""

  def __init__(self, engine: Any):
    self._registry = registry = prometheus.CollectorRegistry()
    told = dict(registry=registry, namespace='llm_jax')
    timed = dict(told, buckets=_SECONDS)
    self.requests = prometheus.Counter('requests', 'HTTP requests', ['route', 'status'], **told)
    self.seconds = prometheus.Histogram('request_seconds', 'whole requests', ['route'], **timed)
    self.first = prometheus.Histogram('first_piece_seconds', 'until a stream begins', **timed)
    self.between = prometheus.Histogram('between_pieces_seconds', 'from piece to piece', **timed)
    self.open = prometheus.Gauge('open_requests', 'HTTP requests being answered', **told)
    registry.register(_Engine(engine))

  def text(self) -> bytes:
    """The exposition format, version 0.0.4."""
    return prometheus.generate_latest(self._registry)
