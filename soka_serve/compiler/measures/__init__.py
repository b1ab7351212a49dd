"""What a build measures besides, where `[output] measure` names it: a file here and a row in `MEASURES` each.

What a measure returns goes into measured.json, under its name, and from there into the report.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soka_serve.compiler.measures.intruders import measure_intruders
from soka_serve.compiler.measures.spectra import measure_spectra

if TYPE_CHECKING:
    from soka_serve.compiler.context import Context
    from soka_serve.data.encode import EncodedSet

MEASURES: dict[str, Callable[[Context, Path, EncodedSet], Any]] = {
    "intruders": measure_intruders,
    "spectra": measure_spectra,
}
"""By the name that the manifest says: of the build, the directory of what it made, and the training examples."""
