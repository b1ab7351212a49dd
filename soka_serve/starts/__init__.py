"""The registry of starts: what of a module is decomposed, whether it may be weighed, and how terms become factors.

A further start is a file here and a row in `STARTS`; manifest, plan, stage `init` and report ask the row and compare no
names. Importing this package does not load torch.
"""

from __future__ import annotations

from collections.abc import Iterable

from soka_serve.starts.adapter import Adapter
from soka_serve.starts.dct import Dct
from soka_serve.starts.delta import Delta
from soka_serve.starts.gradient import Gradient
from soka_serve.starts.minor import Minor
from soka_serve.starts.nystrom import Nystrom
from soka_serve.starts.quantisation import Quantisation
from soka_serve.starts.random import Random, Zero
from soka_serve.starts.start import Material, Pool, Start
from soka_serve.starts.truncated import Truncated
from soka_serve.starts.weights import Weights

__all__ = ["ROWS", "STARTS", "Material", "Pool", "Start", "names_of"]

STARTS: dict[str, Start] = {
    start.name: start
    for start in (
        Weights("weights", {"minor": Minor("minor")}),
        Nystrom("nystrom"),
        Delta("delta"),
        Adapter("adapter"),
        Quantisation("quantisation"),
        Gradient("gradient", {"dct": Dct("dct")}),
        Zero("zero"),
        Truncated("truncated"),
        Random("random"),
    )
}
"""By the name that `[[adapt]] init` says, in the order in which messages list them."""

ROWS: dict[str, Start] = {row.name: row for start in STARTS.values() for row in (start, *start.variants.values())}
"""With the variants, by their own names."""


def names_of(starts: Iterable[Start]) -> str:
    """Names as messages show them: 'weights' or 'gradient'."""
    return " or ".join(repr(start.name) for start in starts)
