"""Intruder dimensions: what counting them costs, and how many SoKA, LoRA and full fine-tuning make (embedded base).

    python -m eval.bench.intruders --checkpoint DIR --out eval/results/intruders.json

`cost`: processor seconds on one thread of `count_intruders` for one projection of the checkpoint, with nothing added,
with a random delta of a tenth of the weight's norm, and with two random directions as large as its largest singular
value.

`trained`: builds on the embedded base and its 'math' problems, at default rates but where the name says more:
intruders over all modules.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import soka_serve
from eval.record import make_parser, write_record
from soka_serve.base.base import Base
from soka_serve.io.json_files import read_json
from soka_serve.kron.intruders import count_intruders

METHODS: dict[str, str] = {
    "soka r=1": "",
    "soka r=1, from the weights": "",
    "lora r=1": 'method = "lora"\nmethod_rank = 1',
    "lora r=1, alpha 16": 'method = "lora"\nmethod_rank = 1\nmethod_scale = 16',
    "lora r=8": 'method = "lora"\nmethod_rank = 8',
    "full": 'method = "full"\nlearning_rate = 1e-3',
}
MANIFEST = """\
schema = 1
name = "trained"
base = {{ builtin = "tiny" }}
eval = {{ limit = 100 }}
adapt = [{{ init = "{init}", rank = {{ policy = "fixed", rank = {rank} }} }}]
output = {{ measure = ["intruders"] }}
[train]
{method}
steps = {steps}
seed = {seed}
data = {{ builtin = "math" }}
"""


def deltas(weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What is added to a weight."""
    generator = torch.Generator().manual_seed(1)
    out, into = weight.shape
    noise = torch.randn(out, into, generator=generator)
    left, right = torch.randn(out, 2, generator=generator), torch.randn(2, into, generator=generator)
    largest = torch.svd_lowrank(weight, q=8)[1][0]
    yield "nothing", torch.zeros_like(weight)
    yield "a tenth of the norm, random", noise * (0.1 * weight.norm() / noise.norm())
    yield "two large directions", left @ right * (largest / (out * into) ** 0.5)


def cost(name: str, weight: Tensor) -> Iterator[dict[str, Any]]:
    """Times of `count_intruders`, by what is added."""
    for added, delta in deltas(weight):
        started = time.process_time()
        found = count_intruders(weight, weight + delta)
        seconds = round(time.process_time() - started, 3)
        yield {"weight": name, "shape": list(weight.shape), "added": added, "intruders": found, "cpu_time_s": seconds}


def trained(steps: int, seeds: list[int]) -> Iterator[dict[str, Any]]:
    """Intruders of small builds, and the problems that they answer."""
    for seed, (name, method) in product(seeds, METHODS.items()):
        rank = 8 if "r=8" in name else 1
        init = "weights" if "weights" in name else "zero"
        with tempfile.TemporaryDirectory() as folder:
            manifest = Path(folder) / "trained.toml"
            manifest.write_text(MANIFEST.format(rank=rank, init=init, method=method, steps=steps, seed=seed))
            built = soka_serve.build(manifest, out=folder, progress=False)
            rows = read_json(built.directory / "measured.json")["intruders"]
        yield {"method": name, "seed": seed} | {
            "parameters": built.trainable_parameters,
            "correct": built.accuracy_after,
            "intruders": sum(row["count"] for row in rows),
            "modules_with_some": sum(row["count"] > 0 for row in rows),
            "modules": len(rows),
        }


def main() -> None:
    """Measure, write, print."""
    parser = make_parser("eval.bench.intruders", __doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a model directory")
    parser.add_argument("--projection", default="model.layers.15.mlp.down_proj")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = list(cost(options.projection, Base(options.checkpoint).weights.read(options.projection).float()))
    record = write_record(
        options, {"cost": rows, "trained": list(trained(options.steps, options.seeds))}, machine={"threads": 1}
    )
    for row in (*record["cost"], *record["trained"]):
        print(row)


if __name__ == "__main__":
    main()
