"""Accuracy before and after on the three task families of the embedded base, over several seeds.

    python -m eval.bench.quickstart --families math --inits zero weights --seeds 0 1 2 3 4 --out quickstart.json

Runs manifests/math.toml (and the same manifest with the other two families' data) through `soka_serve.build`, in a
temporary folder, from each start, and writes every run's figures with versions and hardware. One to four minutes
a run. Accuracy depends on rounding, and so on the number of threads.
"""

from __future__ import annotations

import json
import tempfile
import time
from itertools import product
from pathlib import Path

import torch

import soka_serve
from eval.record import make_parser, write_record

MANIFEST = Path(__file__).resolve().parents[2] / "manifests" / "math.toml"
DATA, SEED, RULE = 'builtin = "math"', "[train]\n", "[[adapt]]\n"


def run(family: str, init: str, seed: int, folder: Path) -> dict[str, object]:
    """Build one variant of the manifest and return its figures."""
    text = MANIFEST.read_text()
    if not all(text.count(piece) == 1 for piece in (DATA, SEED, RULE)):
        raise SystemExit(f"{MANIFEST} has changed: this script replaces {DATA!r}, {SEED!r} and {RULE!r}")
    path = folder / f"{family}-{init}-{seed}.toml"
    name = f'name = "{family}-{init}-{seed}"'
    text = text.replace('name = "math"', name).replace(DATA, f'builtin = "{family}"')
    text = text.replace(RULE, f'{RULE}init = "{init}"\n')
    path.write_text(text.replace(SEED, f"{SEED}seed = {seed}\n"))
    started = time.monotonic()
    result = soka_serve.build(path, out=folder / "build", progress=False)
    if result.accuracy_before is None or result.accuracy_after is None:
        raise SystemExit(f"{path}: nothing was marked")
    return {
        "family": family,
        "init": init,
        "seed": seed,
        "correct_before": result.accuracy_before[0],
        "correct_after": result.accuracy_after[0],
        "problems": result.accuracy_after[1],
        "trainable_parameters": result.trainable_parameters,
        "same_modules": result.comparison,
        "build_s": round(time.monotonic() - started, 1),
        "stages_s": {stage: round(seconds, 1) for stage, seconds in result.timings_s.items()},
    }


def main() -> None:
    parser = make_parser("eval.bench.quickstart", __doc__, needs_out=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--inits", nargs="+", default=["zero"])
    parser.add_argument("--families", nargs="+", default=["math", "boxed", "code"])
    arguments = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for family, seed, init in product(arguments.families, arguments.seeds, arguments.inits):
            runs.append(run(family, init, seed, Path(folder)))
            print(json.dumps(runs[-1]), flush=True)
    found = {"manifest": "manifests/math.toml", "runs": runs}
    write_record(arguments, found, machine={"threads": torch.get_num_threads()})


if __name__ == "__main__":
    main()
