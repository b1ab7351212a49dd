"""Accuracy before and after on the three task families of the embedded base, over several seeds.

    python -m eval.bench.quickstart --out eval/results/quickstart.json

Runs manifests/math.toml (and the same manifest with the other two families' data) through `soka_serve.build`, in a
temporary folder, and writes every run's figures with versions and hardware. About a minute a run on two cores.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import torch

import soka_serve
from eval.record import make_parser, write_record

MANIFEST = Path(__file__).resolve().parents[2] / "manifests" / "math.toml"
DATA, SEED = 'builtin = "math"', "[train]\n"


def run(family: str, seed: int, folder: Path) -> dict[str, object]:
    """Build one variant of the manifest and return its figures."""
    text = MANIFEST.read_text()
    if text.count(DATA) != 1 or text.count(SEED) != 1:
        raise SystemExit(f"{MANIFEST} has changed: this script replaces {DATA!r} and {SEED!r}")
    path = folder / f"{family}-{seed}.toml"
    name = f'name = "{family}-{seed}"'
    text = text.replace('name = "math"', name).replace(DATA, f'builtin = "{family}"')
    path.write_text(text.replace(SEED, f"{SEED}seed = {seed}\n"))
    started = time.monotonic()
    result = soka_serve.build(path, out=folder / "build", progress=False)
    if result.accuracy_before is None or result.accuracy_after is None:
        raise SystemExit(f"{path}: nothing was marked")
    return {
        "family": family,
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
    parser.add_argument("--families", nargs="+", default=["math", "boxed", "code"])
    arguments = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for family in arguments.families:
            for seed in arguments.seeds:
                runs.append(run(family, seed, Path(folder)))
                print(json.dumps(runs[-1]), flush=True)
    found = {"manifest": "manifests/math.toml", "runs": runs}
    write_record(arguments, found, machine={"threads": torch.get_num_threads()})


if __name__ == "__main__":
    main()
