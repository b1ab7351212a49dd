"""The schema of [train.regularise]: a key for each row of the registry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, create_model

from soka_serve.manifest.table import Table
from soka_serve.regularisers import REGULARISERS


class _Regularise(Table):
    """What other methods add to the loss, or do to gradients and factors; 0 is none of it.

    `history.jsonl` has the value of each that is set, without its number; its `loss` stays that of the task.
    """

    LATER = frozenset(REGULARISERS)

    @property
    def chosen(self) -> dict[str, float]:
        """The numbers that are not zero, by the regulariser's name."""
        return {name: value for name in REGULARISERS if (value := getattr(self, name))}


if TYPE_CHECKING:
    Regularise = _Regularise
else:
    Regularise = create_model(
        "Regularise",
        __base__=_Regularise,
        __doc__=_Regularise.__doc__,
        **{
            row.name: (
                Annotated[int if row.whole else float, Field(ge=0)],
                Field(0 if row.whole else 0.0, description=row.meaning),
            )
            for row in REGULARISERS.values()
        },
    )
