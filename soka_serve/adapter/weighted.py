"""Several adapters, each with a weight: as arguments of a command, in a soka.lock, and in a model card."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from soka_serve.adapter.format import Adapter
from soka_serve.adapter.remote.address import is_url
from soka_serve.adapter.remote.fetch import local_adapter
from soka_serve.adapter.source import AdapterSource
from soka_serve.errors import CheckpointError, SokaError


def parse_weighted(text: str) -> tuple[Path, float]:
    """'ADAPTER' or 'ADAPTER=WEIGHT', as the commands take it; an adapter that is kept elsewhere is fetched.

    >>> parse_weighted("build/math/adapter=0.5")[1]
    0.5

    Raises:
        SokaError: no such weight, or an adapter that cannot be fetched.
    """
    place, separator, number = text.rpartition("=")
    if not separator or Path(text).exists() or (is_url(text) and "/" in number):
        return local_adapter(text), 1.0
    try:
        weight = float(number)
    except ValueError:
        raise SokaError(
            f"{text}: expected ADAPTER or ADAPTER=WEIGHT with a number; got weight {number!r}",
            hint="For example: build/math/adapter=0.5",
        ) from None
    return local_adapter(place), weight


def check_weight(adapter: Adapter, weight: float) -> None:
    """Refuse a weight that is no number.

    Raises:
        CheckpointError: NaN or infinity.
    """
    if not math.isfinite(weight):
        raise CheckpointError(f"{adapter.directory}: weight {weight} is not a finite number")


def weighted_lock(sources: Sequence[tuple[AdapterSource, float]]) -> dict[str, Any]:
    """What a soka.lock says of the adapters that went into a result, without paths of this machine."""
    return {
        f"adapter{i}": {
            "name": source.name,
            "weight": weight,
            "sha256": source.sha256,
            "modules": len(source.adapter.factors),
        }
        for i, (source, weight) in enumerate(sources)
    }


def weighted_table(sources: Sequence[tuple[AdapterSource, float]]) -> str:
    """The same as a Markdown table."""
    lines = ["| adapter | weight | modules | parameters |", "|---|---|---|---|"]
    for source, weight in sources:
        name, adapter = source.name.replace("|", "/"), source.adapter
        lines.append(f"| {name} | {weight:g} | {len(adapter.factors)} | {adapter.parameters:,} |")
    return "\n".join(lines)
