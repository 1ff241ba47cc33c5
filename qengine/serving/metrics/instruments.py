"""Counters, gauges and histograms that cost a fraction of a microsecond to change, and are read consistently.

prometheus_client's own take a lock and walk their buckets for every value: some 2 us each, which at hundreds of tokens
per step would be felt. Here one lock guards all instruments of a set and is taken once per step, and a histogram takes
many equal values at once. prometheus_client turns what is here into text.

Invariant: whoever changes or reads an instrument holds the set's lock. Label values come from our own code and are few.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import TypeVar

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

LabelValues = tuple[str, ...]


class Instrument(ABC):
    """One metric, with a value for each combination of label values.

    Attributes:
        name: without the prefix, and for counters without "_total".
        labels: names of the labels that differ within the metric.
    """

    kind = ""

    def __init__(self, name: str, help: str, labels: Sequence[str] = ()) -> None:
        self.name = name
        self.help = help
        self.labels = tuple(labels)

    @abstractmethod
    def family(self, prefix: str, common: dict[str, str]) -> Metric:
        """The metric as prometheus_client's record. `common` are labels that all values share."""


class Counter(Instrument):
    """Only grows."""

    kind = "counter"

    def __init__(self, name: str, help: str, labels: Sequence[str] = (), known: Iterable[LabelValues] = ()) -> None:
        super().__init__(name, help, labels)
        self._values: dict[LabelValues, float] = dict.fromkeys(known or ([] if labels else [()]), 0.0)

    def inc(self, amount: float = 1.0, *values: str) -> None:
        self._values[values] = self._values.get(values, 0.0) + amount

    def set_total(self, total: float) -> None:
        """For a total that someone else counts."""
        self._values[()] = total

    def family(self, prefix: str, common: dict[str, str]) -> Metric:
        family = CounterMetricFamily(prefix + self.name, self.help, labels=(*common, *self.labels))
        for values, total in self._values.items():
            family.add_metric((*common.values(), *values), total)
        return family


class Gauge(Instrument):
    """Goes up and down."""

    kind = "gauge"

    def __init__(self, name: str, help: str, labels: Sequence[str] = ()) -> None:
        super().__init__(name, help, labels)
        self._values: dict[LabelValues, float] = {} if labels else {(): 0.0}

    def set(self, value: float, *values: str) -> None:
        self._values[values] = value

    def family(self, prefix: str, common: dict[str, str]) -> Metric:
        family = GaugeMetricFamily(prefix + self.name, self.help, labels=(*common, *self.labels))
        for values, value in self._values.items():
            family.add_metric((*common.values(), *values), value)
        return family


class Summary(Instrument):
    """Number and sum of values."""

    kind = "summary"

    def __init__(self, name: str, help: str, labels: Sequence[str] = ()) -> None:
        super().__init__(name, help, labels)
        self._values: dict[LabelValues, tuple[int, float]] = {}

    def observe(self, value: float, *values: str) -> None:
        count, total = self._values.get(values, (0, 0.0))
        self._values[values] = (count + 1, total + value)

    def family(self, prefix: str, common: dict[str, str]) -> Metric:
        family = SummaryMetricFamily(prefix + self.name, self.help, labels=(*common, *self.labels))
        for values, (count, total) in self._values.items():
            family.add_metric((*common.values(), *values), count, total)
        return family


class _Buckets:
    """Counts of one combination of label values; the last one is of what lies above all bounds."""

    __slots__ = ("counts", "sum")

    def __init__(self, num_bounds: int) -> None:
        self.counts = [0] * (num_bounds + 1)
        self.sum = 0.0


class Histogram(Instrument):
    """Counts values by size. A value equal to a bound belongs to it."""

    kind = "histogram"

    def __init__(self, name: str, help: str, bounds: Sequence[float], labels: Sequence[str] = ()) -> None:
        super().__init__(name, help, labels)
        self.bounds = tuple(bounds)
        self._buckets: dict[LabelValues, _Buckets] = {} if labels else {(): _Buckets(len(self.bounds))}

    def observe(self, value: float, *values: str, count: int = 1) -> None:
        """Count `value`, `count` times."""
        buckets = self._buckets.get(values)
        if buckets is None:
            buckets = self._buckets[values] = _Buckets(len(self.bounds))
        buckets.counts[bisect_left(self.bounds, value)] += count
        buckets.sum += value * count

    def family(self, prefix: str, common: dict[str, str]) -> Metric:
        family = HistogramMetricFamily(prefix + self.name, self.help, labels=(*common, *self.labels))
        names = (*(str(float(bound)) for bound in self.bounds), "+Inf")
        for values, buckets in self._buckets.items():
            cumulative = list(zip(names, accumulate(buckets.counts), strict=True))
            family.add_metric((*common.values(), *values), cumulative, buckets.sum)
        return family


_T = TypeVar("_T", bound=Instrument)


class InstrumentSet(Collector):
    """Instruments with one prefix, one lock, and labels that all of them share."""

    def __init__(self, prefix: str = "", common: dict[str, str] | None = None) -> None:
        self.prefix = prefix
        self.common = dict(common or {})
        self.lock = threading.Lock()
        self._instruments: list[Instrument] = []

    def __iter__(self) -> Iterator[Instrument]:
        return iter(self._instruments)

    def add(self, instrument: _T) -> _T:
        self._instruments.append(instrument)
        return instrument

    def collect(self) -> Iterable[Metric]:
        """All metrics as of one moment."""
        with self.lock:
            return [instrument.family(self.prefix, self.common) for instrument in self._instruments]


class Reading(Gauge):
    """A gauge that is read when somebody looks: `read` returns a value for each combination of label values."""

    def __init__(
        self, name: str, help: str, labels: Sequence[str], read: Callable[[], dict[LabelValues, float]]
    ) -> None:
        super().__init__(name, help, labels)
        self._read = read

    def family(self, prefix: str, common: dict[str, str]) -> Metric:
        self._values = self._read()
        return super().family(prefix, common)
