"""The metrics of several servers as one page, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector, CollectorRegistry

CONTENT_TYPE = CONTENT_TYPE_LATEST


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


def merge_metrics(pages: Mapping[str, str]) -> bytes:
    """One page of all pages' samples, each with its replica as the label `replica`.

    >>> page = "# HELP a_total Asked.\\n# TYPE a_total counter\\na_total{model=\\"m\\"} 2.0\\n"
    >>> print(merge_metrics({"x": page, "y": page}).decode(), end="")
    # HELP a_total Asked.
    # TYPE a_total counter
    a_total{model="m",replica="x"} 2.0
    a_total{model="m",replica="y"} 2.0

    Args:
        pages: the text of each, by the replica's name.

    Raises:
        ValueError: a page that is none of that format.
    """
    merged: dict[str, Metric] = {}
    for replica, page in pages.items():
        for family in text_string_to_metric_families(page):
            own = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                own.samples.append(sample._replace(labels={**sample.labels, "replica": replica}))
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(merged.values()))
    return generate_latest(registry)
