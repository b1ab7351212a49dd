"""Kronecker spectra of a model's projections beside those of random matrices: is there something to choose ranks by?

    python -m eval.bench.spectra --base DIR --out eval/results/spectra_smollm2.json

Every projection's rearranged weight is decomposed in full at the default shape, unweighted, and so is a matrix of
normal entries of each size. A row has the share of the energy in the first term, sigma_1 over the RMS of all sigma, and
the ranks that `elbow` and `energy` (at its default threshold) read from the first 16 to 256 terms, without a maximum.
`at_maximum` counts the modules to which a policy gives its default maximum, with its default pool.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.record import make_parser, write_record
from soka_serve.base.base import Base
from soka_serve.base.target_modules import resolve_targets
from soka_serve.compiler.init.rank import choose_rank, elbow_rank, energy_rank
from soka_serve.io.progress import track
from soka_serve.kron.factors import rearrange
from soka_serve.kron.shapes import FactorShape, balanced_shape
from soka_serve.manifest.rules import RankElbow, RankEnergy
from soka_serve.manifest.schema import Manifest

POOLS = (16, 32, 64, 128, 256)
ENERGY, ELBOW = RankEnergy(policy="energy"), RankElbow(policy="elbow")


def spectrum(weight: Tensor, shape: FactorShape) -> list[float]:
    """All sigma of a weight, descending."""
    sigma: list[float] = torch.linalg.svdvals(rearrange(weight.float(), shape)).tolist()
    return sigma


def facts(sigma: list[float]) -> dict[str, Any]:
    """What policies can read from a spectrum."""
    total = sum(value * value for value in sigma)
    return {
        "first_share": round(sigma[0] ** 2 / total, 5),
        "first_over_rms": round(sigma[0] / (total / len(sigma)) ** 0.5, 3),
        "elbow": [elbow_rank(sigma[:pool]) for pool in POOLS],
        "energy": [energy_rank(sigma[:pool], ENERGY.threshold) for pool in POOLS],
        "chosen_energy": choose_rank(sigma, total, ENERGY),
        "chosen_elbow": choose_rank(sigma, total, ELBOW),
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Over all modules."""

    def spread(name: str) -> list[float]:
        values = [row[name] for row in rows]
        return [min(values), statistics.median(values), max(values)]

    def medians(name: str) -> list[float]:
        return [statistics.median(values) for values in zip(*(row[name] for row in rows), strict=True)]

    return {
        "first_share": spread("first_share"),
        "first_over_rms": spread("first_over_rms"),
        "elbow_medians": medians("elbow"),
        "energy_medians": medians("energy"),
        "at_maximum": {
            "energy": sum(row["chosen_energy"] == ENERGY.max for row in rows),
            "elbow": sum(row["chosen_elbow"] == ELBOW.max for row in rows),
        },
    }


def main() -> None:
    """Measure, write, print."""
    parser = make_parser("eval.bench.spectra", __doc__)
    parser.add_argument("--base", type=Path, required=True, help="a model directory")
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = Base(options.base)
    manifest = Manifest.model_validate(
        {"schema": 1, "name": "s", "base": {"path": str(options.base)}, "train": {"data": {"builtin": "math"}}}
    )
    targets = resolve_targets(manifest, base.layout.modules, base.layout.left_out)
    generator = torch.Generator().manual_seed(0)
    rows: list[dict[str, Any]] = []
    random: dict[tuple[int, int], dict[str, Any]] = {}
    with track(len(targets), "spectra", unit="module", enabled=True) as step:
        for target in targets:
            weight = base.weights.read(target.module.name)
            size = (weight.shape[0], weight.shape[1])
            shape = balanced_shape(*size)
            rows.append({"module": target.module.name, "shape": list(shape), **facts(spectrum(weight, shape))})
            if size not in random:
                random[size] = facts(spectrum(torch.randn(size, generator=generator), shape))
            step(target.module.name)
    found = {
        "pools": POOLS,
        "maximum": ELBOW.max,
        "pool": ELBOW.pool,
        "modules": len(rows),
        "weights": summary(rows),
        "random": summary(list(random.values())),
        "rows": rows,
    }
    write_record(options, found, machine={"threads": 1})
    for name in ("weights", "random"):
        print(name, found[name])


if __name__ == "__main__":
    main()
