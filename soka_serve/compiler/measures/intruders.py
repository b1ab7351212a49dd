"""Intruder dimensions per module: singular vectors of the adapted weights that the base's have not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from soka_serve.adapter.intruders import intruders_of

if TYPE_CHECKING:
    from soka_serve.compiler.context import Context
    from soka_serve.data.encode import EncodedSet


def measure_intruders(context: Context, new: Path, training: EncodedSet) -> list[dict[str, Any]]:
    """Rows of module, layer and count, see `soka_serve.kron.intruders.count_intruders`."""
    made = new / ("adapter" if (new / "adapter").exists() else "merged")
    counts = intruders_of(made, context.base, progress=context.progress)
    layers = {module.name: module.layer for module in context.base.layout.modules}
    return [{"module": name, "layer": layers[name], "count": count} for name, count in counts.items()]
