"""The registry of regularisers: what `[train.regularise]` adds to the loss, or does to gradients and factors.

A further one is a file here and a row in `REGULARISERS`: its name is a key of the manifest, its meaning that key's
description, and training asks the row. Importing this package does not load torch.
"""

from __future__ import annotations

from soka_serve.regularisers.consistency import Consistency
from soka_serve.regularisers.kasa import Kasa
from soka_serve.regularisers.orthogonalise import Orthogonalise
from soka_serve.regularisers.protect import Protect
from soka_serve.regularisers.regulariser import Constraint, Divergence, Guard, Penalty, Regulariser, Rewrite
from soka_serve.regularisers.sorsa import Sorsa

__all__ = ["REGULARISERS", "Constraint", "Divergence", "Guard", "Penalty", "Regulariser", "Rewrite"]

REGULARISERS: dict[str, Regulariser] = {
    row.name: row
    for row in (
        Sorsa("sorsa"),
        Kasa("kasa"),
        Consistency("consistency"),
        Protect("protect"),
        Orthogonalise("orthogonalise"),
    )
}
"""By the key of `[train.regularise]`, in the order in which the reference lists them."""
