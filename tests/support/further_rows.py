"""A process with a further start and a further regulariser: rows alone, before anything else of the package loads.

    python -m tests.support.further_rows FOLDER

Builds `FOLDER/mine.toml`; prints its history and the manifest reference, as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from soka_serve.regularisers import REGULARISERS, Penalty
from soka_serve.starts import ROWS, STARTS, Pool, Start

if TYPE_CHECKING:
    from torch import Tensor

    from soka_serve.kron import Factors


@dataclass(frozen=True)
class Ones(Start):
    """All entries of Left one, Right zero."""

    meaning: ClassVar[str] = "Left one, Right zero (a test's)"
    told: ClassVar[str] = "ones"
    unweighed: ClassVar[str] = "nothing is decomposed"
    drawn: ClassVar[bool] = True
    subtracted: ClassVar[bool] = False
    needs_trained: ClassVar[str] = "right"

    def factors(self, pool: Pool, rank: int) -> Factors:
        import torch

        from soka_serve.kron import Factors

        m, n, p, q = pool.shape
        return Factors(torch.ones(rank, m, n), torch.zeros(rank, p, q), torch.full((rank,), pool.size))


class Largest(Penalty):
    """The largest entry of Right."""

    meaning: ClassVar[str] = "Weight of the mean over modules of Right's largest entry (a test's)."
    trains: ClassVar[Sequence[str]] = ("right",)

    def penalty(self, modules: Sequence[tuple[Factors, Factors | None]]) -> Tensor:
        from torch import stack

        return stack([theta.right.abs().max() for theta, _ in modules]).mean()


STARTS["ones"] = ROWS["ones"] = Ones("ones")  # as a row of STARTS is in both
REGULARISERS["largest"] = Largest("largest")


def main() -> None:
    import soka_serve
    from soka_serve.manifest.docs import manifest_reference

    made = soka_serve.build(Path(sys.argv[1], "mine.toml"), out=sys.argv[1], progress=False)
    history = [json.loads(line) for line in (made.directory / "history.jsonl").read_text().splitlines()]
    print(json.dumps({"history": history, "reference": manifest_reference()}))


if __name__ == "__main__":
    main()
